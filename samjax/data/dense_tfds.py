"""Datasets of dense tasks that `samjax data prepare` built: `tfds:NAME` where data is asked for.

A record has an array for each task, by its name, or one encoded label image, `labels`, which is the
truth of the task `segmentation`, whatever its loss of classes is. The names of its classes, in
order, are then in the metadata, `classes`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from samjax.data.dense import DenseSample, checked_truth, no_validation
from samjax.data.dense_labels import check_labels_task, read_classes
from samjax.data.images import EncodedImage, read_image
from samjax.data.splits import DEFAULT_FRACTIONS, Fractions
from samjax.data.tfds import Records, open_prepared
from samjax.tasks import Task

_LABELS, _LABELLED = "labels", "segmentation"
# What records have beside the truths of dense tasks.
_OTHERS = {"name", "image", "mask", "annotations"}


class DenseTfds:
    """One split of a prepared dataset; its samples are those of the folder it was built from.

    A dataset without official splits, which is all `train`, is split by seed as a flat folder is.

    Raises FileNotFoundError for a dataset that is not prepared, ValueError for an unknown name, for
    a split or a task that it does not have, and for a segmentation into other classes than its own.
    """

    def __init__(
        self,
        name: str,
        split: str,
        tasks: Sequence[Task],
        data_dir: Path | None = None,
        seed: int = 0,
        fractions: Fractions = DEFAULT_FRACTIONS,
    ) -> None:
        builder = open_prepared(name, data_dir)
        features = set(builder.info.features)
        known = sorted(_LABELLED if key == _LABELS else key for key in features - _OTHERS)
        if not known:
            raise ValueError(f"{name} has masks and no dense tasks: leave out tasks")
        # Of a dataset with several numbers of classes, each has a truth of its own.
        self._truths = {
            task.name: name
            for task in tasks
            for name in (task.name, f"{task.name}_{task.channels}")
            if name in known
        }
        for task in tasks:
            if task.name not in self._truths:
                nearest = difflib.get_close_matches(task.name, known, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"{name} has no task {task.name!r}; the nearest is {nearest}, it has "
                    f"{', '.join(known)}"
                )
            if task.name == _LABELLED and _LABELS in features:
                _check_classes(task, name, builder.info.metadata["classes"])
        stored = builder.info.metadata["names"].keys()
        if split == "validation" and stored == {"train", "test"}:
            raise no_validation()
        self._records = Records(name, split, seed, fractions, builder)
        self.names: tuple[str, ...] = self._records.names
        self._tasks = tuple(tasks)

    def check_sizes(self) -> None:
        """Reads the first sample. Raises as reading does."""
        self[0]

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.names)

    def __getitem__(self, index: int) -> DenseSample:
        """The sample at a position. Raises ValueError, naming it, where it cannot be used."""
        record = self._records[index]
        image = read_image(self._records.file(index, record, "image"))
        truth = {
            task.name: self._truth(index, record, task, image.shape[:2]) for task in self._tasks
        }
        return DenseSample(self.names[index], image, truth)

    def _truth(
        self, index: int, record: dict[str, Any], task: Task, size: tuple[int, ...]
    ) -> np.ndarray:
        if task.name == _LABELLED and _LABELS in self._records.features:
            return read_classes(self._records.file(index, record, _LABELS), task, size)
        where = self._records.folder / f"{self.names[index]} ({task.name})"
        return checked_truth(record[self._truths[task.name]], task, size, where)

    def image_file(self, index: int) -> EncodedImage:
        """The file of a sample's image."""
        return self._records.file(index, self._records[index], "image")


def _check_classes(task: Task, name: str, classes: Sequence[str]) -> None:
    """Raises ValueError for a task of another number of classes than the dataset has."""
    check_labels_task(task, name)
    if task.classes != len(classes):
        raise ValueError(
            f"task {task.name} has {task.classes} classes, and {name} has {len(classes)}, "
            f"{', '.join(classes)}: name the task {task.name}:{len(classes)}:{task.loss}"
        )
