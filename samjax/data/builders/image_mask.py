"""What the builders of images with masks share: finding, unpacking, pairing and checking.

Records hold the files' own bytes, so that samples are decoded by the very code that decodes
folders.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from samjax.data.builders.archives import Archive
from samjax.data.builders.layouts import Layout
from samjax.data.builders.records import Contents, RecordsBuilder
from samjax.data.folder import Pair, check_pair
from samjax.data.images import read_image, read_mask
from samjax.data.walk import walk

_logger = logging.getLogger("samjax")


class ImageMaskBuilder(RecordsBuilder, skip_registration=True):
    """A dataset of images with a mask each; a subclass says where it is and how files pair up.

    The records are `name`, `image` and `mask`, the latter two as they are in the dataset's files. A
    dataset without official splits is `train`, as is TFDS's custom; `TfdsSource` then draws splits.
    """

    # The ways in which the dataset is published; the first that is at hand is taken.
    LAYOUTS: ClassVar[tuple[Layout, ...]]
    # Masks are grey, and the object is where they exceed this, of 255; None: each file tells, as
    # those of a folder do (`samjax.data.images.read_mask`).
    THRESHOLD: ClassVar[int | None] = None

    @classmethod
    def how_to_get(cls) -> str:
        """Where a user finds the archives."""
        return ", or ".join(f"get {layout.source}" for layout in cls.LAYOUTS)

    @classmethod
    def downloads(cls) -> tuple[Archive, ...]:
        """The archives of a layout of which each can be downloaded."""
        for layout in cls.LAYOUTS:
            if all(archive.can_be_fetched for archive in layout.archives):
                return layout.archives
        return ()

    @classmethod
    def missing(cls, folder: Path) -> str:
        """What to say where `find` finds nothing."""
        layout = max(cls.LAYOUTS, key=lambda layout: len(layout.find(folder)))
        found = layout.find(folder)
        lacking = [archive for archive in layout.archives if archive not in found]
        if len(lacking) > 1:
            holds = f"lacks {', '.join(archive.title for archive in lacking)}"
        elif lacking[0].file:
            holds = f"holds neither {lacking[0].file} nor {layout.path_in(lacking[0])}"
        else:
            holds = f"holds no {layout.path_in(lacking[0])}"
        them = "it" if len(layout.archives) == 1 else "them"
        return f"{folder} {holds}: {cls.how_to_get()} and put {them} there"

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The folder, where it holds or is the dataset, as archives or extracted."""
        return folder if cls._at_hand(folder) else None

    @classmethod
    def _at_hand(cls, folder: Path) -> list[Layout]:
        return [own for own in cls.LAYOUTS if len(own.find(folder)) == len(own.archives)]

    def record_features(self) -> dict[str, Any]:
        """An image and a mask."""
        return {
            "image": tfds.features.Image(),
            "mask": tfds.features.Image(shape=(None, None, 1)),
        }

    def contents(self, found: Path) -> dict[str, Contents]:
        """The pairs of each split; each file is decoded once. ValueError names what is wrong."""
        try:
            splits = self._splits(found)
            for split, parts in splits.items():
                self._check(split, [pair for pairs in parts.values() for pair in pairs])
        except ValueError as error:
            raise ValueError(self._of_archives(str(error), found)) from error
        self.info.metadata["threshold"] = self.THRESHOLD
        self.info.metadata["parts"] = {
            split: {part: [pair.name for pair in pairs] for part, pairs in parts.items()}
            for split, parts in splits.items()
            if len(parts) > 1
        }
        return {
            split: _contents([pair for pairs in parts.values() for pair in pairs])
            for split, parts in splits.items()
        }

    def _splits(self, found: Path) -> dict[str, dict[str, list[Pair]]]:
        """The pairs of each part of each split, of the first layout that the files are in."""
        folders: dict[tuple[Path, str], Path] = {}

        def root(archive: Archive, path: Path) -> Path:
            if path.is_dir():
                return path
            if (path, archive.folder) not in folders:
                place = self._scratch() / path.name
                folders[path, archive.folder] = archive.unpack(path, place, self.track)
            return folders[path, archive.folder]

        def warn(message: str) -> None:
            _logger.warning("%s", self._of_archives(message, found))

        unfit = []
        for layout in self._at_hand(found):
            at_hand = layout.find(found)
            roots = {archive.folder: root(archive, path) for archive, path in at_hand.items()}
            if layout.fits(roots):
                return layout.pairs(roots, warn)
            unfit.append((layout, roots))
        layout, roots = unfit[0]
        return layout.pairs(roots, warn)  # which says what is missing

    def _of_archives(self, message: str, found: Path) -> str:
        # What was unpacked goes with the unfinished build: the user has the archives.
        return message.replace(str(self._scratch()), str(found))

    def _check(self, split: str, pairs: list[Pair]) -> None:
        """Raises ValueError for names that are not unique, and for files that cannot be used."""
        files: dict[str, Path] = {}
        for pair in pairs:
            if (other := files.setdefault(pair.name, pair.image)) is not pair.image:
                raise ValueError(f"{other} and {pair.image} have one name: rename one of them")

        def is_marked(pair: Pair) -> bool:
            mask, _ = read_mask(pair.truth, self.THRESHOLD)
            check_pair(pair, read_image(pair.image).shape[:2], mask.shape)
            return bool(mask.any())

        # All of them are read, before any is said to be marked.
        if not any([*walk(is_marked, pairs, f"checking {split}", self.track)]):
            raise ValueError(
                f"no mask in {pairs[0].truth.parent} marks anything: they are not the dataset's"
            )


def _contents(pairs: list[Pair]) -> Contents:
    return Contents([pair.name for pair in pairs], map(_record, pairs))


def _record(pair: Pair) -> dict[str, bytes]:
    return {"image": pair.image.read_bytes(), "mask": pair.truth.read_bytes()}
