"""metrics.jsonl: what a run measured, a line every few steps."""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from samjax.files import write_beside, writing


class MetricsLog:
    """metrics.jsonl, cut back to the step that a run resumes from.

    Of several processes one has the file, and the others none (`path` None).
    """

    def __init__(self, path: Path | None, start: int) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path is not None and path.is_file() else []
        self._lines = [line for line in map(_parse, lines) if line and line["step"] <= start]
        if path is not None:
            with write_beside(path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in self._lines))
        self._since: tuple[int, float] | None = None
        self._seconds_per_step: float | None = None

    def start_clock(self, step: int) -> None:
        """Times the steps after `step`."""
        self._since = (step, time.perf_counter())

    def stop_clock(self, step: int) -> None:
        """Ends the timing, so that what follows a step, such as a validation, is not counted."""
        if self._since is not None and step > self._since[0]:
            elapsed = time.perf_counter() - self._since[1]
            self._seconds_per_step = elapsed / (step - self._since[0])
        self._since = None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends a line, with the seconds a step took where they were timed: all of it or nothing.

        Raises OSError with one sentence where the disk refuses.
        """
        line = {"step": step, **values}
        if self._seconds_per_step is not None:
            line["seconds_per_step"] = self._seconds_per_step
        self._seconds_per_step = None
        if self._path is not None:
            with writing(self._path):
                _append(self._path, json.dumps(line) + "\n")
        self._lines.append(line)

    def seconds_per_step(self) -> float | None:
        """The median over all lines."""
        times = [line["seconds_per_step"] for line in self._lines if "seconds_per_step" in line]
        return statistics.median(times) if times else None


def _append(path: Path, text: str) -> None:
    with open(path, "ab", buffering=0) as file:
        end, rest = file.seek(0, os.SEEK_END), text.encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise


def _parse(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None  # cut in mid-write by a kill
