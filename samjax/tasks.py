"""Dense tasks as data: what a model predicts for each pixel, how it learns it and is measured."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence

# What each loss says of a task: see `samjax.training.task_losses`.
LOSSES = ("cross_entropy", "masked_l1", "cosine")
# The metrics of tasks with each loss, by name, and whether more is better.
METRICS: dict[str, dict[str, bool]] = {
    "cross_entropy": {"miou": True, "pixel_accuracy": True},
    "masked_l1": {"absolute_error": False, "relative_error": False},
    "cosine": {
        "mean_angle": False,
        "median_angle": False,
        "within_11.25": True,
        "within_22.5": True,
        "within_30": True,
    },
}
# Truth of a pixel that does not count in a segmentation.
IGNORE = -1


@dataclasses.dataclass(frozen=True)
class Task:
    """A map to predict: `channels` numbers a pixel, learnt with `loss`, weighted by `weight`.

    `cross_entropy`: logits of classes, truth an int a pixel, -1 where it does not count.
    `masked_l1`: one number, such as depth, truth 0 where it is unknown.
    `cosine`: a direction of three numbers, such as a surface normal, truth (0, 0, 0) where unknown.

    Raises ValueError for a name that is no identifier, a loss that there is not, and channels that
    do not suit it.
    """

    name: str
    channels: int
    loss: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z]\w*", self.name):
            raise ValueError(f"a task's name is an identifier, such as depth, not {self.name!r}")
        if self.loss not in LOSSES:
            nearest = difflib.get_close_matches(self.loss, LOSSES, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"task {self.name}: unknown loss {self.loss!r}; the nearest is {nearest}, known "
                f"are {', '.join(LOSSES)}"
            )
        wants = {"masked_l1": 1, "cosine": 3}.get(self.loss)
        if self.channels < 2 and wants is None:
            raise ValueError(f"task {self.name}: cross_entropy needs two classes or more")
        if wants is not None and self.channels != wants:
            raise ValueError(
                f"task {self.name}: {self.loss} has {wants} channels, not {self.channels}"
            )
        if not self.weight >= 0:
            raise ValueError(f"task {self.name}: weight must not be negative, is {self.weight}")

    @property
    def metrics(self) -> dict[str, bool]:
        """The task's metrics, and whether more is better."""
        return METRICS[self.loss]


def find(tasks: Sequence[Task], name: str) -> Task:
    """The task of a name. Raises ValueError for one that there is not, with the nearest."""
    for task in tasks:
        if task.name == name:
            return task
    names = [task.name for task in tasks]
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    raise ValueError(f"no task {name!r}; the nearest is {nearest}, known are {', '.join(names)}")


# NYUv2 as MTAN, LibMTL and MTSAM have it; weights as in MTSAM's code.
NYUV2 = (
    Task("segmentation", 13, "cross_entropy", 1 / 6),
    Task("depth", 1, "masked_l1", 1 / 6),
    Task("normals", 3, "cosine", 4 / 6),
)
