"""Files that lie in a folder, a zip or a tar, read by the names that they have in each of these."""

from __future__ import annotations

import contextlib
import io
import tarfile
import weakref
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from samjax.data.builders.archives import BROKEN
from samjax.data.images import EncodedImage


class Members:
    """The files of a folder, or of an archive, by their paths in it; what is hidden is left out.

    Large archives are thus read where they lie, one file at a time, by one thread, and nothing is
    extracted: what a member's name says of other places has no effect. Links are left out.

    Raises ValueError where a file that is meant to be an archive is none.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        # What the names are relative to, within `place`.
        self._root = ""
        if place.is_dir():
            names, self._open = _of_folder(place)
        else:
            with _reading(place):
                names, self._open = (_of_zip if zipfile.is_zipfile(place) else _of_tar)(place)
        self.names: list[str] = sorted(filter(_is_visible, names))

    def below(self, marker: str) -> Members | None:
        """The part that has a file or folder `marker`, at whatever depth; None where none has.

        The least deep one, where there are several.
        """
        roots = {
            name[:start] for name in self.names if (start := f"/{name}/".find(f"/{marker}/")) >= 0
        }
        return self.under(min(roots, key=len)) if roots else None

    def under(self, root: str) -> Members:
        """The part in the folder `root`, with names from there on; "" is all of it."""
        root = f"{root.rstrip('/')}/" if root else ""
        part = object.__new__(Members)
        part.place, part._open, part._root = self.place, self._open, self._root + root
        part.names = [name.removeprefix(root) for name in self.names if name.startswith(root)]
        return part

    def path(self, name: str) -> Path:
        """What messages call a file."""
        return self.place / self._root / name

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[io.BufferedIOBase]:
        """The bytes of a file, from its start. Raises ValueError where the archive is broken."""
        with _reading(self.path(name)), self._open(self._root + name) as opened:
            yield opened

    def read(self, name: str) -> bytes:
        """All of a file. Raises as `open`."""
        with self.open(name) as opened:
            return opened.read()

    def image(self, name: str) -> EncodedImage:
        """An image file. Raises as `open`."""
        return EncodedImage(self.read(name), self.path(name))


_Opener = Callable[[str], contextlib.AbstractContextManager[io.BufferedIOBase]]


def _of_folder(place: Path) -> tuple[list[str], _Opener]:
    files = [path for path in place.rglob("*") if path.is_file()]
    return [file.relative_to(place).as_posix() for file in files], lambda n: (place / n).open("rb")


def _of_zip(place: Path) -> tuple[list[str], _Opener]:
    archive = zipfile.ZipFile(place)

    def read(name: str) -> io.BufferedIOBase:
        return archive.open(name)

    weakref.finalize(read, archive.close)  # or Python may warn of a file left open
    return [name for name in archive.namelist() if not name.endswith("/")], read


def _of_tar(place: Path) -> tuple[list[str], _Opener]:
    """A tar that is not compressed: of a compressed one, a member is not to be had by itself."""
    with tarfile.open(place, "r:") as archive:
        spans = {m.name.removeprefix("./"): (m.offset_data, m.size) for m in archive if m.isreg()}

    def read(name: str) -> io.BufferedIOBase:
        start, size = spans[name]
        with place.open("rb") as file:
            file.seek(start)
            content = file.read(size)
        if len(content) < size:
            raise EOFError("it ends too early")
        return io.BytesIO(content)

    return list(spans), read


def _is_visible(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return "__MACOSX" not in parts and not any(part.startswith(".") for part in parts)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except BROKEN as error:
        raise ValueError(f"{path} is broken ({error}): get the archive again") from error
