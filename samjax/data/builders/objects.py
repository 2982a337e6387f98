"""What the builders of images with classes or objects share: finding, writing, and an index.

Records hold the images' own bytes. Which objects are in which image stands in the metadata, too,
so that a source knows all samples of a large dataset without reading a record.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import tensorflow_datasets as tfds

from samjax.data import segmentation
from samjax.data.builders.archives import Archive
from samjax.data.builders.members import Members
from samjax.data.builders.records import Contents, RecordsBuilder
from samjax.data.coco_json import Annotation
from samjax.data.objects import Object, add_image, empty_index


class Truth(NamedTuple):
    """One image and what is known of it, as files' bytes and as objects.

    The objects are annotations, or, where a record has none, the classes of its label image.
    """

    image: bytes
    objects: Sequence[Annotation] | Sequence[Object]
    labels: bytes | None = None


def categories_of(classes: Sequence[str]) -> list[dict[str, Any]]:
    """The classes of label images as COCO lists categories; 0 is the background."""
    return [{"id": value, "name": name} for value, name in enumerate(classes) if value]


# The names of a split's images, each with what reads it.
Readers = dict[str, Callable[[], Truth]]


class ObjectsBuilder(RecordsBuilder, skip_registration=True):
    """A dataset whose records have `labels`, `annotations`, or both; a subclass says which.

    `labels` is a label image: a class a pixel, 255 where it does not count; the metadata has the
    classes' names as `classes`. `annotations` is a list as JSON, each entry as COCO writes it: id,
    category_id, iscrowd, segmentation; the metadata has `categories`, as COCO lists them.
    """

    # What the dataset is published in.
    ARCHIVES: ClassVar[tuple[Archive, ...]]
    # Files or folders that tell the dataset's root; the first that is there counts.
    MARKERS: ClassVar[tuple[str, ...]]
    # Which files these are, and where they are found, for people.
    SOURCE: ClassVar[str]
    # What records hold beside images.
    KEYS: ClassVar[tuple[str, ...]] = ("annotations",)
    # The names of the classes of label images, by their values.
    CLASSES: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def how_to_get(cls) -> str:
        """Where a user finds the archives."""
        return f"get {cls.SOURCE}"

    @classmethod
    def downloads(cls) -> tuple[Archive, ...]:
        """The archives, where each can be downloaded."""
        return cls.ARCHIVES if all(archive.can_be_fetched for archive in cls.ARCHIVES) else ()

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The folder, where it is the dataset or holds all of it, as archives or extracted."""
        is_whole = all(archive.find(folder) for archive in cls.ARCHIVES)
        return folder if is_whole or cls._is_root(folder) else None

    @classmethod
    def missing(cls, folder: Path) -> str:
        """What to say where `find` finds nothing."""
        titles = (
            f"{archive.file} nor {archive.folder}/"
            if archive.file not in (None, archive.folder)
            else archive.title
            for archive in cls.ARCHIVES
            if not archive.find(folder)
        )
        return f"{folder} holds no {', no '.join(titles)}: {cls.how_to_get()}, and put it there"

    @classmethod
    def _is_root(cls, folder: Path) -> bool:
        return any((folder / marker).exists() for marker in cls.MARKERS)

    def root(self, found: Path) -> Members:
        """The files of a dataset of one archive. Raises ValueError where it is another archive."""
        place = found if self._is_root(found) else self.ARCHIVES[0].find(found)
        assert place is not None  # or `find` would not have found it
        members = Members(place)
        for marker in self.MARKERS:
            if (part := members.below(marker)) is not None:
                return part
        raise ValueError(f"{place} holds no {' and no '.join(self.MARKERS)}: {self.how_to_get()}")

    @abc.abstractmethod
    def readers(self, found: Path) -> dict[str, Readers]:
        """The images of each split, and what reads each. Raises ValueError for what is missing."""

    def categories(self) -> list[dict[str, Any]]:
        """The categories as COCO lists them; `readers` was called before."""
        return categories_of(self.CLASSES)

    def record_features(self) -> dict[str, Any]:
        """An image, and what `KEYS` name."""
        features = {
            "labels": tfds.features.Image(shape=(None, None, 1)),
            "annotations": tfds.features.Text(),
        }
        return {"image": tfds.features.Image(), **{key: features[key] for key in self.KEYS}}

    def contents(self, found: Path) -> dict[str, Contents]:
        """The splits; their objects come into the metadata as their records are written."""
        splits = self.readers(found)
        metadata = self.info.metadata
        metadata["categories"] = self.categories()
        if self.CLASSES:
            metadata["classes"] = list(self.CLASSES)
        metadata["objects"], metadata["polygons"] = {}, False
        return {
            split: Contents(list(readers), self._records(split, readers))
            for split, readers in splits.items()
        }

    def _records(self, split: str, readers: Readers) -> Iterator[dict[str, Any]]:
        index = self.info.metadata["objects"][split] = empty_index()
        for read in readers.values():
            truth = read()
            add_image(index, truth.objects)
            record: dict[str, Any] = {"image": truth.image}
            if truth.labels is not None:
                record["labels"] = truth.labels
            if "annotations" in self.KEYS:
                shapes = [one.segmentation for one in truth.objects if isinstance(one, Annotation)]
                self.info.metadata["polygons"] |= any(map(segmentation.is_polygons, shapes))
                record["annotations"] = json.dumps(
                    [
                        {
                            "id": one.id,
                            "category_id": one.category,
                            "iscrowd": int(one.is_crowd),
                            "segmentation": shape,
                        }
                        for one, shape in zip(truth.objects, shapes, strict=True)
                    ]
                )
            yield record
