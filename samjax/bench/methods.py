"""Training steps of methods, beside that of the mask decoder alone and what FLOPs allow."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from samjax.bench import machine
from samjax.bench.inputs import model_config
from samjax.bench.programs import DoesNotFit, Step
from samjax.bench.rounds import check_rounds, ratios, take_turns
from samjax.bench.steps import compiled_steps, training_config
from samjax.bench.tables import size, spread
from samjax.models import Sam
from samjax.peft.recipes import RECIPES

# What the others are compared with.
REFERENCE = "decoder"


def measure(
    model_name: str,
    image_size: int | None,
    methods: Sequence[str] | None,
    batch_size: int,
    rounds: int,
    console: Console,
) -> dict[str, Any]:
    """Training steps of `methods` (None: all of masks) relative to those of the mask decoder alone.

    Random weights, images and masks, a box as prompt, float32; the loss and the optimiser of
    `samjax train`. The result is JSON-able. Raises ValueError for a model, a method or a size that
    there is not, and RuntimeError where a step does not fit into memory.
    """
    model = Sam(model_config(model_name, image_size))
    check_rounds(rounds)
    if methods is None:
        methods = [name for name, recipe in RECIPES.items() if not recipe.dense]
    names = dict.fromkeys([REFERENCE, *methods])
    configs = {name: training_config(name, batch_size) for name in names}
    load = machine.facts(console)
    try:
        steps = compiled_steps(model, configs, console)
        seconds = take_turns({name: step.run for name, step in steps.items()}, rounds, console)
    except DoesNotFit as error:
        raise RuntimeError(f"a step {error}: lower --batch-size or --image-size") from None
    return {
        **load,
        "model": model_name,
        "image_size": list(model.config.frame.shape),
        "batch_size": batch_size,
        "rounds": rounds,
        "methods": summarize(steps, seconds),
    }


def summarize(
    steps: Mapping[str, Step], seconds: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, Any]]:
    """By method: speed relative to the reference, and the bounds that FLOPs set it."""
    result = {}
    for name, step in steps.items():
        relative = ratios(seconds[REFERENCE], seconds[name])
        needed = steps[REFERENCE].needed_flops / step.needed_flops
        recomputing = steps[REFERENCE].program.flops / step.program.flops
        result[name] = {
            "trainable": step.trainable,
            "seconds": statistics.median(seconds[name]),
            "all_seconds": list(seconds[name]),
            **relative,
            "bound": needed,
            "share_of_bound": relative["ratio"] / needed,
            "bound_recomputing": recomputing,
            "share_of_bound_recomputing": relative["ratio"] / recomputing,
            "flops": step.program.flops,
            "needed_flops": step.needed_flops,
            "argument_bytes": step.program.argument_bytes,
            "temporary_bytes": step.program.temporary_bytes,
            "compile_seconds": step.program.compile_seconds,
        }
    return result


def caption(result: Mapping[str, Any]) -> str:
    """One sentence on what was measured, and where."""
    height, width = result["image_size"]
    return (
        f"{machine.described(result)}; {result['model']} at {height} x {width} px, float32, "
        f"batch {result['batch_size']}; median of {result['rounds']} rounds at load "
        f"{result['load']:.1f}."
    )


def rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table of `measure`, its head first."""
    head = ("method", "trainable", "s/step", f"{REFERENCE} = 1", "least to most")
    head = (*head, "bound", "of it", "recomputing", "of it")
    table = [(*head, "GFLOP", "weights, state", "temporary", "compiled in")]
    for name, row in result["methods"].items():
        table.append(
            (
                name,
                f"{row['trainable']:,}",
                f"{row['seconds']:.3g}",
                f"{row['ratio']:.3f}",
                spread(row["ratio_range"]),
                f"{row['bound']:.3f}",
                f"{row['share_of_bound']:.0%}",
                f"{row['bound_recomputing']:.3f}",
                f"{row['share_of_bound_recomputing']:.0%}",
                f"{row['flops'] / 1e9:.4g}",
                size(row["argument_bytes"]),
                size(row["temporary_bytes"]),
                f"{row['compile_seconds']:.0f} s",
            )
        )
    return table
