"""What a split of each kind of data holds, and what reading one of its images shows.

`samjax.data.check` makes a report of it. Files are read as the sources read them, with their
functions, but what these would raise is collected.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from samjax.data import coco, folder
from samjax.data.coco_json import Coco, CocoImage, read_coco
from samjax.data.images import read_image, read_labels, read_mask
from samjax.data.labels import VOID
from samjax.data.sources import Dataset, open_source
from samjax.data.splits import Fractions, draw_split

Severity = Literal["error", "warning", "note"]

FAULTY = "faulty entries in the JSON"
MISSING = "missing images"
UNREADABLE = "files that cannot be used"
SIZES = "sizes that differ"
EMPTY = "empty masks"
VALUES = "masks with more than two values"

# Most models' input; see `samjax.preprocess.prepare_mask` for what becomes of tiny objects.
LONGEST_SIDE = 1024
TINY = f"objects smaller than a pixel of an input of {LONGEST_SIDE} pixels"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong: errors spoil a run, warnings may be meant, notes are to be known."""

    severity: Severity
    kind: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Examined:
    """What was found of one image: a hash of its pixels, unless they cannot be read."""

    digest: bytes | None
    problems: list[Problem]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One image of a split, yet to be read."""

    split: str
    name: str
    examine: Callable[[], Examined]


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a split holds, and what is seen to be wrong before images are read."""

    entries: list[Entry]
    problems: list[Problem]


def lister(
    data: str, seed: int, fractions: Fractions, as_labels: bool
) -> Callable[[str], Contents]:
    """A function that lists a split of the data; it raises ValueError for one that is closed.

    `as_labels` reads `masks/` as label images, which they are where objects or classes are chosen.
    """
    root = Path(data).expanduser()
    if not root.exists():
        return lambda split: _list_source(
            split, open_source(data, split, seed=seed, fractions=fractions)
        )
    if coco.is_coco(root):
        read = functools.cache(read_coco)  # one JSON may hold all splits
        return lambda split: _list_coco(root, split, seed, fractions, read)
    return lambda split: _list_folder(root, split, seed, fractions, as_labels)


def _list_source(split: str, source: Dataset) -> Contents:
    """Data without files of a known layout: what its samples show."""

    def examine(index: int) -> Examined:
        problems: list[Problem] = []
        sample = _attempt(lambda: source[index], UNREADABLE, problems)
        if sample is not None:
            problems += _check_extent(sample.mask, f"{sample.name} ({split})")
        return Examined(None if sample is None else _digest(sample.image), problems)

    entries = [
        Entry(split, name, functools.partial(examine, i)) for i, name in enumerate(source.names)
    ]
    return Contents(entries, [])


def _list_folder(
    root: Path, split: str, seed: int, fractions: Fractions, as_labels: bool
) -> Contents:
    place, is_flat = folder.find_folder(root, split)
    listing = folder.list_folder(place)
    problems = [
        Problem("error", kind, str(file.relative_to(root)))
        for kind, files in listing.faults.items()
        for file in files
    ]
    pairs = {pair.name: pair for pair in listing.pairs}
    if problems and not pairs:
        return Contents([], problems)  # no split can be drawn, and these files say why
    names = draw_split(root, list(pairs), split, seed, fractions) if is_flat else list(pairs)
    entries = [
        Entry(
            split,
            str(pairs[name].image.relative_to(root)),
            functools.partial(_examine_pair, pairs[name], root, as_labels),
        )
        for name in names
    ]
    return Contents(entries, problems)


def _examine_pair(pair: folder.Pair, root: Path, as_labels: bool) -> Examined:
    problems: list[Problem] = []
    image = _attempt(lambda: read_image(pair.image), UNREADABLE, problems)
    truth = _attempt(lambda: _read_truth(pair.truth, as_labels), UNREADABLE, problems)
    if truth is not None:
        mask, notice = truth
        if image is not None:
            _attempt(lambda: folder.check_pair(pair, image.shape[:2], mask.shape), SIZES, problems)
        name = pair.truth.relative_to(root)
        problems += _check_extent(mask, str(name))
        if notice:
            problems.append(Problem("warning", VALUES, f"{name} {notice}"))
    return Examined(None if image is None else _digest(image), problems)


def _read_truth(file: Path, as_labels: bool) -> tuple[np.ndarray, str | None]:
    """The mask of all objects, and what should be known about it."""
    if file.parent.name != folder.LABELS and not as_labels:
        return read_mask(file)
    labels = read_labels(file)
    has_void = (labels == VOID).any() and ((labels > 0) & (labels != VOID)).any()
    notice = f"holds {VOID}, often void, but an object unless classes leave it out"
    return labels > 0, notice if has_void else None


def _list_coco(
    root: Path, split: str, seed: int, fractions: Fractions, read: Callable[[Path], Coco]
) -> Contents:
    file, is_flat = coco.find_json(root, split)
    content = read(file)
    problems = [Problem("error", FAULTY, f"{file.name}: {fault}") for fault in content.faults]
    if not content.images:
        return Contents([], problems)
    part = coco.take_split(content, split, is_flat, seed, fractions)
    missing = set(part.missing())
    problems += [Problem("error", MISSING, str(part.folder / name)) for name in sorted(missing)]
    entries = [
        Entry(split, image.file, functools.partial(_examine_coco, part, image))
        for image in part.images
        if image.file not in missing
    ]
    return Contents(entries, problems)


def _examine_coco(part: coco.CocoSplit, image: CocoImage) -> Examined:
    problems: list[Problem] = []
    pixels = _attempt(lambda: read_image(part.path(image)), UNREADABLE, problems)
    if pixels is None:
        return Examined(None, problems)
    _attempt(lambda: part.check_size(image, pixels.shape[:2]), SIZES, problems)
    if not problems:
        for annotation in image.annotations:
            read = functools.partial(part.mask, image, (annotation,))
            mask = _attempt(read, UNREADABLE, problems)
            if mask is not None:
                problems += _check_extent(mask, f"annotation {annotation.id} of {image.file}")
        if not image.annotations:
            problems.append(Problem("warning", EMPTY, f"{image.file} has no annotations"))
    return Examined(_digest(pixels), problems)


def _check_extent(mask: np.ndarray, name: str) -> list[Problem]:
    """A warning for a mask without a pixel in the image, or with less than one in the input."""
    if not mask.any():
        return [Problem("warning", EMPTY, name)]
    is_tiny = mask.sum() * (LONGEST_SIDE / max(mask.shape)) ** 2 < 1
    return [Problem("warning", TINY, name)] if is_tiny else []


def _attempt(read: Callable[[], T], kind: str, problems: list[Problem]) -> T | None:
    """What `read` returns; a ValueError becomes an error in `problems`."""
    try:
        return read()
    except ValueError as error:
        problems.append(Problem("error", kind, str(error)))
        return None


def _digest(image: np.ndarray) -> bytes:
    return hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).digest()
