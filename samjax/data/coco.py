"""A COCO dataset as a source: images whose objects are polygons or run lengths in a JSON.

Layouts of a folder, of which the first that is found counts:

- a JSON in each of `train/`, `valid/` and `test/`, with its images (as Roboflow exports);
- JSONs in `annotations/` or in the folder itself, named after their splits, such as COCO's own
  `annotations/instances_train2017.json` (where any is named `instances_`, the others are not read);
- one JSON there, which is split by seed.

A JSON itself is split by seed, too. Its images lie in a folder named as the JSON is, such as
`train2017/`, in `images/`, in `data/` or beside it; one level up where it lies in `annotations/`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from samjax.data import segmentation
from samjax.data.coco_json import (
    Annotation,
    Coco,
    CocoImage,
    category_ids,
    check_run_lengths,
    read_coco,
    union,
)
from samjax.data.folder import has_masks
from samjax.data.images import image_size, read_image
from samjax.data.objects import choose
from samjax.data.sources import Objects, Sample
from samjax.data.splits import (
    DEFAULT_FRACTIONS,
    Fractions,
    check_split,
    choose_one,
    draw_split,
    quote,
    split_folders,
    split_of,
)
from samjax.data.walk import walk


@dataclasses.dataclass(frozen=True)
class CocoSplit:
    """The part of a JSON that is one split, and the folder that its files are relative to."""

    coco: Coco
    folder: Path
    images: tuple[CocoImage, ...]

    def path(self, image: CocoImage) -> Path:
        """Where an image lies."""
        return self.folder / image.file

    def missing(self) -> list[str]:
        """The files of images that do not exist."""
        return [image.file for image in self.images if not self.path(image).is_file()]

    def check_size(self, image: CocoImage, size: tuple[int, ...]) -> None:
        """Raises ValueError where an image's (height, width) is not what the JSON says."""
        check_annotated_size(image, size, self.path(image), self.coco.path)

    def mask(self, image: CocoImage, annotations: Sequence[Annotation]) -> Bool[np.ndarray, "h w"]:
        """The union of annotations of an image. Raises ValueError where one cannot be decoded."""
        return union(annotations, (image.height, image.width), self.coco.path, image.file)


class CocoSource:
    """The images of a COCO dataset: all annotations as one mask, or a sample for each.

    `classes` are names of categories; all where it is empty. Together, an image without annotations
    has an empty mask, and a crowd belongs to the mask. With `objects` each, crowds are left out,
    since they are many objects.

    Nothing is decoded at construction. Raises ValueError, naming the thing and the fix, for a
    missing folder or split, a JSON that is no COCO or does not fit together, segmentations that
    cannot be, missing image files, unknown classes and a split without any of the classes; and on
    access for files that cannot be decoded and for sizes that differ from the JSON's. RuntimeError
    where polygons need pycocotools and it is not installed.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        seed: int = 0,
        fractions: Fractions = DEFAULT_FRACTIONS,
        objects: Objects = "together",
        classes: tuple[str, ...] = (),
    ) -> None:
        split = check_split(split)
        file, is_flat = find_json(Path(root).expanduser(), split)
        coco = read_coco(file)
        coco.check()
        kept = category_ids(classes, coco.categories, file)
        self._split = take_split(coco, split, is_flat, seed, fractions)
        if missing := self._split.missing():
            raise ValueError(
                f"{len(missing)} of the images that {file} lists are not in {self._split.folder}: "
                f"{quote(missing)}; put them there, or remove them from the JSON"
            )
        images = ((image.name, image.annotations) for image in self._split.images)
        self._choices = choose(images, objects, kept if classes else None)
        has_objects = any(choice.objects for choice in self._choices)
        if not self._choices or (classes and not has_objects):
            what = f"of the classes {quote(classes)} " if classes else ""
            raise ValueError(f"{file} annotates no objects {what}in the split {split!r}")
        # The images' names, or name#id with the annotation's id where each is a sample.
        self.names: tuple[str, ...] = tuple(choice.name for choice in self._choices)
        shapes = (a.segmentation for choice in self._choices for a in choice.objects)
        if any(map(segmentation.is_polygons, shapes)):
            segmentation.pycocotools_mask()  # better now than in the first batch

    def __len__(self) -> int:
        return len(self._choices)

    def __getitem__(self, index: int) -> Sample:
        choice, image = self._choices[index], self._image(index)
        pixels = read_image(self._split.path(image))
        self._split.check_size(image, pixels.shape[:2])
        return Sample(choice.name, pixels, self._split.mask(image, choice.objects))

    def check_sizes(self) -> None:
        """Raises ValueError for images and masks whose sizes are not the JSON's.

        Of images only headers are read.
        """
        for index, choice in enumerate(self._choices):
            image = self._image(index)
            shape = (image.height, image.width)
            check_run_lengths(choice.objects, shape, self._split.coco.path, image.file)
        chosen = [self._split.images[i] for i in sorted({c.image for c in self._choices})]

        def check(image: CocoImage) -> None:
            self._split.check_size(image, image_size(self._split.path(image)))

        for _ in walk(check, chosen, "checking sizes"):
            pass

    def image_file(self, index: int) -> Path:
        """The file of a sample's image, which all its objects share."""
        return self._split.path(self._image(index))

    def _image(self, index: int) -> CocoImage:
        return self._split.images[self._choices[index].image]


