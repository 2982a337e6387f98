"""What a user sees while work goes on: progress bars and notices, on standard error."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from samjax.data.walk import Track


def error_console() -> Console:
    """Standard error, where text stands as it is written."""
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def progress_bar(console: Console) -> Progress:
    """A bar with counts, the time that remains, and a `note` field."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def download_bar(console: Console) -> Progress:
    """A bar with bytes, their rate, and the time that remains."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def progress_on(console: Console) -> Track:
    """Shows on a console how many of some items went by."""

    def track(items: Iterable[Any], title: str, total: int) -> Iterator[Any]:
        with progress_bar(console) as bar:
            task = bar.add_task(title, total=total, note="")
            for item in items:
                yield item
                bar.advance(task)

    return track


class Interrupted(RuntimeError):
    """The user stopped a run; the message says how to go on."""


class _Notices(logging.Handler):
    """The library's notices, a line each, above the progress bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one notice."""
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        self._console.print(prefix + record.getMessage())


@contextlib.contextmanager
def notices_on(console: Console) -> Iterator[None]:
    """Prints the library's notices on a console instead of wherever logging sends them."""
    logger = logging.getLogger("samjax")
    before = logger.level, logger.handlers, logger.propagate
    logger.setLevel(logging.INFO)
    logger.handlers = [_Notices(console)]
    logger.propagate = False  # other libraries give the root logger a handler of their own
    try:
        yield
    finally:
        logger.setLevel(before[0])
        logger.handlers, logger.propagate = before[1:]


def print_wide(table: Table, console: Console) -> None:
    """Prints a table as wide as it needs to be: what is no terminal counts as a narrow one.

    A narrow terminal breaks lines, rather than columns being cut.
    """
    table.width = console.measure(table, options=console.options.update(width=250)).maximum
    console.print(table, crop=False)
