"""What the C library does with memory that a step has freed.

On a CPU, XLA takes the buffers of each call from the C library and frees them after it. By default
glibc gives large blocks back to the system at once, which then makes every page of the next call
anew, and fills it with zeros: a fifth of a training step, and more in virtual machines. Kept, the
pages are there; what is kept and no longer fits goes back when the program says so.

glibc's settings are those of mallopt(3); a user who sets its variables has the last word. With
other C libraries nothing happens.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from typing import Any

# The numbers of mallopt's parameters (malloc.h).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Has freed memory kept for whoever asks next; returns whether it will be.

    To be called before JAX is imported, whose threads else have heaps of their own.
    """
    libc = _glibc()
    if libc is None or _is_set_by_user():
        return False
    # One heap for all threads, large blocks too, which does not shrink by itself (-1: never).
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _ARENA_MAX: 1}
    return all([libc.mallopt(name, value) == 1 for name, value in settings.items()])


def release_freed_memory() -> None:
    """Gives what is free back to the system: after work whose blocks the next does not ask for."""
    libc = _glibc()
    if libc is not None and not _is_set_by_user():
        libc.malloc_trim(0)


@functools.cache
def _glibc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def _is_set_by_user() -> bool:
    return any(name.startswith("MALLOC_") for name in os.environ) or (
        "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    )
