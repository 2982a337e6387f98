"""Where samples come from: what a source is, and how the data that a user names becomes one.

What a source holds is decided when it is opened, from file names, headers and annotations, so that
wrong data fails at once and a large dataset opens quickly; pixels are decoded when a sample is
asked for. Each kind of data is a module of its own, imported where it is asked for.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, UInt8

from samjax.data.images import ImageFile
from samjax.data.splits import DEFAULT_FRACTIONS, Fractions, check_split
from samjax.data.walk import Track, untracked

# Whether everything that is marked in an image is one mask, or each object is a sample of its own.
Objects = Literal["together", "each"]


# Begins what names a dataset of TFDS wherever a folder can be named.
TFDS = "tfds:"


def is_tfds(data: str) -> bool:
    """Whether `data` names a dataset of TFDS rather than a path."""
    return data.startswith(TFDS)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image with its truth: `image` holds RGB in [0, 255], `mask` is True on the object."""

    name: str
    image: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"]


@runtime_checkable
class Source(Protocol):
    """Anything that holds a fixed number of samples and reads them by position.

    Threads read at once, and the same position always gives the same sample.
    """

    def __len__(self) -> int:
        """The number of samples."""

    def __getitem__(self, index: int) -> Sample:
        """The sample at a position in [0, len).

        Raises ValueError, naming the file, where it cannot be had.
        """


@runtime_checkable
class Dataset(Source, Protocol):
    """A source that a run can be made of: named samples that can be checked before long work."""

    @property
    def names(self) -> tuple[str, ...]:
        """The samples' names in order, known without reading them."""

    def check_sizes(self) -> None:
        """Raises ValueError for a mask that has not its image's size; reads headers only."""

    def image_file(self, index: int) -> ImageFile:
        """The file of a sample's image; that of another sample where they show one image."""


def open_source(
    data: str,
    split: str,
    *,
    seed: int = 0,
    fractions: Fractions = DEFAULT_FRACTIONS,
    objects: Objects = "together",
    classes: tuple[str, ...] = (),
    track: Track = untracked,
) -> Dataset:
    """One split of the data, whatever its kind.

    Args:
      data: a folder of images and masks (`samjax.data.folder`), one of images and label images
        (`samjax.data.labels`), a COCO dataset: its folder or its JSON (`samjax.data.coco`), or
        tfds:NAME, a dataset that `samjax data prepare` built (`samjax.data.tfds`).
      split: train, validation or test.
      seed, fractions: draw the splits of data that has none.
      objects: together: all that is marked in an image is one mask. each: every object (COCO's
        annotations, the values of label images) is a sample of its own, named `image#id`.
      classes: what counts as an object: names of categories in COCO and in datasets of TFDS, values
        in label images; all where it is empty. Images without one have an empty mask, or, with
        `each`, no sample.
      track: shows the progress of reading label images, the one thing here that takes long.

    Raises ValueError, naming the thing and the fix, for data that cannot be used; RuntimeError
    where a package that the data needs is not installed.
    """
    split = check_split(split)
    if not data:
        raise ValueError(
            "no data: pass --data with a folder of images and masks, or a COCO dataset"
        )
    if is_tfds(data):
        from samjax.data.tfds import open_tfds

        return open_tfds(data.removeprefix(TFDS), split, seed, fractions, objects, classes)
    root = Path(data).expanduser()
    if not root.exists():
        raise ValueError(f"the data {root} does not exist")

    from samjax.data import coco, folder, labels

    if coco.is_coco(root):
        return coco.CocoSource(root, split, seed, fractions, objects, classes)
    if objects == "each" or classes or folder.has_labels(root):
        return labels.LabelSource(root, split, seed, fractions, objects, classes, track)
    return folder.FolderSource(root, split, seed, fractions)
