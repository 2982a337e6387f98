"""The work of `samjax bench`: what is timed side by side, in rounds, and how that is shown.

What shares a machine is timed in turns (A B C, A B C, ...), so that whatever else the machine does
falls on all of them; ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from rich.console import Console
from rich.table import Table

from samjax import peft as peft_lib
from samjax.config import Config
from samjax.data.prompts import BOX_LOWER_RIGHT, BOX_UPPER_LEFT, PromptConfig
from samjax.flops import program_flops
from samjax.method_text import with_method
from samjax.models import MODELS, Sam, SamConfig
from samjax.peft.recipes import RECIPES
from samjax.terminal import print_wide, progress_bar
from samjax.training.loop import prepare
from samjax.training.memory import exhaustion, gigabytes
from samjax.training.step import finite_names

# What the others are compared with.
REFERENCE = "decoder"
# A busier machine is told of.
_QUIET = 0.25

Name = TypeVar("Name", bound=Hashable)


def bench_methods(
    model_name: str,
    image_size: int | None,
    methods: Sequence[str] | None,
    batch_size: int,
    rounds: int,
    console: Console,
) -> dict[str, Any]:
    """Training steps of `methods` (None: all) relative to those of the mask decoder alone.

    Random weights, images and masks, a box as prompt, float32; the loss and the optimiser of
    `samjax train`. The result is JSON-able. Raises ValueError for a model, a method or a size that
    there is not.
    """
    if model_name not in MODELS:
        raise ValueError(f"unknown model {model_name!r}; known are {', '.join(MODELS)}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    model = Sam(MODELS[model_name].with_image_size(image_size))
    names = dict.fromkeys([REFERENCE, *(RECIPES if methods is None else methods)])
    configs = {name: training_config(name, batch_size) for name in names}
    load = machine_load(console)
    steps = compiled_steps(model, configs, console)
    seconds = take_turns({name: step.run for name, step in steps.items()}, rounds, console)
    return {
        "device": device_name(),
        "jax": jax.__version__,
        "threads": num_threads(),
        "load": load,
        "model": model_name,
        "image_size": list(model.config.frame.shape),
        "batch_size": batch_size,
        "rounds": rounds,
        "methods": summarize(steps, seconds),
    }


def training_config(method: str, batch_size: int) -> Config:
    """The run that a method's step is taken from: defaults, but a box as prompt."""
    prompts = PromptConfig(none=0.0, box=1.0)
    return with_method(Config(batch_size=batch_size, prompts=prompts), method)


