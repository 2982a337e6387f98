"""One process at a time: in a run folder, where two would mix their results, and in downloads."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from samjax.files import writing

try:
    import fcntl
except ImportError:  # Windows has no flock: there, nothing keeps processes apart
    fcntl = None

_NAME = ".lock"


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Holds a run folder, which exists, for the length of a `with` block.

    The lock is on `.lock` in the folder, which stays there with the number of the last process
    that held it. The operating system lets go of it when the process ends, however it ends. Raises
    RuntimeError where another process holds it.
    """
    with writing(run / _NAME):
        descriptor = os.open(run / _NAME, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take(descriptor, run)
        with writing(run / _NAME):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)


def check_free(run: Path) -> None:
    """Raises RuntimeError where another process holds a run folder."""
    with contextlib.suppress(FileNotFoundError, PermissionError, NotADirectoryError):
        descriptor = os.open(run / _NAME, os.O_RDWR)
        try:
            _take(descriptor, run)
        finally:
            os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Takes the lock on an open file, until it is closed; False where another process holds it.

    True, too, where there are no locks: on Windows, and on some network file systems.
    """
    return _flock(descriptor, wait=False)


def wait_lock(descriptor: int) -> None:
    """As `try_lock`, once every other process has let go of the file."""
    _flock(descriptor, wait=True)


def _flock(descriptor: int, *, wait: bool) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    return True


def _take(descriptor: int, run: Path) -> None:
    if not try_lock(descriptor):
        os.lseek(descriptor, 0, os.SEEK_SET)
        holder = os.read(descriptor, 32).decode(errors="replace") or "unknown"
        raise RuntimeError(
            f"another samjax, process {holder}, is training in {run}: wait for it or stop it, or "
            "choose another folder with --out"
        )
