"""Random changes of an image and its mask for training: geometry for both, colour for the image."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageEnhance

CROP_ATTEMPTS = 5


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Which changes are drawn. Raises ValueError for a share outside [0, 1)."""

    # Mirror left-right with probability 1/2.
    flip: bool = True
    # Mirror upside-down with probability 1/2.
    vertical_flip: bool = False
    # Turn by a uniform multiple of 90 degrees.
    rotate90: bool = False
    # Cut out a window of the image's aspect whose sides are a uniform share in [1 - scale_crop, 1]
    # of the image's; the resize to the model's input then makes it larger.
    scale_crop: float = 0.25
    # Brightness, contrast and saturation are multiplied by factors that are uniform in
    # [1 - color_jitter, 1 + color_jitter].
    color_jitter: float = 0.2

    def __post_init__(self) -> None:
        for name in ("scale_crop", "color_jitter"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), but is {getattr(self, name)}")

    @property
    def changing(self) -> tuple[str, ...]:
        """The names of the settings by which an image can change."""
        return tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name))


NO_AUGMENTATION = AugmentConfig(flip=False, scale_crop=0.0, color_jitter=0.0)


def augment(
    rng: np.random.Generator,
    image: UInt8[np.ndarray, "h w 3"],
    mask: Bool[np.ndarray, "h w"],
    config: AugmentConfig,
) -> tuple[UInt8[np.ndarray, "h2 w2 3"], Bool[np.ndarray, "h2 w2"]]:
    """Changes an image in [0, 255] and its mask alike; the same `rng` state gives the same result.

    A crop that would lose all of a mask that is not empty is drawn again, `CROP_ATTEMPTS` times in
    all, and then left out.
    """
    rows, columns = _draw_crop(rng, mask, config.scale_crop)
    image, mask = image[rows, columns], mask[rows, columns]
    if config.flip and rng.random() < 0.5:
        image, mask = image[:, ::-1], mask[:, ::-1]
    if config.vertical_flip and rng.random() < 0.5:
        image, mask = image[::-1], mask[::-1]
    if config.rotate90:
        turns = int(rng.integers(4))
        image, mask = np.rot90(image, turns), np.rot90(mask, turns)
    image, mask = np.ascontiguousarray(image), np.ascontiguousarray(mask)
    if config.color_jitter:
        image = _jitter_colors(rng, image, config.color_jitter)
    return image, mask


def _draw_crop(rng: np.random.Generator, mask: np.ndarray, strength: float) -> tuple[slice, slice]:
    """Rows and columns to keep."""
    whole = (slice(None), slice(None))
    if not strength:
        return whole
    sides = np.array(mask.shape)
    for _ in range(CROP_ATTEMPTS):
        cropped = np.maximum(1, np.round(sides * rng.uniform(1 - strength, 1))).astype(int)
        start = rng.integers(0, sides - cropped + 1)
        window = tuple(
            slice(a, a + n) for a, n in zip(start.tolist(), cropped.tolist(), strict=True)
        )
        if mask[window].any() or not mask.any():
            return window
    return whole


def _jitter_colors(rng: np.random.Generator, image: np.ndarray, strength: float) -> np.ndarray:
    changed = Image.fromarray(image)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        changed = enhance(changed).enhance(rng.uniform(1 - strength, 1 + strength))
    return np.array(changed)
