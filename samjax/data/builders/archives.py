"""What datasets are published in: archives, which are found, or their folders, and unpacked.

An archive is never believed: members that would lie outside of its folder are refused, links and
devices are left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from samjax.data.walk import Track

# What is raised for archives that are damaged, encrypted, or packed in a way that Python lacks.
BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,  # encrypted, or compressed in another way
)


@dataclasses.dataclass(frozen=True)
class Archive:
    """A folder of a dataset, and the file that it is published in."""

    # What it is called once it is extracted, without its parents.
    folder: str
    # A .zip, or .tar with any compression of Python; None where there is none that can be unpacked.
    file: str | None = None
    url: str | None = None
    # Bytes of the file, and its sha256, or `md5:` and its MD5; None where nobody told.
    size: int | None = None
    checksum: str | None = None

    @property
    def can_be_fetched(self) -> bool:
        """Whether it takes no person: what arrives can be compared with what was published."""
        return self.file is not None and self.url is not None and self.checksum is not None

    @property
    def title(self) -> str:
        """What a user looks for."""
        return self.file or f"{self.folder}/"

    def find(self, place: Path) -> Path | None:
        """The folder in `place`, else the file in it, else `place` where it is that folder."""
        if (place / self.folder).is_dir():
            return self._inner(place / self.folder)
        # Before the name of `place`: who collects archives may call the place as one of them.
        if self.file and (place / self.file).is_file():
            return place / self.file
        is_folder = place.absolute().name == self.folder and place.is_dir()
        return self._inner(place) if is_folder else None

    def _inner(self, folder: Path) -> Path:
        # Who extracts into a folder of the archive's name has it twice.
        inner = folder / self.folder
        return inner if inner.is_dir() else folder

    def unpack(self, file: Path, into: Path, track: Track) -> Path:
        """Extracts the folder from the archive `file` to a folder in `into`, and returns that.

        Raises ValueError for a file that is damaged, holds no such folder, or has members whose
        names lead out of it.
        """
        try:
            with _opened(file) as (names, read):
                members = {name: inner for name in names if (inner := self._place(name, file))}
                titled = track(members.items(), f"unpacking {file.name}", len(members))
                for name, inner in titled:
                    target = into / inner
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with read(name) as source, target.open("wb") as sink:
                        shutil.copyfileobj(source, sink)
        except BROKEN as error:
            raise ValueError(f"{file} is broken ({error}): get it again") from error
        if not members:
            raise ValueError(f"{file} holds no folder {self.folder}: it is another archive")
        return self._inner(into / self.folder)

    def _place(self, name: str, file: Path) -> Path | None:
        """Where a member belongs, from the dataset's folder on; None where it is none of it."""
        parts = PurePosixPath(name).parts
        if "__MACOSX" in parts or self.folder not in parts or name.endswith("/"):
            return None
        if PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name:
            raise ValueError(f"{file} has a member {name!r} that leads out of it: get it elsewhere")
        return Path(*parts[parts.index(self.folder) :])


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tuple[list[str], Callable[[str], IO[bytes] | None]]]:
    """The names of an archive's files, and what opens one of them."""
    if file.suffix == ".zip":
        with zipfile.ZipFile(file) as opened:
            yield opened.namelist(), opened.open
    else:
        with tarfile.open(file) as opened:
            members = {member.name: member for member in opened if member.isreg()}
            yield list(members), lambda name: opened.extractfile(members[name])
