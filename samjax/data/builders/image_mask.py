"""What the builders of images with masks share: unpacking, and checking.

Records hold the files' own bytes, so that samples are decoded by the very code that decodes
folders.
"""

from __future__ import annotations

import abc
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from samjax.data.builders.records import Contents, RecordsBuilder
from samjax.data.folder import Pair, check_pairs


class ImageMaskBuilder(RecordsBuilder, skip_registration=True):
    """A dataset of images with a mask each; a subclass says where it is and how files pair up.

    The records are `name`, `image` and `mask`, the latter two as they are in the dataset's files. A
    dataset without official splits is `train`, as is TFDS's custom; `TfdsSource` then draws splits.
    """

    # The archive's one folder.
    FOLDER: ClassVar[str]

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

    def record_features(self) -> dict[str, Any]:
        """An image and a mask."""
        return {
            "image": tfds.features.Image(),
            "mask": tfds.features.Image(shape=(None, None, 1)),
        }

    def contents(self, found: Path) -> dict[str, Contents]:
        """The pairs of the archive or of the extracted folder; ValueError names what is wrong."""
        try:
            splits = self.pairs(found if found.is_dir() else self._unpack(found))
            for pairs in splits.values():
                check_pairs(pairs)
        except ValueError as error:
            # What was unpacked goes with the unfinished build: the user has the archive.
            raise ValueError(str(error).replace(str(self._scratch()), str(found))) from error
        return {
            split: Contents([pair.name for pair in pairs], map(_record, pairs))
            for split, pairs in splits.items()
        }

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


def _record(pair: Pair) -> dict[str, bytes]:
    return {"image": pair.image.read_bytes(), "mask": pair.truth.read_bytes()}
