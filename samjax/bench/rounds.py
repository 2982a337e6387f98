"""Timing in turns.

What shares a machine is timed in turns (A B C, A B C, ...), so that whatever else the machine does
falls on all of them; ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console

from samjax.terminal import progress_bar

Name = TypeVar("Name", bound=Hashable)


def check_rounds(rounds: int) -> None:
    """Raises ValueError where there would be no round."""
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")


def take_turns(
    calls: Mapping[Name, Callable[[], float]], rounds: int, console: Console
) -> dict[Name, list[float]]:
    """The seconds that each call returns, round by round, after a round that does not count."""
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    with progress_bar(console) as bar:
        turns = bar.add_task("rounds", total=(1 + rounds) * len(calls), note="")
        for i in range(1 + rounds):
            for name, call in calls.items():
                bar.update(turns, note=name if isinstance(name, str) else " ".join(name))
                taken = call()
                if i > 0:
                    seconds[name].append(taken)
                bar.advance(turns)
    return seconds


def ratios(reference: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """How often `others` go by while `reference` does once: median, least and most of the rounds.

    Below 1 where they take longer.
    """
    found = [a / b for a, b in zip(reference, others, strict=True)]
    return {"ratio": statistics.median(found), "ratio_range": [min(found), max(found)]}
