"""Random changes of an image with dense truths, which keep their geometry true (MTAN's)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from samjax.data.dense import DenseSample, resize_nearest
from samjax.tasks import Task

# Tasks whose numbers are the larger, the nearer something is.
INVERSE = ("disparity",)


@dataclasses.dataclass(frozen=True)
class DenseAugmentConfig:
    """Which changes are drawn. Raises ValueError for a scale below 1."""

    # Mirror left-right with probability 1/2.
    flip: bool = True
    # One is drawn: a window of 1 / scale of the sides is cut out and enlarged to the whole.
    scales: tuple[float, ...] = (1.0, 1.2, 1.5)

    def __post_init__(self) -> None:
        if not self.scales or not all(scale >= 1 for scale in self.scales):
            raise ValueError(f"scales must be 1 or more, not {self.scales}")

    @property
    def changing(self) -> tuple[str, ...]:
        """The names of the settings by which an image can change."""
        by_scale = ("scales",) if any(scale != 1 for scale in self.scales) else ()
        return ("flip", *by_scale) if self.flip else by_scale


NO_DENSE_AUGMENTATION = DenseAugmentConfig(flip=False, scales=(1.0,))


def augment_dense(
    rng: np.random.Generator,
    sample: DenseSample,
    tasks: Sequence[Task],
    config: DenseAugmentConfig,
) -> DenseSample:
    """Changes a sample; the same `rng` state gives the same result.

    What is enlarged is nearer: a depth is divided by the scale, an inverse depth, by its task's
    name, is multiplied. A direction's x changes its sign in the mirror. Truths take the nearest
    pixel, the image is resized bilinearly.
    """
    image, truth = sample.image, dict(sample.truth)
    height, width = image.shape[:2]
    scale = config.scales[rng.integers(len(config.scales))]
    rows, columns = round(height / scale), round(width / scale)
    top, left = rng.integers(0, height - rows + 1), rng.integers(0, width - columns + 1)
    window = slice(top, top + rows), slice(left, left + columns)
    if (rows, columns) != (height, width):
        cut = Image.fromarray(np.ascontiguousarray(image[window]))
        image = np.asarray(cut.resize((width, height), Image.Resampling.BILINEAR))
        for task in tasks:
            own = resize_nearest(truth[task.name][window], (height, width))
            if task.loss == "masked_l1":
                own = own * np.float32(scale if task.name in INVERSE else 1 / scale)
            truth[task.name] = own
    if config.flip and rng.random() < 0.5:
        image = image[:, ::-1]
        for task in tasks:
            own = truth[task.name][:, ::-1]
            truth[task.name] = own * np.float32([-1, 1, 1]) if task.loss == "cosine" else own
    truth = {name: np.ascontiguousarray(own) for name, own in truth.items()}
    return DenseSample(sample.name, np.ascontiguousarray(image), truth)
