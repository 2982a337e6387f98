"""Masks for an image from points, boxes and masks: the verbs of `segment_anything.SamPredictor`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samjax import preprocess
from samjax.data.prompts import encode_prompt, pad_prompt
from samjax.models import Prompts, Sam


class SamPredictor:
    """Holds one image's embedding and answers prompts on it.

    `model, params` come from `samjax.load`; `peft` is an adapter's tree or None. Arrays go in and
    come out in the reference's layout. The encoder compiles once for a model; the decoder once for
    each number of prompts and each doubling of points.
    """

    def __init__(self, model: Sam, params: Any, peft: Any = None) -> None:
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
        self._embedding = _encode(self.model, self._variables, padded[None], input_size[None])
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
        image's; `mask_input` (1, 256, 256) logits that an earlier call returned. All are optional.

        Returns masks (c, h, w), bool, or float32 logits with `return_logits`; IoU predictions (c,);
        and low-resolution logits (c, 256, 256); c is 3 with `multimask_output` and 1 without.

        Raises RuntimeError before `set_image`, ValueError for a prompt that cannot be.
        """
        original_size = self._require_image()
        coords, labels = encode_prompt(point_coords, point_labels, box)
        check_inside(coords[labels >= 0], original_size)
        masks, iou, low_res = self._predict(
            coords[None], labels[None], mask_input, multimask_output, return_logits
        )
        return masks[0], iou[0], low_res[0]

    def predict_boxes(
        self, boxes: np.ndarray, multimask_output: bool = False, return_logits: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks for many boxes (n, 4) on the current image in one call; each is a prompt.

        Returns masks (n, c, h, w), IoU predictions (n, c) and low-resolution logits
        (n, c, 256, 256). Raises as `predict` does.
        """
        original_size = self._require_image()
        array = np.asarray(boxes)
        if array.ndim != 2 or array.shape[1] != 4 or not len(array):
            raise ValueError(f"boxes must have shape (n, 4) with n > 0, not {array.shape}")
        prompts = [encode_prompt(None, None, box) for box in array]
        coords, labels = (np.stack(parts) for parts in zip(*prompts, strict=True))
        check_inside(coords, original_size)
        return self._predict(coords, labels, None, multimask_output, return_logits)

    def _predict(
        self,
        coords: np.ndarray,
        labels: np.ndarray,
        mask_input: np.ndarray | None,
        multimask_output: bool,
        return_logits: bool,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        original_size = self._require_image()
        frame = self.model.config.frame
        coords = preprocess.scale_coords(coords, original_size, frame).astype(np.float32)
        # Empty slots change nothing, and rounding up to powers of two spares recompiling.
        slots = labels.shape[1] and 1 << (labels.shape[1] - 1).bit_length()
        padded = [pad_prompt(c, x, slots) for c, x in zip(coords, labels, strict=True)]
        coords, labels = (np.stack(parts) for parts in zip(*padded, strict=True))
        masks = None if mask_input is None else self._check_mask(mask_input)
        prompts = Prompts(coords, labels, masks)
        logits, iou = _decode(self.model, self._variables, self._embedding, prompts)
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        logits, iou = logits[:, chosen], iou[:, chosen]
        full = preprocess.postprocess_masks(logits, frame, original_size)
        full = full if return_logits else full > preprocess.MASK_THRESHOLD
        return np.asarray(full), np.asarray(iou), np.asarray(logits)

    def _check_mask(self, mask_input: np.ndarray) -> Any:
        side = 4 * self._embedding.shape[1]
        array = np.asarray(mask_input)
        if array.shape != (1, side, side):
            raise ValueError(
                f"mask_input must have shape (1, {side}, {side}), low-resolution logits of an "
                f"earlier prediction, not {array.shape}"
            )
        return jnp.asarray(array, jnp.float32)

    def _require_image(self) -> tuple[int, int]:
        if self.original_size is None:
            raise RuntimeError("call set_image(image) before predicting")
        return self.original_size


@functools.partial(jax.jit, static_argnums=0)
def _encode(model: Sam, variables: Any, image: Any, input_size: Any) -> Any:
    return model.apply(variables, image, input_size, method="encode")


@functools.partial(jax.jit, static_argnums=0)
def _decode(model: Sam, variables: Any, embedding: Any, prompts: Prompts) -> Any:
    return model.apply(variables, embedding, prompts, method="decode")


def check_inside(coords: np.ndarray, original_size: tuple[int, int]) -> None:
    """Raises ValueError for a point outside the image; its edges x = width, y = height are in."""
    height, width = original_size
    flat = np.asarray(coords).reshape(-1, 2)
    outside = flat[(flat < 0).any(1) | (flat[:, 0] > width) | (flat[:, 1] > height)]
    if len(outside):
        x, y = outside[0]
        raise ValueError(
            f"the point or box corner ({x:g}, {y:g}) lies outside the image, which is {width} "
            f"pixels wide and {height} high"
        )
