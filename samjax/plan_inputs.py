"""A run's model and the shapes of its programs' arguments, known without weights and data."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from samjax import peft as peft_lib
from samjax.catalog import CATALOG
from samjax.config import Config
from samjax.data.dense import DenseSample
from samjax.data.pipeline import EVAL_SLOTS
from samjax.data.sources import Sample
from samjax.evaluation.evaluate import predict
from samjax.evaluation.evaluate_tasks import predict_tasks
from samjax.models import MODELS, MSam, Sam
from samjax.problems import problem_of
from samjax.tasks import CLASSES
from samjax.training.sharding import BatchLayout, rows

# Of the images that stand for the data, in pixels; the model's input has its own.
_SIDE = 64


def model_of(config: Config) -> Sam:
    """The model that a run of `config` trains.

    Raises ValueError where neither `model` nor the name of its weights tells which that is.
    """
    name = config.model
    if name == "auto" and config.weights in CATALOG:
        name = CATALOG[config.weights].model
    if name == "auto":
        raise ValueError(f"no weights are read: pass --model, one of {', '.join(MODELS)}")
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(MODELS)}")
    options: dict[str, Any] = {
        "config": MODELS[name].with_image_size(config.image_size),
        "attention": config.attention,
        "dtype": jnp.dtype(config.dtype),
        "remat": config.remat,
    }
    tasks = config.parsed_tasks()
    return MSam(**options, tasks=tasks) if tasks else Sam(**options)


def base_shapes(config: Config, model: Sam) -> dict[str, Any]:
    """The shapes of {"params", "peft"} as a run keeps them; nothing is allocated."""
    spec = config.spec()

    def base(params: Any) -> Any:
        return peft_lib.start(spec, model, params, jax.random.key(0))

    return jax.eval_shape(base, model.init_params_shapes())


def batch_shapes(config: Config, model: Sam, mesh: Mesh) -> dict[str, Any]:
    """The shapes of a training batch, spread over a mesh: what the data pipeline makes of noise."""
    pair = dataclasses.replace(config, batch_size=2, accumulate=1)
    split = any(stage.split for stage in config.parsed_stages())
    batch = dict(problem_of(pair).batches(model, _Noise(config), split=split)[0])
    del batch["index"]  # the host's
    return _spread(batch, config.batch_size, mesh)


def _spread(batch: Any, size: int, mesh: Mesh) -> Any:
    """The shapes of a batch of `size` images like these."""

    def of_leaf(leaf: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype, sharding=rows(mesh))

    return jax.tree.map(of_leaf, batch)


class _Noise:
    """Two samples of the kind that a run reads."""

    def __init__(self, config: Config) -> None:
        self._tasks = config.parsed_tasks()

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Sample | DenseSample:
        image = np.random.default_rng(index).integers(0, 256, (_SIDE, _SIDE, 3), np.uint8)
        if not self._tasks:
            return Sample("", image, np.ones((_SIDE, _SIDE), bool))
        truth = {
            task.name: np.zeros((_SIDE, _SIDE), np.int32)
            if task.loss in CLASSES
            else np.zeros((_SIDE, _SIDE, task.channels), np.float32)
            for task in self._tasks
        }
        return DenseSample("", image, truth)


def evaluation_shapes(config: Config, model: Sam, mesh: Mesh) -> dict[str, Any]:
    """The shapes of a batch of evaluation, spread over a mesh: what `evaluation_step` takes."""
    batch = {
        "image": np.zeros((1, *model.config.frame.shape, 3), np.uint8),
        "input_size": np.zeros((1, 2), np.int32),
    }
    if not isinstance(model, MSam):
        slots = EVAL_SLOTS[config.evaluation_prompt]
        batch["coords"] = np.zeros((1, slots, 2), np.float32)
        batch["labels"] = np.zeros((1, slots), np.int32)
    return _spread(batch, BatchLayout.for_at_least(config.eval_batch_size, mesh).size, mesh)


def evaluation_step(model: Sam) -> Any:
    """The jitted function of (model, mesh, variables, batch) that evaluates a batch."""
    return predict_tasks if isinstance(model, MSam) else predict