def random_batch(config: SamConfig, batch_size: int) -> dict[str, np.ndarray]:
    """A batch of `make_train_step`: noise, a rectangle as truth, and the rectangle's box."""
    height, width = config.frame.shape
    rng = np.random.default_rng(0)
    mask = np.zeros((batch_size, height, width), bool)
    mask[:, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = True
    corners = np.float32([[width / 4, height / 4], [3 * width / 4, 3 * height / 4]])
    return {
        "image": rng.integers(0, 256, (batch_size, height, width, 3), np.uint8),
        "input_size": np.tile(np.int32([height, width]), (batch_size, 1)),
        "mask": mask,
        "coords": np.tile(corners, (batch_size, 1, 1)),
        "labels": np.tile(np.int32([BOX_UPPER_LEFT, BOX_LOWER_RIGHT]), (batch_size, 1)),
    }


class Step:
    """A method's training step, compiled, with the state that it changes.

    `flops` are the step's own; `needed_flops` leave out what is computed again to save memory.
    """

    def __init__(self, model: Sam, config: Config, params: Any, batch: dict[str, Any]) -> None:
        spec = config.spec()
        base = {"params": params, "peft": peft_lib.attach(spec, model, params, jax.random.key(0))}
        trainer = prepare(config, model, spec, base, config.num_steps(1000))
        # Of several stages the one in which most trains.
        stage = max((span.stage for span in trainer.spans), key=lambda stage: len(stage.groups))
        step, self._state, self._frozen = trainer.step(stage), trainer.state, trainer.frozen
        self._batch = batch
        arguments = self._state, self._frozen, batch
        traced = step.trace(*arguments)
        # Dense attention keeps what chunks compute again, and multiplies the same.
        dense = model.clone(attention="dense")
        twin = prepare(config, dense, spec, base, config.num_steps(1000)).step(stage)
        self.flops = program_flops(traced.jaxpr)
        self.needed_flops = program_flops(twin.trace(*arguments).jaxpr)
        self.trainable = sum(leaf.size for leaf in jax.tree.leaves(self._state.train))
        start = time.perf_counter()
        with _compiled_anew():
            self._compiled = traced.lower().compile()
        self.compile_seconds = time.perf_counter() - start
        memory = self._compiled.memory_analysis()
        self.argument_bytes = None if memory is None else memory.argument_size_in_bytes
        self.temporary_bytes = None if memory is None else memory.temp_size_in_bytes
        self.logs: dict[str, Any] = {}

    def run(self) -> float:
        """Takes one step and returns its seconds. Raises RuntimeError where it is not finite."""
        start = time.perf_counter()
        with exhaustion():
            self._state, self.logs = self._compiled(self._state, self._frozen, self._batch)
            jax.block_until_ready((self._state, self.logs))
        seconds = time.perf_counter() - start
        if (bad_leaf := int(self.logs["bad_leaf"])) >= 0:
            raise RuntimeError(f"{finite_names(self._state.train)[bad_leaf]} is not finite")
        return seconds


@contextlib.contextmanager
def _compiled_anew() -> Iterator[None]:
    """Programs that earlier processes compiled are not read back."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # whether there is one is asked once only
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()


def compiled_steps(
    model: Sam, configs: Mapping[str, Config], console: Console, params: Any = None
) -> dict[str, Step]:
    """The step of each method by name; frozen weights are one copy for all.

    `params` are random where none are given.
    """
    if params is None:
        params = jax.jit(model.init_params)(jax.random.key(0))
    steps = {}
    with progress_bar(console) as bar:
        task = bar.add_task("compiling", total=len(configs), note="")
        for name, config in configs.items():
            bar.update(task, note=name)
            batch = jax.device_put(random_batch(model.config, config.batch_size))
            steps[name] = Step(model, config, params, batch)
            bar.advance(task)
    return steps


def take_turns(
    calls: Mapping[Name, Callable[[], float]], rounds: int, console: Console
) -> dict[Name, list[float]]:
    """The seconds that each call returns, round by round, after a round that does not count."""
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    with progress_bar(console) as bar:
        turns = bar.add_task("rounds", total=(1 + rounds) * len(calls), note="")
        for i in range(1 + rounds):
            for name, call in calls.items():
                bar.update(turns, note=name if isinstance(name, str) else " ".join(name))
                taken = call()
                if i > 0:
                    seconds[name].append(taken)
                bar.advance(turns)
    return seconds


def ratios(reference: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """How often `others` go by while `reference` does once: median, least and most of the rounds.

    Below 1 where they take longer.
    """
    found = [a / b for a, b in zip(reference, others, strict=True)]
    return {"ratio": statistics.median(found), "ratio_range": [min(found), max(found)]}


def summarize(
    steps: Mapping[str, Step], seconds: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, Any]]:
    """By method: speed relative to the reference, and the bounds that FLOPs set it."""
    result = {}
    for name, step in steps.items():
        relative = ratios(seconds[REFERENCE], seconds[name])
        needed = steps[REFERENCE].needed_flops / step.needed_flops
        recomputing = steps[REFERENCE].flops / step.flops
        result[name] = {
            "trainable": step.trainable,
            "seconds": statistics.median(seconds[name]),
            "all_seconds": list(seconds[name]),
            **relative,
            "bound": needed,
            "share_of_bound": relative["ratio"] / needed,
            "bound_recomputing": recomputing,
            "share_of_bound_recomputing": relative["ratio"] / recomputing,
            "flops": step.flops,
            "needed_flops": step.needed_flops,
            "argument_bytes": step.argument_bytes,
            "temporary_bytes": step.temporary_bytes,
            "compile_seconds": step.compile_seconds,
        }
    return result


def methods_caption(result: Mapping[str, Any]) -> str:
    """One sentence on what was measured, and where."""
    height, width = result["image_size"]
    return (
        f"{result['device']}, {result['threads']} threads, jax {result['jax']}; {result['model']} "
        f"at {height} x {width} px, float32, batch {result['batch_size']}; median of "
        f"{result['rounds']} rounds at load {result['load']:.1f}."
    )


def methods_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table of `bench_methods`, its head first."""
    head = ("method", "trainable", "s/step", f"{REFERENCE} = 1", "least to most")
    head = (*head, "bound", "of it", "recomputing", "of it")
    rows = [(*head, "GFLOP", "weights, state", "temporary", "compiled in")]
    for name, row in result["methods"].items():
        least, most = row["ratio_range"]
        rows.append(
            (
                name,
                f"{row['trainable']:,}",
                f"{row['seconds']:.3g}",
                f"{row['ratio']:.3f}",
                f"{least:.3f} to {most:.3f}",
                f"{row['bound']:.3f}",
                f"{row['share_of_bound']:.0%}",
                f"{row['bound_recomputing']:.3f}",
                f"{row['share_of_bound_recomputing']:.0%}",
                f"{row['flops'] / 1e9:.4g}",
                *(
                    "-" if row[key] is None else gigabytes(row[key])
                    for key in ("argument_bytes", "temporary_bytes")
                ),
                f"{row['compile_seconds']:.0f} s",
            )
        )
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    head, *body = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *body))


def print_table(rows: Sequence[Sequence[str]], console: Console) -> None:
    """The same for a terminal: numbers, all but the first column, to the right."""
    head, *body = rows
    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in body:
        table.add_row(*row)
    print_wide(table, console)


def machine_load(console: Console) -> float:
    """How busy the machine is with other work, of which the user is told."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows has none
    if load > _QUIET:
        console.print(f"warning: other work runs on this machine (load {load:.1f}); times grow")
    return load


def num_threads() -> int:
    """How many cores this process may use, which is how many threads libraries take."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_name() -> str:
    """What computes: an accelerator's name, or the processor's."""
    device = jax.devices()[0]
    return cpu_name() if device.platform == "cpu" else device.device_kind


def cpu_name() -> str:
    """What the machine calls its processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
