"""Batches on their way to the devices, one step ahead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from samjax.training.sharding import BatchLayout


class Feed:
    """Holds the next batch, which is read and sent to the devices while a step computes."""

    def __init__(self, batches: Iterator[dict[str, Any]], layout: BatchLayout) -> None:
        self._batches = batches
        self._layout = layout
        self._ahead: Any = None
        self.advance()

    def advance(self) -> None:
        """Reads the next batch, if there is one; where that fails, `take` says so in its turn."""
        try:
            batch = next(self._batches, None)
        except Exception as error:
            self._ahead = error
            return
        if batch is not None:
            indices = batch.pop("index")
            self._ahead = self._layout.place(batch), [int(index) for index in indices]

    def take(self) -> tuple[dict[str, Any], list[int]]:
        """The next batch's inputs on the devices, and its images' positions in the source.

        Of several processes, the positions are those of its own rows.

        Raises what reading it raised.
        """
        if isinstance(self._ahead, Exception):
            raise self._ahead
        return self._ahead
