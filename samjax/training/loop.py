"""The training loop: steps, logs, validations, checkpoints; interruptible, resumed to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from rich.console import Console

from samjax import peft as peft_lib
from samjax.allocator import release_freed_memory
from samjax.config import Config
from samjax.data.pipeline import batches_from
from samjax.data.sources import Dataset
from samjax.files import read_record, write_json
from samjax.hosts import any_process, gather, is_first
from samjax.models import Sam
from samjax.peft.delta import UNTRAINED
from samjax.problems import problem_of
from samjax.terminal import Interrupted, progress_bar
from samjax.training import memory
from samjax.training.checkpoint import Best, Checkpoints
from samjax.training.feed import Feed
from samjax.training.log import MetricsLog
from samjax.training.sharding import (
    BatchLayout,
    StepShardings,
    make_mesh,
    place,
    with_shardings,
)
from samjax.training.stages import Span, Stage, spans
from samjax.training.step import (
    TrainState,
    finite_names,
    init_state,
    make_optimizer,
    make_train_step,
    trained_labels,
)
from samjax.training.stop import StopRequest
from samjax.training.trunk import Trunk

STEP_MEMORY = "step_memory.json"
METRICS = "metrics.jsonl"
Validate = Callable[[Any], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """How training ended."""

    variables: Any  # {"params", "peft"} of the step that is kept
    steps: int  # done: fewer than asked for where it ended early
    kept_step: int
    best: Best | None  # the best validation, where there are any
    seconds_per_step: float | None  # the median; None where no interval was timed


def fit(
    config: Config,
    model: Sam,
    spec: peft_lib.PeftSpec,
    base: Any,
    source: Dataset,
    out: Path,
    console: Console,
    validate: Validate | None = None,
    trunk: Trunk | None = None,
) -> Fitted:
    """Trains `base` ({"params", "peft"}) from the newest checkpoint in `out`, or from the start.

    Batch i is a function of the seed and i alone and so is its randomness: a run that was killed
    and resumed ends bit-equal to one that was not. `validate(variables)` measures a state every
    `config.validate_every` steps and at the end; each such state becomes a checkpoint with what was
    measured, from which alone follows which state is best and when patience is at its end.

    With `trunk`, its features take the place of images.

    Raises Interrupted on Ctrl-C, and ValueError where a loss or a gradient is not finite or a batch
    cannot be read: in each case the last good state is saved. Raises OSError where the disk
    refuses, and RuntimeError where memory runs out.
    """
    steps = config.num_steps(len(source))
    layout = BatchLayout(config.mesh(), config.batch_size)
    begins_at = trunk.point if trunk else ""
    trainer = prepare(config, model, spec, base, steps, layout.mesh, begins_at)
    state, frozen = trainer.state, trainer.frozen
    with (
        contextlib.closing(Checkpoints(out / "checkpoints", *config.best)) as checkpoints,
        progress_bar(console) as bar,
        StopRequest() as stop,
    ):
        state = checkpoints.restore(state) or state
        step = start = int(state.step)
        if start:
            console.print(f"resuming after step {start}")
        log = MetricsLog(out / METRICS if is_first() else None, start)
        task = bar.add_task("training", total=steps, completed=start, note="compiling")
        ended = start == steps or _out_of_patience(config, checkpoints.best(), start)
        span = feed = train_step = None
        # By what tells programs apart; stages that are alike share one.
        compiled: dict[Any, tuple[Any, memory.StepMemory]] = {}
        record_metrics = jax.jit(peft_lib.metrics)
        while not ended:
            begins = span is None or step == span.stop
            if begins:
                span = next(span for span in trainer.spans if step < span.stop)
                dataset = problem_of(config).batches(
                    model,
                    source,
                    split=span.stage.split,
                    rows=layout.own,
                    features=trunk.features if trunk else None,
                )
                feed = Feed(batches_from(dataset, step, span.stop), layout)
            inputs, images = _take(feed, checkpoints, state)
            if begins:
                if len(trainer.spans) > 1:
                    console.print(_announce(trainer.spans.index(span), trainer.spans))
                kind = span.stage.groups, span.stage.split
                if kind not in compiled:
                    bar.update(task, note="compiling")
                    step_function = trainer.step(span.stage)
                    with jax.set_mesh(layout.mesh):  # which kernels of attention ask for
                        compiled[kind] = _compile(console, step_function, state, frozen, inputs)
                    release_freed_memory()  # the compiler's
                train_step, needs = compiled[kind]
                if is_first():
                    _note_memory(out / STEP_MEMORY, needs)
            with memory.exhaustion():
                state, logs = train_step(state, frozen, inputs)
                feed.advance()  # while the step computes
                bad_leaf = int(logs.pop("bad_leaf"))
            step += 1
            if bad_leaf >= 0:
                checkpoints.save(state)
                images = ", ".join(source.names[i] for i in _of_all(images))
                raise ValueError(
                    f"{finite_names(state.train)[bad_leaf]} is not finite at step {step} (images "
                    f"{images}); the state before it is saved: mend these images and go on with "
                    "--resume, or start anew with a lower learning_rate"
                )
            bar.advance(task)
            if begins:
                bar.update(task, note="")
            validates = validate is not None and _is_due(step, config.validate_every, steps)
            saves = validates or _is_due(step, config.checkpoint_every, steps)
            saves = saves or any_process(stop.requested)
            saves = saves or step == span.stop  # the next stage may need more memory than there is
            writes = saves or _is_due(step, config.log_every, steps)
            if writes:
                log.stop_clock(step)
                found = jax.device_get({**logs, **record_metrics(state.train["peft"])})
                # NaN is what a step has not, such as the loss of a task that was not drawn.
                values = {k: float(v) for k, v in found.items() if not math.isnan(v)}
                metrics = None
                if validate is not None and validates:
                    bar.update(task, note="validating")
                    metrics = validate(peft_lib.combine(state.train, frozen))
                    values |= {f"val_{key}": value for key, value in metrics.items()}
                log.write(step, values)
                bar.update(task, note=_note(values, config.best[0]))
                if saves:
                    # States of earlier stages are not yet what the run is after.
                    checkpoints.save(state, metrics if span.stop == steps else None)
                    release_freed_memory()  # else what the save left lies between a step's buffers
            if writes or begins:  # a stage's first step is mostly compilation
                log.start_clock(step)
            # Else it came too late for a save: the next step's.
            if saves and any_process(stop.requested):
                raise Interrupted(
                    f"stopped after step {step} of {steps}; the same command with --resume goes on"
                )
            ended = step == steps or _out_of_patience(config, checkpoints.best(), step)
        best = checkpoints.best()
        if best is not None and step < steps:
            console.print(
                f"ended after step {step} of {steps}: step {best.step} had the best validation"
            )
        kept_step = best.step if best is not None and config.keep == "best" else step
        if kept_step != step:
            state = checkpoints.restore(state, kept_step)
    variables = peft_lib.combine(state.train, frozen)
    return Fitted(variables, step, kept_step, best, log.seconds_per_step())


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What `fit` trains with."""

    spans: list[Span]  # the stages of the run
    state: TrainState  # before the first step
    frozen: Any  # the leaves that stay as they are
    step: Callable[[Stage], Any]  # the step of a stage, to be compiled


