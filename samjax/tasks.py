"""Dense tasks as data: what a model predicts for each pixel, how it learns it and is measured."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence

# What each loss says of a task: see `samjax.training.task_losses`.
LOSSES = ("cross_entropy", "mask_classification", "balanced_bce", "masked_l1", "cosine")
# The metrics of tasks with each loss, by name, and whether more is better.
_OF_CLASSES = {"miou": True, "pixel_accuracy": True}
METRICS: dict[str, dict[str, bool]] = {
    "cross_entropy": _OF_CLASSES,
    "mask_classification": _OF_CLASSES,
    "balanced_bce": {"max_f": True, "iou": True},
    "masked_l1": {"absolute_error": False, "relative_error": False},
    "cosine": {
        "mean_angle": False,
        "median_angle": False,
        "within_11.25": True,
        "within_22.5": True,
        "within_30": True,
    },
}
# Truth of a pixel that does not count, where truths are classes.
IGNORE = -1
# Stands for every task where one is named.
ALL = "all"
# Losses whose maps have a channel for each class, the largest of which is the prediction.
MULTI_CLASS = ("cross_entropy", "mask_classification")
# Of losses whose truth is a class, (h, w) int32; of others it is (h, w, channels) float32.
CLASSES = (*MULTI_CLASS, "balanced_bce")


@dataclasses.dataclass(frozen=True)
class Task:
    """A map to predict: `channels` numbers a pixel, learnt with `loss`, weighted by `weight`.

    `cross_entropy`: logits of classes, truth an int a pixel, -1 where it does not count.
    `mask_classification`: scores of classes, made of masks and the class of each, truth as before.
    One mask for each class; with `tokens` so many, which are matched with the classes anew in each
    image (`samjax.training.mask_classification`).
    `balanced_bce`: a logit of yes or no, such as edges, truth 1 or 0, -1 where it does not count.
    `masked_l1`: one number, such as depth, truth 0 where it is unknown.
    `cosine`: a direction of three numbers, such as a surface normal, truth (0, 0, 0) where unknown.

    As text it is NAME:CHANNELS:LOSS:WEIGHT, and with `tokens` NAME:CHANNELS:LOSS:WEIGHT:TOKENS,
    which `parse` reads.

    Raises ValueError for a name that is no identifier or is `ALL`, a loss that there is not, and
    channels or tokens that do not suit it.
    """

    name: str
    channels: int
    loss: str
    weight: float = 1.0
    tokens: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z]\w*", self.name):
            raise ValueError(f"a task's name is an identifier, such as depth, not {self.name!r}")
        if self.name == ALL:
            raise ValueError(f"a task cannot be named {ALL}, which stands for all of them")
        if self.loss not in LOSSES:
            nearest = difflib.get_close_matches(self.loss, LOSSES, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"task {self.name}: unknown loss {self.loss!r}; the nearest is {nearest}, known "
                f"are {', '.join(LOSSES)}"
            )
        wants = {"balanced_bce": 1, "masked_l1": 1, "cosine": 3}.get(self.loss)
        if self.channels < 2 and wants is None:
            raise ValueError(f"task {self.name}: {self.loss} needs two classes or more")
        if wants is not None and self.channels != wants:
            count = "1 channel" if wants == 1 else f"{wants} channels"
            raise ValueError(f"task {self.name}: {self.loss} has {count}, not {self.channels}")
        if not 0 <= self.weight < math.inf:
            raise ValueError(
                f"task {self.name}: weight must be finite and not negative, is {self.weight}"
            )
        if self.tokens and self.loss != "mask_classification":
            raise ValueError(f"task {self.name}: {self.loss} has no tokens: leave them out")
        if self.tokens and self.tokens < self.channels:
            raise ValueError(
                f"task {self.name}: {self.tokens} tokens cannot show {self.channels} classes at "
                "once: take as many or more, or leave them out for one of each class"
            )

    def __str__(self) -> str:
        """The text that `parse` reads."""
        tokens = f":{self.tokens}" if self.tokens else ""
        return f"{self.name}:{self.channels}:{self.loss}:{self.weight!r}{tokens}"

    @property
    def classes(self) -> int:
        """How many classes its truth has, where it has any."""
        return max(2, self.channels)

    @property
    def decodings(self) -> int:
        """How many decodings make its map, each from a row of "no mask" embedding of its own."""
        return 1 if self.loss == "mask_classification" else self.channels

    @property
    def masks(self) -> int:
        """How many masks are classified, where its loss is mask_classification."""
        return self.tokens or self.channels

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
# CityScapes as MTAN and LibMTL have it, whose depth is the inverse of a depth.
CITYSCAPES = (Task("segmentation", 7, "cross_entropy"), Task("disparity", 1, "masked_l1"))
# PASCAL-Context as ASTMT (Maninis et al. 2019) has it; weights as in MTI-Net's code.
PASCAL_CONTEXT = (
    Task("segmentation", 21, "cross_entropy", 1.0),
    Task("human_parts", 7, "cross_entropy", 2.0),
    Task("saliency", 1, "balanced_bce", 5.0),
    Task("normals", 3, "cosine", 10.0),
    Task("edges", 1, "balanced_bce", 50.0),
)
SETS = {"nyuv2": NYUV2, "cityscapes": CITYSCAPES, "pascal_context": PASCAL_CONTEXT}


def parse(texts: Sequence[str]) -> tuple[Task, ...]:
    """Tasks from texts: NAME:CHANNELS:LOSS, followed by :WEIGHT or :WEIGHT:TOKENS, or of `SETS`.

    Raises ValueError for a text that is neither, and for two tasks of one name.
    """
    tasks: list[Task] = []
    for text in texts:
        tasks += SETS[text] if text in SETS else [_parse(text)]
    names = [task.name for task in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"there are two tasks {twice[0]!r}: leave one out")
    return tuple(tasks)


def _parse(text: str) -> Task:
    name, *rest = text.split(":")
    if not rest:
        nearest = difflib.get_close_matches(text, SETS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"no set of tasks {text!r}; the nearest is {nearest}, known are {', '.join(SETS)}; a "
            "task of your own is NAME:CHANNELS:LOSS, such as depth:1:masked_l1"
        )
    try:
        channels, loss, *numbers = rest
        if len(numbers) > 2:
            raise ValueError
        kinds = zip((float, int), numbers, strict=False)
        channels, numbers = int(channels), [kind(number) for kind, number in kinds]
    except ValueError:
        raise ValueError(
            "a task is NAME:CHANNELS:LOSS or NAME:CHANNELS:LOSS:WEIGHT, such as "
            f"depth:1:masked_l1:0.5, or NAME:CHANNELS:mask_classification:WEIGHT:TOKENS, not "
            f"{text!r}"
        ) from None
    return Task(name, channels, loss, *numbers)
