"""From uint8 image to model input, and from mask logits back to the image: the only definition.

SAM resizes the longest side to the model's own with PIL's antialiased bilinear filter on uint8,
normalises, and pads below and to the right with zeros *after* normalising (so that padding is the
mean colour, not black). Masks go the other way by two bilinear resizes without antialiasing
(`segment_anything/utils/transforms.py`, `modeling/sam.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8
from PIL import Image

from samjax.data.prompts import central_point

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


Resize = Literal["longest_side", "stretch"]


@dataclasses.dataclass(frozen=True)
class Frame:
    """The model's input: its sides in pixels, and how an image is laid into it.

    `longest_side` keeps the aspect: the image becomes as large as fits, by an antialiased bilinear
    filter, and the rest is padding below or to the right. `stretch` fills the input whatever the
    aspect, by an antialiased bicubic filter (MedSAM; its authors take scikit-image's spline of the
    same order, which differs by rounding and ringing).
    """

    height: int
    width: int
    resize: Resize = "longest_side"

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.height, self.width

    def __str__(self) -> str:
        return str(self.height) if self.height == self.width else f"{self.height}x{self.width}"

    def resized_shape(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels that an image of that size has within the input."""
        if self.resize == "stretch":
            return self.shape
        scale = min(self.height * 1.0 / height, self.width * 1.0 / width)
        # The side that sets the scale becomes the frame's own, whatever the rounding.
        return (
            min(self.height, max(1, int(height * scale + 0.5))),
            min(self.width, max(1, int(width * scale + 0.5))),
        )


def resize_image(image: UInt8[np.ndarray, "h w 3"], frame: Frame) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Resizes an image as the reference does, with PIL's antialiased filters on uint8."""
    height, width = frame.resized_shape(image.shape[0], image.shape[1])
    if image.shape[:2] == (height, width):
        return image
    kinds = {"longest_side": Image.Resampling.BILINEAR, "stretch": Image.Resampling.BICUBIC}
    return np.asarray(Image.fromarray(image).resize((width, height), kinds[frame.resize]))


def pad_to(array: np.ndarray, frame: Frame) -> np.ndarray:
    """Pads (h, w, ...) with zeros below and to the right to (frame.height, frame.width, ...)."""
    height, width = array.shape[:2]
    pad = [(0, frame.height - height), (0, frame.width - width)] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, pad)


def prepare_image(
    image: UInt8[np.ndarray, "h w 3"], frame: Frame
) -> tuple[UInt8[np.ndarray, "fh fw 3"], Int[np.ndarray, "2"]]:
    """Resizes and pads; returns the image and `input_size`, its (height, width) before padding."""
    resized = resize_image(image, frame)
    return pad_to(resized, frame), np.array(resized.shape[:2], np.int32)


def prepare_mask(mask: Bool[np.ndarray, "h w"], frame: Frame) -> Bool[np.ndarray, "fh fw"]:
    """A mask on the padded input: resized as the image with nearest neighbour, padded False.

    Nearest neighbour may miss an object that is smaller than a pixel of the frame. Of a mask that
    would become empty, the pixel of the frame that its most central pixel lies in stays, so that a
    prompt on the object never goes with a truth that has none.
    """
    height, width = frame.resized_shape(*mask.shape)
    if mask.shape == (height, width):
        return pad_to(mask, frame)
    image = Image.fromarray(mask.astype(np.uint8))
    resized = np.array(image.resize((width, height), Image.Resampling.NEAREST)).astype(bool)
    if mask.any() and not resized.any():
        x, y = central_point(mask) + 0.5
        resized[int(y * height / mask.shape[0]), int(x * width / mask.shape[1])] = True
    return pad_to(resized, frame)


# The logit of a mask prompt's object; SAM was trained with logits of its own predictions, and an
# object of probability 0.999 lies well within them.
MASK_PROMPT_LOGIT = 6.9


def prepare_mask_prompt(
    mask: Shaped[np.ndarray, "h w"], frame: Frame, low: tuple[int, int]
) -> Float[np.ndarray, "lh lw"]:
    """A mask of the image's size, bool or float logits, as the (lh, lw) logits of a mask prompt.

    It is resized as the image is, antialiased; the padding is background.
    """
    logits = mask
    if mask.dtype == bool:
        logits = np.where(mask, MASK_PROMPT_LOGIT, -MASK_PROMPT_LOGIT)
    # An image's sides in the frame need not be whole low-resolution pixels: resized within the
    # frame, where they are whole, and then brought down to it as one.
    height, width = frame.resized_shape(*mask.shape)
    image = Image.fromarray(logits.astype(np.float32))
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    pad = ((0, frame.height - height), (0, frame.width - width))
    padded = Image.fromarray(np.pad(resized, pad, constant_values=-MASK_PROMPT_LOGIT))
    return np.asarray(padded.resize((low[1], low[0]), Image.Resampling.BILINEAR))


