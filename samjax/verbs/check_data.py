"""`samjax check-data`."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from rich.console import Console
from tyro.conf import Positional

from samjax.arguments import Outcome, parse
from samjax.terminal import progress_on


@dataclasses.dataclass(frozen=True)
class CheckData:
    """Reads a whole dataset and names what is wrong with it; exit code 1 where there are errors.

    Errors: files without a partner or that cannot be read, sizes that differ, faults in a COCO
    JSON, objects and classes that cannot be had, and images that are in several splits (by their
    decoded pixels). Warnings: empty masks, tiny objects, masks of more than two values, missing
    splits.

    Example: samjax check-data my_images
    """

    data: Positional[str]
    """What `--data` of `samjax train` takes."""
    split: Literal["train", "validation", "test"] | None = None
    """Which part of the data; left out, all, and whether they share images."""
    split_seed: int = 0
    """As for `samjax train`: what draws the splits, where the data has none of its own."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of the splits, where the data has none of its own."""
    objects: Literal["together", "each"] = "together"
    """As for `samjax train`: each, where every object is to be a sample of its own."""
    classes: tuple[str, ...] = ()
    """As for `samjax train`: the categories or labels that are to count; left out, all."""
    json: bool = False
    """Print one JSON object with every problem, on one line, last on stdout."""

    def run(self, console: Console) -> dict[str, Any]:
        """Prints the problems by kind; returns how many there are."""
        from samjax.data.check import check

        report = check(
            self.data,
            self.split,
            seed=self.split_seed,
            fractions=self.fractions,
            objects=self.objects,
            classes=self.classes,
            track=progress_on(console),
        )
        for line in report.lines():
            console.print(line)
        if not self.json:
            return report.summary()
        return {**report.summary(), "problems": [dataclasses.asdict(p) for p in report.problems]}


def run(argv: list[str], console: Console) -> Outcome:
    """Reads the arguments and runs the verb."""
    args = parse(CheckData, argv, "samjax check-data", None, None)
    return args.run(console), args.json