def prepare(
    config: Config,
    model: Sam,
    spec: peft_lib.PeftSpec,
    base: Any,
    steps: int,
    mesh: Mesh | None = None,
    start: str = "",
) -> Trainer:
    """The steps of a run of `steps` on a mesh (left out, of one device), and where it starts.

    `base` survives: its trained leaves are copied, the others are shared where they lie as the mesh
    has them. `start` is the encoder's point at which a step begins (see `Sam`). Raises ValueError
    for stages that the run cannot have.
    """
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    planned, first = plan(config, model, spec, base, steps, mesh, start)
    base = place(base, mesh)
    train_leaves, frozen = peft_lib.partition(base, peft_lib.trainable(spec, model, base))
    return dataclasses.replace(planned, state=first(train_leaves), frozen=frozen)


def plan(
    config: Config,
    model: Sam,
    spec: peft_lib.PeftSpec,
    base: Any,
    steps: int,
    mesh: Mesh,
    start: str = "",
) -> tuple[Trainer, Callable[[Any], TrainState]]:
    """`prepare` from the shapes of `base` alone, and what makes the first state of its leaves.

    State and frozen leaves are `jax.ShapeDtypeStruct`, with their shardings: the steps can be
    compiled for them, for a mesh of devices that are not there, too.
    """
    train_leaves, frozen = peft_lib.partition(base, peft_lib.trainable(spec, model, base))
    labels = trained_labels(peft_lib.groups(spec, model, base))
    present = set(jax.tree.leaves(labels))
    stages = spans(config.parsed_stages(), steps, present)
    trained = {
        name: sum(span.stop - span.start for span in stages if name in span.stage.groups) or 1
        for name in present
    }

    def optimizer(stage: Stage) -> optax.GradientTransformation:
        return make_optimizer(config.optimizer, trained, labels, config.learning_rate, stage.groups)

    def step(stage: Stage) -> Any:
        return make_train_step(
            model.clone(start=start),
            optimizer(stage),
            objective=problem_of(config).objective,
            seed=config.seed,
            accumulate=config.accumulate,
            labels=labels,
            stage=stage,
            shardings=placed,
        )

    def first(leaves: Any) -> TrainState:
        # Copied, since the step donates its state and `base` must survive it.
        return init_state(jax.tree.map(jnp.copy, leaves), optimizer(stages[0].stage))

    state = jax.eval_shape(first, train_leaves)
    placed = StepShardings.of(state, frozen, mesh)
    trainer = Trainer(stages, with_shardings(state, mesh), with_shardings(frozen, mesh), step)
    return trainer, jax.jit(first, out_shardings=placed.state)


