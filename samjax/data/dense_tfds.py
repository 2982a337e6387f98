"""Datasets of dense tasks that `samjax data prepare` built: `tfds:NAME` where data is asked for."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from samjax.data.dense import DenseSample, checked_truth
from samjax.data.images import EncodedImage, read_image
from samjax.data.tfds import open_prepared
from samjax.tasks import Task


class DenseTfds:
    """One split of a prepared dataset; its samples are those of the folder it was built from.

    Raises FileNotFoundError for a dataset that is not prepared, ValueError for an unknown name, and
    for a split or a task that it does not have.
    """

    def __init__(
        self, name: str, split: str, tasks: Sequence[Task], data_dir: Path | None = None
    ) -> None:
        builder = open_prepared(name, data_dir)
        known = sorted(set(builder.info.features) - {"name", "image"})
        if known == ["mask"]:
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
        stored: dict[str, list[str]] = builder.info.metadata["names"]
        if split not in stored:
            raise ValueError(f"{name} has no split {split!r}, only {', '.join(stored)}")
        self.names: tuple[str, ...] = tuple(stored[split])
        self._tasks = tuple(tasks)
        decoders = {"image": tfds.decode.SkipDecoding()}
        self._records = builder.as_data_source(split, decoders=decoders)
        self._folder = Path(builder.data_dir)

    def check_sizes(self) -> None:
        """Reads the first sample. Raises as reading does."""
        self[0]

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.names)

    def __getitem__(self, index: int) -> DenseSample:
        """The sample at a position. Raises ValueError, naming it, where it cannot be used."""
        name, record = self.names[index], self._records[index]
        image = read_image(self._image_file(name, record))
        truth = {}
        for task in self._tasks:
            array, where = record[self._truths[task.name]], self._folder / f"{name} ({task.name})"
            truth[task.name] = checked_truth(array, task, image.shape[:2], where)
        return DenseSample(name, image, truth)

    def image_file(self, index: int) -> EncodedImage:
        """The file of a sample's image."""
        return self._image_file(self.names[index], self._records[index])

    def _image_file(self, name: str, record: dict[str, Any]) -> EncodedImage:
        return EncodedImage(record["image"], self._folder / f"{name} (image)")
