"""Prepared datasets whose records have annotations or label images: objects, and classes by name.

Which objects there are stands in the metadata (`samjax.data.builders.objects`), so that opening
reads no record.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from samjax.data import segmentation
from samjax.data.coco_json import Annotation, category_ids, union
from samjax.data.images import EncodedImage, read_image, read_labels
from samjax.data.labels import select
from samjax.data.objects import Choice, Object, choose, objects_of
from samjax.data.sources import Objects, Sample
from samjax.data.splits import DEFAULT_FRACTIONS, Fractions, quote
from samjax.data.tfds import Records, open_prepared


class ObjectRecords:
    """The images of a split, all their objects as one mask, or a sample for each object.

    Objects are the annotations of records that have these, else the classes of label images.
    Samples and their names are those of a `samjax.data.coco.CocoSource`, or of a
    `samjax.data.labels.LabelSource`, of the same data; but `classes` of label images are names,
    too, and 255 is never an object.

    Raises as `samjax.data.tfds.open_prepared` and its `Records` do, and ValueError for unknown
    classes and for a split without objects or any of the classes; RuntimeError where polygons lack
    pycocotools.
    """

    def __init__(
        self,
        name: str,
        split: str,
        seed: int = 0,
        fractions: Fractions = DEFAULT_FRACTIONS,
        objects: Objects = "together",
        classes: tuple[str, ...] = (),
        data_dir: Path | None = None,
    ) -> None:
        builder = open_prepared(name, data_dir)
        records = self._records = Records(name, split, seed, fractions, builder)
        named = [(entry["name"], entry["id"]) for entry in records.metadata["categories"]]
        kept = category_ids(classes, named, records.folder)
        present = objects_of(records.metadata["objects"][records.stored])
        marked = zip(records.names, (present[i] for i in records.positions), strict=True)
        self._choices = choose(marked, objects, kept if classes else None)
        has_objects = any(choice.objects for choice in self._choices)
        if not self._choices or (classes and not has_objects):
            what = f"of the classes {quote(classes)} " if classes else ""
            raise ValueError(f"{records.folder} has no objects {what}in the split {split!r}")
        self.names: tuple[str, ...] = tuple(choice.name for choice in self._choices)
        self._mask = self._of_labels
        if "annotations" in records.features:
            self._mask = self._of_annotations
            if records.metadata["polygons"]:
                segmentation.pycocotools_mask()  # better now than in the first batch

    def __len__(self) -> int:
        return len(self._choices)

    def __getitem__(self, index: int) -> Sample:
        choice = self._choices[index]
        record = self._records[choice.image]
        image = read_image(self._records.file(choice.image, record, "image"))
        height, width, _ = image.shape
        return Sample(choice.name, image, self._mask(choice, record, (height, width)))

    def check_sizes(self) -> None:
        """Nothing: sizes were checked when the dataset was built."""

    def image_file(self, index: int) -> EncodedImage:
        """The file of a sample's image, which all its objects share."""
        image = self._choices[index].image
        return self._records.file(image, self._records[image], "image")

    def _of_annotations(
        self, choice: Choice[Object], record: dict[str, Any], shape: tuple[int, int]
    ) -> Bool[np.ndarray, "h w"]:
        ids = {one.id for one in choice.objects}
        annotations = [
            Annotation(
                entry["id"], entry["category_id"], bool(entry["iscrowd"]), entry["segmentation"]
            )
            for entry in json.loads(record["annotations"])
            if entry["id"] in ids
        ]
        return union(annotations, shape, self._records.folder, self._records.names[choice.image])

    def _of_labels(
        self, choice: Choice[Object], record: dict[str, Any], shape: tuple[int, int]
    ) -> Bool[np.ndarray, "h w"]:
        labels = read_labels(self._records.file(choice.image, record, "labels"))
        return select(labels, [int(one.id) for one in choice.objects])