def check_stages(config: Config, model: Sam, spec: peft_lib.PeftSpec, num_images: int) -> None:
    """Raises ValueError for stages that a run cannot have; nothing is allocated."""
    params = model.init_params_shapes()
    peft = jax.eval_shape(lambda p: peft_lib.attach(spec, model, p, jax.random.key(0)), params)
    groups = peft_lib.groups(spec, model, {"params": params, "peft": peft})
    present = set(jax.tree.leaves(groups)) - UNTRAINED
    spans(config.parsed_stages(), config.num_steps(num_images), present)


def _note_memory(file: Path, needs: memory.StepMemory) -> None:
    """Keeps the most that a stage needs."""
    known = read_record(file, "delete it")["bytes"] if file.is_file() else 0
    if needs.bytes >= known:
        write_json(file, dataclasses.asdict(needs))


def _announce(number: int, stages: list[Span]) -> str:
    span = stages[number]
    groups = " and ".join(sorted(span.stage.groups))
    steps = f"steps {span.start + 1} to {span.stop}"
    return f"stage {number + 1} of {len(stages)}, {steps}: {groups} train"


def _take(
    feed: Feed, checkpoints: Checkpoints, state: TrainState
) -> tuple[dict[str, Any], list[int]]:
    """The next batch's inputs, and its images' positions; saves the state where there is none."""
    taken, failure = None, None
    try:
        taken = feed.take()
    except Exception as error:
        failure = error
    if any_process(failure is not None):
        checkpoints.save(state)
        told = gather({"error": np.array("" if failure is None else str(failure))})
        error = next(text for part in told if (text := str(part["error"])))
        raise ValueError(
            f"{error}; training is saved up to the step before: once the file is mended, the same "
            "command with --resume goes on"
        ) from failure
    return taken


def _of_all(indices: list[int]) -> list[int]:
    """The positions of a batch's images, of all processes."""
    return np.concatenate([part["index"] for part in gather({"index": np.array(indices)})]).tolist()


def _is_due(step: int, every: int | None, last: int) -> bool:
    return step == last or (every is not None and step % every == 0)


def _out_of_patience(config: Config, best: Best | None, step: int) -> bool:
    """Whether `patience` validations up to `step` brought no new best."""
    if best is None or config.patience is None or config.validate_every is None:
        return False
    return step // config.validate_every - best.step // config.validate_every >= config.patience


def _note(values: dict[str, float], metric: str) -> str:
    shown = {"loss": "loss", f"val_{metric}": f"validation {metric}"}
    return ", ".join(f"{text} {values[key]:.4f}" for key, text in shown.items() if key in values)


def _compile(console: Console, step: Any, *arguments: Any) -> tuple[Any, memory.StepMemory]:
    """The step, compiled for arguments like these, which all of a run's are, and what it needs.

    Says that, as an estimate, before the minutes that it may take, and warns where there is less.
    """
    need = memory.estimate(step, *arguments)
    console.print(str(need))
    have = memory.available_bytes(jax.local_devices()[0])
    if have is not None and have < need.total:
        console.print(
            f"warning: there are {memory.gigabytes(have)}, which may not do: {memory.ADVICE}"
        )
    with memory.exhaustion():
        compiled = step.lower(*arguments).compile()
    return compiled, memory.compiled_memory(compiled, need)
