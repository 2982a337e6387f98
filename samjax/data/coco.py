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

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from samjax.data import segmentation
from samjax.data.coco_json import Annotation, Coco, CocoImage, read_coco
from samjax.data.folder import has_masks
from samjax.data.images import image_size, read_image
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


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """What a sample is made of: an image, and the annotations whose union is the mask."""

    name: str
    image: CocoImage
    annotations: tuple[Annotation, ...]


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
        if size != (image.height, image.width):
            raise ValueError(
                f"the image {self.path(image)} is {size[1]}x{size[0]} pixels (width x height, "
                f"upright), but {self.coco.path} annotates it at {image.width}x{image.height}: "
                "take the images that were annotated"
            )

    def mask(self, item: Item) -> Bool[np.ndarray, "h w"]:
        """The union of an item's annotations. Raises ValueError where one cannot be decoded."""
        mask = np.zeros((item.image.height, item.image.width), bool)
        for annotation in item.annotations:
            with self._naming(item, annotation):
                mask |= segmentation.decode(annotation.segmentation, *mask.shape)
        return mask

    def check_run_lengths(self, item: Item) -> None:
        """Raises ValueError where compressed run lengths have not the image's size."""
        for annotation in item.annotations:
            if not segmentation.is_polygons(annotation.segmentation):
                with self._naming(item, annotation):
                    counts = annotation.segmentation["counts"]
                    segmentation.run_lengths(counts, item.image.height, item.image.width)

    @contextlib.contextmanager
    def _naming(self, item: Item, annotation: Annotation) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(
                f"in {self.coco.path} annotation {annotation.id} of {item.image.file!r} {error}"
            ) from None


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
        kept = coco.category_ids(classes)
        self._split = take_split(coco, split, is_flat, seed, fractions)
        if missing := self._split.missing():
            raise ValueError(
                f"{len(missing)} of the images that {file} lists are not in {self._split.folder}: "
                f"{quote(missing)}; put them there, or remove them from the JSON"
            )
        self._items: list[Item] = []
        for image in self._split.images:
            chosen = tuple(a for a in image.annotations if not classes or a.category in kept)
            if objects == "together":
                self._items.append(Item(image.name, image, chosen))
            else:
                self._items += [
                    Item(f"{image.name}#{a.id}", image, (a,)) for a in chosen if not a.is_crowd
                ]
        has_objects = any(item.annotations for item in self._items)
        if not self._items or (classes and not has_objects):
            what = f"of the classes {quote(classes)} " if classes else ""
            raise ValueError(f"{file} annotates no objects {what}in the split {split!r}")
        # The images' names, or name#id with the annotation's id where each is a sample.
        self.names: tuple[str, ...] = tuple(item.name for item in self._items)
        shapes = (a.segmentation for item in self._items for a in item.annotations)
        if any(map(segmentation.is_polygons, shapes)):
            segmentation.pycocotools_mask()  # better now than in the first batch

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Sample:
        item = self._items[index]
        pixels = read_image(self._split.path(item.image))
        self._split.check_size(item.image, pixels.shape[:2])
        return Sample(item.name, pixels, self._split.mask(item))

    def check_sizes(self) -> None:
        """Raises ValueError for images and masks whose sizes are not the JSON's.

        Of images only headers are read.
        """
        for item in self._items:
            self._split.check_run_lengths(item)
        images = list({item.image.file: item.image for item in self._items}.values())

        def check(image: CocoImage) -> None:
            self._split.check_size(image, image_size(self._split.path(image)))

        for _ in walk(check, images, "checking sizes"):
            pass

    def image_file(self, index: int) -> Path:
        """The file of a sample's image, which all its objects share."""
        return self._split.path(self._items[index].image)


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
