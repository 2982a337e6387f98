"""The work of `samjax plan`: a run's programs, compiled and not run, and what they need."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from samjax.collectives import Collective, collectives
from samjax.config import Config
from samjax.flops import program_flops
from samjax.hlo import Program
from samjax.models import Sam
from samjax.plan_inputs import (
    base_shapes,
    batch_shapes,
    evaluation_shapes,
    evaluation_step,
    model_of,
)
from samjax.topology import topology_devices
from samjax.traffic import LargeArray, largest_arrays, traffic
from samjax.training.loop import Trainer
from samjax.training.loop import plan as plan_steps
from samjax.training.memory import ADVICE, available_bytes, gigabytes
from samjax.training.sharding import make_mesh, with_shardings

# How many of a program's largest arrays are told.
_LARGEST = 6


class DoesNotFit(RuntimeError):
    """A program needs more memory than a device has."""


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """What one program needs on each device, and does there in a run. Bytes and FLOPs."""

    images: int  # of all devices together
    frozen_bytes: int
    trained_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    temporary_bytes: int  # activations, mostly: what the program makes and frees
    code_bytes: int
    peak_bytes: int  # all of it, with the padding of tiles
    padding_bytes: int  # of the arguments
    flops: int  # of products, elementwise work left out
    traffic_bytes: int  # read from and written to the device's memory
    collectives: tuple[Collective, ...]
    largest: tuple[LargeArray, ...]

    @property
    def intensity(self) -> float:
        """FLOPs a byte of traffic."""
        return self.flops / self.traffic_bytes

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        own = dataclasses.asdict(self) | {"intensity": self.intensity}
        own["collectives"] = [
            {**dataclasses.asdict(c), "axes": list(c.axes), "total_bytes": c.total_bytes}
            for c in self.collectives
        ]
        own["largest"] = [
            {
                "shape": str(array.shape),
                "bytes": array.shape.bytes,
                "padded_bytes": array.shape.padded_bytes,
                "times": array.times,
                "source": array.source,
            }
            for array in self.largest
        ]
        return own


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs on a mesh of devices."""

    config: Config
    model: Sam
    mesh: Mesh
    base: Any  # shapes of {"params", "peft"}
    training: ProgramPlan
    evaluation: ProgramPlan
    max_batch: int | None  # the most images on a device, where that was searched

    @property
    def peak_bytes(self) -> int:
        """On each device, of the program that needs more."""
        return max(self.training.peak_bytes, self.evaluation.peak_bytes)


def make_plan(
    config: Config,
    topology: str | None,
    console: Console,
    *,
    one_each: bool = False,
    max_batch: bool = False,
) -> Plan:
    """Compiles the training and the evaluation step of `config`, for shapes alone.

    For the devices of a `topology` that is not there, else for those at hand. `one_each`: the batch
    is the smallest that can be, one image a device at a time; with `max_batch` the largest that
    fits is searched, a program for each size that is tried. Raises ValueError for what cannot be,
    DoesNotFit where memory is too small, and RuntimeError without libtpu.
    """
    devices = jax.devices() if topology is None else topology_devices(topology)
    mesh = make_mesh(config.fsdp, devices)
    split = any(stage.split for stage in config.parsed_stages())
    smallest = mesh.size * config.accumulate * (2 if split else 1)
    if one_each or max_batch:
        config = dataclasses.replace(config, batch_size=smallest)
    config.check_devices(mesh.size)
    model = model_of(config)
    base = base_shapes(config, model)
    largest, found = None, {}
    if max_batch:

        def fits(count: int) -> bool:
            own = dataclasses.replace(config, batch_size=count * smallest)
            console.print(f"compiling for {own.batch_size // mesh.size} images a device")
            try:
                found[count] = _training(own, model, base, mesh)
            except DoesNotFit as error:
                console.print(str(error))
                return False
            console.print(f"fits: {gigabytes(found[count].peak_bytes)}")
            return True

        best = largest_that(fits)
        if not best:
            count = smallest // mesh.size
            images = "1 image" if count == 1 else f"{count} images"
            raise DoesNotFit(
                f"not even the smallest batch, {images} a device, fits: {ADVICE}, or use --fsdp"
            )
        config = dataclasses.replace(config, batch_size=best * smallest)
        training, largest = found[best], config.batch_size // mesh.size
    else:
        console.print("compiling the training step")
        training = _training(config, model, base, mesh)
    console.print("compiling the evaluation step")
    evaluation = _evaluation(config, model, base, mesh)
    return Plan(config, model, mesh, base, training, evaluation, largest)


