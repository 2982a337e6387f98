"""Work on many files: done by threads, yielded in order, and shown to whoever watches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Passes items on while it shows how many of a known number went by: (items, title, number).
# `samjax.terminal.progress_on` makes one that draws a bar.
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]


def untracked(items: Iterable[Any], title: str, total: int) -> Iterable[Any]:
    """Shows nothing."""
    return items


def walk(
    function: Callable[[T], R], items: Sequence[T], title: str, track: Track = untracked
) -> Iterator[R]:
    """`function` of each item, in the order of the items; raises what it raised first.

    Threads suit what decodes images: Pillow and hashlib give up the interpreter's lock.
    """
    executor = ThreadPoolExecutor()
    try:
        yield from track(executor.map(function, items), title, len(items))
    finally:
        executor.shutdown(cancel_futures=True)
