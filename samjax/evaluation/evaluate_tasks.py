"""Measures a model of dense tasks over a set: jitted, at each image's own resolution."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samjax.data.dense_pipeline import place_truth
from samjax.evaluation.evaluate import Evaluation, resizing
from samjax.evaluation.task_metrics import add, measure, summarize
from samjax.models import MSam
from samjax.tasks import Task

# How metrics are written in tables, after their task.
_TITLES = {
    "miou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
    "max_f": "max F",
    "iou": "IoU",
    "absolute_error": "absolute error",
    "relative_error": "relative error",
    "mean_angle": "mean angle",
    "median_angle": "median angle",
    "within_11.25": "within 11.25°",
    "within_22.5": "within 22.5°",
    "within_30": "within 30°",
}


def titles(tasks: Sequence[Task]) -> dict[str, str]:
    """The metrics of some tasks, TASK/METRIC, and how they are written in tables."""
    return {
        f"{task.name}/{metric}": f"{task.name} {_TITLES[metric]}"
        for task in tasks
        for metric in task.metrics
    }


@functools.partial(jax.jit, static_argnums=0)
def predict_tasks(
    model: MSam, variables: Any, image: Any, input_size: Any, rows: Any, columns: Any
) -> dict[str, Any]:
    """The maps (b, channels, h, w) of all tasks at the images' own resolutions, by task.

    `rows` and `columns` are those of `samjax.evaluation.evaluate.resizing`.
    """
    maps = model.apply(variables, image, input_size)
    return {
        name: jnp.einsum("bih,bchw,bjw->bcij", rows, low, columns, precision="highest")
        for name, low in maps.items()
    }


def evaluate_tasks(
    model: MSam,
    variables: Any,
    batches: Iterator[dict[str, Any]],
    on_batch: Callable[[dict[str, Any], dict[str, Any]], None] = lambda batch, maps: None,
) -> Evaluation:
    """Runs a model over `samjax.data.dense_pipeline.dense_eval_batches`.

    The metrics, TASK/METRIC, are those of `samjax.evaluation.task_metrics`, of each image and of
    the set, whose pixels count alike; NaN where no pixel of a truth is known. `on_batch(batch,
    maps)` sees each batch with the maps (b, channels, h, w) of each task on the device, padded
    below and to the right to a common size.
    """
    variables = jax.device_put(variables)
    names: list[str] = []
    totals: dict[str, Any] = {}
    collected: dict[str, list[float]] = {}
    for batch in batches:
        sizes = [_size(truth) for truth in batch["truth"]]
        rows, columns = resizing(model, sizes)
        shape = rows.shape[1], columns.shape[1]
        maps = predict_tasks(model, variables, batch["image"], batch["input_size"], rows, columns)
        valid = np.flatnonzero(batch["valid"])
        names += [batch["names"][i] for i in valid]
        for task in model.tasks:
            truth = [place_truth(task, own[task.name], shape) for own in batch["truth"]]
            counts = jax.device_get(measure(task, maps[task.name], np.stack(truth)))
            counts = {name: value[valid] for name, value in counts.items()}
            totals[task.name] = add(totals.get(task.name), counts)
            for i in range(len(valid)):
                own = summarize(task, {name: value[i] for name, value in counts.items()})
                for metric, value in own.items():
                    collected.setdefault(f"{task.name}/{metric}", []).append(value)
        on_batch(batch, maps)
    of_set = {
        f"{task.name}/{metric}": value
        for task in model.tasks
        for metric, value in summarize(task, totals[task.name]).items()
    }
    return Evaluation(tuple(names), {k: np.array(v) for k, v in collected.items()}, of_set)


def _size(truth: dict[str, np.ndarray]) -> tuple[int, int]:
    height, width = next(iter(truth.values())).shape[:2]
    return height, width
