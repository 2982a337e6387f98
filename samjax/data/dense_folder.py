"""Dense tasks in a folder of arrays, as MTAN and LibMTL lay out NYUv2 and CityScapes.

A split is a folder with a folder of images and one for each task, whose files have the images'
names:

    ROOT/train/image/0.npy    (h, w, 3) float in [0, 1], or an image file
    ROOT/train/label/0.npy    (h, w) integers, -1 where a pixel does not count
    ROOT/train/depth/0.npy    (h, w, 1) float, 0 where it is unknown
    ROOT/train/normal/0.npy   (h, w, 3) float of length 1, (0, 0, 0) where it is unknown
    ROOT/val/...              the test split

A task reads the first of `folders_of` that there is: CityScapes has label_7 and label_19 for as
many classes, and the inverse of a depth, or disparity, in `depth`. Tasks segmentation_7 and
segmentation_19 are both at once.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from samjax.data.dense import DenseSample, check_truth_shape, checked_truth
from samjax.data.images import image_size, read_image
from samjax.tasks import Task

IMAGES = "image"
# The literature's names of the splits.
SPLITS = {"train": "train", "test": "val"}
# NumPy parses headers by `ast`, which in Python 3.11 fails where threads do so at the same time
# (SystemError: AST constructor recursion depth mismatch).
_HEADER = threading.Lock()


def folders_of(task: Task) -> tuple[str, ...]:
    """The folders that may hold a task's truth, in the order in which they are looked for."""
    usual = {
        "segmentation": (f"label_{task.channels}", "label"),
        f"segmentation_{task.channels}": (f"label_{task.channels}",),
        "normals": ("normal",),
        "disparity": ("depth",),
    }
    return (*usual.get(task.name, ()), task.name)


class DenseFolder:
    """One split of a folder, read by position; see above for the layout."""

    def __init__(self, root: str | Path, split: str, tasks: Sequence[Task]) -> None:
        """Lists files; reads none.

        Raises ValueError where the split, or the folder of a task, or the file of an image is
        missing.
        """
        base = Path(root).expanduser() / SPLITS[split]
        if not (base / IMAGES).is_dir():
            raise ValueError(
                f"there is no folder {base / IMAGES}: a folder of dense tasks has "
                f"{{train,val}}/{IMAGES} and a folder beside it for each task"
            )
        self._tasks = tuple(tasks)
        self._images = _by_stem(base / IMAGES)
        self._truths = {}
        for task in tasks:
            folder = _folder(base, task)
            files = _by_stem(folder)
            if missing := [stem for stem in self._images if stem not in files]:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise ValueError(
                    f"task {task.name}: {folder} has no file for {missing[0]}{more} of "
                    f"{base / IMAGES}"
                )
            self._truths[task.name] = files
        self.names = tuple(sorted(self._images, key=_natural))

    def check_sizes(self) -> None:
        """Reads the headers of all files, and the first sample. Raises as reading does."""
        for name in self.names:
            size = _image_size(self._images[name])
            for task in self._tasks:
                file = self._truths[task.name][name]
                check_truth_shape(_mapped(file).shape, task, size, file)
        self[0]

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.names)

    def __getitem__(self, index: int) -> DenseSample:
        """The sample at a position. Raises ValueError, naming the file, where it cannot be used."""
        name = self.names[index]
        image = _read_rgb(self._images[name])
        files = {task: self._truths[task.name][name] for task in self._tasks}
        truth = {
            task.name: checked_truth(_load(file), task, image.shape[:2], file)
            for task, file in files.items()
        }
        return DenseSample(name, image, truth)

    def image_file(self, index: int) -> Path:
        """The file of a sample's image."""
        return self._images[self.names[index]]


def _folder(base: Path, task: Task) -> Path:
    names = folders_of(task)
    for name in names:
        if (base / name).is_dir():
            return base / name
    there = sorted(path.name for path in base.iterdir() if path.is_dir() and path.name != IMAGES)
    raise ValueError(
        f"task {task.name}: {base} has no folder {' or '.join(names)}, only "
        f"{', '.join(there) or IMAGES}: leave the task out, or add its truths"
    )


def _by_stem(folder: Path) -> dict[str, Path]:
    files = {path.stem: path for path in folder.iterdir() if not path.name.startswith(".")}
    if not files:
        raise ValueError(f"{folder} is empty")
    return files


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Numbers by their value: 2 before 10."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in parts)


def _load(path: Path) -> np.ndarray:
    return np.array(_mapped(path))


def _mapped(path: Path) -> np.ndarray:
    """An array whose numbers are read when they are asked for."""
    try:
        with _HEADER:
            return np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an array ({error}): replace it") from None


def _image_size(path: Path) -> tuple[int, int]:
    """(height, width), from the header."""
    if path.suffix != ".npy":
        return image_size(path)
    height, width, _ = _check_rgb(_mapped(path), path).shape
    return height, width


def _read_rgb(path: Path) -> np.ndarray:
    if path.suffix != ".npy":
        return read_image(path)
    image = _check_rgb(_load(path), path)
    if image.dtype == np.uint8:
        return image
    if not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(f"{path} has values outside [0, 1], between which an image's lie")
    return np.round(image * 255).astype(np.uint8)


def _check_rgb(image: np.ndarray, path: Path) -> np.ndarray:
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"{path} is {list(image.shape)}, and an image is (height, width, 3)")
    return image