def normalize(
    image: UInt8[Array, "b h w 3"],
    input_size: Int[Array, "b 2"],
    normalization: Literal["pixel", "min_max"],
    pixel_mean: tuple[float, float, float],
    pixel_std: tuple[float, float, float],
) -> Float[Array, "b h w 3"]:
    """Normalises on the device and sets the padding, everything outside `input_size`, to zero.

    `min_max` scales each image to [0, 1] by its least and largest value before mean and standard
    deviation; see `samjax.models.SamConfig`.
    """
    mean, std = jnp.asarray(pixel_mean, jnp.float32), jnp.asarray(pixel_std, jnp.float32)
    within = inside(input_size, *image.shape[1:3])[..., None]
    values = image.astype(jnp.float32)
    if normalization == "min_max":
        low = jnp.min(jnp.where(within, values, 255.0), axis=(1, 2, 3), keepdims=True)
        high = jnp.max(jnp.where(within, values, 0.0), axis=(1, 2, 3), keepdims=True)
        values = (values - low) / jnp.maximum(high - low, 1e-8)
    return jnp.where(within, (values - mean) / std, 0.0)


def inside(input_size: Int[Array, "b 2"], height: int, width: int) -> Bool[Array, "b h w"]:
    """True where a pixel of the padded (height, width) input belongs to the image."""
    rows = jnp.arange(height)[None, :, None] < input_size[:, 0, None, None]
    columns = jnp.arange(width)[None, None, :] < input_size[:, 1, None, None]
    return rows & columns


def scale_coords(
    coords: np.ndarray, original_size: tuple[int, int], frame: Frame
) -> Float[np.ndarray, "..."]:
    """(..., 2) points as (x, y) in image pixels -> pixels of the model's input."""
    height, width = original_size
    new_height, new_width = frame.resized_shape(height, width)
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


def unpad_matrices(
    low: tuple[int, int], frame: Frame, original_size: tuple[int, int]
) -> tuple[Float[np.ndarray, "oh h"], Float[np.ndarray, "ow w"]]:
    """Post-processing of (h, w) = `low` logits, one float32 matrix for each axis.

    Upsampling to the frame, cutting the padding off and resizing to `original_size` are all linear,
    so they are one matrix for rows and one for columns: exact, and the same shape of work for every
    image of a dataset.
    """
    sides = zip(low, frame.shape, frame.resized_shape(*original_size), original_size, strict=True)
    rows, columns = (
        interpolation_matrix(side_input, original)
        @ interpolation_matrix(side_low, side)[:side_input]
        for side_low, side, side_input, original in sides
    )
    return rows.astype(np.float32), columns.astype(np.float32)


@jax.jit
def _apply_separable(
    rows: Float[Array, "oh h"], columns: Float[Array, "ow w"], logits: Float[Array, "*n h w"]
) -> Float[Array, "*n oh ow"]:
    return jnp.einsum(
        "ih,...hw,jw->...ij", rows, logits, columns, precision=jax.lax.Precision.HIGHEST
    )


def postprocess_masks(
    low_res_logits: Float[Array | np.ndarray, "*n h w"],
    frame: Frame,
    original_size: tuple[int, int],
) -> Float[Array, "*n oh ow"]:
    """Mask logits at the model's resolution -> float32 logits at `original_size` (height, width).

    A pixel belongs to the mask where its logit exceeds `MASK_THRESHOLD`.
    """
    height, width = low_res_logits.shape[-2:]
    rows, columns = unpad_matrices((height, width), frame, original_size)
    return _apply_separable(rows, columns, jnp.asarray(low_res_logits, jnp.float32))


def upsample(logits: Float[Array, "*n h w"], size: tuple[int, int]) -> Float[Array, "*n oh ow"]:
    """Bilinear resize of (h, w) to `size` as torch's (no antialiasing, corners not aligned)."""
    rows, columns = (
        interpolation_matrix(low, high).astype(np.float32)
        for low, high in zip(logits.shape[-2:], size, strict=True)
    )
    return _apply_separable(rows, columns, logits.astype(jnp.float32))
