"""What Orbax does where it fails: it talks, and a save that it has begun goes on for a moment."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def clean_save(parts: Callable[[], Sequence[Path]]) -> Iterator[None]:
    """The body saves through Orbax; where that raises, nothing is printed and no part is left.

    `parts()` are the folders that there are of an unfinished save.
    """
    with silence():
        try:
            yield
        except Exception:
            # What its other writers raise is told when their tasks are collected, perhaps later.
            logging.getLogger("asyncio").addFilter(_is_not_of_orbax)
            for _ in range(20):
                time.sleep(0.05)  # its other writers go on after the first has failed
                found = parts()
                if not found:
                    break
                for part in found:
                    shutil.rmtree(part, ignore_errors=True)
            raise


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Leaves only what is raised: Orbax's threads and tasks log it too, each with a traceback, and
    TensorStore complains of event loops that the first error has closed.
    """
    logs, hook = [logging.getLogger(name) for name in ("", "absl", "asyncio")], sys.unraisablehook
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
        sys.unraisablehook = hook


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """Not of a task that is defined in Orbax: the text names the file."""
    return "orbax" not in record.getMessage()
