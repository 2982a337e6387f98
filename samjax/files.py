"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def write_beside(destination: Path) -> Iterator[Path]:
    """Yields a path next to `destination`; what was written there takes its place at the end.

    Works for a file and for a folder that does not exist yet. On any error nothing is left.
    """
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    try:
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
            temporary.unlink(missing_ok=True)
