"""What the builders of images with masks share: unpacking, checking, writing records.

Records hold the files' own bytes. TFDS would need TensorFlow to encode arrays, and this way samples
are decoded by the very code that decodes folders.
"""

from __future__ import annotations

import abc
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from tensorflow_datasets.core import file_adapters

from samjax.data.folder import Pair, check_pairs
from samjax.data.walk import Track, untracked


class _Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Nothing: TFDS publishes none of these, and its search leaves an empty folder in /tmp."""


class ImageMaskBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A dataset of images with a mask each; a subclass says where it is and how files pair up.

    The records are `name`, `image` and `mask`, the latter two as they are in the dataset's files. A
    dataset without official splits is `train`, as is TFDS's custom; `TfdsSource` then draws splits.

    TFDS's download manager is not used: it needs TensorFlow to unpack an archive, and where there
    is no network it tries in silence for minutes. `samjax.data.builders.prepare` puts the archive
    where TFDS has files that were fetched by hand.
    """

    TITLE: ClassVar[str]
    HOMEPAGE: ClassVar[str]
    # What the data may be used for.
    LICENSE: ClassVar[str]
    CITATION: ClassVar[str]
    # The archive's file name, its one folder, and how many pairs that holds.
    ARCHIVE: ClassVar[str]
    FOLDER: ClassVar[str]
    NUM_PAIRS: ClassVar[int]
    # The archive's URL, size in bytes and sha256; None where it takes registration to get it.
    DOWNLOAD: ClassVar[tuple[str, int, str] | None] = None

    # TFDS would look for checksums beside this file, and for that needs a package
    # (importlib_resources) that it does not require.
    url_infos = None

    # Shows progress; set by who builds.
    track: Track = staticmethod(untracked)

    def __init__(self, *, file_format: str = "array_record", **options: Any) -> None:
        super().__init__(file_format=file_format, **options)

    @abc.abstractmethod
    def pairs(self, root: Path) -> dict[str, Sequence[Pair]]:
        """The pairs of each split, in the archive's folder.

        Raises ValueError where the files are not those of the dataset.
        """

    @classmethod
    def how_to_get(cls) -> str:
        """Where a user finds the archive."""
        return f"get {cls.ARCHIVE} from {cls.HOMEPAGE}"

    @classmethod
    def missing(cls, folder: Path) -> str:
        """What to say where `find` finds nothing."""
        return (
            f"{folder} holds neither {cls.ARCHIVE} nor {cls.FOLDER}/: {cls.how_to_get()} and put "
            "it there"
        )

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The dataset in a folder that holds it, as an archive or extracted, or that is it."""
        candidates = [folder / cls.FOLDER, folder / cls.ARCHIVE]
        if folder.absolute().name == cls.FOLDER:
            candidates.insert(0, folder)
        return next((path for path in candidates if path.exists()), None)

    @property
    def MANUAL_DOWNLOAD_INSTRUCTIONS(self) -> str:
        """What TFDS tells those who build without samjax's command."""
        return f"{self.how_to_get()} and put it there"

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "name": tfds.features.Text(),
            "image": tfds.features.Image(),
            "mask": tfds.features.Image(shape=(None, None, 1)),
        }
        return _Info(
            builder=self,
            description=self.TITLE,
            homepage=self.HOMEPAGE,
            license=self.LICENSE,
            citation=self.CITATION,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "mask"),
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
        splits = self._checked_pairs(found)
        self.info.metadata["names"] = {
            split: [pair.name for pair in pairs] for split, pairs in splits.items()
        }
        return {split: self._generate_examples(pairs) for split, pairs in splits.items()}

    def _generate_examples(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, dict[str, Any]]]:
        for position, pair in enumerate(pairs):
            image, mask = pair.image.read_bytes(), pair.truth.read_bytes()
            yield position, {"name": pair.name, "image": image, "mask": mask}

    def _checked_pairs(self, found: Path) -> dict[str, Sequence[Pair]]:
        """The pairs of the archive or of the extracted folder; ValueError names what is wrong."""
        try:
            splits = self.pairs(found if found.is_dir() else self._unpack(found))
            for pairs in splits.values():
                check_pairs(pairs)
        except ValueError as error:
            # What was unpacked goes with the unfinished build: the user has the archive.
            raise ValueError(str(error).replace(str(self._scratch()), str(found))) from error
        return splits

    def _unpack(self, archive: Path) -> Path:
        """The archive's folder, among the files of the unfinished build."""
        try:
            with zipfile.ZipFile(archive) as opened:
                members = [n for n in opened.namelist() if n.startswith(f"{self.FOLDER}/")]
                for member in self.track(members, f"unpacking {archive.name}", len(members)):
                    opened.extract(member, self._scratch())
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{archive} is broken ({error}): {self.how_to_get()} again") from error
        if not members:
            raise ValueError(f"{archive} holds no folder {self.FOLDER}: {self.how_to_get()}")
        return self._scratch() / self.FOLDER

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
