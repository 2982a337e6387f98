"""A run folder is one process's at a time: two that write into it would mix their results."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from samjax.files import writing

try:
    import fcntl
except ImportError:  # Windows has no flock: there, nothing guards a run folder
    fcntl = None

_NAME = ".lock"


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Holds a run folder, which exists, for the length of a `with` block.

    The lock is on `.lock` in the folder, which stays there with the number of the last process
    that held it. The operating system lets go of it when the process ends, however it ends. Raises
    RuntimeError where another process holds it.
    """
    if fcntl is None:
        yield
        return
    with writing(run / _NAME):
        descriptor = os.open(run / _NAME, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take(descriptor, run)
        with writing(run / _NAME):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def check_free(run: Path) -> None:
    """Raises RuntimeError where another process holds a run folder."""
    if fcntl is None:
        return
    with contextlib.suppress(FileNotFoundError, PermissionError, NotADirectoryError):
        descriptor = os.open(run / _NAME, os.O_RDWR)
        try:
            _take(descriptor, run)
        finally:
            os.close(descriptor)


def _take(descriptor: int, run: Path) -> None:
    assert fcntl is not None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode() or "unknown"
        raise RuntimeError(
            f"another samjax, process {holder}, is training in {run}: wait for it or stop it, or "
            "choose another folder with --out"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # some network file systems
            raise
