"""Jitted evaluation: the model and the metrics apart, on random data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from scipy import special

from samjax.bench import machine
from samjax.bench.encoder import check_batch_sizes
from samjax.bench.inputs import model_config, random_batch, random_params
from samjax.bench.programs import DoesNotFit, Program
from samjax.bench.rounds import check_rounds, ratios, take_turns
from samjax.bench.tables import size, spread
from samjax.evaluation.evaluate import measure as measure_counts
from samjax.evaluation.evaluate import on_one_device, postprocessing, predict
from samjax.evaluation.saliency import saliency
from samjax.evaluation.surface import hd95
from samjax.models import Sam
from samjax.peft import as_computed
from samjax.preprocess import MASK_THRESHOLD

# What an evaluation does with each batch, in order.
PARTS = ("model", "counts", "saliency", "hd95")


def measure(
    model_name: str,
    image_size: int | None,
    batch_sizes: Sequence[int],
    dtype: str,
    truth_size: tuple[int, int],
    rounds: int,
    console: Console,
) -> dict[str, Any]:
    """Times the parts of an evaluation with boxes, for images of `truth_size` (height, width).

    model: image to logits. counts: logits to masks at the image's size, and the counts that Dice,
    IoU and all metrics of sets are made of. saliency and hd95: what the host's threads compute.
    Raises ValueError for a model or a size that there is not, and RuntimeError where a batch does
    not fit into memory.
    """
    model = Sam(model_config(model_name, image_size), dtype=jnp.dtype(dtype))
    check_rounds(rounds)
    check_batch_sizes(batch_sizes)
    if min(truth_size) < 2:
        raise ValueError(f"truth_size must be at least 2 pixels, not {min(truth_size)}")
    load = machine.facts(console)
    variables = as_computed({"params": jax.device_put(random_params(model))}, model.dtype)
    programs: dict[tuple[str, str], Program] = {}
    calls: dict[tuple[str, str], Callable[[], float]] = {}
    with ThreadPoolExecutor() as threads:
        try:
            for batch_size in batch_sizes:
                key = str(batch_size)
                made = _programs(model, variables, batch_size, truth_size)
                programs["model", key], programs["counts", key] = made
                calls |= {(part, key): programs[part, key].run for part in PARTS[:2]}
                calls["saliency", key] = _on_host(threads, batch_size, truth_size, _saliency)
                calls["hd95", key] = _on_host(threads, batch_size, truth_size, _surface)
            seconds = take_turns(calls, rounds, console)
        except DoesNotFit as error:
            raise RuntimeError(f"a batch {error}: lower --batch-size or --image-size") from None
    parts, per_image = [], math.prod(truth_size)
    for (part, key), taken in seconds.items():
        program = programs.get((part, key))
        median = float(np.median(taken))
        parts.append(
            {
                "part": part,
                "batch_size": int(key),
                "images_per_second": int(key) / median,
                "pixels_per_second": None if part == "model" else int(key) * per_image / median,
                "seconds": median,
                "all_seconds": taken,
                **ratios(seconds["model", key], taken),
                "flops": program and program.flops,
                "temporary_bytes": program and program.temporary_bytes,
                "compile_seconds": program and program.compile_seconds,
            }
        )
    return {
        **load,
        "model": model_name,
        "image_size": list(model.config.frame.shape),
        "truth_size": list(truth_size),
        "dtype": dtype,
        "rounds": rounds,
        "parts": parts,
        "metrics_pixels_per_second": {
            str(b): b * per_image / sum(float(np.median(seconds[p, str(b)])) for p in PARTS[1:])
            for b in batch_sizes
        },
    }


def _programs(
    model: Sam, variables: Any, batch_size: int, truth_size: tuple[int, int]
) -> tuple[Program, Program]:
    """The model, and the counts of what it gives beside a truth."""
    batch = random_batch(model.config, batch_size)
    inputs = {key: batch[key] for key in ("image", "input_size", "coords", "labels")}
    mesh = on_one_device(batch_size).mesh
    forward = jax.jit(lambda variables, inputs: predict(model, mesh, variables, inputs))
    logits = np.random.default_rng(0).normal(size=(batch_size, *model.config.low_res_shape))
    truths = list(_truths(batch_size, truth_size))
    after = jax.device_put((logits.astype(np.float32), *postprocessing(model, truths)))
    return Program(forward, variables, jax.device_put(inputs)), Program(measure_counts, *after)


def _truths(batch_size: int, size: tuple[int, int]) -> np.ndarray:
    """(b, h, w): an ellipse in each image."""
    rows, columns = (np.linspace(-1, 1, side) for side in size)
    return np.repeat((rows[:, None] ** 2 + columns**2 < 0.5)[None], batch_size, axis=0)


def _saliency(logits: np.ndarray, truth: np.ndarray) -> Any:
    return saliency(special.expit(logits), truth)


def _surface(logits: np.ndarray, truth: np.ndarray) -> Any:
    return hd95(logits > MASK_THRESHOLD, truth)


def _on_host(
    threads: ThreadPoolExecutor,
    batch_size: int,
    size: tuple[int, int],
    work: Callable[[np.ndarray, np.ndarray], Any],
) -> Callable[[], float]:
    """Measures a batch, as `samjax.evaluation.evaluate` does, and returns seconds."""
    truths = _truths(batch_size, size)
    # Noise has the longest outlines that there are.
    maps = np.random.default_rng(0).normal(size=truths.shape).astype(np.float32) + truths

    def run() -> float:
        start = time.perf_counter()
        list(threads.map(work, maps, truths))
        return time.perf_counter() - start

    return run


def caption(result: Mapping[str, Any]) -> str:
    """One sentence on what was measured, and where."""
    (height, width), (truth_height, truth_width) = result["image_size"], result["truth_size"]
    together = ", ".join(
        f"{pixels / 1e6:.3g} million pixels/s in batches of {batch_size}"
        for batch_size, pixels in result["metrics_pixels_per_second"].items()
    )
    return (
        f"{machine.described(result)}; evaluation of {result['model']} at {height} x {width} px, "
        f"{result['dtype']}, images of {truth_height} x {truth_width} px; median of "
        f"{result['rounds']} rounds at load {result['load']:.1f}. All metrics together: {together}."
    )


def rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table, its head first."""
    head = ("part", "batch", "images/s", "Mpixel/s", "seconds", "model = 1", "least to most")
    table: list[tuple[str, ...]] = [(*head, "GFLOP", "temporary", "compiled in")]
    for row in result["parts"]:
        compiled, pixels = row["compile_seconds"], row["pixels_per_second"]
        table.append(
            (
                row["part"],
                str(row["batch_size"]),
                f"{row['images_per_second']:.4g}",
                "-" if pixels is None else f"{pixels / 1e6:.3g}",
                f"{row['seconds']:.3g}",
                f"{row['ratio']:.3g}",
                spread(row["ratio_range"]),
                "-" if row["flops"] is None else f"{row['flops'] / 1e9:.4g}",
                size(row["temporary_bytes"]),
                "-" if compiled is None else f"{compiled:.0f} s",
            )
        )
    return table
