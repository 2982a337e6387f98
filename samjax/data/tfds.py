"""Datasets that `samjax data prepare` built as sources: records of encoded files, read by position.

`tfds:NAME` names one wherever data is asked for, and `tfds:NAME/PART` one of whose test split a
part is chosen, such as `tfds:polyp/kvasir`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from samjax.data.builders import default_data_dir, prepared_folder
from samjax.data.images import EncodedImage, Notices, read_image, read_mask
from samjax.data.sources import Dataset, Objects, Sample
from samjax.data.splits import DEFAULT_FRACTIONS, Fractions, check_split, draw_split

# What records hold as image files.
_ENCODED = ("image", "mask", "labels")


def open_prepared(name: str, data_dir: Path | None = None) -> tfds.core.DatasetBuilder:
    """A prepared dataset, in `data_dir` or where TFDS keeps datasets; whole for NAME/PART, too.

    Raises FileNotFoundError where it is not prepared, ValueError for an unknown name or part.
    """
    name, _, part = name.partition("/")
    data_dir = default_data_dir() if data_dir is None else data_dir
    folder = prepared_folder(name, data_dir)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name} is not prepared in {data_dir}: run `samjax data prepare {name}`, or set "
            "TFDS_DATA_DIR to the folder where it is"
        )
    builder = tfds.builder_from_directory(folder)
    parts: dict[str, dict[str, list[str]]] = builder.info.metadata.get("parts", {})
    known = list(dict.fromkeys(own for of_split in parts.values() for own in of_split))
    if part and part not in known:
        raise ValueError(f"{name} has no part {part!r}, only {', '.join(known) or 'the whole'}")
    return builder


def choose_records(
    builder: tfds.core.DatasetBuilder, split: str, seed: int, fractions: Fractions, part: str = ""
) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    """Of a split: the stored split that it lies in, its names, and the positions of these there.

    A dataset without official splits, which is all `train`, is split by seed as a flat folder is;
    where its metadata has `groups`, such as the volume of each slice, no group is divided. Of a
    split that has parts, `part` alone is taken, where it is given. Raises ValueError for a split
    that is not there or empty.
    """
    name, folder = builder.info.name, Path(builder.data_dir)
    stored: dict[str, list[str]] = builder.info.metadata["names"]
    split = check_split(split)
    parts: dict[str, list[str]] = builder.info.metadata.get("parts", {}).get(split, {})
    if stored.keys() == {"train"}:
        groups: list[str] = builder.info.metadata.get("groups", stored)["train"]
        drawn = set(draw_split(folder, list(dict.fromkeys(groups)), split, seed, fractions))
        grouped = zip(stored["train"], groups, strict=True)
        names = sorted(name for name, group in grouped if group in drawn)
        split = "train"
    elif split in stored:
        names = parts.get(part, stored[split])
    else:
        raise ValueError(f"{name} has no split {split!r}, only {', '.join(stored)}")
    positions = {name: position for position, name in enumerate(stored[split])}
    return split, tuple(names), tuple(positions[name] for name in names)


def open_tfds(
    name: str,
    split: str,
    seed: int = 0,
    fractions: Fractions = DEFAULT_FRACTIONS,
    objects: Objects = "together",
    classes: tuple[str, ...] = (),
    data_dir: Path | None = None,
) -> Dataset:
    """One split of a prepared dataset: of its annotations, its label images or its masks.

    `objects` and `classes` are those of `samjax.data.sources.open_source`. Raises as `TfdsSource`
    and `samjax.data.tfds_objects.ObjectRecords` do, and ValueError for objects and classes of a
    dataset of masks.
    """
    features = open_prepared(name, data_dir).info.features
    if "annotations" in features or "labels" in features:
        from samjax.data.tfds_objects import ObjectRecords

        return ObjectRecords(name, split, seed, fractions, objects, classes, data_dir)
    if "mask" in features and (objects == "each" or classes):
        raise ValueError(f"tfds:{name} has masks without objects: leave out objects and classes")
    return TfdsSource(name, split, seed, fractions, data_dir)


class Records:
    """The records of one split of a prepared dataset, with image files as they are.

    `builder` is what `open_prepared` gives of `name`, which may have a part of the dataset after a
    slash: splits that have parts are that one alone.

    Raises ValueError for a split that is not there or empty.
    """

    def __init__(
        self,
        name: str,
        split: str,
        seed: int,
        fractions: Fractions,
        builder: tfds.core.DatasetBuilder,
    ) -> None:
        self.folder = Path(builder.data_dir)
        self.features = frozenset(builder.info.features)
        part = name.partition("/")[2]
        self.stored, self.names, self.positions = choose_records(
            builder, split, seed, fractions, part
        )
        self.metadata: dict[str, Any] = builder.info.metadata
        encoded = {key: tfds.decode.SkipDecoding() for key in _ENCODED if key in self.features}
        self._records = builder.as_data_source(self.stored, decoders=encoded)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._records[self.positions[index]]

    def file(self, index: int, record: dict[str, Any], key: str) -> EncodedImage:
        """An image file of the record at a position."""
        return EncodedImage(record[key], self.folder / f"{self.names[index]} ({key})")


class TfdsSource:
    """One split of a prepared dataset; its samples are those of the folder that it was built from.

    A dataset without official splits, which is all `train`, is split by seed as a flat folder is.
    Images and masks are decoded as those of a `samjax.data.folder.FolderSource`, but that a dataset
    may tell the threshold of its masks. `name` may have a part of the dataset after a slash: splits
    that have parts are then that one alone.

    Raises as `open_prepared` and `Records` do, and ValueError for a dataset without masks.
    """

    def __init__(
        self,
        name: str,
        split: str,
        seed: int = 0,
        fractions: Fractions = DEFAULT_FRACTIONS,
        data_dir: Path | None = None,
    ) -> None:
        builder = open_prepared(name, data_dir)
        if "mask" not in builder.info.features:
            raise ValueError(f"{name} has dense tasks and no masks: name them with tasks")
        self._records = Records(name, split, seed, fractions, builder)
        self.names = self._records.names
        self._threshold: int | None = self._records.metadata.get("threshold")
        self._notices = Notices(self._records.folder)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        record = self._records[index]
        mask_file = self._records.file(index, record, "mask")
        mask, notice = read_mask(mask_file, self._threshold)
        self._notices.say(notice, mask_file)
        image = read_image(self._records.file(index, record, "image"))
        return Sample(self.names[index], image, mask)

    def check_sizes(self) -> None:
        """Nothing: sizes were checked when the dataset was built."""

    def image_file(self, index: int) -> EncodedImage:
        """The file of a sample's image."""
        return self._records.file(index, self._records[index], "image")
