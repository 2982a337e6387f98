"""Files that are either whole or absent, and what to say where a disk refuses them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

# What no program can mend: a full disk, a quota, a limit, a place that cannot be written.
_REFUSALS = frozenset(
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EIO")
    if hasattr(errno, name)
)


@contextlib.contextmanager
def write_beside(destination: Path) -> Iterator[Path]:
    """Yields a path next to `destination`; what was written there takes its place at the end.

    Works for a file and for a folder that does not exist yet. On any error nothing is left. Raises
    OSError with one sentence where the disk refuses.
    """
    # Not by the process's number, which is the same in each container: what is left of one that was
    # killed would be in the way of the next.
    temporary = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.tmp")
    try:
        with writing(destination):
            yield temporary
            if temporary.is_file():  # some writers make files that only their owner can read
                umask = os.umask(0)
                os.umask(umask)
                temporary.chmod(0o666 & ~umask)
            os.replace(temporary, destination)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # a folder that is a file has nothing to remove
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Makes a folder, with its parents; on an error, those that were not there are gone again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):  # it holds what others have put there
                path.rmdir()
        raise


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Makes a folder that is not there yet; on an error it is gone again, with all that is in it.

    Raises FileExistsError where it is there, and OSError with one sentence where the disk refuses.
    """
    with writing(folder):
        folder.mkdir()
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def read_record(file: Path, mend: str) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError where it is damaged, with how to `mend` that."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{file} is damaged: {mend}")
    return record


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes a JSON object, which `read_record` reads."""
    with write_beside(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n")


def check_parent(path: Path) -> None:
    """Raises, before any work, where nothing could be written at `path`.

    FileNotFoundError where its parent does not exist, PermissionError where that is a file or
    read-only.
    """
    if not os.path.exists(path.parent):
        raise FileNotFoundError(f"there is no directory {path.parent} to write into; create it")
    check_writable(path.parent)


def check_writable(folder: Path) -> None:
    """Raises PermissionError where a folder is read-only, or could not be made where it is not."""
    # Not Path.exists, which raises where a parent cannot be looked into.
    places = (folder.absolute(), *folder.absolute().parents)
    place = next(path for path in places if os.path.exists(path))
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise PermissionError(
            f"{folder} cannot be written, since {place} is no folder that you may write; choose "
            "another one"
        )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says in one sentence which path the disk refuses, why, and what to do.

    TensorStore's errors are ValueErrors. Errors of other kinds, and those of files elsewhere that
    the body reads, pass as they are.
    """
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        number = error_number(error)
        name = getattr(error, "filename", None)
        if number not in _REFUSALS or (name is not None and not _is_near(Path(name), path)):
            raise
        raise OSError(
            f"{path} cannot be written ({os.strerror(number)}): free space there, make the folder "
            "writable, or choose another one"
        ) from error


def error_number(error: Exception) -> int | None:
    """The errno of an error of Python, or of the text of Rust's and TensorStore's; None else."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\bos[ _]error(?:_code=)?[ ']*(\d+)", str(error))
    return int(found[1]) if found else None


def _is_near(name: Path, path: Path) -> bool:
    return name == path or name in path.parents or path.parent in name.parents
