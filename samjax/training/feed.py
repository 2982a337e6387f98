"""Batches on their way to the device, one step ahead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax


class Feed:
    """Holds the next batch, which is read and sent to the device while a step computes."""

    def __init__(self, batches: Iterator[dict[str, Any]]) -> None:
        self._batches = batches
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
            self._ahead = jax.device_put(batch), [int(index) for index in indices]

    def take(self) -> tuple[dict[str, Any], list[int]]:
        """The next batch's inputs on the device, and the positions of its images in the source.

        Raises what reading it raised.
        """
        if isinstance(self._ahead, Exception):
            raise self._ahead
        return self._ahead
