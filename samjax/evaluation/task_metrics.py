"""Metrics of dense tasks over a whole set: from sums over pixels, not from means of images.

`measure` counts a batch, jitted; counts add up; `summarize` makes metrics of them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samjax.tasks import Task
from samjax.training.task_losses import known_pixels, unit

# Bins of angles from 0 to 180 degrees; a median is interpolated within one of them.
_BINS = 36_000
_WITHIN = (11.25, 22.5, 30.0)

Counts = dict[str, np.ndarray]


@functools.partial(jax.jit, static_argnums=0)
def measure(task: Task, maps: Any, truth: Any) -> dict[str, Any]:
    """Sums of one batch; arguments as those of `samjax.training.task_losses.task_loss`.

    cross_entropy: `confusion` (classes, classes), truth by prediction. masked_l1: `pixels`,
    `absolute`, `relative`, by image. cosine: `angles`, a histogram, `sum`, by image, and `within`.
    """
    known = known_pixels(task, truth)
    if task.loss == "cross_entropy":
        classes = maps.shape[1]
        pair = jnp.where(known, truth * classes + jnp.argmax(maps, axis=1), classes**2)
        counts = jnp.bincount(pair.ravel(), length=classes**2 + 1)[:-1]
        return {"confusion": counts.reshape(classes, classes)}
    pixels = jnp.sum(known, axis=(1, 2))
    if task.loss == "masked_l1":
        error = jnp.abs(maps - truth)[:, 0]
        share = error / jnp.where(known, truth[:, 0], 1.0)
        sums = (jnp.sum(jnp.where(known, x, 0.0), axis=(1, 2)) for x in (error, share))
        return dict(zip(("absolute", "relative", "pixels"), (*sums, pixels), strict=True))
    cosine = jnp.clip(jnp.sum(unit(maps) * unit(truth), axis=1), -1.0, 1.0)
    angle = jnp.degrees(jnp.arccos(cosine))
    place = jnp.clip((angle * (_BINS / 180)).astype(jnp.int32), 0, _BINS - 1)
    place = jnp.where(known, place, _BINS)
    return {
        "angles": jnp.bincount(place.ravel(), length=_BINS + 1)[:-1],
        "sum": jnp.sum(jnp.where(known, angle, 0.0), axis=(1, 2)),
        "pixels": pixels,
        "within": jnp.stack([jnp.sum(known & (angle < limit)) for limit in _WITHIN]),
    }


def add(total: Counts | None, batch: Mapping[str, Any]) -> Counts:
    """Counts of a batch added to those before, in float64 and int64."""
    new: Counts = {}
    for name, value in batch.items():
        array = np.asarray(value)
        array = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
        by_image = name in ("absolute", "relative", "sum", "pixels")
        new[name] = np.asarray(array.sum()) if by_image else array
    return new if total is None else {k: np.asarray(total[k] + v) for k, v in new.items()}


def summarize(task: Task, counts: Counts) -> dict[str, float]:
    """The task's metrics; NaN where no pixel was known.

    A class counts in the mean IoU if some pixel has it, in truth or prediction. Angles are in
    degrees, shares in [0, 1].
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        if task.loss == "cross_entropy":
            confusion = counts["confusion"]
            hits = np.diag(confusion)
            either = confusion.sum(0) + confusion.sum(1) - hits
            there = either > 0
            mean_iou = (hits[there] / either[there]).mean() if there.any() else np.nan
            return {
                "miou": float(mean_iou),
                "pixel_accuracy": float(hits.sum() / np.float64(confusion.sum())),
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
    tasks: Sequence[Task],
    found: Mapping[str, Mapping[str, float]],
    baseline: Mapping[str, Mapping[str, float]],
) -> float:
    """Delta_b in percent: the mean over tasks of the mean gain of their metrics over a baseline.

    A metric's gain is relative, and positive where it is better (Vandenhende et al. 2021).
    """
    gains = []
    for task in tasks:
        of_task = []
        for name, more in task.metrics.items():
            change = found[task.name][name] / baseline[task.name][name] - 1
            of_task.append(change if more else -change)
        gains.append(np.mean(of_task))
    return float(100 * np.mean(gains))
