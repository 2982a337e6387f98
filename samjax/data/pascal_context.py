"""PASCAL-Context with the five dense tasks of ASTMT (Maninis et al. 2019), as MTI-Net has them too.

The layout is that of their archive (PASCAL_MT); which image is in which split stands in a list:

    ROOT/ImageSets/Context/{train,val}.txt     a name in each line; val is the test split
    ROOT/JPEGImages/NAME.jpg                   images, whose sizes differ
    ROOT/semseg/VOC12/NAME.png                 segmentation: classes 0 to 20, 255 does not count;
                                               where it is missing, semseg/pascal-context/NAME.png
    ROOT/human_parts/NAME.mat                  human_parts: PASCAL-Part's `anno`, see below
    ROOT/sal_distill/NAME.png                  saliency: above 127 is salient
    ROOT/normals_distill/NAME.png              normals: (x, y, z) from -1 to 1 as 0 to 255
    ROOT/pascal-context/trainval/NAME.mat      edges: `LabelMap`, 459 classes, whose boundaries
                                               they are; and where normals are known

`anno` has `objects`, each with `class_ind`, `mask` and `parts`, and those with `part_name` and
`mask`. The parts of people are put together to head, torso, upper and lower arms, upper and lower
legs, classes 1 to 6; all else is 0, and an image in which nobody has parts does not count at all.

Saliency and normals are what other networks said ("distilled"). Normals count on things that the
network saw in NYUv2, as ASTMT has it, and are made to have length 1 again, which 8 bits do not
keep; their x changes its sign in a mirror. A truth that has not its image's size is resized to it
by the nearest pixel (ASTMT resizes normals bicubically).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.io import loadmat

from samjax.data.boundaries import boundaries
from samjax.data.dense import DenseSample, checked_truth, resize_nearest
from samjax.data.images import read_image, read_labels
from samjax.tasks import IGNORE, PASCAL_CONTEXT, Task, find

LISTS = Path("ImageSets", "Context")
_SPLITS = {"train": "train", "test": "val"}
_IMAGES = ("JPEGImages",)
_LABEL_MAPS = ("pascal-context/trainval",)
# The files that tasks are read from: of each, the folders where it may lie.
_FILES: dict[str, tuple[tuple[str, ...], ...]] = {
    "segmentation": (("semseg/VOC12", "semseg/pascal-context"),),
    "human_parts": (("human_parts",),),
    "saliency": (("sal_distill",),),
    "normals": (("normals_distill",), _LABEL_MAPS),
    "edges": (_LABEL_MAPS,),
}
_SUFFIXES = {"JPEGImages": ".jpg", "human_parts": ".mat", "pascal-context/trainval": ".mat"}
_VOID = 255
_PERSON = 15
# PASCAL-Part's names of parts of people, without l or r for left and right, by class.
_PARTS = {
    1: "head hair ear ebrow eye nose mouth",
    2: "neck torso",
    3: "uarm",
    4: "larm hand",
    5: "uleg",
    6: "lleg foot",
}
_CLASS_OF_PART = {part: label for label, parts in _PARTS.items() for part in parts.split()}
# The classes of PASCAL-Context that NYUv2 has by the same name, and tvmonitor (427).
_WITH_NORMALS = tuple(
    int(number)
    for number in """
    3 4 6 9 10 11 13 15 17 18 22 23 29 30 33 34 36 37 38 39 41 43 46 49 50 51 53 55 56 59 61 62
    65 66 68 69 72 73 78 83 84 85 87 88 95 96 101 104 105 107 111 113 115 122 124 135 141 142
    143 146 150 154 157 158 159 165 172 174 181 183 184 191 193 195 197 199 202 213 215 216 219
    220 223 225 228 230 232 233 238 239 242 243 246 250 251 252 255 260 261 263 269 272 273 275
    281 283 284 285 286 287 288 290 291 292 293 295 304 307 309 310 314 315 319 323 329 330 331
    336 342 345 349 350 351 352 355 357 368 370 371 374 379 380 383 384 397 401 403 405 407 408
    411 412 413 414 417 419 421 423 427 429 430 432 440 441 442 443 444 446 454 457
    """.split()
)


def is_pascal_context(root: Path) -> bool:
    """Whether a folder is laid out as PASCAL-Context."""
    return (root / LISTS).is_dir()


class PascalContext:
    """One split of PASCAL-Context, read by position; see above for the layout."""

    def __init__(self, root: str | Path, split: str, tasks: Sequence[Task]) -> None:
        """Lists files; reads the split's list only.

        Raises ValueError where the list or a file is missing, and for a task that is not one of
        `samjax.tasks.PASCAL_CONTEXT`, whatever its weight.
        """
        self._root = Path(root).expanduser()
        self._tasks = tuple(tasks)
        for task in tasks:
            own = find(PASCAL_CONTEXT, task.name)
            if (task.channels, task.loss) != (own.channels, own.loss):
                raise ValueError(
                    f"task {task.name} of PASCAL-Context is {own.name}:{own.channels}:{own.loss}, "
                    f"not {task}"
                )
        listed = self._root / LISTS / f"{_SPLITS[split]}.txt"
        if not listed.is_file():
            raise ValueError(f"there is no {listed}, which lists the images of the split {split}")
        self.names = tuple(listed.read_text().split())
        if not self.names:
            raise ValueError(f"{listed} lists no image")
        wanted = {folders: f"task {task.name}" for task in tasks for folders in _FILES[task.name]}
        wanted[_IMAGES] = "images"
        self._files = {
            folders: self._find(folders, asked_by, listed) for folders, asked_by in wanted.items()
        }

    def _find(self, folders: tuple[str, ...], asked_by: str, listed: Path) -> dict[str, Path]:
        """The file of each name, in the first of the folders that has it."""
        found: dict[str, Path] = {}
        for folder in reversed(folders):
            place, suffix = self._root / folder, _SUFFIXES.get(folder, ".png")
            there = {path.name for path in place.iterdir()} if place.is_dir() else ()
            found |= {n: place / (n + suffix) for n in self.names if n + suffix in there}
        if missing := [name for name in self.names if name not in found]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            places = " and ".join(str(self._root / folder) for folder in folders)
            raise ValueError(f"{asked_by}: {places} has no file for {missing[0]}{more} of {listed}")
        return found

    def check_sizes(self) -> None:
        """Reads the first sample. Raises as reading does."""
        self[0]

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.names)

    def __getitem__(self, index: int) -> DenseSample:
        """The sample at a position. Raises ValueError, naming the file, where it cannot be used."""
        name = self.names[index]
        image = read_image(self._files[_IMAGES][name])
        size = image.shape[:2]
        truth = {}
        for task in self._tasks:
            files = [self._files[folders][name] for folders in _FILES[task.name]]
            array = resize_nearest(_READ[task.name](*files), size)
            truth[task.name] = checked_truth(array, task, size, files[0])
        return DenseSample(name, image, truth)

    def image_file(self, index: int) -> Path:
        """The file of a sample's image."""
        return self._files[_IMAGES][self.names[index]]


