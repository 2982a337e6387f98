"""Measures a model over a set: jitted, at each image's own resolution, with one row per sample."""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float
from scipy import special

from samjax.evaluation.metrics import METRICS, Counts, count, of_samples, of_set
from samjax.evaluation.saliency import saliency
from samjax.evaluation.surface import hd95
from samjax.files import write_beside
from samjax.hosts import gather
from samjax.models import Prompts, Sam
from samjax.preprocess import MASK_THRESHOLD, unpad_matrices
from samjax.training.sharding import BatchLayout, make_mesh, place, rows

# The row of a file that is no image's.
_SET = "(whole set)"
# Truths of one batch are padded to a multiple of this, so that few shapes are compiled.
_BUCKET = 64


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics of every sample, in order, and of the whole set."""

    names: tuple[str, ...]
    per_image: dict[str, np.ndarray]
    # Metrics of the set that are no means over its samples: all of dense tasks', some of masks'.
    of_set: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def mean(self) -> dict[str, float]:
        """Each metric of the set: its mean over samples, where it is one."""
        means = {key: float(np.mean(x)) for key, x in self.per_image.items()}
        return means | self.of_set

    def write_csv(self, path: Path) -> None:
        """One row per sample: its name, then each metric; last those of the set, if no means."""
        with (
            write_beside(path) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            metrics = list(self.mean)
            writer.writerow(["name", *metrics])
            for i, name in enumerate(self.names):
                own = {metric: values[i] for metric, values in self.per_image.items()}
                writer.writerow([name, *_cells(own, metrics)])
            if self.of_set:
                writer.writerow([_SET, *_cells(self.of_set, metrics)])

    @staticmethod
    def read_csv(path: Path) -> Evaluation:
        """The inverse of `write_csv`, up to the six decimals written. Raises ValueError."""
        try:
            with open(path, newline="", encoding="utf-8") as file:
                (_, *metrics), *rows = csv.reader(file)
            last = rows.pop()[1:] if rows[-1][0] == _SET else [""] * len(metrics)
            names, *columns = zip(*rows, strict=True)
            per_image = {
                key: np.array(column, np.float64)
                for key, column in zip(metrics, columns, strict=True)
                if any(column)  # else it is of the set alone
            }
            of_set = {key: float(x) for key, x in zip(metrics, last, strict=True) if x}
            if per_image.keys() | of_set.keys() != set(metrics):
                raise ValueError
            return Evaluation(names, per_image, of_set)
        except (ValueError, IndexError, csv.Error):
            raise ValueError(f"{path} is damaged: delete it, and evaluate again") from None


def _cells(values: dict[str, Any], metrics: Sequence[str]) -> list[str]:
    """As many as there are metrics, empty where one is none of the values."""
    return [f"{values[metric]:.6f}" if metric in values else "" for metric in metrics]


@functools.partial(jax.jit, static_argnums=(0, 1))
def predict(model: Sam, mesh: Mesh, variables: Any, batch: dict[str, Any]) -> Float[Array, "b h w"]:
    """Logits of mask 0 of each image's prompt, at the decoder's resolution.

    `batch`: image, input_size, coords and labels of `samjax.data.pipeline.eval_batches`, spread
    over the mesh, as the logits are.
    """
    prompts = Prompts(batch["coords"], batch["labels"])
    logits, _ = model.apply(variables, batch["image"], batch["input_size"], prompts)
    return jax.lax.with_sharding_constraint(logits[:, 0], rows(mesh))


@jax.jit
def measure(logits: Any, rows: Any, columns: Any, truth: Any) -> tuple[dict[str, Any], Any, Any]:
    """Counts, masks and logits at the images' own resolutions, padded to a common size.

    `rows` (b, h, l) and `columns` (b, w, m) are the post-processing matrices of each image, zero
    where it is smaller than (h, w); `truth` (b, h, w) is False there.
    """
    full = jnp.einsum("bih,bhw,bjw->bij", rows, logits, columns, precision="highest")
    masks = full > MASK_THRESHOLD
    return count(masks, truth), masks, full


def evaluate(
    model: Sam,
    variables: Any,
    batches: Iterator[dict[str, Any]],
    on_batch: Callable[[dict[str, Any], np.ndarray], None] = lambda batch, masks: None,
    *,
    metrics: Sequence[str] = ("dice", "iou"),
    layout: BatchLayout | None = None,
) -> Evaluation:
    """Runs a model over `samjax.data.pipeline.eval_batches`; mask 0 of each prompt counts.

    The model compiles once, whatever the sizes of the images. `on_batch(batch, masks)` sees each
    batch with its predicted masks (b, h, w), padded below and to the right to a common size. The
    `metrics` are of `samjax.evaluation.metrics.METRICS`; those that need more of a sample than its
    counts, the host's threads compute while the model sees the next batch.

    `layout` is how batches are spread over devices; left out, one device has them. Of several
    processes each gives, and sees, its own rows of a batch, and all return the whole evaluation.
    """
    names: list[str] = []
    indices: list[np.ndarray] = []
    collected: dict[str, list[np.ndarray]] = {}
    pending: list[Future[dict[str, float]]] = []

    def collect() -> None:
        for measured in pending:
            for key, value in measured.result().items():
                collected.setdefault(key, []).append(np.array([value]))
        pending.clear()

    maps = [name for name in metrics if METRICS[name].of == "map"]
    surface = "hd95" in metrics

    with ThreadPoolExecutor() as threads:
        for batch in batches:
            valid = batch["valid"]
            layout = layout or on_one_device(len(valid))
            variables = place(variables, layout.mesh)
            inputs = {key: batch[key] for key in ("image", "input_size", "coords", "labels")}
            with jax.set_mesh(layout.mesh):
                logits = predict(model, layout.mesh, variables, layout.place(inputs))
            logits = layout.local(logits)
            counts, masks, full = measure(logits, *postprocessing(model, batch["truth"]))
            indices.append(batch["index"][valid])
            names += [name for name, use in zip(batch["names"], valid, strict=True) if use]
            counts["pixels"] = np.array([truth.size for truth in batch["truth"]])
            for key, values in counts.items():
                collected.setdefault(key, []).append(np.asarray(values, np.int64)[valid])
            collect()  # of the batch before: no more than two batches of maps wait
            host_masks = np.asarray(masks)
            if maps:
                logits = np.asarray(full)
                pending += [
                    threads.submit(_saliency, logits[i], batch["truth"][i], maps)
                    for i in np.flatnonzero(valid)
                ]
            if surface:
                pending += [
                    threads.submit(_surface, host_masks[i], batch["truth"][i])
                    for i in np.flatnonzero(valid)
                ]
            on_batch(batch, host_masks)
        collect()
    order, found = of_all(names, indices, collected)
    every = Counts(**{field.name: found.pop(field.name) for field in dataclasses.fields(Counts)})
    found |= of_samples(every, metrics)
    per_image = {name: found[name] for name in metrics if name in found}
    return Evaluation(order, per_image, of_set(every, order, metrics))


def on_one_device(batch_size: int) -> BatchLayout:
    """The layout of batches that one device has."""
    return BatchLayout(make_mesh(devices=jax.devices()[:1]), batch_size)


def of_all(
    names: list[str], indices: list[np.ndarray], collected: dict[str, list[np.ndarray]]
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """What all processes have measured, in the order of the samples' positions: names, metrics."""
    own = {key: np.concatenate(values) for key, values in collected.items()}
    parts = gather({"index": np.concatenate(indices), "name": np.array(names, str), **own})

    def joined(key: str) -> np.ndarray:
        return np.concatenate([part[key] for part in parts if key in part])

    order = np.argsort(joined("index"))
    every = {key: joined(key)[order] for part in parts for key in part}
    return tuple(every.pop("name").tolist()), {k: v for k, v in every.items() if k != "index"}


