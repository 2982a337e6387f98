"""What a training step of three dense tasks costs: TA-LoRA beside a LoRA model for each task.

SAM ViT-B, float32, batch 1, rank 32 on the fused qkv, a mask decoder for each of NYUv2's tasks.
LoRA-STL is three models, one a task, whose three steps are added. TA-LoRA trains all in one step,
and computes once what comes before the first adapted block: the fewer blocks it adapts, the more
the tasks share. The bound is what the FLOPs of the two say. All take turns, and ratios are medians
of the ratios within a round.

    python experiments/bench_ta_lora.py --rounds 5
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import numpy as np
from bench_cli import Size, restrict_cores, run  # pyrefly: ignore[missing-import]
from rich.console import Console

from samjax.bench import machine
from samjax.bench.inputs import random_params
from samjax.bench.programs import Step
from samjax.bench.rounds import ratios, take_turns
from samjax.bench.steps import open_step
from samjax.bench.tables import markdown, size
from samjax.config import Config
from samjax.models import Sam
from samjax.peft import MethodConfig
from samjax.tasks import NYUV2, Task

FIRST_BLOCKS = (0, 6, 9)


@dataclasses.dataclass(frozen=True)
class Bench(Size):
    """Times training steps of three dense tasks in SAM ViT-B: TA-LoRA and LoRA-STL.

    Example: python experiments/bench_ta_lora.py --rounds 5
    """


def step_of(sam: Sam, params: Any, tasks: tuple[Task, ...], method: MethodConfig) -> Step:
    """The compiled step of a model of some tasks."""
    config = Config(tasks=tuple(map(str, tasks)), method=method, batch_size=1)
    return open_step(sam, config, params)


def bench(args: Bench, console: Console) -> dict[str, Any]:
    """The whole comparison, as a JSON-able dict."""
    sam, cores = Sam(args.config()), restrict_cores(args.cores)
    load = machine.machine_load(console)
    params = jax.device_put(random_params(sam))
    stl = {
        f"LoRA-STL {task.name}": step_of(sam, params, (task,), MethodConfig("lora_stl"))
        for task in NYUV2
    }
    shared = {
        f"TA-LoRA from block {first}": step_of(
            sam, params, NYUV2, MethodConfig("ta_lora", first_block=first)
        )
        for first in FIRST_BLOCKS
        if first < args.depth
    }
    steps = {**stl, **shared}
    seconds = take_turns({name: step.run for name, step in steps.items()}, args.rounds, console)
    three = [sum(round_) for round_ in zip(*(seconds[name] for name in stl), strict=True)]
    flops = sum(step.needed_flops for step in stl.values())
    rows = [
        {
            "name": name,
            "seconds": list(seconds[name]),
            "flops": step.program.flops,
            "trainable": step.trainable,
            "bytes": step.program.temporary_bytes,
            # How many times as fast as LoRA-STL's three, and as the FLOPs would have it.
            **(ratios(three, seconds[name]) if name in shared else {}),
            **({"bound": flops / step.needed_flops} if name in shared else {}),
        }
        for name, step in steps.items()
    ]
    return {
        "cpu": machine.cpu_name(),
        "cores": cores,
        "load": load,
        "image_size": args.image_size,
        "depth": args.depth,
        "rounds": args.rounds,
        "jax": jax.__version__,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    head = (
        f"{result['cpu']}, {result['cores']} cores, jax {result['jax']}; ViT-B of "
        f"{result['depth']} blocks at {result['image_size']} px, float32, batch 1; median of "
        f"{result['rounds']} rounds at load {result['load']:.1f}."
    )
    rows = [("step", "s/step", "LoRA-STL's three / it", "rounds", "bound", "GFLOP", "temporary")]
    for row in result["rows"]:
        shared = "ratio" in row
        least, most = row["ratio_range"] if shared else (0, 0)
        rows.append(
            (
                row["name"],
                f"{np.median(row['seconds']):.3g}",
                f"{row['ratio']:.2f}" if shared else "-",
                f"{least:.2f} to {most:.2f}" if shared else "-",
                f"{row['bound']:.2f}" if shared else "-",
                f"{row['flops'] / 1e9:.4g}",
                size(row["bytes"]),
            )
        )
    return f"{head}\n\n{markdown(rows)}"


if __name__ == "__main__":
    sys.exit(run(Bench, sys.argv[1:], "bench_ta_lora.py", bench, table))
