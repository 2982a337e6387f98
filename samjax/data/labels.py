"""A folder of images and label images, whose values say which class or instance a pixel is of.

The layouts are those of `samjax.data.folder`; label images lie in `labels/`, or in `masks/` where
objects are told apart or chosen. 0 is the background. Every other value is an object, also 255,
which some datasets use for pixels that do not count: leave it out by naming the classes that count.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from samjax.data.folder import LABELS, MASKS, Pair, check_pair, check_pairs, list_folder, open_pairs
from samjax.data.images import SOFT, Notices, read_image, read_labels, read_mask
from samjax.data.objects import Object, choose
from samjax.data.sources import Objects, Sample
from samjax.data.splits import DEFAULT_FRACTIONS, Fractions, quote, split_folders
from samjax.data.walk import Track, untracked, walk

# Label images often mark pixels that do not count with this value.
VOID = 255


class LabelSource:
    """Images with label images: all labels as one mask, or a sample for each label of an image.

    `classes` are the values that count, such as ("1", "7"). With `objects` each, or with classes,
    the label images are read once at construction, since their values say what samples there are.

    Raises ValueError as `samjax.data.folder.FolderSource` does, and for a class that is no label of
    the dataset, for label images that hold no objects and masks with soft edges where each object
    is a sample, and for files that cannot hold labels. A notice is logged where a mask of black and
    white becomes one object.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        seed: int = 0,
        fractions: Fractions = DEFAULT_FRACTIONS,
        objects: Objects = "together",
        classes: tuple[str, ...] = (),
        track: Track = untracked,
    ) -> None:
        root = Path(root).expanduser()
        pairs = open_pairs(root, split, seed, fractions, (LABELS, MASKS))
        kept = _parse(classes)
        # Each sample: its name, its files, and the labels that count, or None for all.
        self._samples: list[tuple[str, Pair, tuple[int, ...] | None]] = [
            (pair.name, pair, None) for pair in pairs
        ]
        if objects == "each" or classes:
            present = list(walk(_labels_in, pairs, "reading labels", track))
            _check_kept(kept, set().union(*present), root, track)
            if objects == "each":
                notices = Notices(root)
                for pair, labels in zip(pairs, present, strict=True):
                    notices.say(_check_objects(pair, labels), pair.truth)
            marked = (
                (pair.name, [Object(label, label) for label in labels])
                for pair, labels in zip(pairs, present, strict=True)
            )
            self._samples = [
                (choice.name, pairs[choice.image], tuple(int(one.id) for one in choice.objects))
                for choice in choose(marked, objects, kept if classes else None)
            ]
            if not self._samples:
                what = f"none of the classes {quote(classes)}" if classes else "no objects"
                raise ValueError(f"the label images of the split {split!r} of {root} hold {what}")
        self.names: tuple[str, ...] = tuple(name for name, _, _ in self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        name, pair, chosen = self._samples[index]
        image, labels = read_image(pair.image), read_labels(pair.truth)
        check_pair(pair, image.shape[:2], labels.shape)
        return Sample(name, image, labels > 0 if chosen is None else select(labels, chosen))

    def check_sizes(self) -> None:
        """Raises ValueError for a label image that has not its image's size; reads headers only."""
        check_pairs(list(dict.fromkeys(pair for _, pair, _ in self._samples)))

    def image_file(self, index: int) -> Path:
        """The file of a sample's image, which all its objects share."""
        return self._samples[index][1].image


def select(labels: Int[np.ndarray, "h w"], chosen: Sequence[int]) -> Bool[np.ndarray, "h w"]:
    """Where the label is one of the chosen."""
    return labels == chosen[0] if len(chosen) == 1 else np.isin(labels, chosen)


def _labels_in(pair: Pair) -> tuple[int, ...]:
    """The labels of one file, sorted, without the background."""
    return present_labels(read_labels(pair.truth))


def present_labels(values: Int[np.ndarray, "h w"]) -> tuple[int, ...]:
    """The labels of an image, sorted, without the background."""
    # Counting is ten times as fast as sorting, but takes memory for every value up to the largest.
    present = (
        np.flatnonzero(np.bincount(values.ravel())) if values.max() < 2**16 else np.unique(values)
    )
    return tuple(present[present > 0].tolist())


def _check_objects(pair: Pair, labels: Collection[int]) -> str | None:
    """A notice where the `labels` of a file in `masks/` may not be meant to tell objects apart.

    Raises ValueError where they are the shades of a mask's soft edges.
    """
    if pair.truth.parent.name != MASKS:
        return None
    # White is above 127, so that most label images need not be read again.
    if len(labels) > 1 and max(labels) > 127 and read_mask(pair.truth)[1] == SOFT:
        raise ValueError(
            f"{pair.truth} looks like a mask with soft edges, of which each of {len(labels)} "
            f"shades would be an object: if it does hold labels, rename {MASKS}/ to {LABELS}/; if "
            "not, use objects together"
        )
    if set(labels) == {255}:
        return f"is black and white: all of it is one object; label images go into {LABELS}/"
    return None


def _parse(classes: Sequence[str]) -> list[int]:
    try:
        return [int(name) for name in classes]
    except ValueError:
        raise ValueError(
            f"classes of label images are values, such as 1 or 7, not {quote(classes)}"
        ) from None


def _check_kept(kept: list[int], present: set[int], root: Path, track: Track) -> None:
    """Raises ValueError for a class that is no label of the dataset."""
    if set(kept) <= present:
        return
    # A rare class may be missing in one split and be well in the others.
    folders = [path for paths in split_folders(root).values() for path in paths] or [root]
    pairs = [pair for folder in folders for pair in list_folder(folder).pairs]
    known = present.union(*walk(_labels_in, pairs, "reading all splits' labels", track))
    unknown = [label for label in kept if label not in known]
    if unknown and not known:
        raise ValueError(
            f"the label images of {root} are all empty: there is no class {unknown[0]}"
        )
    if unknown:
        nearest = min(known, key=lambda label: abs(label - unknown[0]))
        raise ValueError(
            f"no label image of {root} holds the class {unknown[0]}; the nearest label is {nearest}"
        )
