"""The training step of one method or experiment: batch sizes and settings side by side."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from samjax.bench import machine
from samjax.bench.cases import Case, case_rows, product_rates, time_cases
from samjax.bench.inputs import model_config, random_params
from samjax.bench.programs import Step, product_side
from samjax.bench.rounds import check_rounds
from samjax.bench.steps import open_step, training_config
from samjax.config import Config, load_experiment
from samjax.data.augment import NO_AUGMENTATION
from samjax.data.dense_augment import NO_DENSE_AUGMENTATION
from samjax.models import Sam
from samjax.models.flash import check_attention

# Columns of the table, by their titles.
TITLES = {
    "batch_size": "batch",
    "accumulate": "accumulate",
    "dtype": "dtype",
    "remat": "remat",
    "attention": "attention",
    "cache_features": "features",
}


def measure(
    what: str,
    model_name: str,
    image_size: int | None,
    settings: Mapping[str, Sequence[Any]],
    rounds: int,
    console: Console,
) -> dict[str, Any]:
    """Times each combination of `settings`, of the names in `TITLES`; others are the run's own.

    `what` is a method with its settings, or an experiment file, whose data and weights are not
    read. Raises ValueError for a method, a model, a size or a setting that there is not.
    """
    config, sam_config = config_of(what), model_config(model_name, image_size)
    check_rounds(rounds)
    if "on" in settings.get("cache_features", ()):  # which takes images that do not change
        still = {"augment": NO_AUGMENTATION, "dense_augment": NO_DENSE_AUGMENTATION}
        config = dataclasses.replace(config, **still)
    # All of them before anything is compiled.
    configs = [
        dataclasses.replace(config, **dict(zip(settings, values, strict=True)))
        for values in itertools.product(*settings.values())
    ]
    for config in configs:
        check_attention(config.attention, config.dtype, jax.default_backend())
    load = machine.facts(console)
    params = jax.device_put(random_params(Sam(sam_config)))

    def case(config: Config) -> Case:
        model = Sam(sam_config, config.attention, jnp.dtype(config.dtype), config.remat)

        def make() -> Step:
            return open_step(model, config, params)

        shown = {name: getattr(config, name) for name in TITLES}
        return Case(shown, config.batch_size, config.dtype, make)

    side = product_side(max(sam_config.frame.shape))
    return {
        **load,
        "what": what,
        "model": model_name,
        "image_size": list(sam_config.frame.shape),
        "rounds": rounds,
        "steps": time_cases([case(config) for config in configs], side, rounds, console),
    }


def config_of(what: str) -> Config:
    """The run that a method's name with settings, or an experiment file, stands for."""
    return load_experiment(what).config if Path(what).suffix == ".py" else training_config(what, 1)


def caption(result: Mapping[str, Any]) -> str:
    """One sentence on what was measured, and where."""
    height, width = result["image_size"]
    return (
        f"{machine.described(result)}; training step of {result['what']}, {result['model']} at "
        f"{height} x {width} px; {product_rates(result['steps'])}; median of {result['rounds']} "
        f"rounds at load {result['load']:.1f}."
    )


def rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table, its head first."""
    return case_rows(result["steps"], TITLES)
