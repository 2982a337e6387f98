"""Tables of results: rows of text, the head first, as Markdown and for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from samjax.terminal import print_wide
from samjax.training.memory import gigabytes

Rows = Sequence[Sequence[str]]


def markdown(rows: Rows) -> str:
    """A table whose first row is its head."""
    head, *body = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *body))


def print_table(rows: Rows, console: Console) -> None:
    """The same for a terminal: numbers, all but the first column, to the right."""
    head, *body = rows
    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in body:
        table.add_row(*row)
    print_wide(table, console)


def size(count: int | None) -> str:
    """A number of bytes, or - where nothing tells it."""
    return "-" if count is None else gigabytes(count)


def spread(least_and_most: Sequence[float]) -> str:
    """The least and the most of the rounds."""
    least, most = least_and_most
    return f"{least:.3f} to {most:.3f}"
