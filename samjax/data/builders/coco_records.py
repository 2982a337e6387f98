"""What the builders of datasets that are published as COCO's JSON share."""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from samjax.data.builders.members import Members
from samjax.data.builders.objects import ObjectsBuilder, Readers, Truth
from samjax.data.coco import check_annotated_size
from samjax.data.coco_json import Coco, CocoImage, check_run_lengths, parse_coco
from samjax.data.images import EncodedImage, image_size
from samjax.data.splits import quote


class CocoPart(NamedTuple):
    """One split: its JSON, which messages call `path`, and the images that this lists."""

    split: str
    path: Path
    content: bytes
    images: Members


class CocoBuilder(ObjectsBuilder, skip_registration=True):
    """A dataset whose splits have a JSON each; a subclass says where these lie.

    What is wrong in a JSON is refused as `samjax.data.coco.CocoSource` refuses it.
    """

    @abc.abstractmethod
    def parts(self, found: Path) -> Iterator[CocoPart]:
        """The splits of what `find` found. Raises ValueError for what is missing."""

    def part(self, split: str, files: Members, name: str, images: Members) -> CocoPart:
        """A split whose JSON is a file of that name. Raises ValueError where it is missing."""
        if name not in files.names:
            raise ValueError(f"{files.path(name)} is missing: {self.how_to_get()}")
        return CocoPart(split, files.path(name), files.read(name), images)

    def categories(self) -> list[dict[str, Any]]:
        """The categories of the JSONs."""
        return [{"id": id, "name": name} for name, id in self._named]

    def readers(self, found: Path) -> dict[str, Readers]:
        """The images that the JSONs list. Raises ValueError for what is missing or faulty."""
        splits: dict[str, Readers] = {}
        for split, path, content, images in self.parts(found):
            coco = parse_coco(content, path)
            coco.check()
            if splits and coco.categories != self._named:
                raise ValueError(f"{path} has other categories than the other splits have")
            self._named = coco.categories
            missing = {image.file for image in coco.images}.difference(images.names)
            if missing:
                raise ValueError(
                    f"{len(missing)} of the images that {path} lists are not in "
                    f"{images.path('')}: {quote(missing)}; {self.how_to_get()}"
                )
            splits[split] = {
                image.name: functools.partial(_read, coco, images, image) for image in coco.images
            }
        return splits


def _read(coco: Coco, images: Members, image: CocoImage) -> Truth:
    content, shape = images.read(image.file), (image.height, image.width)
    size = image_size(EncodedImage(content, images.path(image.file)))
    check_annotated_size(image, size, images.path(image.file), coco.path)
    check_run_lengths(image.annotations, shape, coco.path, image.file)
    return Truth(content, image.annotations)