def _saliency(logits: np.ndarray, truth: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Of one sample, whose logits are padded."""
    height, width = truth.shape
    return saliency(special.expit(logits[:height, :width]), truth, names)


def _surface(mask: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Of one sample, whose mask is padded."""
    height, width = truth.shape
    return {"hd95": hd95(mask[:height, :width], truth)}


def postprocessing(model: Sam, truths: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """What `measure` takes beside the logits, for `truths` (h, w) of the images' own sizes."""
    rows, columns = resizing(model, [truth.shape for truth in truths])
    truth = np.zeros((rows.shape[0], rows.shape[1], columns.shape[1]), bool)
    for padded, own in zip(truth, truths, strict=True):
        padded[: own.shape[0], : own.shape[1]] = own
    return rows, columns, truth


def resizing(model: Sam, sizes: Sequence[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Matrices that bring each image's maps to its own (height, width) of `sizes`.

    (b, h, low height) and (b, w, low width), zero where an image is smaller than (h, w), which
    are multiples of `_BUCKET`.
    """
    height, width = (-(-max(side) // _BUCKET) * _BUCKET for side in zip(*sizes, strict=True))
    low_height, low_width = model.config.low_res_shape
    rows = np.zeros((len(sizes), height, low_height), np.float32)
    columns = np.zeros((len(sizes), width, low_width), np.float32)
    for i, (h, w) in enumerate(sizes):
        matrices = unpad_matrices((low_height, low_width), model.config.frame, (h, w))
        rows[i, :h], columns[i, :w] = matrices
    return rows, columns
