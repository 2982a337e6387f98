"""Dense tasks as pictures: classes in colours, numbers in a scale, directions as RGB."""

from __future__ import annotations

import colorsys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from samjax.tasks import IGNORE, MULTI_CLASS, Task
from samjax.training.task_losses import unit

# Numbers from the least to the largest, equally spaced; dark to light, as viridis.
_SCALE = np.float32(
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ]
)
_UNKNOWN = (0, 0, 0)


def predicted(task: Task, maps: Any) -> Any:
    """What a task's maps (b, channels, h, w) say: as its truths, with the batch before.

    Classes (b, h, w) int32; of balanced_bce the probability (b, h, w, 1); numbers (b, h, w, 1);
    directions (b, h, w, 3) of length 1.
    """
    if task.loss in MULTI_CLASS:
        return jnp.argmax(maps, axis=1).astype(jnp.int32)
    if task.loss == "balanced_bce":
        maps = jax.nn.sigmoid(maps)
    elif task.loss == "cosine":
        maps = unit(maps)
    return jnp.moveaxis(maps, 1, -1)


def range_of(task: Task, values: np.ndarray) -> tuple[float, float]:
    """The least and the largest known number, for a scale; (0, 1) where there is none."""
    known = values[values != 0] if task.loss == "masked_l1" else values[:0]
    return (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)


def picture_of(
    task: Task, values: np.ndarray, limits: tuple[float, float]
) -> UInt8[np.ndarray, "h w 3"]:
    """A truth or a prediction in colours; unknown pixels are black.

    `limits` are the numbers at the ends of the scale. A direction (x, y, z) is RGB, -1 black.
    """
    if task.loss == "cosine":
        colors = np.round((values + 1) * 127.5)
        return np.where(values.any(-1, keepdims=True), colors, 0).astype(np.uint8)
    if task.loss in MULTI_CLASS:
        palette = np.array([*_palette(task.channels), _UNKNOWN], np.uint8)
        return palette[np.where(values == IGNORE, task.channels, values)]
    if task.loss == "balanced_bce":  # a truth of yes and no, or a probability
        values = values if values.ndim == 2 else values[..., 0]
        unknown, limits = values == IGNORE, (0.0, 1.0)
    else:
        values = values[..., 0]
        unknown = values == 0
    colors = _scaled(values, *limits)
    colors[unknown] = _UNKNOWN
    return colors


def _scaled(values: np.ndarray, least: float, largest: float) -> np.ndarray:
    place = np.clip((values - least) / max(largest - least, 1e-12), 0, 1) * (len(_SCALE) - 1)
    low = np.minimum(place.astype(int), len(_SCALE) - 2)
    share = (place - low)[..., None]
    return np.round(_SCALE[low] * (1 - share) + _SCALE[low + 1] * share).astype(np.uint8)


def _palette(count: int) -> list[tuple[int, ...]]:
    """Colours of classes; neighbours in number are far apart in hue."""
    colors = []
    for i in range(count):
        rgb = colorsys.hsv_to_rgb(i * 0.61803 % 1, 0.85 - 0.35 * (i % 2), 0.95 - 0.3 * (i // 2 % 2))
        colors.append(tuple(round(255 * part) for part in rgb))
    return colors


def with_bar(
    picture: UInt8[np.ndarray, "h w 3"], limits: tuple[float, float]
) -> UInt8[np.ndarray, "h w2 3"]:
    """The picture of a number's map with its scale beside it."""
    height, width = picture.shape[:2]
    bar, gap, text = max(8, width // 40), max(4, width // 80), max(44, width // 10)
    canvas = Image.new("RGB", (width + gap + bar + text, height), "white")
    canvas.paste(Image.fromarray(picture), (0, 0))
    ramp = np.repeat(np.linspace(1, 0, height)[:, None], bar, axis=1)
    canvas.paste(Image.fromarray(_scaled(ramp, 0.0, 1.0)), (width + gap, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=max(10, text // 4))
    left = width + gap + bar + 4
    draw.text((left, 2), f"{limits[1]:.3g}", "black", font, "la")
    draw.text((left, height - 2), f"{limits[0]:.3g}", "black", font, "ld")
    return np.asarray(canvas)
