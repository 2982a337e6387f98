"""Maps of dense tasks for an image, at its own resolution."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Shaped

from samjax import preprocess
from samjax.models import MSam, Sam
from samjax.models.msam import maps_of
from samjax.nn import Context
from samjax.tasks import Task, find
from samjax.viz_tasks import predicted


class TaskPredictor:
    """Predicts the dense tasks that an adapter was trained for.

    `model, params, peft` come from `samjax.load_adapted`. The model compiles once for the tasks
    that are asked for, whatever the sizes of images; what the tasks' encoders have in common is
    computed once. Raises ValueError for a model that predicts masks.
    """

    def __init__(self, model: Sam, params: Any, peft: Any = None) -> None:
        if not isinstance(model, MSam):
            raise ValueError(
                "this model predicts masks from prompts, and has no dense tasks: use "
                "samjax.SamPredictor, or load an adapter that was trained for tasks"
            )
        self.model = model
        self._variables = jax.device_put({"params": params, "peft": peft or {}})

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What there is to predict."""
        return self.model.tasks

    def predict(
        self, image: np.ndarray, tasks: str | Sequence[str] | None = None
    ) -> dict[str, Shaped[np.ndarray, "h w *c"]]:
        """What tasks (one by name, several, or all) say of an RGB image, at its own size, by name.

        By the task's loss: `cross_entropy` and `mask_classification` the classes (h, w), int32;
        `balanced_bce` the probability (h, w), float32 in [0, 1]; `masked_l1` the number (h, w),
        float32, in the unit of its training; `cosine` the direction (h, w, 3), float32, of length
        1.

        Raises ValueError for another shape or dtype (floats in [0, 1] among them), and for a task
        that there is not, with the nearest.
        """
        return self.at_size(self.predict_low_res(image, tasks), np.shape(image)[:2])

    def predict_low_res(
        self, image: np.ndarray, tasks: str | Sequence[str] | None = None
    ) -> dict[str, Float32[np.ndarray, "c lh lw"]]:
        """The model's own maps by task, without activation, of the image in its padded input.

        Of `mask_classification` they are the classes' scores. A quarter of the input's height and
        width; raises as `predict`.
        """
        names = [task.name for task in self.tasks] if tasks is None else tasks
        names = [names] if isinstance(names, str) else names
        chosen = tuple(find(self.tasks, name).name for name in dict.fromkeys(names))
        if not chosen:
            raise ValueError("tasks is empty: name some, or leave it out for all of them")
        array = preprocess.check_image(image)
        padded, input_size = preprocess.prepare_image(array, self.model.config.frame)
        maps = _maps(self.model, chosen, self._variables, padded[None], input_size[None])
        return {name: np.asarray(maps[name][0]) for name in chosen}

    def at_size(
        self, low_res: Mapping[str, Float32[np.ndarray, "c lh lw"]], size: Sequence[int]
    ) -> dict[str, Shaped[np.ndarray, "h w *c"]]:
        """`predict`'s result out of `predict_low_res`'s, for an image of (height, width) `size`."""
        frame, (height, width) = self.model.config.frame, size
        found = {}
        for name, maps in low_res.items():
            full = preprocess.postprocess_masks(maps, frame, (height, width))
            values = np.asarray(predicted(find(self.tasks, name), full[None])[0])
            found[name] = values[..., 0] if values.shape[2:] == (1,) else values
        return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _maps(
    model: MSam, names: tuple[str, ...], variables: Any, image: Any, input_size: Any
) -> dict[str, Any]:
    """Low-resolution maps (b, channels, lh, lw) of some tasks, from one pass for all of them."""
    tasks = jnp.array([model.index(name) for name in names], jnp.int32)
    embeddings = model.apply(variables, image, input_size, tasks, method="encode_tasks")
    found = {}
    for i, name in enumerate(names):
        context = Context(task=tasks[i])
        decoded = model.apply(variables, embeddings[i], name, context, method="decode_task")
        found[name] = maps_of(decoded)
    return found
