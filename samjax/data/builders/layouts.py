"""Where a published dataset has its images and masks, as data: folders, or tables of paths."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from samjax.data.builders.archives import Archive
from samjax.data.folder import Pair, list_images, match
from samjax.data.splits import quote

# The folders of a dataset by the names that its archives give them, wherever they are.
Roots = Mapping[str, Path]


@dataclasses.dataclass(frozen=True)
class Folders:
    """Images and masks in a folder each, under the same names up to the extension."""

    # From the archive's folder on, with "/"; of several, the first that is there.
    images: str | tuple[str, ...]
    masks: str | tuple[str, ...]
    # What a mask's name has after its image's.
    suffix: str = ""
    # What the names of files end in that lie among the images and are none.
    skip: str | None = None
    # Whether files without a partner are left out, with a warning, and no error.
    lenient: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        """All that it may have, from the archives' folders on."""
        return (*_several(self.images), *_several(self.masks))

    def pairs(
        self, roots: Roots, warn: Callable[[str], None], others: frozenset[str]
    ) -> list[Pair]:
        """The pairs, sorted by name.

        `others` are names of images elsewhere whose masks lie among these; `warn` is told what is
        left out. Raises ValueError for a missing folder, for one without images, and for files
        without a partner.
        """
        images = list_images(_place(roots, self.images), self.skip)
        masks = list_images(_place(roots, self.masks), suffix=self.suffix)
        pairs, faults = match(
            images, {n: f for n, f in masks.items() if n in images or n not in others}
        )
        for kind, files in faults.items():
            told = f"{files[0].parent} has {kind}: {quote(file.name for file in files)}"
            if not self.lenient:
                raise ValueError(f"{told}; get the dataset again")
            warn(f"{told}; they are left out")
        return list(pairs)

    def names(self, roots: Roots) -> frozenset[str]:
        """The names of all images."""
        return frozenset(list_images(_place(roots, self.images), self.skip))


@dataclasses.dataclass(frozen=True)
class Table:
    """A CSV file with a header, whose columns `image` and `label` are paths from its own folder."""

    file: str

    @property
    def paths(self) -> tuple[str, ...]:
        """The table alone."""
        return (self.file,)

    def pairs(self, roots: Roots) -> list[Pair]:
        """The pairs, sorted by name. Raises ValueError for what the table lacks or names amiss."""
        file = _place(roots, self.file)
        if not file.is_file():
            raise ValueError(f"the table {file} is missing: get the dataset again")
        try:
            with file.open(newline="", encoding="utf-8-sig") as stream:
                rows = list(csv.DictReader(stream))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{file} is no table ({error}): get the dataset again") from error
        pairs = []
        for row in rows:
            image, mask = (
                self._path(file, row.get(column), column) for column in ("image", "label")
            )
            pairs.append(Pair(image.stem, image, mask))
        if not pairs:
            raise ValueError(f"{file} lists no images: get the dataset again")
        return sorted(pairs, key=lambda pair: pair.name)

    def _path(self, table: Path, value: str | None, column: str) -> Path:
        if not value:
            raise ValueError(f"{table} has no {column} in each row: get the dataset again")
        path = table.parent / value
        if not path.resolve().is_relative_to(table.parent.resolve()) or not path.is_file():
            raise ValueError(f"{table} names {value}, which is not there: get the dataset again")
        return path


Part = Folders | Table


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way in which a dataset is published."""

    # How to get it: a sentence's end, after "get".
    source: str
    archives: tuple[Archive, ...]
    # The dataset's own splits; one of several parts has them by name.
    splits: Mapping[str, Part | Mapping[str, Part]]

    def find(self, place: Path) -> dict[Archive, Path]:
        """Those of the archives, or of their extracted folders, that are there.

        A folder of an archive's name that has nothing of it does not count.
        """
        found = {archive: archive.find(place) for archive in self.archives}
        return {
            archive: path
            for archive, path in found.items()
            if path is not None and (path.is_file() or self.fits({archive.folder: path}))
        }

    def fits(self, roots: Roots) -> bool:
        """Whether anything of it is in the folders: two layouts may have archives of one name."""
        places = (_place(roots, p) for p in self.paths if p.partition("/")[0] in roots)
        return any(place.exists() for place in places)

    def path_in(self, archive: Archive) -> str:
        """What an archive's extracted folder has, from that on."""
        return next(p for p in self.paths if p.partition("/")[0] == archive.folder)

    @property
    def paths(self) -> list[str]:
        """All that it may have, from the archives' folders on."""
        parts = [
            part
            for own in self.splits.values()
            for part in (own.values() if isinstance(own, Mapping) else [own])
        ]
        return [path for part in parts for path in part.paths]

    def pairs(self, roots: Roots, warn: Callable[[str], None]) -> dict[str, dict[str, list[Pair]]]:
        """The pairs of each part of each split; a split of one part has it under "".

        Raises ValueError, naming the file, for what is missing or has no partner; `warn` is told of
        what may be left out.
        """
        return {
            split: {
                name: self._pairs(part, roots, warn)
                for name, part in (parts if isinstance(parts, Mapping) else {"": parts}).items()
            }
            for split, parts in self.splits.items()
        }

    def _pairs(self, part: Part, roots: Roots, warn: Callable[[str], None]) -> list[Pair]:
        if isinstance(part, Table):
            return part.pairs(roots)
        others = (
            other.names(roots)
            for other in self.splits.values()
            if isinstance(other, Folders) and other is not part and other.masks == part.masks
        )
        return part.pairs(roots, warn, frozenset().union(*others))


def _several(paths: str | tuple[str, ...]) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else paths


def _place(roots: Roots, paths: str | tuple[str, ...]) -> Path:
    """The first path that is there, else the first."""
    places = [roots[path.partition("/")[0]] / path.partition("/")[2] for path in _several(paths)]
    return next((place for place in places if place.exists()), places[0])
