"""What all builders share: finding the dataset's files, writing records, without TensorFlow."""

from __future__ import annotations

import abc
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import tensorflow_datasets as tfds
from tensorflow_datasets.core import file_adapters

from samjax.data.builders.archives import Archive
from samjax.data.walk import Track, untracked


class Contents(NamedTuple):
    """One split: the samples' names in order, and their records, without `name`."""

    names: list[str]
    records: Iterable[dict[str, Any]]


class _Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Nothing: TFDS publishes none of these, and its search leaves an empty folder in /tmp."""


class RecordsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A dataset of images with their truths; a subclass says where it is and what it holds.

    Each record has `name` and what `record_features` says.

    TFDS's download manager is not used: it needs TensorFlow to unpack an archive, and where there
    is no network it tries in silence for minutes. `samjax.data.builders.prepare` puts the archive
    where TFDS has files that were fetched by hand.
    """

    TITLE: ClassVar[str]
    HOMEPAGE: ClassVar[str]
    # What the data may be used for.
    LICENSE: ClassVar[str]
    CITATION: ClassVar[str]
    # How many images with their truths there are; None where it depends on settings.
    NUM_PAIRS: ClassVar[int | None]

    # TFDS would look for checksums beside this file, and for that needs a package
    # (importlib_resources) that it does not require.
    url_infos = None

    # Shows progress; set by who builds.
    track: Track = staticmethod(untracked)

    def __init__(self, *, file_format: str = "array_record", **options: Any) -> None:
        super().__init__(file_format=file_format, **options)

    @classmethod
    def configured(cls, settings: str) -> tfds.core.BuilderConfig | None:
        """The settings of a text, as `samjax.data.builders.settings` has it; None: there are none.

        Raises ValueError for settings that the dataset has not.
        """
        if settings:
            raise ValueError(f"{cls.name} has no settings")
        return None

    @classmethod
    @abc.abstractmethod
    def how_to_get(cls) -> str:
        """Where a user finds the files."""

    @classmethod
    @abc.abstractmethod
    def find(cls, folder: Path) -> Path | None:
        """The dataset in a folder that holds it or is it."""

    @classmethod
    @abc.abstractmethod
    def missing(cls, folder: Path) -> str:
        """What to say where `find` finds nothing."""

    @classmethod
    def downloads(cls) -> tuple[Archive, ...]:
        """What to download where `find` finds nothing; nothing where it takes a person."""
        return ()

    @abc.abstractmethod
    def record_features(self) -> dict[str, Any]:
        """TFDS's features of what a record holds beside `name`; `image` is among them."""

    @abc.abstractmethod
    def contents(self, found: Path) -> dict[str, Contents]:
        """The splits of what `find` found. Raises ValueError where it is not the dataset."""

    def _create_builder_config(
        self, builder_config: Any, version: Any
    ) -> tfds.core.BuilderConfig | None:
        # TFDS's own lists the configurations that there can be, and warns of others.
        return builder_config if builder_config is not None else self.configured("")

    @property
    def MANUAL_DOWNLOAD_INSTRUCTIONS(self) -> str:
        """What TFDS tells those who build without samjax's command."""
        return f"{self.how_to_get()} and put it there"

    def _info(self) -> tfds.core.DatasetInfo:
        return _Info(
            builder=self,
            description=self.TITLE,
            homepage=self.HOMEPAGE,
            license=self.LICENSE,
            citation=self.CITATION,
            features=tfds.features.FeaturesDict(
                {"name": tfds.features.Text(), **self.record_features()}
            ),
            # Holds the names of each split in the order of its records, so that a source chooses
            # among them without reading all.
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        folder = Path(dl_manager.manual_dir)
        found = self.find(folder)
        if found is None:
            raise FileNotFoundError(self.missing(folder))
        splits = self.contents(found)
        self.info.metadata["names"] = {split: own.names for split, own in splits.items()}
        return {split: self._generate_examples(own) for split, own in splits.items()}

    def _generate_examples(self, contents: Contents) -> Iterator[tuple[int, dict[str, Any]]]:
        named = zip(contents.names, contents.records, strict=True)
        for position, (name, record) in enumerate(named):
            yield position, {"name": name, **record}

    def _scratch(self) -> Path:
        # While TFDS builds, its data folder is one that it removes on errors.
        return Path(self.data_dir) / "unpacked"

    def _generate_splits(
        self,
        dl_manager: tfds.download.DownloadManager,
        download_config: tfds.download.DownloadConfig,
    ) -> list[tfds.core.SplitInfo]:
        """Writes records as they come, one file a split, in place of TFDS's own writer.

        That one gathers a split in memory to shuffle it and, above 1 GB, in files that it writes
        with TensorFlow.
        """
        examples = self._split_generators(dl_manager)
        written = [self._write(split, examples[split]) for split in examples]
        shutil.rmtree(self._scratch(), ignore_errors=True)
        return written

    def _write(
        self, split: str, examples: Iterator[tuple[int, dict[str, Any]]]
    ) -> tfds.core.SplitInfo:
        template = self._get_filename_template(split)
        file = template.sharded_filepath(shard_index=0, num_shards=1)
        count, size = len(self.info.metadata["names"][split]), 0

        def records() -> Iterator[tuple[int, bytes]]:
            nonlocal size
            for position, example in self.track(examples, f"writing {split}", count):
                record = self.info.features.serialize_example(example)
                size += len(record)
                yield position, record

        file_adapters.ADAPTER_FOR_FORMAT[self.info.file_format].write_examples(file, records())
        return tfds.core.SplitInfo(
            name=split, shard_lengths=[count], num_bytes=size, filename_template=template
        )
