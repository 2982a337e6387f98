"""The training step of a run, compiled for random weights and a random batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console

from samjax import peft as peft_lib
from samjax.bench.inputs import dense_batch, random_batch, random_params, with_features
from samjax.bench.programs import Step
from samjax.config import Config
from samjax.data.prompts import PromptConfig
from samjax.method_text import with_method
from samjax.models import MSam, Sam
from samjax.peft.cut import find_cut
from samjax.problems import problem_of
from samjax.terminal import progress_bar
from samjax.training.loop import prepare


def training_config(method: str, batch_size: int) -> Config:
    """The run that a method's step is taken from: defaults, but a box as prompt."""
    prompts = PromptConfig(none=0.0, box=1.0)
    return with_method(Config(batch_size=batch_size, prompts=prompts), method)


def open_step(sam: Sam, config: Config, params: Any) -> Step:
    """The step of a run of `config`; of several stages the one in which most trains.

    `params` are SAM's; frozen leaves among them are shared, as far as they are kept in the dtype of
    the model. With `cache_features` on, the step begins with features in the place of images.
    Raises ValueError where nothing comes before what trains.
    """
    model, params = problem_of(config).build(sam, params)
    spec = config.spec()
    base = peft_lib.start(spec, model, params, jax.random.key(0))
    start = _start(config, model, spec)
    trainer = prepare(config, model, spec, base, config.num_steps(1000), start=start)
    stage = max((span.stage for span in trainer.spans), key=lambda stage: len(stage.groups))
    # Dense attention keeps what chunks compute again, and multiplies the same.
    leaner = model.clone(attention="dense", remat="none")
    twin = prepare(config, leaner, spec, base, config.num_steps(1000), start=start).step(stage)
    batch: dict[str, Any] = (
        dense_batch(model, config.batch_size, config.tasks_per_step)
        if isinstance(model, MSam)
        else random_batch(model.config, config.batch_size)
    )
    if start:
        batch = with_features(model, start, batch)
    arguments = trainer.state, trainer.frozen, jax.device_put(batch)
    return Step(trainer.step(stage), twin, *arguments)


def _start(config: Config, model: Sam, spec: peft_lib.PeftSpec) -> str:
    """The encoder's point at which a run's step begins; "" where it takes images."""
    if config.cache_features != "on":
        return ""
    cut = find_cut(spec, model)
    if not cut.before:
        raise ValueError(
            f"cache_features on leaves nothing out of a step of {config.method.method}, since "
            f"{cut.because} trains or is adapted, which is where the encoder begins"
        )
    return cut.point


def compiled_steps(
    model: Sam, configs: Mapping[str, Config], console: Console, params: Any = None
) -> dict[str, Step]:
    """The step of each method by name; in float32, frozen weights are one copy for all.

    `params` are random where none are given.
    """
    params = jax.device_put(random_params(model) if params is None else params)
    steps = {}
    with progress_bar(console) as bar:
        task = bar.add_task("compiling", total=len(configs), note="")
        for name, config in configs.items():
            bar.update(task, note=name)
            steps[name] = open_step(model, config, params)
            bar.advance(task)
    return steps
