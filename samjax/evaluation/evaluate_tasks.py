"""Measures a model of dense tasks over a set: jitted, at each image's own resolution."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from samjax.data.dense_pipeline import place_truth
from samjax.evaluation.evaluate import Evaluation, of_all, on_one_device, resizing
from samjax.evaluation.task_metrics import add, measure, summarize
from samjax.hosts import gather
from samjax.models import MSam
from samjax.models.msam import maps_of
from samjax.tasks import Task
from samjax.training.sharding import BatchLayout, place, rows

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


@functools.partial(jax.jit, static_argnums=(0, 1))
def predict_tasks(model: MSam, mesh: Mesh, variables: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The low-resolution maps (b, channels, h, w) of all tasks, by task, spread as the batch is.

    `batch`: image and input_size of `samjax.data.dense_pipeline.dense_eval_batches`.
    """
    decoded = model.apply(variables, batch["image"], batch["input_size"])
    maps = {name: maps_of(of_task) for name, of_task in decoded.items()}
    return jax.lax.with_sharding_constraint(maps, rows(mesh))


@jax.jit
def _resize(maps: dict[str, Any], to_rows: Any, to_columns: Any) -> dict[str, Any]:
    """Maps at the images' own resolutions, by `samjax.evaluation.evaluate.resizing`."""
    return {
        name: jnp.einsum("bih,bchw,bjw->bcij", to_rows, low, to_columns, precision="highest")
        for name, low in maps.items()
    }


def evaluate_tasks(
    model: MSam,
    variables: Any,
    batches: Iterator[dict[str, Any]],
    on_batch: Callable[[dict[str, Any], dict[str, Any]], None] = lambda batch, maps: None,
    *,
    layout: BatchLayout | None = None,
) -> Evaluation:
    """Runs a model over `samjax.data.dense_pipeline.dense_eval_batches`.

    The metrics, TASK/METRIC, are those of `samjax.evaluation.task_metrics`, of each image and of
    the set, whose pixels count alike; NaN where no pixel of a truth is known. `on_batch(batch,
    maps)` sees each batch with the maps (b, channels, h, w) of each task on the device, padded
    below and to the right to a common size. `layout` is that of
    `samjax.evaluation.evaluate.evaluate`.
    """
    names: list[str] = []
    indices: list[np.ndarray] = []
    totals: dict[str, Any] = {}
    collected: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        layout = layout or on_one_device(len(batch["valid"]))
        variables = place(variables, layout.mesh)
        sizes = [_size(truth) for truth in batch["truth"]]
        to_rows, to_columns = resizing(model, sizes)
        shape = to_rows.shape[1], to_columns.shape[1]
        inputs = layout.place({key: batch[key] for key in ("image", "input_size")})
        with jax.set_mesh(layout.mesh):
            low = predict_tasks(model, layout.mesh, variables, inputs)
        maps = _resize(jax.tree.map(layout.local, low), to_rows, to_columns)
        valid = np.flatnonzero(batch["valid"])
        indices.append(batch["index"][valid])
        names += [batch["names"][i] for i in valid]
        for task in model.tasks:
            truth = [place_truth(task, own[task.name], shape) for own in batch["truth"]]
            counts = jax.device_get(measure(task, maps[task.name], np.stack(truth)))
            counts = {name: value[valid] for name, value in counts.items()}
            totals[task.name] = add(totals.get(task.name), counts)
            for i in range(len(valid)):
                own = summarize(task, {name: value[i] for name, value in counts.items()})
                for metric, value in own.items():
                    collected.setdefault(f"{task.name}/{metric}", []).append(np.array([value]))
        on_batch(batch, maps)
    of_set = {
        f"{task.name}/{metric}": value
        for task in model.tasks
        for metric, value in summarize(task, _sum(totals[task.name])).items()
    }
    return Evaluation(*of_all(names, indices, collected), of_set)


def _sum(counts: dict[str, Any]) -> dict[str, Any]:
    """The counts of all processes."""
    total = None
    for part in gather({name: np.asarray(value) for name, value in counts.items()}):
        total = add(total, {name: value[None] for name, value in part.items()})
    return total or {}


def _size(truth: dict[str, np.ndarray]) -> tuple[int, int]:
    height, width = next(iter(truth.values())).shape[:2]
    return height, width
