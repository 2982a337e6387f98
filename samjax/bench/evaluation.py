"""Jitted evaluation: the model and the metrics apart, on random data."""

from __future__ import annotations

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
from samjax.evaluation.evaluate import measure as measure_overlap
from samjax.evaluation.evaluate import on_one_device, postprocessing, predict
from samjax.evaluation.saliency import saliency
from samjax.models import Sam
from samjax.peft import as_computed

# What an evaluation does with each batch, in order.
PARTS = ("model", "overlap", "saliency")


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

    model: image to logits. overlap: logits to masks at the image's size, and their Dice and IoU.
    saliency: the measures that the host's threads compute. Raises ValueError for a model or a size
    that there is not, and RuntimeError where a batch does not fit into memory.
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
                programs["model", key], programs["overlap", key] = made
                calls |= {(part, key): programs[part, key].run for part in PARTS[:2]}
                calls["saliency", key] = _saliency(threads, batch_size, truth_size)
            seconds = take_turns(calls, rounds, console)
        except DoesNotFit as error:
            raise RuntimeError(f"a batch {error}: lower --batch-size or --image-size") from None
    parts = []
    for (part, key), taken in seconds.items():
        program = programs.get((part, key))
        median = float(np.median(taken))
        parts.append(
            {
                "part": part,
                "batch_size": int(key),
                "images_per_second": int(key) / median,
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
    }


def _programs(
    model: Sam, variables: Any, batch_size: int, truth_size: tuple[int, int]
) -> tuple[Program, Program]:
    """The model, and the overlap of what it gives with a truth."""
    batch = random_batch(model.config, batch_size)
    inputs = {key: batch[key] for key in ("image", "input_size", "coords", "labels")}
    mesh = on_one_device(batch_size).mesh
    forward = jax.jit(lambda variables, inputs: predict(model, mesh, variables, inputs))
    logits = np.random.default_rng(0).normal(size=(batch_size, *model.config.low_res_shape))
    truths = list(_truths(batch_size, truth_size))
    after = jax.device_put((logits.astype(np.float32), *postprocessing(model, truths)))
    return Program(forward, variables, jax.device_put(inputs)), Program(measure_overlap, *after)


def _truths(batch_size: int, size: tuple[int, int]) -> np.ndarray:
    """(b, h, w): an ellipse in each image."""
    rows, columns = (np.linspace(-1, 1, side) for side in size)
    return np.repeat((rows[:, None] ** 2 + columns**2 < 0.5)[None], batch_size, axis=0)


def _saliency(
    threads: ThreadPoolExecutor, batch_size: int, size: tuple[int, int]
) -> Callable[[], float]:
    """Takes the measures of a batch, as `samjax.evaluation.evaluate` does, and returns seconds."""
    truths = _truths(batch_size, size)
    maps = np.random.default_rng(0).normal(size=truths.shape).astype(np.float32) + truths

    def run() -> float:
        start = time.perf_counter()
        list(
            threads.map(lambda logits, truth: saliency(special.expit(logits), truth), maps, truths)
        )
        return time.perf_counter() - start

    return run


def caption(result: Mapping[str, Any]) -> str:
    """One sentence on what was measured, and where."""
    (height, width), (truth_height, truth_width) = result["image_size"], result["truth_size"]
    return (
        f"{machine.described(result)}; evaluation of {result['model']} at {height} x {width} px, "
        f"{result['dtype']}, images of {truth_height} x {truth_width} px; median of "
        f"{result['rounds']} rounds at load {result['load']:.1f}."
    )


def rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table, its head first."""
    head = ("part", "batch", "images/s", "seconds", "model = 1", "least to most")
    table: list[tuple[str, ...]] = [(*head, "GFLOP", "temporary", "compiled in")]
    for row in result["parts"]:
        compiled = row["compile_seconds"]
        table.append(
            (
                row["part"],
                str(row["batch_size"]),
                f"{row['images_per_second']:.4g}",
                f"{row['seconds']:.3g}",
                f"{row['ratio']:.3g}",
                spread(row["ratio_range"]),
                "-" if row["flops"] is None else f"{row['flops'] / 1e9:.4g}",
                size(row["temporary_bytes"]),
                "-" if compiled is None else f"{compiled:.0f} s",
            )
        )
    return table
