"""Metrics of dense tasks over a whole set: from sums over pixels, not from means of images.

`measure` counts each image of a batch, jitted; counts add up; `summarize` makes metrics of them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samjax.tasks import MULTI_CLASS, Task
from samjax.training.task_losses import known_pixels, unit

# Bins of angles from 0 to 180 degrees; a median is interpolated within one of them.
_BINS = 36_000
_WITHIN = (11.25, 22.5, 30.0)
# Thresholds of a probability, of which the best counts.
_LEVELS = 256

Counts = dict[str, Any]


@functools.partial(jax.jit, static_argnums=0)
def measure(task: Task, maps: Any, truth: Any) -> dict[str, Any]:
    """Counts of each image; arguments as those of `samjax.training.task_losses.task_loss`.

    Arrays have a leading batch axis. Losses of `MULTI_CLASS`: `confusion` (b, classes, classes),
    truth by prediction. balanced_bce: `hits` and `alarms`, pixels above each threshold that are
    positive and negative, and `positives`. masked_l1: sums `absolute` and `relative`. cosine:
    `angles`, a histogram, their `sum`, and `within`, pixels within each limit. And `pixels`, the
    known ones.
    """
    known = known_pixels(task, truth)
    pixels = jnp.sum(known, axis=(1, 2))
    if task.loss in MULTI_CLASS:
        classes = maps.shape[1]
        pair = jnp.where(known, truth * classes + jnp.argmax(maps, axis=1), classes**2)
        counts = _histogram(pair, classes**2)
        return {"confusion": counts.reshape(-1, classes, classes), "pixels": pixels}
    if task.loss == "balanced_bce":
        level = jnp.floor(jax.nn.sigmoid(maps[:, 0]) * _LEVELS).astype(jnp.int32)
        level = jnp.clip(level, 0, _LEVELS - 1)
        found = {}
        for name, value in (("hits", 1), ("alarms", 0)):
            counts = _histogram(jnp.where(known & (truth == value), level, _LEVELS), _LEVELS)
            found[name] = jnp.flip(jnp.cumsum(jnp.flip(counts, 1), axis=1), 1)
        return {**found, "positives": jnp.sum(known & (truth == 1), axis=(1, 2)), "pixels": pixels}
    if task.loss == "masked_l1":
        error = jnp.abs(maps - truth)[:, 0]
        share = error / jnp.where(known, truth[:, 0], 1.0)
        sums = (jnp.sum(jnp.where(known, x, 0.0), axis=(1, 2)) for x in (error, share))
        return dict(zip(("absolute", "relative", "pixels"), (*sums, pixels), strict=True))
    cosine = jnp.clip(jnp.sum(unit(maps) * unit(truth), axis=1), -1.0, 1.0)
    angle = jnp.degrees(jnp.arccos(cosine))
    place = jnp.clip((angle * (_BINS / 180)).astype(jnp.int32), 0, _BINS - 1)
    within = [jnp.sum(known & (angle < limit), axis=(1, 2)) for limit in _WITHIN]
    return {
        "angles": _histogram(jnp.where(known, place, _BINS), _BINS),
        "sum": jnp.sum(jnp.where(known, angle, 0.0), axis=(1, 2)),
        "within": jnp.stack(within, axis=1),
        "pixels": pixels,
    }


def _histogram(places: Any, length: int) -> Any:
    """(b, length) counts of each image's places; those at `length` are left out."""
    count = jax.vmap(lambda image: jnp.bincount(image.ravel(), length=length + 1))
    return count(places)[:, :-1]


def add(total: Counts | None, batch: Mapping[str, Any]) -> Counts:
    """Counts of a batch's images added to those before, in float64 and int64."""
    new = {}
    for name, value in batch.items():
        array = np.asarray(value)
        new[name] = array.sum(axis=0, dtype=np.float64 if array.dtype.kind == "f" else np.int64)
    return new if total is None else {k: total[k] + v for k, v in new.items()}


def summarize(task: Task, counts: Counts) -> dict[str, float]:
    """The task's metrics; NaN where no pixel was known.

    A class counts in the mean IoU if some pixel has it, in truth or prediction. `max_f` is the
    largest F1 of all thresholds, `iou` that of the positive class at one half. Angles are in
    degrees, shares in [0, 1].
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        if task.loss in MULTI_CLASS:
            confusion = counts["confusion"]
            hits = np.diag(confusion)
            either = confusion.sum(0) + confusion.sum(1) - hits
            there = either > 0
            mean_iou = (hits[there] / either[there]).mean() if there.any() else np.nan
            return {
                "miou": float(mean_iou),
                "pixel_accuracy": float(hits.sum() / np.float64(confusion.sum())),
            }
        if task.loss == "balanced_bce":
            hits, predicted = counts["hits"], counts["hits"] + counts["alarms"]
            positives = np.float64(counts["positives"])
            scores = np.where(hits > 0, 2 * hits / (predicted + positives), 0.0)
            half = _LEVELS // 2
            return {
                "max_f": float(scores.max()) if counts["pixels"] else np.nan,
                "iou": float(hits[half] / (predicted[half] + positives - hits[half])),
            }
        pixels = np.float64(counts["pixels"])
        if task.loss == "masked_l1":
            return {
                "absolute_error": float(counts["absolute"] / pixels),
                "relative_error": float(counts["relative"] / pixels),
            }
        shares = counts["within"] / pixels
        return {
            "mean_angle": float(counts["sum"] / pixels),
            "median_angle": _median(counts["angles"]),
            **{f"within_{limit:g}": float(s) for limit, s in zip(_WITHIN, shares, strict=True)},
        }


def _median(histogram: np.ndarray) -> float:
    total = histogram.sum()
    if total == 0:
        return float("nan")
    below = np.cumsum(histogram)
    place = int(np.searchsorted(below, total / 2))
    before = below[place] - histogram[place]
    return float((place + (total / 2 - before) / histogram[place]) * 180 / _BINS)


def relative_gain(
    tasks: Sequence[Task], found: Mapping[str, float], baseline: Mapping[str, float]
) -> float:
    """Delta_b in percent: the mean over tasks of the mean gain of their metrics over a baseline.

    `found` and `baseline` are metrics by TASK/METRIC. A metric's gain is relative, and positive
    where it is better (Vandenhende et al. 2021). NaN where a metric of the baseline is 0, over
    which there is no relative gain, and where one is NaN.
    """
    gains = []
    for task in tasks:
        of_task = []
        for metric, more in task.metrics.items():
            name = f"{task.name}/{metric}"
            change = found[name] / baseline[name] - 1 if baseline[name] else np.nan
            of_task.append(change if more else -change)
        gains.append(np.mean(of_task))
    return float(100 * np.mean(gains))
