"""What `samjax plan` tells: tables, JSON, and where a layout wastes the machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console

from samjax.bench.tables import print_table
from samjax.collectives import Collective
from samjax.plan import Plan, ProgramPlan
from samjax.training.memory import gigabytes
from samjax.training.sharding import DATA, FSDP, SPLIT_BYTES, with_shardings

# What sums of gradients take; all else along `data` would move weights or images.
_SUMS = ("all-reduce", "reduce-scatter")
# Shares of memory, or of a batch, from which on waste is told of.
_NOTABLE = 0.1
# Times its elements' bytes that an array takes with its tiles' padding, from which on that is told.
_PADDED = 1.5


def to_json(plan: Plan) -> dict[str, Any]:
    """All of it, bytes and FLOPs of one device."""
    config, mesh = plan.config, plan.mesh
    return {
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "model": plan.model.config.name,
        "image_size": list(plan.model.config.frame.shape),
        "method": config.method.method,
        "dtype": config.dtype,
        "remat": config.remat,
        "batch_size": config.batch_size,
        "batch_per_chip": config.batch_size // mesh.size,
        "max_batch_per_chip": plan.max_batch,
        "peak_bytes_per_chip": plan.peak_bytes,
        "training": plan.training.to_json(),
        "evaluation": plan.evaluation.to_json(),
        "waste": waste(plan),
    }


def show(plan: Plan, console: Console) -> None:
    """Prints it for people."""
    config, mesh = plan.config, plan.mesh
    height, width = plan.model.config.frame.shape
    console.print(
        f"{plan.model.config.name} at {height} x {width} px, {config.method.method}, "
        f"{config.dtype}, remat {config.remat}; {config.batch_size} images a step on {mesh.size} "
        f"{mesh.devices.flat[0].device_kind} ({DATA} {mesh.shape[DATA]}, {FSDP} "
        f"{mesh.shape[FSDP]}), {config.batch_size // mesh.size} on each"
    )
    programs = {"training": plan.training, "evaluation": plan.evaluation}
    console.print("\non each device")
    print_table(_needs(programs), console)
    for name, program in programs.items():
        if program.collectives:
            console.print(f"\nwhat devices exchange in {name}")
            print_table(_exchanged(program.collectives), console)
    console.print("\nthe largest arrays of training")
    print_table(_largest(plan.training), console)
    for sentence in waste(plan):
        console.print(f"waste: {sentence}")


def _needs(programs: dict[str, ProgramPlan]) -> list[tuple[str, ...]]:
    def row(name: str, p: ProgramPlan) -> tuple[str, ...]:
        memory = (p.frozen_bytes, p.trained_bytes, p.optimizer_bytes, p.batch_bytes)
        memory = (*memory, p.temporary_bytes, p.code_bytes, p.peak_bytes)
        work = f"{p.flops / 1e9:,.0f}", gigabytes(p.traffic_bytes), f"{p.intensity:.0f}"
        return name, str(p.images), *(gigabytes(count) for count in memory), *work

    head = ("", "images", "frozen", "trained", "optimiser", "batch", "temporary", "code", "peak")
    head = (*head, "GFLOP", "moved", "FLOP a byte")
    return [head, *(row(name, program) for name, program in programs.items())]


def _exchanged(found: Sequence[Collective]) -> list[tuple[str, ...]]:
    head = ("collective", "along", "devices", "bytes", "times", "in all", "for")
    return [
        head,
        *(
            (
                collective.kind,
                " ".join(collective.axes),
                str(collective.group),
                f"{collective.bytes:,}",
                str(collective.times),
                gigabytes(collective.total_bytes),
                _short(collective.source),
            )
            for collective in found
        ),
    ]


def _largest(program: ProgramPlan) -> list[tuple[str, ...]]:
    head = ("array", "bytes", "with padding", "made", "for")
    return [
        head,
        *(
            (
                str(array.shape),
                gigabytes(array.shape.bytes),
                gigabytes(array.shape.padded_bytes),
                f"{array.times} times",
                _short(array.source),
            )
            for array in program.largest
        ),
    ]


def _short(source: str) -> str:
    """The end of an operation's path, which tells most."""
    return source if len(source) <= 60 else f"...{source[-57:]}"


def waste(plan: Plan) -> list[str]:
    """Where the layout wastes the machine, a sentence each."""
    mesh, training, evaluation = plan.mesh, plan.training, plan.evaluation
    found = []
    asked = plan.config.eval_batch_size
    if (idle := evaluation.images - asked) > _NOTABLE * evaluation.images:
        found.append(
            f"evaluation takes {evaluation.images} images at a time, a whole number on each "
            f"device, and eval_batch_size is {asked}: {idle} rows are computed in the last batch "
            "of a set, or in all of them, for nothing; choose a multiple of the devices"
        )
    leaves = jax.tree_util.tree_leaves_with_path(with_shardings(plan.base, mesh))
    weights = [(path, x, math.prod(x.shape) * x.dtype.itemsize) for path, x in leaves]
    large = [(path, x, size) for path, x, size in weights if size > SPLIT_BYTES]
    in_all = sum(size for _, _, size in large)
    if mesh.shape[FSDP] == 1 and mesh.size > 1 and in_all > _NOTABLE * plan.peak_bytes:
        left = in_all // mesh.size
        found.append(
            f"{gigabytes(in_all)} of large weights lie whole on each of the {mesh.size} devices; "
            f"fsdp {mesh.size} would leave {gigabytes(left)} on each, and gather them in each step"
        )
    whole = [(path, size) for path, x, size in large if x.sharding.is_fully_replicated]
    if mesh.shape[FSDP] > 1 and whole:
        path, size = max(whole, key=lambda pair: pair[1])
        found.append(
            f"{gigabytes(sum(size for _, size in whole))} of large weights have no side that fsdp "
            f"{mesh.shape[FSDP]} divides and lie whole on each device, such as "
            f"{jax.tree_util.keystr(path, simple=True, separator='/')} ({gigabytes(size)})"
        )
    for name, program in (("training", training), ("evaluation", evaluation)):
        others = [c for c in program.collectives if DATA in c.axes and c.kind not in _SUMS]
        if others:
            found.append(
                f"{name} moves {gigabytes(sum(c.total_bytes for c in others))} along {DATA} in "
                f"other ways than sums, such as {others[0].kind} of {gigabytes(others[0].bytes)} "
                f"for {_short(others[0].source)}"
            )
        if program.padding_bytes > _NOTABLE * program.peak_bytes:
            found.append(f"tiles pad the arguments of {name} by {gigabytes(program.padding_bytes)}")
    padded = [a for a in training.largest if a.shape.padded_bytes >= _PADDED * a.shape.bytes]
    for array in padded:
        ratio = array.shape.padded_bytes / array.shape.bytes
        found.append(
            f"an array {array.shape} takes {ratio:.1f} times its elements, "
            f"{gigabytes(array.shape.padded_bytes)}, since its minor axes do not fill the tiles"
        )
    return found
