"""What a user sees while work goes on: progress bars and notices, on standard error."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


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


class _Notices(logging.Handler):
    """The library's notices, a line each, above the progress bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one notice."""
        self._console.print(f"{record.levelname.lower()}: {record.getMessage()}")


def send_notices_to(console: Console) -> None:
    """Prints the library's notices on a console instead of wherever logging sends them."""
    logger = logging.getLogger("samjax")
    logger.handlers = [_Notices(console)]
    logger.propagate = False  # other libraries give the root logger a handler of their own
