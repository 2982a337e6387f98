"""What a training step needs of memory, known before it is compiled.

The step's own jaxpr is walked in order: an array lives from the equation that makes it to the last
one that reads it. Activations kept for the backward pass, what rematerialisation and accumulation
save of them, and the chunks of attention are thus counted as the step has them. The compiler fuses
some arrays away and needs room for others: on CPU, its own count of a step in float32 is between
0.7 and 1.4 times this one (MobileSAM and ViT-B at 1024 px: 1.3), and up to 3 times with
rematerialisation, whose small rest is what a block needs for a moment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from samjax.jaxprs import inner_jaxprs

ADVICE = "pass --remat blocks, raise --accumulate, or lower --batch-size or --image-size"


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device while a step runs."""

    weights: int  # frozen leaves
    state: int  # trained leaves and the optimiser's state, which are updated in place
    batch: int
    activations: int  # what the step makes and frees: for the backward pass, mostly

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.state + self.batch + self.activations

    def __str__(self) -> str:
        return (
            f"a step needs about {gigabytes(self.total)} of memory: {gigabytes(self.weights)} for "
            f"frozen weights, {gigabytes(self.state)} for trained leaves and the optimiser, "
            f"{gigabytes(self.activations + self.batch)} for the batch and its activations"
        )


def estimate(step: Any, state: Any, frozen: Any, batch: Any) -> MemoryEstimate:
    """Estimates a step of `samjax.training.step.make_train_step` for arguments of these shapes.

    The step is traced, as it is when it is first called, which then need not trace it again.
    """
    devices = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(batch) if _is_placed(leaf)}
    # A program's arrays are those of all devices; its activations are spread as its batch is.
    activations = peak_bytes(step.trace(state, frozen, batch).jaxpr) // max(devices, default=1)
    return MemoryEstimate(_tree_bytes(frozen), _tree_bytes(state), _tree_bytes(batch), activations)


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes on one device while a step runs, and who says so."""

    bytes: int
    origin: str  # "compiler" or "estimate"


def compiled_memory(compiled: jax.stages.Compiled, need: MemoryEstimate) -> StepMemory:
    """What the compiler counts for a step; the estimate, where it tells nothing."""
    stats = compiled.memory_analysis()
    if stats is None:
        return StepMemory(need.total, "estimate")
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes  # the rest has donated room
    total = stats.argument_size_in_bytes + outputs + stats.temp_size_in_bytes
    return StepMemory(total, "compiler")


def peak_bytes(jaxpr: ClosedJaxpr) -> int:
    """The most bytes that a program's own arrays have at one time, its arguments aside."""
    return _peak(jaxpr.jaxpr, {})


def _peak(jaxpr: Jaxpr, known: dict[int, int]) -> int:
    """`known` holds the peaks of inner programs, of which a model has many copies, by identity."""
    if id(jaxpr) in known:
        return known[id(jaxpr)]
    last_use: dict[Var, int] = {}
    for i, equation in enumerate(jaxpr.eqns):
        last_use.update((v, i) for v in equation.invars if not isinstance(v, Literal))
    last_use.update((v, len(jaxpr.eqns)) for v in jaxpr.outvars if not isinstance(v, Literal))
    sizes: dict[Var, int] = {}  # of the arrays that live, arguments aside
    live = top = 0
    for i, equation in enumerate(jaxpr.eqns):
        made = {v: _bytes(v.aval) for v in equation.outvars}
        inner = max((_peak(part, known) for part in inner_jaxprs(equation.params)), default=0)
        # A loop stacks its outputs beside what a turn of it makes; else, inner ones are the outer.
        loops = equation.primitive.name in ("scan", "while")
        out = sum(made.values())
        top = max(top, live + (out + inner if loops else max(out, inner)))
        sizes.update(made)
        live += out
        # Each operand that dies here, and each result that nothing reads.
        for v in {*(v for v in equation.invars if not isinstance(v, Literal)), *made}:
            if last_use.get(v, i) <= i:
                live -= sizes.pop(v, 0)
    known[id(jaxpr)] = top
    return top


def _bytes(aval: Any) -> int:
    if not hasattr(aval, "shape") or not hasattr(aval, "dtype"):
        return 0
    return math.prod(aval.shape) * aval.dtype.itemsize


def _tree_bytes(tree: Any) -> int:
    """Those of one device."""

    def of_leaf(leaf: Any) -> int:
        if not _is_placed(leaf):
            return _bytes(leaf)
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(of_leaf(leaf) for leaf in jax.tree.leaves(tree))


def _is_placed(leaf: Any) -> bool:
    return getattr(leaf, "sharding", None) is not None


def available_bytes(device: jax.Device) -> int | None:
    """The memory that a device has for arrays; None where nothing tells.

    Of an accelerator, what its allocator may take; of a CPU, the machine's or the container's.
    """
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    if not hasattr(os, "sysconf"):  # Windows
        return None
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    container = Path("/sys/fs/cgroup/memory.max")
    if container.is_file() and (text := container.read_text().strip()).isdigit():
        limits.append(int(text))
    return min(limits)


@contextlib.contextmanager
def exhaustion() -> Iterator[None]:
    """Says in one sentence that memory ran out, and what to do. Raises RuntimeError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RuntimeError(f"a step does not fit into memory: {ADVICE}") from error


def gigabytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
