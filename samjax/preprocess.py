"""From uint8 image to model input, and from mask logits back to the image: the only definition.

SAM resizes the longest side to `image_size` with PIL's antialiased bilinear filter on uint8,
normalises, and pads below and to the right with zeros *after* normalising (so that padding is the
mean colour, not black). Masks go the other way by two bilinear resizes without antialiasing
(`segment_anything/utils/transforms.py`, `modeling/sam.py`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import Image

MASK_THRESHOLD = 0.0


def check_image(image: object, name: str = "image") -> np.ndarray:
    """Returns `image` as an (h, w, 3) uint8 array, or raises ValueError with one sentence."""
    array = np.asarray(image)
    if array.dtype != np.uint8:
        hint = (
            f"multiply by 255 and convert: ({name} * 255).round().astype(numpy.uint8)"
            if np.issubdtype(array.dtype, np.floating) and array.size and array.max() <= 1
            else 'give an RGB array, such as numpy.asarray(Image.open(path).convert("RGB"))'
        )
        raise ValueError(
            f"{name} must hold RGB values in [0, 255] as uint8, not {array.dtype}; {hint}"
        )
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(
            f"{name} must have shape (height, width, 3), RGB, but has shape {array.shape}"
        )
    if 0 in array.shape:
        raise ValueError(f"{name} has shape {array.shape}: it holds no pixels")
    return array


def resized_shape(height: int, width: int, image_size: int) -> tuple[int, int]:
    """(height, width) in pixels after the longest side became `image_size`."""
    scale = image_size * 1.0 / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(
    image: UInt8[np.ndarray, "h w 3"], image_size: int
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Resizes the longest side to `image_size` as the reference: PIL bilinear, antialiased."""
    height, width = resized_shape(image.shape[0], image.shape[1], image_size)
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def pad_to_square(array: np.ndarray, image_size: int) -> np.ndarray:
    """Pads (h, w, ...) with zeros below and to the right to (image_size, image_size, ...)."""
    height, width = array.shape[:2]
    pad = [(0, image_size - height), (0, image_size - width)] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, pad)


def prepare_image(
    image: UInt8[np.ndarray, "h w 3"], image_size: int
) -> tuple[UInt8[np.ndarray, "s s 3"], Int[np.ndarray, "2"]]:
    """Resizes and pads; returns the image and `input_size`, its (height, width) before padding."""
    resized = resize_image(image, image_size)
    return pad_to_square(resized, image_size), np.array(resized.shape[:2], np.int32)


def normalize(
    image: UInt8[Array, "b h w 3"],
    input_size: Int[Array, "b 2"],
    pixel_mean: tuple[float, float, float],
    pixel_std: tuple[float, float, float],
) -> Float[Array, "b h w 3"]:
    """Normalises on the device and sets the padding, everything outside `input_size`, to zero."""
    mean, std = jnp.asarray(pixel_mean, jnp.float32), jnp.asarray(pixel_std, jnp.float32)
    normalized = (image.astype(jnp.float32) - mean) / std
    return jnp.where(inside(input_size, *image.shape[1:3])[..., None], normalized, 0.0)


def inside(input_size: Int[Array, "b 2"], height: int, width: int) -> Bool[Array, "b h w"]:
    """True where a pixel of the padded (height, width) input belongs to the image."""
    rows = jnp.arange(height)[None, :, None] < input_size[:, 0, None, None]
    columns = jnp.arange(width)[None, None, :] < input_size[:, 1, None, None]
    return rows & columns


def scale_coords(
    coords: np.ndarray, original_size: tuple[int, int], image_size: int
) -> Float[np.ndarray, "..."]:
    """(..., 2) points as (x, y) in image pixels -> pixels of the model's input."""
    height, width = original_size
    new_height, new_width = resized_shape(height, width, image_size)
    return np.asarray(coords, np.float64) * (new_width / width, new_height / height)


@functools.lru_cache(maxsize=16)
def interpolation_matrix(size_in: int, size_out: int) -> Float[np.ndarray, "n m"]:
    """One axis of torch's `F.interpolate(mode="bilinear", align_corners=False)` as a matrix."""
    source = np.maximum((np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5, 0.0)
    low = np.minimum(source.astype(np.int64), size_in - 1)
    high = np.minimum(low + 1, size_in - 1)
    weight = source - low
    matrix = np.zeros((size_out, size_in))
    np.add.at(matrix, (np.arange(size_out), low), 1.0 - weight)
    np.add.at(matrix, (np.arange(size_out), high), weight)
    matrix.setflags(write=False)
    return matrix


def unpad_matrix(low: int, image_size: int, input_side: int, original: int) -> np.ndarray:
    """One axis of post-processing as a float32 (original, low) matrix.

    Upsampling from `low` to `image_size`, cutting the padding off at `input_side` and resizing to
    `original` pixels are all linear, so they are one matrix: exact, and the same shape of work for
    every image of a dataset.
    """
    up = interpolation_matrix(low, image_size)[:input_side]
    return (interpolation_matrix(input_side, original) @ up).astype(np.float32)


@jax.jit
def _apply_separable(
    rows: Float[Array, "oh h"], columns: Float[Array, "ow w"], logits: Float[Array, "*n h w"]
) -> Float[Array, "*n oh ow"]:
    return jnp.einsum(
        "ih,...hw,jw->...ij", rows, logits, columns, precision=jax.lax.Precision.HIGHEST
    )


def postprocess_masks(
    low_res_logits: Float[Array | np.ndarray, "*n h w"],
    image_size: int,
    original_size: tuple[int, int],
) -> Float[Array, "*n oh ow"]:
    """Mask logits at the model's resolution -> float32 logits at `original_size` (height, width).

    A pixel belongs to the mask where its logit exceeds `MASK_THRESHOLD`.
    """
    input_size = resized_shape(*original_size, image_size)
    rows, columns = (
        unpad_matrix(low, image_size, side, original)
        for low, side, original in zip(
            low_res_logits.shape[-2:], input_size, original_size, strict=True
        )
    )
    return _apply_separable(rows, columns, jnp.asarray(low_res_logits, jnp.float32))


def upsample(logits: Float[Array, "*n h w"], size: tuple[int, int]) -> Float[Array, "*n oh ow"]:
    """Bilinear resize of (h, w) to `size` as torch's (no antialiasing, corners not aligned)."""
    rows, columns = (
        interpolation_matrix(low, high).astype(np.float32)
        for low, high in zip(logits.shape[-2:], size, strict=True)
    )
    return _apply_separable(rows, columns, logits.astype(jnp.float32))