def check_annotated_size(
    image: CocoImage, size: tuple[int, ...], where: Path, json_file: Path
) -> None:
    """Raises ValueError where the image `where` has another (height, width) than its entry says."""
    if size != (image.height, image.width):
        raise ValueError(
            f"the image {where} is {size[1]}x{size[0]} pixels (width x height, upright), but "
            f"{json_file} annotates it at {image.width}x{image.height}: take the images that were "
            "annotated"
        )


def take_split(coco: Coco, split: str, is_flat: bool, seed: int, fractions: Fractions) -> CocoSplit:
    """The images of one split: all of the JSON's, or, where `is_flat`, those that the seed draws.

    They are drawn by their files, since the names of all change where one more image makes two of
    them the same. Raises ValueError for an empty split and where no folder holds the images.
    """
    images = {image.file: image for image in coco.images}
    files = draw_split(coco.path, list(images), split, seed, fractions) if is_flat else images
    return CocoSplit(coco, _find_images(coco), tuple(images[file] for file in files))


def is_coco(root: Path) -> bool:
    """Whether the data is a JSON or a folder with JSONs rather than masks."""
    return root.is_file() or (not has_masks(root) and bool(_find_jsons(root)))


def find_json(root: Path, split: str) -> tuple[Path, bool]:
    """The JSON that holds a split, and whether it holds all splits at once.

    Raises ValueError where there is none, or no telling which.
    """
    if root.is_file():
        return root, True
    found = _find_jsons(root)
    unnamed = found.pop(None, [])
    named = {name: files for name, files in found.items() if name is not None}
    if len(unnamed) == 1 and not named:
        return unnamed[0], True
    if not named:
        files = f"; it has {quote(file.name for file in unnamed)}" if unnamed else ""
        raise ValueError(
            f"{root} must hold one COCO JSON, or JSONs named after train, validation and test"
            f"{files}"
        )
    if split not in named:
        files = ", ".join(str(f.relative_to(root)) for files in named.values() for f in files)
        raise ValueError(
            f"{root} has no JSON for the split {split!r}, only {files}; add one, or pass a JSON "
            "itself, which is split by seed"
        )
    return choose_one(root, split, named), False


def _find_jsons(root: Path) -> dict[str | None, list[Path]]:
    """The JSONs of a dataset by split; None for those that are not named after one."""
    in_folders = {
        split: [file for folder in folders for file in _list_jsons(folder)]
        for split, folders in split_folders(root).items()
    }
    if any(in_folders.values()):
        return {split: files for split, files in in_folders.items() if files}
    found: dict[str | None, list[Path]] = {}
    for file in _list_jsons(root / "annotations") or _list_jsons(root):
        words = re.split("[^a-z]+", file.stem.lower())
        found.setdefault(next(filter(None, map(split_of, words)), None), []).append(file)
    return found


def _list_jsons(folder: Path) -> list[Path]:
    files = [file for file in sorted(folder.glob("*.json")) if not file.name.startswith(".")]
    # COCO's folder also has captions and keypoints of the same images.
    return [file for file in files if file.name.startswith("instances_")] or files


def _find_images(coco: Coco) -> Path:
    """The folder that the images' files are relative to. Raises ValueError where there is none."""
    folder = coco.path.parent
    name = coco.path.stem.removeprefix("instances_")
    candidates = [
        base / place
        for base in ((folder, folder.parent) if folder.name == "annotations" else (folder,))
        for place in (name, f"images/{name}", "images", "data", ".")
    ]
    # A few files tell, were it not that some may be missing.
    some = coco.images[:: max(1, len(coco.images) // 20)]

    def hits(base: Path) -> int:
        return sum((base / image.file).is_file() for image in some)

    best = max(candidates, key=hits)
    if not hits(best):
        places = ", ".join(dict.fromkeys(str(place) for place in candidates))
        raise ValueError(
            f"the images that {coco.path} lists, such as {some[0].file!r}, are in none of {places}"
        )
    return best