def _segmentation(file: Path) -> Int[np.ndarray, "h w"]:
    labels = read_labels(file)
    return np.where(labels == _VOID, IGNORE, labels)


def _saliency(file: Path) -> Int[np.ndarray, "h w"]:
    return (read_labels(file) > 127).astype(np.int32)


def _edges(file: Path) -> Int[np.ndarray, "h w"]:
    return boundaries(_label_map(file)).astype(np.int32)


def _normals(file: Path, label_map: Path) -> Float[np.ndarray, "h w 3"]:
    normals = read_image(file).astype(np.float32) * np.float32(2 / 255) - 1
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)  # 8 bits have no 0
    known = np.isin(_label_map(label_map), _WITH_NORMALS)
    return np.where(resize_nearest(known, normals.shape[:2])[..., None], normals, np.float32(0))


def _human_parts(file: Path) -> Int[np.ndarray, "h w"]:
    try:
        objects = np.atleast_1d(_variable(file, "anno").objects)
        people = [own for own in objects if own.class_ind == _PERSON]
        parts = [part for person in people for part in np.atleast_1d(person.parts)]
        masks = [(_class_of_part(str(part.part_name), file), part.mask > 0) for part in parts]
    except AttributeError as error:
        raise ValueError(f"{file} is not laid out as PASCAL-Part's ({error})") from None
    if not masks:
        return np.full((1, 1), IGNORE, np.int32)  # whatever the image's size is
    labels = np.zeros(masks[0][1].shape, np.int32)
    for label, mask in masks:
        labels[mask] = label
    return labels if labels.any() else np.full_like(labels, IGNORE)


def _class_of_part(name: str, file: Path) -> int:
    # llarm is a left lower arm, luarm a left upper one; no part without sides begins with l or r.
    label = _CLASS_OF_PART.get(name) or _CLASS_OF_PART.get(re.sub("^[lr]", "", name))
    if label is None:
        raise ValueError(f"{file} has the part {name!r}, which PASCAL-Part's people do not have")
    return label


def _label_map(file: Path) -> Int[np.ndarray, "h w"]:
    return _variable(file, "LabelMap").astype(np.int32)


def _variable(file: Path, name: str) -> Any:
    """A variable of a file of MATLAB, its structs as objects with attributes."""
    try:
        variables = loadmat(file, squeeze_me=True, struct_as_record=False)
    except Exception as error:  # of broken files SciPy raises many kinds
        raise ValueError(f"{file} cannot be read as MATLAB's ({error}): replace it") from error
    if name not in variables:
        raise ValueError(f"{file} has no {name}")
    return variables[name]


_READ: dict[str, Callable[..., np.ndarray]] = {
    "segmentation": _segmentation,
    "human_parts": _human_parts,
    "saliency": _saliency,
    "normals": _normals,
    "edges": _edges,
}
