"""From a user's prompts, in the pixels of images, to the model's: fixed slots that pad exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from samjax.data.prompts import encode_prompt, pad_prompt
from samjax.models import Prompts, SamConfig
from samjax.preprocess import prepare_mask_prompt, scale_coords


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt for one mask, in pixels of its image; all parts are optional and may be mixed.

    `point_coords` (n, 2) as (x, y) with `point_labels` (n,), 1 for the object and 0 for the
    background; `box` (4,) as (x0, y0, x1, y1), whose edges may lie on the image's. `mask_input` is
    either the low-resolution logits (1, 4 h, 4 w) that an earlier prediction returned, (1, 256,
    256) at SAM's own input size, or a mask of the image's own size (height, width): bool, or
    float logits.
    """

    point_coords: Any = None
    point_labels: Any = None
    box: Any = None
    mask_input: Any = None


def check_prompt(
    prompt: Prompt, original_size: tuple[int, int], config: SamConfig | None = None
) -> None:
    """Raises ValueError, one sentence, for a prompt that cannot be in an image of that size.

    Without the model's `config` a mask is not looked at.
    """
    _encode(prompt, original_size)
    if prompt.mask_input is not None and config is not None:
        _check_mask(prompt.mask_input, original_size, config.low_res_shape)


def assemble(
    prompts: Sequence[Prompt], original_sizes: Sequence[tuple[int, int]], config: SamConfig
) -> Prompts:
    """A batch of the model's prompts, each with the (height, width) of its own image.

    The slots of a prompt and the number of prompts are rounded up to powers of two: empty slots
    change nothing, and few shapes are compiled. Raises ValueError for a prompt that cannot be.
    """
    frame = config.frame
    encoded = []
    for prompt, size in zip(prompts, original_sizes, strict=True):
        coords, labels = _encode(prompt, size)
        encoded.append((scale_coords(coords, size, frame).astype(np.float32), labels))
    slots = power_of_two(max(len(labels) for _, labels in encoded))
    count = power_of_two(len(prompts))
    nothing = (np.zeros((0, 2), np.float32), np.zeros(0, np.int32))
    padded = [pad_prompt(*one, slots) for one in encoded + [nothing] * (count - len(encoded))]
    coords, labels = (np.stack(parts) for parts in zip(*padded, strict=True))
    if all(prompt.mask_input is None for prompt in prompts):
        return Prompts(coords, labels)
    low = config.low_res_shape
    masks, has_mask = np.zeros((count, *low), np.float32), np.zeros(count, bool)
    for i, (prompt, size) in enumerate(zip(prompts, original_sizes, strict=True)):
        if prompt.mask_input is not None:
            mask = _check_mask(prompt.mask_input, size, low)
            masks[i] = mask[0] if mask.ndim == 3 else prepare_mask_prompt(mask, frame, low)
            has_mask[i] = True
    return Prompts(coords, labels, masks, has_mask)


def power_of_two(count: int) -> int:
    """The least power of two that is not less than `count`; 0 for 0."""
    return count and 1 << (count - 1).bit_length()


def _encode(prompt: Prompt, original_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Points and box as the model's slots, in the image's pixels, where they lie in the image."""
    coords, labels = encode_prompt(prompt.point_coords, prompt.point_labels, prompt.box)
    check_inside(coords[labels >= 0], original_size)
    return coords, labels


def _check_mask(
    mask_input: Any, original_size: tuple[int, int], low: tuple[int, int]
) -> np.ndarray:
    """The mask as an array: (1, 4 h, 4 w) logits, or (height, width), bool or logits."""
    array = np.asarray(mask_input)
    if array.dtype != bool and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"mask_input must be bool or float logits, not {array.dtype}")
    if array.dtype != bool:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError("mask_input must hold finite numbers")
        if array.shape == original_size and (array >= 0).all():
            # A mask of zeros and ones would be an object of every pixel, weakly.
            raise ValueError(
                "mask_input of the image's size holds no negative number: give a mask as bool, "
                "mask > 0, or logits, which are negative on the background"
            )
    if array.shape != original_size and (array.shape != (1, *low) or array.dtype == bool):
        raise ValueError(
            f"mask_input must have shape (1, {low[0]}, {low[1]}), low-resolution logits of an "
            f"earlier prediction, or the image's own {original_size}, not {array.dtype} "
            f"{array.shape}"
        )
    return array


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
