"""The training loop: steps, logs, checkpoints; interruptible, and resumed to the bit."""

from __future__ import annotations

import json
import math
import signal
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from samjax import peft as peft_lib
from samjax.config import Config
from samjax.data.pipeline import batches_from, train_batches
from samjax.data.sources import Dataset
from samjax.files import write_beside
from samjax.models import Sam
from samjax.terminal import Interrupted, progress_bar
from samjax.training.checkpoint import Checkpoints
from samjax.training.step import init_state, make_optimizer, make_train_step, trained_labels

MODEL_INPUTS = ("image", "input_size", "mask", "coords", "labels")


def fit(
    config: Config,
    model: Sam,
    spec: peft_lib.PeftSpec,
    base: Any,
    source: Dataset,
    out: Path,
    console: Console,
) -> tuple[Any, float | None]:
    """Trains `base` ({"params", "peft"}) from the newest checkpoint in `out`, or from the start.

    Batch i is a function of the seed and i alone and so is its randomness: a run that was killed
    and resumed ends bit-equal to one that was not. Returns the trained variables and the median
    seconds a step took (None where no interval was timed). Raises Interrupted on Ctrl-C, after
    saving, and ValueError where a loss is not finite.
    """
    steps = config.num_steps(len(source))
    train_leaves, frozen = peft_lib.partition(base, peft_lib.trainable(spec, model, base))
    labels = trained_labels(peft_lib.groups(spec, model, base))
    optimizer = make_optimizer(config.optimizer, steps, labels)
    # Copied, since the step donates its state and `base` must survive it.
    state = init_state(jax.tree.map(jnp.copy, train_leaves), optimizer)
    checkpoints = Checkpoints(out / "checkpoints")
    state = checkpoints.restore(state) or state
    train_step = make_train_step(model, optimizer, seed=config.seed, accumulate=config.accumulate)
    dataset = train_batches(
        source,
        frame=model.config.frame,
        batch_size=config.batch_size,
        seed=config.seed,
        prompts=config.prompts,
        augment=config.augment,
    )
    start = int(state.step)
    if start:
        console.print(f"resuming after step {start}")
    log = MetricsLog(out / "metrics.jsonl", start)
    with progress_bar(console) as bar, StopRequest() as stop:
        task = bar.add_task("training", total=steps, completed=start, note="")
        try:
            for step, batch in enumerate(batches_from(dataset, start, steps), start + 1):
                state, logs = train_step(state, frozen, {k: batch[k] for k in MODEL_INPUTS})
                if step == start + 1:
                    jax.block_until_ready(logs)
                    log.restart_clock(step)
                bar.advance(task)
                saves = step % config.checkpoint_every == 0 or step == steps or stop.requested
                if saves or step % config.log_every == 0:
                    values = {key: float(value) for key, value in logs.items()}
                    check_finite(values, step, [source.names[i] for i in batch["index"]])
                    log.write(step, values)
                    bar.update(task, note=f"loss {values['loss']:.4f}")
                if saves:
                    checkpoints.save(state)
                if stop.requested and step < steps:
                    raise Interrupted(
                        f"stopped after step {step} of {steps}; the same command with --resume "
                        "goes on"
                    )
        finally:
            checkpoints.close()
    return peft_lib.combine(state.train, frozen), log.seconds_per_step()


def check_finite(values: dict[str, float], step: int, names: list[str]) -> None:
    """Raises ValueError where a loss or the gradient's norm is NaN or infinite."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise ValueError(
            f"{bad[0]} is not finite at step {step} (images {', '.join(names)}); the last "
            "checkpoint is good: lower the learning rate and start anew, or look at these images"
        )


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a flag that is read between steps; a second one stops at once.

    A step donates its state: to be interrupted within it would lose both the old and the new one.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class MetricsLog:
    """metrics.jsonl: one line every few steps, cut back to the step that a run resumes from."""

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self._lines = [line for line in map(_parse, lines) if line and line["step"] <= start]
        with write_beside(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self._lines))
        self._last: tuple[int, float] | None = None

    def restart_clock(self, step: int) -> None:
        """Starts timing after `step`, whose time was mostly compilation."""
        self._last = (step, time.perf_counter())

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends a line, with the seconds a step took since the last one."""
        line = {"step": step, **values}
        now = time.perf_counter()
        if self._last is not None and step > self._last[0]:
            line["seconds_per_step"] = (now - self._last[1]) / (step - self._last[0])
        self._last = (step, now)
        self._lines.append(line)
        with open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def seconds_per_step(self) -> float | None:
        """The median over all lines."""
        times = [line["seconds_per_step"] for line in self._lines if "seconds_per_step" in line]
        return statistics.median(times) if times else None


def _parse(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None  # cut in mid-write by a kill
