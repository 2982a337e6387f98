"""Stages of a run as data: which groups of leaves train for which share of the steps.

A stage is written `SHARE:GROUPS`, such as `0.3:weights+decoder`, or `0.4:all`; with `:split` its
architecture parameters see one half of the training images and everything else the other (DARTS,
Liu et al. 2019, section 2.4: without it, both see all). A run's stages follow each other, and their
shares are relative to their sum.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Collection, Sequence

from samjax.peft.delta import ARCH, WEIGHTS

GROUPS = (WEIGHTS, ARCH, "decoder")
_ALL = "all"
_SPLIT = "split"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run. `groups` train; with `split` halves of the data are kept apart."""

    share: float
    groups: frozenset[str]
    split: bool = False


@dataclasses.dataclass(frozen=True)
class Span:
    """The steps `start` to `stop` - 1 of a run, and what happens in them."""

    start: int
    stop: int
    stage: Stage


def parse(text: str) -> Stage:
    """The stage that a text describes. Raises ValueError for none."""
    share, _, rest = text.partition(":")
    names, _, option = rest.partition(":")
    try:
        value = float(share)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(
            f"a stage is SHARE:GROUPS, such as 0.3:weights+decoder, and {text!r} has no share"
        )
    if option not in ("", _SPLIT):
        raise ValueError(f"stage {text!r}: the only option is {_SPLIT}, not {option!r}")
    groups = frozenset(GROUPS) if names == _ALL else frozenset(names.split("+"))
    for name in sorted(groups.difference(GROUPS)):
        nearest = difflib.get_close_matches(name, (*GROUPS, _ALL), n=1, cutoff=0.0)[0]
        known = ", ".join((*GROUPS, _ALL))
        raise ValueError(
            f"stage {text!r}: there is no group {name!r}; the nearest is {nearest}, known are "
            f"{known}"
        )
    if option and not (ARCH in groups and groups - {ARCH}):
        raise ValueError(f"stage {text!r}: split needs {ARCH} and another group that train at once")
    return Stage(value, groups, bool(option))


def spans(stages: Sequence[Stage], steps: int, present: Collection[str]) -> list[Span]:
    """The stages of a run of so many steps, one step each at least; all of it without stages.

    `present` are the groups that a run has; a stage keeps those of its groups. Raises ValueError
    for a stage in which nothing trains, or whose halves of the data have nothing to train on one
    of them, and for more stages than steps.
    """
    if not stages:
        return [Span(0, steps, Stage(1.0, frozenset(present)))]
    if len(stages) > steps:
        raise ValueError(f"{len(stages)} stages need as many steps, and the run has {steps}")
    total, ends, done = sum(stage.share for stage in stages), [], 0.0
    kept: list[Stage] = []
    for i, stage in enumerate(stages):
        if not stage.groups & set(present):
            raise ValueError(
                f"stage {i + 1} trains {' and '.join(sorted(stage.groups))}, and the method has "
                f"{' and '.join(sorted(present))} alone: nothing would train"
            )
        groups = stage.groups & set(present)
        if stage.split and not (ARCH in groups and groups - {ARCH}):
            raise ValueError(
                f"stage {i + 1} keeps halves of the data apart, and one of them would train "
                f"nothing: the method has {' and '.join(sorted(present))}; leave out :{_SPLIT}"
            )
        kept.append(dataclasses.replace(stage, groups=groups))
        done += stage.share
        earliest, latest = (ends[-1] if ends else 0) + 1, steps - (len(stages) - 1 - i)
        ends.append(min(max(round(steps * done / total), earliest), latest))
    starts = [0, *ends[:-1]]
    return [Span(*span) for span in zip(starts, ends, kept, strict=True)]
