"""Masks for an image from points, boxes and masks: the verbs of `segment_anything.SamPredictor`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from samjax import preprocess
from samjax.models import MSam, Prompts, Sam
from samjax.prompting import Prompt, assemble, check_prompt

# Prompts that are decoded at once: each holds a few dense maps of the image embedding's size.
PROMPTS_PER_BATCH = 64


class SamPredictor:
    """Holds one image's embedding and answers prompts on it.

    `model, params` come from `samjax.load`; `peft` is an adapter's tree or None. Arrays go in and
    come out in the reference's layout. The encoder compiles once for a model; the decoder once for
    each doubling of prompts and of points. Raises ValueError for a model of dense tasks.
    """

    def __init__(self, model: Sam, params: Any, peft: Any = None) -> None:
        check_promptable(model)
        self.model = model
        self._variables = jax.device_put({"params": params, "peft": peft or {}})
        self.reset_image()

    def reset_image(self) -> None:
        """Forgets the current image."""
        self._embedding: Any = None
        self.original_size: tuple[int, int] | None = None

    def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
        """Computes the embedding of an (h, w, 3) uint8 image.

        `image_format` is the order of its channels, "RGB" or "BGR". Raises ValueError for another
        shape, another dtype (floats in [0, 1] among them) or another format.
        """
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be 'RGB' or 'BGR', not {image_format!r}")
        array = preprocess.check_image(image)
        if image_format == "BGR":
            array = array[..., ::-1]
        padded, input_size = preprocess.prepare_image(array, self.model.config.frame)
        self._embedding = encode(self.model, self._variables, padded[None], input_size[None])
        self.original_size = (array.shape[0], array.shape[1])

    def get_image_embedding(self) -> np.ndarray:
        """The current image's embedding, float32 (1, 256, h, w) as in the reference."""
        self._require_image()
        return np.asarray(self._embedding, np.float32).transpose(0, 3, 1, 2)

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks for one prompt on the current image.

        `point_coords` (n, 2) as (x, y) in the image's pixels with `point_labels` (n,), 1 for the
        object and 0 for the background; `box` (4,) as (x0, y0, x1, y1), whose edges may lie on the
        image's; `mask_input`, (1, 256, 256) logits that an earlier call returned (to refine them),
        or a mask of the image's own size (h, w), bool or float logits. All are optional.

        Returns masks (c, h, w), bool, or float32 logits with `return_logits`; IoU predictions (c,);
        and low-resolution logits (c, 256, 256); c is 3 with `multimask_output` and 1 without.

        Raises RuntimeError before `set_image`, ValueError for a prompt that cannot be.
        """
        prompt = Prompt(point_coords, point_labels, box, mask_input)
        masks, iou, low_res = self.predict_prompts([prompt], multimask_output, return_logits)
        return masks[0], iou[0], low_res[0]

    def predict_boxes(
        self, boxes: np.ndarray, multimask_output: bool = False, return_logits: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks for many boxes (n, 4) on the current image in one call; each is a prompt.

        Returns masks (n, c, h, w), IoU predictions (n, c) and low-resolution logits
        (n, c, 256, 256). Raises as `predict` does.
        """
        array = np.asarray(boxes)
        if array.ndim != 2 or array.shape[1] != 4 or not len(array):
            raise ValueError(f"boxes must have shape (n, 4) with n > 0, not {array.shape}")
        prompts = [Prompt(box=box) for box in array]
        return self.predict_prompts(prompts, multimask_output, return_logits)

    def predict_prompts(
        self,
        prompts: Sequence[Prompt],
        multimask_output: bool = False,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks for any mixture of prompts on the current image in one call.

        Returns what `predict_boxes` does; raises as `predict` does, and for no prompts at all.
        """
        size, config = self._require_image(), self.model.config
        if not prompts:
            raise ValueError("prompts is empty; for no points, boxes and masks give [Prompt()]")
        for prompt in prompts:
            check_prompt(prompt, size, config)
        parts = []
        for start in range(0, len(prompts), PROMPTS_PER_BATCH):
            some = prompts[start : start + PROMPTS_PER_BATCH]
            batch = assemble(some, [size] * len(some), config)
            logits, iou = decode(self.model, self._variables, self._embedding, batch)
            chosen = slice(1, None) if multimask_output else slice(0, 1)
            logits, iou = logits[: len(some), chosen], iou[: len(some), chosen]
            full = preprocess.postprocess_masks(logits, config.frame, size)
            full = full if return_logits else full > preprocess.MASK_THRESHOLD
            parts.append([np.asarray(x) for x in (full, iou, logits)])
        masks, iou, low_res = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return masks, iou, low_res

    def _require_image(self) -> tuple[int, int]:
        if self.original_size is None:
            raise RuntimeError("call set_image(image) before predicting")
        return self.original_size


def check_promptable(model: Sam) -> None:
    """Raises ValueError for a model of dense tasks, which takes no prompts."""
    if isinstance(model, MSam):
        names = ", ".join(task.name for task in model.tasks)
        raise ValueError(
            f"this model predicts dense tasks ({names}), and no masks from prompts: use "
            "samjax.TaskPredictor"
        )


@functools.partial(jax.jit, static_argnums=0)
def encode(model: Sam, variables: Any, image: Any, input_size: Any) -> Any:
    """`Sam.encode`, compiled."""
    return model.apply(variables, image, input_size, method="encode")


@functools.partial(jax.jit, static_argnums=0)
def decode(model: Sam, variables: Any, embedding: Any, prompts: Prompts) -> Any:
    """`Sam.decode`, compiled."""
    return model.apply(variables, embedding, prompts, method="decode")
