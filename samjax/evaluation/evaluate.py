"""Measures a model over a set: jitted, at each image's own resolution, with one row per image."""

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

from samjax.evaluation.metrics import overlap
from samjax.evaluation.saliency import saliency
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
    """Metrics of every image, in order, and of the whole set."""

    names: tuple[str, ...]
    per_image: dict[str, np.ndarray]
    # Metrics of the set that are no means over its images, such as those of dense tasks.
    of_set: dict[str, float] | None = None

    @property
    def mean(self) -> dict[str, float]:
        """Each metric of the set: its mean over images, where it is one."""
        if self.of_set is not None:
            return self.of_set
        return {key: float(np.mean(values)) for key, values in self.per_image.items()}

    def write_csv(self, path: Path) -> None:
        """One row per image: its name, then each metric; last those of the set, if no means."""
        with (
            write_beside(path) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(["name", *self.per_image])
            columns = [[f"{v:.6f}" for v in values] for values in self.per_image.values()]
            writer.writerows(zip(self.names, *columns, strict=True))
            if self.of_set is not None:
                writer.writerow([_SET, *(f"{value:.6f}" for value in self.of_set.values())])

    @staticmethod
    def read_csv(path: Path) -> Evaluation:
        """The inverse of `write_csv`, up to the six decimals written. Raises ValueError."""
        try:
            with open(path, newline="", encoding="utf-8") as file:
                (_, *metrics), *rows = csv.reader(file)
            last = rows.pop()[1:] if rows[-1][0] == _SET else None
            columns = list(zip(*rows, strict=True))
            values = zip(metrics, columns[1:], strict=True)
            per_image = {key: np.array(column, np.float64) for key, column in values}
            of_set = last and {k: float(v) for k, v in zip(metrics, last, strict=True)}
            return Evaluation(columns[0], per_image, of_set)
        except (ValueError, IndexError, csv.Error):
            raise ValueError(f"{path} is damaged: delete it, and evaluate again") from None


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
    """Overlap, masks and logits at the images' own resolutions, padded to a common size.

    `rows` (b, h, l) and `columns` (b, w, m) are the post-processing matrices of each image, zero
    where it is smaller than (h, w); `truth` (b, h, w) is False there.
    """
    full = jnp.einsum("bih,bhw,bjw->bij", rows, logits, columns, precision="highest")
    masks = full > MASK_THRESHOLD
    return overlap(masks, truth), masks, full


def evaluate(
    model: Sam,
    variables: Any,
    batches: Iterator[dict[str, Any]],
    on_batch: Callable[[dict[str, Any], np.ndarray], None] = lambda batch, masks: None,
    *,
    with_saliency: bool = False,
    layout: BatchLayout | None = None,
) -> Evaluation:
    """Runs a model over `samjax.data.pipeline.eval_batches`; mask 0 of each prompt counts.

    The model compiles once, whatever the sizes of the images. `on_batch(batch, masks)` sees each
    batch with its predicted masks (b, h, w), padded below and to the right to a common size. The
    metrics are those of `overlap`, and `with_saliency` those of `saliency`, which the host's
    threads compute while the model sees the next batch.

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

    with ThreadPoolExecutor() as threads:
        for batch in batches:
            valid = batch["valid"]
            layout = layout or on_one_device(len(valid))
            variables = place(variables, layout.mesh)
            inputs = {key: batch[key] for key in ("image", "input_size", "coords", "labels")}
            with jax.set_mesh(layout.mesh):
                logits = predict(model, layout.mesh, variables, layout.place(inputs))
            logits = layout.local(logits)
            metrics, masks, full = measure(logits, *postprocessing(model, batch["truth"]))
            indices.append(batch["index"][valid])
            names += [name for name, use in zip(batch["names"], valid, strict=True) if use]
            for key, values in metrics.items():
                collected.setdefault(key, []).append(np.asarray(values)[valid])
            collect()  # of the batch before: no more than two batches of maps wait
            if with_saliency:
                maps = np.asarray(full)
                pending += [
                    threads.submit(_saliency, maps[i], batch["truth"][i])
                    for i in np.flatnonzero(valid)
                ]
            on_batch(batch, np.asarray(masks))
        collect()
    return Evaluation(*of_all(names, indices, collected))


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


def _saliency(logits: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Of one image, whose logits are padded."""
    height, width = truth.shape
    return saliency(special.expit(logits[:height, :width]), truth)


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