def largest_that(fits: Callable[[int], bool]) -> int:
    """The largest n that fits, where all smaller ones do; 0 where 1 does not.

    Doubles until one does not, then bisects.
    """
    good, bad = 0, 1
    while fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _training(config: Config, model: Sam, base: Any, mesh: Mesh) -> ProgramPlan:
    """Of several stages the one in which most trains."""

    def trainer_of(model: Sam) -> Trainer:
        return plan_steps(config, model, config.spec(), base, config.steps or 1000, mesh)[0]

    trainer = trainer_of(model)
    stage = max((span.stage for span in trainer.spans), key=lambda stage: len(stage.groups))
    state, frozen, batch = trainer.state, trainer.frozen, batch_shapes(config, model, mesh)

    def trace(own: Sam) -> Any:
        steps = trainer if own is model else trainer_of(own)
        with jax.set_mesh(mesh):
            return steps.step(stage).trace(state, frozen, batch)

    traced, flops = _with_flops(trace, model, mesh)
    parts = frozen, state.train, state.opt_state, batch
    return _compile(traced, f"a training step of {config.batch_size} images", flops, mesh, *parts)


def _evaluation(config: Config, model: Sam, base: Any, mesh: Mesh) -> ProgramPlan:
    batch, variables = evaluation_shapes(config, model, mesh), with_shardings(base, mesh)

    def trace(model: Sam) -> Any:
        with jax.set_mesh(mesh):
            return evaluation_step(model).trace(model, mesh, variables, batch)

    traced, flops = _with_flops(trace, model, mesh)
    what = f"evaluation of {len(batch['image'])} images at a time"
    return _compile(traced, what, flops, mesh, variables, (), (), batch)


def _with_flops(trace: Callable[[Sam], Any], model: Sam, mesh: Mesh) -> tuple[Any, int]:
    """A program that `trace` makes of a model, and the FLOPs of each device.

    Kernels of attention hide theirs; in chunks it multiplies the same.
    """
    traced = trace(model)
    hidden = model.attention not in ("chunked", "dense")
    shown = trace(model.clone(attention="chunked")) if hidden else traced
    return traced, program_flops(shown.jaxpr) // mesh.size


def _compile(
    traced: Any,
    what: str,
    flops: int,
    mesh: Mesh,
    frozen: Any,
    trained: Any,
    optimizer: Any,
    batch: Any,
) -> ProgramPlan:
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(_refusal(what, str(error))) from None
    stats = compiled.memory_analysis()
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes  # the rest has donated room
    code = stats.generated_code_size_in_bytes
    peak = stats.argument_size_in_bytes + outputs + stats.temp_size_in_bytes + code
    if (have := _room(mesh)) is not None and peak > have:
        raise DoesNotFit(
            f"{what} needs {gigabytes(peak)} on each device, which has {gigabytes(have)}: {ADVICE}"
        )
    program = Program(compiled.as_text())
    parts = [_device_bytes(tree) for tree in (frozen, trained, optimizer, batch)]
    return ProgramPlan(
        batch["image"].shape[0],
        *parts,
        temporary_bytes=stats.temp_size_in_bytes,
        code_bytes=code,
        peak_bytes=peak,
        padding_bytes=max(0, stats.argument_size_in_bytes - sum(parts)),
        flops=flops,
        traffic_bytes=traffic(program),
        collectives=tuple(collectives(program, dict(mesh.shape))),
        largest=tuple(largest_arrays(program, _LARGEST)),
    )


def _refusal(what: str, error: str) -> str:
    """A compiler's refusal in a sentence."""
    used = re.search(r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm", error)
    needs = (
        f"needs {_gib(used[1])} of the {_gib(used[2])} of a chip" if used else "does not fit a chip"
    )
    return f"{what} {needs}: {ADVICE}"


def _gib(text: str) -> str:
    """As XLA writes it, such as 15.75G."""
    return f"{text[:-1]} {text[-1]}iB"


def _room(mesh: Mesh) -> int | None:
    """Bytes that each device has; None of devices that are not there, whose compiler knows."""
    device = mesh.devices.flat[0]
    if device not in jax.devices():
        return None
    have = available_bytes(device)
    # All CPU devices of a process share the machine's memory.
    return have // mesh.size if have is not None and device.platform == "cpu" else have


def _device_bytes(tree: Any) -> int:
    """Those of one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
