"""Datasets that `samjax data prepare` built as sources: records of encoded files, read by position.

`tfds:NAME` names one wherever data is asked for.
"""

from __future__ import annotations

from pathlib import Path

import tensorflow_datasets as tfds

from samjax.data.builders import default_data_dir, prepared_folder
from samjax.data.images import EncodedImage, Notices, read_image, read_mask
from samjax.data.sources import Sample
from samjax.data.splits import DEFAULT_FRACTIONS, Fractions, check_split, draw_split


def open_prepared(name: str, data_dir: Path | None = None) -> tfds.core.DatasetBuilder:
    """A prepared dataset, in `data_dir` or where TFDS keeps datasets.

    Raises FileNotFoundError where it is not prepared, ValueError for an unknown name.
    """
    data_dir = default_data_dir() if data_dir is None else data_dir
    folder = prepared_folder(name, data_dir)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name} is not prepared in {data_dir}: run `samjax data prepare {name}`, or set "
            "TFDS_DATA_DIR to the folder where it is"
        )
    return tfds.builder_from_directory(folder)


def choose_records(
    builder: tfds.core.DatasetBuilder, split: str, seed: int, fractions: Fractions
) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    """Of a split: the stored split that it lies in, its names, and the positions of these there.

    A dataset without official splits, which is all `train`, is split by seed as a flat folder is;
    where its metadata has `groups`, such as the volume of each slice, no group is divided. Raises
    ValueError for a split that is not there or empty.
    """
    name, folder = builder.info.name, Path(builder.data_dir)
    stored: dict[str, list[str]] = builder.info.metadata["names"]
    split = check_split(split)
    if stored.keys() == {"train"}:
        groups: list[str] = builder.info.metadata.get("groups", stored)["train"]
        drawn = set(draw_split(folder, list(dict.fromkeys(groups)), split, seed, fractions))
        grouped = zip(stored["train"], groups, strict=True)
        names = sorted(name for name, group in grouped if group in drawn)
        split = "train"
    elif split in stored:
        names = stored[split]
    else:
        raise ValueError(f"{name} has no split {split!r}, only {', '.join(stored)}")
    positions = {name: position for position, name in enumerate(stored[split])}
    return split, tuple(names), tuple(positions[name] for name in names)


class TfdsSource:
    """One split of a prepared dataset; its samples are those of the folder that it was built from.

    A dataset without official splits, which is all `train`, is split by seed as a flat folder is.
    Images and masks are decoded as those of a `samjax.data.folder.FolderSource`.

    Raises FileNotFoundError for a dataset that is not prepared, ValueError for an unknown name and
    for a split that is not there or empty.
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
        folder = Path(builder.data_dir)
        split, self.names, self._positions = choose_records(builder, split, seed, fractions)
        encoded = {key: tfds.decode.SkipDecoding() for key in ("image", "mask")}
        self._records = builder.as_data_source(split, decoders=encoded)
        self._folder = folder
        self._notices = Notices(folder)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        image_file, mask_file = self._files(index)
        mask, notice = read_mask(mask_file)
        self._notices.say(notice, mask_file)
        return Sample(self.names[index], read_image(image_file), mask)

    def check_sizes(self) -> None:
        """Nothing: sizes were checked when the dataset was built."""

    def image_file(self, index: int) -> EncodedImage:
        """The file of a sample's image."""
        return self._files(index)[0]

    def _files(self, index: int) -> tuple[EncodedImage, EncodedImage]:
        """Of a sample's image and of its mask."""
        name, record = self.names[index], self._records[self._positions[index]]
        image, mask = (
            EncodedImage(record[key], self._folder / f"{name} ({key})") for key in ("image", "mask")
        )
        return image, mask
