"""The metrics of binary masks: of each sample, and of a whole set, from counts of pixels.

A sample is an image, or with objects each one object of it. Counts are integers, on the device and
where those of a set are added up, and each metric is one division in float64: a sum in float32
would lose pixels beyond 2**24. docs/metrics.md has the definitions, and which paper means which.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a metric is called in tables, and what it is made of."""

    title: str
    # Counts of a sample; the map or the mask of a sample, on the host; or the whole set.
    of: Literal["counts", "map", "surface", "set"]
    # Whether more of it is better.
    more: bool = True


METRICS: Mapping[str, Metric] = {
    "dice": Metric("Dice", "counts"),
    "iou": Metric("IoU", "counts"),
    "precision": Metric("precision", "counts"),
    "recall": Metric("recall", "counts"),
    "ber": Metric("BER", "counts", more=False),
    "pixel_accuracy": Metric("pixel accuracy", "counts"),
    "s_measure": Metric("S-measure", "map"),
    "mean_e_measure": Metric("mean E", "map"),
    "weighted_f_measure": Metric("weighted F", "map"),
    "mae": Metric("MAE", "map", more=False),
    "hd95": Metric("HD95 (px)", "surface", more=False),
    "set_dice": Metric("set Dice", "set"),
    "set_iou": Metric("set IoU", "set"),
    "set_ber": Metric("set BER", "set", more=False),
    "set_pixel_accuracy": Metric("set pixel accuracy", "set"),
    "class_iou": Metric("class IoU", "set"),
    "image_iou": Metric("image IoU", "set"),
}

# Those that a run has where it names none.
DEFAULT = ("dice", "iou", "s_measure", "mean_e_measure", "weighted_f_measure", "mae")


# Other names that the literature has for some of them.
_ALSO = {"f1": "dice", "dsc": "dice", "jaccard": "iou", "miou": "iou", "accuracy": "pixel_accuracy"}


def check_metrics(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is no metric's."""
    for name in names:
        if name not in METRICS:
            close = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.0)
            nearest = _ALSO.get(name.lower(), close[0])
            raise ValueError(
                f"metrics has {name!r}, and they are {', '.join(METRICS)}; the nearest is {nearest}"
            )


def quick(names: Sequence[str]) -> tuple[str, ...]:
    """Those of the metrics that need nothing of a sample but its counts."""
    return tuple(name for name in names if METRICS[name].of in ("counts", "set"))


@dataclasses.dataclass(frozen=True)
class Counts:
    """Pixels of n samples: predicted and true, predicted, true, and all; int64."""

    both: Int[np.ndarray, " n"]
    predicted: Int[np.ndarray, " n"]
    truth: Int[np.ndarray, " n"]
    pixels: Int[np.ndarray, " n"]

    @property
    def either(self) -> Int[np.ndarray, " n"]:
        """Pixels that are predicted or true."""
        return self.predicted + self.truth - self.both

    @property
    def neither(self) -> Int[np.ndarray, " n"]:
        """Pixels that are background in both."""
        return self.pixels - self.either

    def pooled(self) -> Counts:
        """The counts of all samples as one."""
        return Counts(*(np.sum(x, keepdims=True) for x in dataclasses.astuple(self)))


def count(predicted: Bool[Array, "b h w"], truth: Bool[Array, "b h w"]) -> dict[str, Any]:
    """What of `Counts` (b,) two batches of masks say, as int32: all but `pixels`.

    Padding that is False in both changes nothing. A mask has fewer than 2**31 pixels.
    """

    def pixels(mask: Any) -> Any:
        return jnp.sum(mask, axis=(1, 2), dtype=jnp.int32)

    return {
        "both": pixels(predicted & truth),
        "predicted": pixels(predicted),
        "truth": pixels(truth),
    }


def of_samples(counts: Counts, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of the metrics that are of `counts`: (n,) float64 each, in [0, 1], none of them NaN."""
    return {name: _OF_COUNTS[name](counts) for name in names if METRICS[name].of == "counts"}


def of_set(counts: Counts, samples: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Those of the metrics that are of the set; `samples` are the samples' names, in order."""
    pooled = counts.pooled()
    found = {}
    for name in names:
        if METRICS[name].of == "set":
            own = _image_iou(counts, samples) if name == "image_iou" else _OF_SET[name](pooled)
            found[name] = float(own[0])
    return found


def _share(part: Any, whole: Any, otherwise: Any) -> np.ndarray:
    """part / whole, and `otherwise` where there is no whole."""
    found = np.broadcast_to(np.asarray(otherwise, np.float64), np.shape(whole)).copy()
    return np.divide(part, whole, out=found, where=np.asarray(whole) > 0)


def _dice(c: Counts) -> np.ndarray:
    return _share(2 * c.both, c.predicted + c.truth, 1.0)


def _iou(c: Counts) -> np.ndarray:
    return _share(c.both, c.either, 1.0)


def _precision(c: Counts) -> np.ndarray:
    return _share(c.both, c.predicted, c.truth == 0)


def _recall(c: Counts) -> np.ndarray:
    return _share(c.both, c.truth, c.predicted == 0)


def _mean_of_two(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The mean of those that are not NaN, of which there is one at least."""
    both = (first + second) / 2
    return np.where(np.isnan(first), second, np.where(np.isnan(second), first, both))


def _ber(c: Counts) -> np.ndarray:
    hits = _share(c.both, c.truth, np.nan)
    rejections = _share(c.neither, c.pixels - c.truth, np.nan)
    return 1 - _mean_of_two(hits, rejections)


def _pixel_accuracy(c: Counts) -> np.ndarray:
    return (c.both + c.neither) / c.pixels


def _class_iou(c: Counts) -> np.ndarray:
    objects = _share(c.both, c.either, np.nan)
    return _mean_of_two(objects, _share(c.neither, c.pixels - c.both, np.nan))


def _image_iou(c: Counts, samples: Sequence[str]) -> np.ndarray:
    """(1,); samples are named `image#id`."""
    images = [name.rpartition("#")[0] for name in samples]
    _, image = np.unique(images, return_inverse=True)
    return np.mean(np.bincount(image, _iou(c)) / np.bincount(image), keepdims=True)


_OF_COUNTS: Mapping[str, Callable[[Counts], np.ndarray]] = {
    "dice": _dice,
    "iou": _iou,
    "precision": _precision,
    "recall": _recall,
    "ber": _ber,
    "pixel_accuracy": _pixel_accuracy,
}
_OF_SET: Mapping[str, Callable[[Counts], np.ndarray]] = {
    "set_dice": _dice,
    "set_iou": _iou,
    "set_ber": _ber,
    "set_pixel_accuracy": _pixel_accuracy,
    "class_iou": _class_iou,
}
