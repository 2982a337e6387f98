"""Files that lie in a folder or in a zip archive, read by the names that they have in both."""

from __future__ import annotations

import contextlib
import io
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path


class Members:
    """The files of a folder, or of an archive, by their paths in it; what is hidden is left out.

    Large archives are thus read where they lie, one file at a time, by one thread.

    Raises ValueError where a file that is meant to be an archive is none.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._archive: zipfile.ZipFile | None = None
        if place.is_dir():
            names = (path.relative_to(place) for path in place.rglob("*") if path.is_file())
            self.names = sorted(name.as_posix() for name in names if not name.name.startswith("."))
            return
        with _reading(place):
            self._archive = zipfile.ZipFile(place)
        weakref.finalize(self, self._archive.close)  # or Python may warn of a file left open
        self.names = sorted(
            name
            for name in self._archive.namelist()
            if not name.endswith("/") and not Path(name).name.startswith(".")
        )

    def path(self, name: str) -> Path:
        """What messages call a file."""
        return self.place / name

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[io.BufferedIOBase]:
        """A file, read from its beginning. Raises ValueError where the archive is broken."""
        if self._archive is None:
            with open(self.place / name, "rb") as opened:
                yield opened
        else:
            with _reading(self.path(name)), self._archive.open(name) as opened:
                yield opened

    def read(self, name: str) -> bytes:
        """All of a file. Raises as `open`."""
        with self.open(name) as opened:
            return opened.read()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is broken ({error}): get the archive again") from error
