"""Images with a truth for each pixel and task: what a sample is, and how data is opened.

Data is a folder in MTAN's layout (`samjax.data.dense_folder`), PASCAL-Context in that of ASTMT
(`samjax.data.pascal_context`), a folder of images and label images (`samjax.data.dense_labels`), or
tfds:NAME, a dataset that `samjax data prepare` built (`samjax.data.dense_tfds`). Each is imported
where it is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from samjax.data.images import EncodedImage, ImageFile
from samjax.data.sources import TFDS, is_tfds
from samjax.data.splits import DEFAULT_FRACTIONS, Fractions, check_split
from samjax.tasks import CLASSES, IGNORE, Task

# How far from 1 the length of a direction may lie, as resizing leaves it.
_LENGTH = 0.05


@dataclasses.dataclass(frozen=True)
class DenseSample:
    """One image, RGB in [0, 255], with its truths by task.

    Of losses of `samjax.tasks.CLASSES` (h, w) int32, else (h, w, channels) float32.
    """

    name: str
    image: UInt8[np.ndarray, "h w 3"]
    truth: Mapping[str, np.ndarray]


@runtime_checkable
class DenseSource(Protocol):
    """Anything that holds a fixed number of dense samples and reads them by position."""

    def __len__(self) -> int:
        """The number of samples."""

    def __getitem__(self, index: int) -> DenseSample:
        """The sample at a position. Raises ValueError, naming the file, where it cannot be had."""


@runtime_checkable
class DenseDataset(DenseSource, Protocol):
    """A source that a run can be made of: named samples that can be checked before long work."""

    @property
    def names(self) -> tuple[str, ...]:
        """The samples' names in order, known without reading them."""

    def check_sizes(self) -> None:
        """Reads what of sizes stands in headers, and the first sample. Raises as reading does."""

    def image_file(self, index: int) -> ImageFile:
        """The file of a sample's image."""


def open_dense(
    data: str,
    split: str,
    tasks: Sequence[Task],
    *,
    seed: int = 0,
    fractions: Fractions = DEFAULT_FRACTIONS,
) -> DenseDataset:
    """One split of the data: train, test, and, of label images and datasets of TFDS, validation.

    `seed` and `fractions` draw the splits of data that has none. Raises ValueError, naming the
    thing and the fix, for data that cannot be used; FileNotFoundError for a dataset of TFDS that is
    not prepared.
    """
    split = check_split(split)
    if not data:
        raise ValueError("no data: pass --data with a folder of images and their dense truths")
    if is_tfds(data):
        from samjax.data.dense_tfds import DenseTfds

        name = data.removeprefix(TFDS)
        return DenseTfds(name, split, tasks, seed=seed, fractions=fractions)
    root = Path(data).expanduser()
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}: data of dense tasks is a folder")

    from samjax.data import dense_folder, dense_labels, pascal_context

    if dense_labels.is_labelled(root):
        return dense_labels.DenseLabels(root, split, tasks, seed, fractions)
    if split == "validation":
        raise no_validation()
    if pascal_context.is_pascal_context(root):
        return pascal_context.PascalContext(root, split, tasks)
    return dense_folder.DenseFolder(root, split, tasks)


def no_validation() -> ValueError:
    """The error of data that has none."""
    return ValueError(
        "this data of dense tasks has the splits train and test, and no validation: the "
        "literature's `val` is the test split"
    )


def check_truth_shape(
    shape: tuple[int, ...], task: Task, size: tuple[int, ...], where: str | Path | EncodedImage
) -> None:
    """Raises ValueError, which calls the array `where`, for a shape that no truth of the task has.

    It is that of the image, (h, w) `size`, alone where there is one number a pixel, or with the
    number of channels after it.
    """
    channels = 1 if task.loss in CLASSES else task.channels
    if shape != (*size, channels) and not (channels == 1 and shape == size):
        needed = [*size] if task.loss in CLASSES else [*size, channels]
        raise ValueError(
            f"{where} is {list(shape)}, and task {task.name} needs {needed} for its image"
        )


def checked_truth(
    array: np.ndarray,
    task: Task,
    size: tuple[int, ...],
    where: str | Path | EncodedImage,
    void: int = IGNORE,
) -> np.ndarray:
    """A truth as `DenseSample` has it, of an image of (h, w) `size`.

    `array` is (h, w) or (h, w, channels), of any type of numbers; of classes, `void` is what a
    pixel has that does not count. Raises ValueError, which calls it `where`, for what cannot be a
    truth of the task.
    """
    check_truth_shape(array.shape, task, size, where)
    if task.loss in CLASSES:
        array = array.reshape(size)
        counts = array != void
        wrong = counts & ~((array >= 0) & (array < task.classes) & (array == np.floor(array)))
        if wrong.any():
            raise ValueError(
                f"{where} has the value {array[wrong][0]}, and task {task.name} has the classes 0 "
                f"to {task.classes - 1}, and {void} where a pixel does not count"
            )
        return np.where(counts, array.astype(np.int32), np.int32(IGNORE))
    array = array.reshape(*size, task.channels).astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{where} has values that are not finite; unknown pixels are 0")
    if task.loss == "masked_l1" and (array < 0).any():
        raise ValueError(f"{where} has values below 0; unknown pixels are 0")
    if task.loss == "cosine":
        length = np.linalg.norm(array, axis=-1)
        if ((np.abs(length - 1) > _LENGTH) & (length > 0)).any():
            raise ValueError(f"{where} has directions whose length is neither 1 nor 0")
    return array


def has_labels(task: Task, truth: np.ndarray) -> bool:
    """Whether some pixel of a truth counts."""
    return bool((truth != IGNORE).any() if task.loss in CLASSES else truth.any())


def resize_nearest(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """An array (h, w, ...) at another (h, w): the value where the centre of each pixel lies."""
    size = array.shape[:2]
    if size == shape:
        return array
    places = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(shape, size, strict=True))
    return array[np.ix_(*places)]
