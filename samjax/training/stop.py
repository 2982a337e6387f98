"""Ctrl-C and SIGTERM between steps."""

from __future__ import annotations

import signal
import threading
from typing import Any


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a flag that is read between steps; a second one stops at once.

    A step donates its state: to be interrupted within it would lose both the old and the new one.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
