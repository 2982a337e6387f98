"""Models, weights and batches to time: nothing is downloaded, everything is random."""

from __future__ import annotations

import difflib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samjax.data.prompts import BOX_LOWER_RIGHT, BOX_UPPER_LEFT
from samjax.models import MODELS, MSam, Sam, SamConfig
from samjax.models.configs import ImageSize
from samjax.tasks import CLASSES, Task


def model_config(name: str, image_size: ImageSize | None) -> SamConfig:
    """A model by name, at its own input size or another.

    Raises ValueError for a model or a size that there is not.
    """
    if name not in MODELS:
        nearest = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown model {name!r}; known are {', '.join(MODELS)}, and the nearest is {nearest}"
        )
    return MODELS[name].with_image_size(image_size)


def random_params(model: Sam) -> dict[str, Any]:
    """Float32 numpy arrays, none of them all zeros or ones, which would hide differences."""
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        name = path[-1].key
        fan_in = float(np.prod(leaf.shape[:-1]))
        values = rng.standard_normal(leaf.shape, np.float32)
        if name == "var":  # of a batch norm
            return np.abs(values) + np.float32(0.5)
        return values * np.float32(fan_in**-0.5 if name == "kernel" else 0.1) + (name == "scale")

    return jax.tree.map_with_path(draw, model.init_params_shapes())


def random_batch(config: SamConfig, batch_size: int) -> dict[str, np.ndarray]:
    """A batch of `make_train_step`: noise, a rectangle as truth, and the rectangle's box."""
    height, width = config.frame.shape
    mask = np.zeros((batch_size, height, width), bool)
    mask[:, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = True
    corners = np.float32([[width / 4, height / 4], [3 * width / 4, 3 * height / 4]])
    return {
        **_images(config, batch_size),
        "mask": mask,
        "coords": np.tile(corners, (batch_size, 1, 1)),
        "labels": np.tile(np.int32([BOX_UPPER_LEFT, BOX_LOWER_RIGHT]), (batch_size, 1)),
    }


def dense_batch(model: MSam, batch_size: int, tasks_per_step: int | None = None) -> dict[str, Any]:
    """A batch of dense tasks: noise, with a truth for each task; some are drawn, or all train."""
    rng = np.random.default_rng(1)
    height, width = model.config.frame.shape

    def truth(task: Task) -> np.ndarray:
        if task.loss in CLASSES:
            return rng.integers(0, task.classes, (batch_size, height, width), np.int32)
        values = rng.random((batch_size, task.channels, height, width), np.float32) + 0.5
        if task.channels == 3:  # normals
            values /= np.linalg.norm(values, axis=1, keepdims=True)
        return values

    batch: dict[str, Any] = _images(model.config, batch_size)
    if tasks_per_step is not None:
        batch["drawn"] = np.tile(np.arange(tasks_per_step, dtype=np.int32), (batch_size, 1))
    return {**batch, "truth": {task.name: truth(task) for task in model.tasks}}


def with_features(model: Sam, point: str, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch that has noise, bfloat16, as the encoder's features at `point` instead of images."""
    rest = {key: value for key, value in batch.items() if key != "image"}

    def encode(params: Any, image: Any, input_size: Any) -> Any:
        return model.apply({"params": params}, image, input_size, point, method="encode_to")

    images = batch["image"], batch["input_size"]
    shape = jax.eval_shape(encode, model.init_params_shapes(), *images).shape
    noise = np.random.default_rng(2).standard_normal(shape, np.float32)
    return {**rest, "features": noise.astype(jnp.bfloat16)}


def _images(config: SamConfig, batch_size: int) -> dict[str, np.ndarray]:
    height, width = config.frame.shape
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (batch_size, height, width, 3), np.uint8),
        "input_size": np.tile(np.int32([height, width]), (batch_size, 1)),
    }
