"""What the builders of dense tasks share: samples of a source, written as records.

Records hold samples as the source gives them: the image as an image file, the truths as arrays
that zlib packs. A truth has its task's name; where a dataset has truths of several numbers of
classes, such as segmentation_7 and segmentation_19, a task segmentation reads that of its own.
"""

from __future__ import annotations

import abc
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from samjax.data.builders.records import Contents, RecordsBuilder
from samjax.data.dense import DenseDataset, DenseSample
from samjax.data.dense_folder import IMAGES, SPLITS
from samjax.tasks import CLASSES, Task


class DenseBuilder(RecordsBuilder, skip_registration=True):
    """A dataset of images with a truth for each task; the literature's `val` is the test split."""

    TASKS: ClassVar[tuple[Task, ...]]
    # What the dataset's own folder is called.
    FOLDER: ClassVar[str]

    @classmethod
    @abc.abstractmethod
    def is_dataset(cls, folder: Path) -> bool:
        """Whether a folder is laid out as the dataset."""

    @abc.abstractmethod
    def sources(self, found: Path) -> dict[str, DenseDataset]:
        """Each split's samples. Raises ValueError, naming the file, where they cannot be had."""

    def image(self, source: DenseDataset, index: int, sample: DenseSample) -> bytes:
        """The file of a sample's image: a PNG."""
        image = io.BytesIO()
        Image.fromarray(sample.image).save(image, "PNG")
        return image.getvalue()

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The dataset's folder: `folder`, or `FOLDER` in it."""
        return next((f for f in (folder, folder / cls.FOLDER) if cls.is_dataset(f)), None)

    def record_features(self) -> dict[str, Any]:
        """An image, and an array for each task."""
        features: dict[str, Any] = {"image": tfds.features.Image(shape=(None, None, 3))}
        for task in self.TASKS:
            labels = task.loss in CLASSES
            features[task.name] = tfds.features.Tensor(
                shape=(None, None) if labels else (None, None, task.channels),
                dtype=np.int32 if labels else np.float32,
                encoding="zlib",
            )
        return features

    def contents(self, found: Path) -> dict[str, Contents]:
        """The splits, whose files' headers are read first, and samples as they are written."""
        sources = self.sources(found)
        for source in sources.values():
            source.check_sizes()
        return {
            split: Contents(list(source.names), self._records(source))
            for split, source in sources.items()
        }

    def _records(self, source: DenseDataset) -> Iterator[dict[str, Any]]:
        for index in range(len(source)):
            sample = source[index]
            yield {"image": self.image(source, index, sample), **sample.truth}


def is_mtan(folder: Path) -> bool:
    """Whether a folder is laid out as MTAN's are (`samjax.data.dense_folder`), in both splits."""
    return all((folder / place / IMAGES).is_dir() for place in SPLITS.values())


# Where `is_mtan` is not so.
MTAN_PLACES = " and ".join(f"{place}/{IMAGES}" for place in SPLITS.values())
