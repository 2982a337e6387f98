"""What is wrong with a dataset, all of it at once: before training, or where training refuses it.

Every image and every mask is decoded as training would decode it. Nothing stops at the first
problem, and data that cannot be opened as a source is looked at as far as it goes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args

from samjax.data.examine import Contents, Entry, Problem, Severity, lister
from samjax.data.sources import Objects, open_source
from samjax.data.splits import DEFAULT_FRACTIONS, SPLITS, Fractions, check_split
from samjax.data.walk import Track, untracked, walk

CLOSED = "splits that cannot be opened"
LEAKS = "images that occur in several splits"
REPEATS = "images that occur several times in a split"

_SEVERITIES: tuple[Severity, ...] = get_args(Severity)


@dataclasses.dataclass(frozen=True)
class Report:
    """The number of images of each split that could be opened, and the problems as found."""

    images: dict[str, int]
    problems: tuple[Problem, ...]

    def summary(self) -> dict[str, Any]:
        """The numbers of images, errors, warnings and notes."""
        counts = {
            f"{severity}s": sum(problem.severity == severity for problem in self.problems)
            for severity in _SEVERITIES
        }
        return {"images": self.images, **counts}

    def lines(self, limit: int = 10) -> Iterator[str]:
        """For people: the problems by kind, the worst first, at most `limit` of a kind."""
        kinds: dict[tuple[Severity, str], list[str]] = {}
        for problem in sorted(self.problems, key=lambda p: _SEVERITIES.index(p.severity)):
            kinds.setdefault((problem.severity, problem.kind), []).append(problem.detail)
        for (severity, kind), details in kinds.items():
            yield f"{severity}: {kind} ({len(details)})"
            yield from (f"  {detail}" for detail in details[:limit])
            if len(details) > limit:
                yield f"  and {len(details) - limit} more"


def check(
    data: str,
    split: str | None = None,
    *,
    seed: int = 0,
    fractions: Fractions = DEFAULT_FRACTIONS,
    objects: Objects = "together",
    classes: tuple[str, ...] = (),
    track: Track = untracked,
) -> Report:
    """Checks one split of a dataset, or all that there are, whatever its kind.

    The arguments are those of `samjax.data.sources.open_source`. Errors: files without a partner,
    files that cannot be read, sizes that differ, faults in a JSON, and an image that is in several
    splits, so that a test would not be one; and a split that is well but cannot be opened with
    these objects and classes. Warnings: empty masks and tiny objects, masks of more than two
    values (with what becomes of them), splits that cannot be opened where others can. Notes: an
    image that is several times in a split. Images are the same where their decoded pixels are
    equal, whatever their files are.

    Raises ValueError for a split that there cannot be, and RuntimeError where a package that the
    data needs is not installed; whatever is wrong with the data is in the report.
    """
    splits = SPLITS if split is None else (check_split(split),)
    is_chosen = objects == "each" or bool(classes)
    list_split = lister(data, seed, fractions, is_chosen)
    opened: dict[str, Contents] = {}
    closed: list[str] = []
    for name in splits:
        try:
            opened[name] = list_split(name)
        except ValueError as error:
            closed.append(str(error))
    problems = [Problem("warning" if opened else "error", CLOSED, text) for text in closed]
    entries = []
    options: dict[str, Any] = {"seed": seed, "fractions": fractions, "track": track}
    for name, contents in opened.items():
        if is_chosen and not contents.problems:
            try:
                open_source(data, name, objects=objects, classes=classes, **options)
            except ValueError as error:
                problems.append(Problem("error", CLOSED, str(error)))
        problems += contents.problems
        entries += contents.entries
    digests: list[bytes | None] = []
    for examined in walk(lambda entry: entry.examine(), entries, "checking", track):
        problems += examined.problems
        digests.append(examined.digest)
    problems += _duplicates(entries, digests)
    images = {name: len(contents.entries) for name, contents in opened.items()}
    # Splits that are drawn from one folder or JSON share its faults.
    return Report(images, tuple(dict.fromkeys(problems)))


def _duplicates(entries: list[Entry], digests: list[bytes | None]) -> Iterator[Problem]:
    """One problem for each image that is there more than once."""
    same: dict[bytes, list[Entry]] = {}
    for entry, digest in zip(entries, digests, strict=True):
        if digest is not None:
            same.setdefault(digest, []).append(entry)
    for group in same.values():
        names = " = ".join(f"{entry.name} ({entry.split})" for entry in group)
        if len({entry.split for entry in group}) > 1:
            yield Problem("error", LEAKS, names)
        elif len(group) > 1:
            yield Problem("note", REPEATS, names)
