"""Images with a truth for each pixel and task, in the layouts of the multi-task literature.

A split is a folder with a folder of images and one for each task, whose files have the images'
names, as MTAN and LibMTL lay out NYUv2 and CityScapes:

    ROOT/train/image/0.npy   (h, w, 3) float in [0, 1], or an image file
    ROOT/train/label/0.npy   (h, w) integers, -1 where a pixel does not count
    ROOT/train/depth/0.npy   (h, w, 1) float, 0 where it is unknown
    ROOT/train/normal/0.npy  (h, w, 3) float of length 1, (0, 0, 0) where it is unknown
    ROOT/val/...             the test split

Which folder a task reads is `FOLDERS`, or the task's own name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from samjax.data.images import read_image
from samjax.tasks import CLASSES, IGNORE, Task

FOLDERS = {"segmentation": "label", "normals": "normal", "disparity": "depth"}
# The literature's names of the splits.
_SPLITS = {"train": "train", "test": "val"}
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


class DenseFolder:
    """One split of a folder, read by position; see above for the layout."""

    def __init__(self, root: str | Path, split: str, tasks: Sequence[Task]) -> None:
        """Lists files; reads none. Raises ValueError where an image lacks a task's file."""
        if split not in _SPLITS:
            raise ValueError(f"a folder of dense tasks has the splits train and test, not {split}")
        base = Path(root).expanduser() / _SPLITS[split]
        self._tasks = tuple(tasks)
        self._images = _by_stem(base / "image")
        self._truths = {}
        for task in tasks:
            folder = base / FOLDERS.get(task.name, task.name)
            files = _by_stem(folder)
            if missing := [stem for stem in self._images if stem not in files]:
                raise ValueError(
                    f"task {task.name}: {folder} has no file for {missing[0]} and "
                    f"{len(missing) - 1} more images of {base / 'image'}"
                )
            self._truths[task.name] = files
        self.names = tuple(sorted(self._images, key=_natural))

    def check_sizes(self) -> None:
        """Reads the first sample: sizes stand in the arrays alone. Raises as reading does."""
        self[0]

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.names)

    def __getitem__(self, index: int) -> DenseSample:
        """The sample at a position. Raises ValueError, naming the file, where it cannot be used."""
        name = self.names[index]
        image = _read_rgb(self._images[name])
        truth = {
            task.name: _read_truth(self._truths[task.name][name], task, image.shape[:2])
            for task in self._tasks
        }
        return DenseSample(name, image, truth)


def open_dense(data: str, split: str, tasks: Sequence[Task]) -> DenseFolder:
    """One split of a folder of dense tasks.

    Raises ValueError, naming the thing and the fix, for data that cannot be used.
    """
    if not data:
        raise ValueError("no data: pass --data with a folder of images and their dense truths")
    root = Path(data).expanduser()
    if not root.exists():
        raise ValueError(f"the data {root} does not exist")
    return DenseFolder(root, split, tasks)


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    files = {path.stem: path for path in folder.iterdir() if not path.name.startswith(".")}
    if not files:
        raise ValueError(f"{folder} is empty")
    return files


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Numbers by their value: 2 before 10."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in parts)


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an array ({error}): replace it") from None


def _read_rgb(path: Path) -> np.ndarray:
    if path.suffix != ".npy":
        return read_image(path)
    image = _load(path)
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"{path} is {list(image.shape)}, and an image is (height, width, 3)")
    if image.dtype == np.uint8:
        return image
    if not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(f"{path} has values outside [0, 1], between which an image's lie")
    return np.round(image * 255).astype(np.uint8)


def _read_truth(path: Path, task: Task, size: tuple[int, ...]) -> np.ndarray:
    array = _load(path)
    if task.loss in CLASSES:
        array = array[..., 0] if array.ndim == 3 else array
        if array.shape != size:
            raise ValueError(f"{path} is {list(array.shape)}, and its image is {list(size)}")
        labels = array.astype(np.int32)
        wrong = (labels != array) | (labels < IGNORE) | (labels >= task.classes)
        if wrong.any():
            raise ValueError(
                f"{path} has the value {array[wrong][0]}, and task {task.name} has the classes 0 "
                f"to {task.classes - 1}, and {IGNORE} where a pixel does not count"
            )
        return labels
    array = array[..., None] if array.ndim == 2 else array
    if array.shape != (*size, task.channels):
        raise ValueError(
            f"{path} is {list(array.shape)}, and task {task.name} needs "
            f"{[*size, task.channels]} for its image"
        )
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{path} has values that are not finite; unknown pixels are 0")
    if task.loss == "masked_l1" and (array < 0).any():
        raise ValueError(f"{path} has values below 0; unknown pixels are 0")
    if task.loss == "cosine":
        length = np.linalg.norm(array, axis=-1)
        if ((np.abs(length - 1) > _LENGTH) & (length > 0)).any():
            raise ValueError(f"{path} has directions whose length is neither 1 nor 0")
    return array
