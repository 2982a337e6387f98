"""Train, validation and test: as folders, or as shares that a seed draws."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

SPLITS = ("train", "validation", "test")
Fractions = tuple[float, float, float]
DEFAULT_FRACTIONS: Fractions = (0.8, 0.1, 0.1)

# What a split's folder or file may be called.
SPLIT_ALIASES = {
    "train": ("train",),
    "validation": ("validation", "val", "valid"),
    "test": ("test",),
}


def split_of(alias: str) -> str | None:
    """The split that goes by `alias`, or None."""
    return next((split for split, aliases in SPLIT_ALIASES.items() if alias in aliases), None)


def check_split(name: str) -> str:
    """The split's own name. Raises ValueError where there is no such split."""
    split = split_of(name)
    if split is None:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, but is {name!r}")
    return split


def split_folders(root: Path) -> dict[str, list[Path]]:
    """The folders in `root` that are named as a split, by split."""
    found = {
        split: [root / alias for alias in aliases if (root / alias).is_dir()]
        for split, aliases in SPLIT_ALIASES.items()
    }
    return {split: folders for split, folders in found.items() if folders}


def choose_one(root: Path, split: str, found: dict[str, list[Path]]) -> Path:
    """The one file or folder of a split. Raises ValueError where there is none, or are several."""
    if split not in found:
        names = ", ".join(str(path.relative_to(root)) for paths in found.values() for path in paths)
        raise ValueError(f"{root} has no split {split!r}, only {names}")
    if len(found[split]) > 1:
        names = " and ".join(str(path.relative_to(root)) for path in found[split])
        raise ValueError(f"{root} has {names} for the split {split!r}: keep one of them")
    return found[split][0]


def draw_split(
    where: Path, names: Sequence[str], split: str, seed: int, fractions: Fractions
) -> list[str]:
    """The names of one split of a dataset that has none of its own, sorted.

    Depends on the names, the seed and the fractions only; the hash that orders the names is the
    same on every machine and with every version of numpy. Raises ValueError for fractions that are
    no shares and for an empty split.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1.0) > 1e-6:
        raise ValueError(
            "fractions must be three shares that are not negative and sum to 1 "
            f"(train, validation, test), but are {fractions}"
        )
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    # Rounded at the borders, so that the three splits always partition the dataset.
    borders = [round(len(names) * share) for share in (0, *np.cumsum(fractions[:2]).tolist(), 1)]
    index = SPLITS.index(split)
    chosen = sorted(order[borders[index] : borders[index + 1]])
    if not chosen:
        raise ValueError(
            f"the split {split!r} of {where} is empty: its share of {len(names)} images is "
            f"{fractions[index]}; raise it in fractions or add images"
        )
    return chosen


def quote(names: Iterable[str], count: int = 3) -> str:
    """The first few names in a sentence."""
    ordered = sorted(names)
    more = f" and {len(ordered) - count} more" if len(ordered) > count else ""
    return ", ".join(repr(name) for name in ordered[:count]) + more
