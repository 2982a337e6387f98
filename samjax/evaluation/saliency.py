"""What the literature of salient and camouflaged objects measures of a probability map.

Dice and IoU know the mask at one threshold; these four see the map itself. Conv-LoRA and its peers
report them on polyps and camouflaged objects. They follow the evaluation code in common use, the
package PySODMetrics, which the tests compare with: a map is stretched to reach from 0 to 1 before
it is measured. They run on the host, in float64: one takes each pixel to its nearest object pixel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

_EPS = np.spacing(1.0)


def saliency(
    probability: np.ndarray, truth: np.ndarray, names: Sequence[str] | None = None
) -> dict[str, float]:
    """The four measures of one image, or those of them that are in `names`.

    `probability` (h, w) in [0, 1], of any float type; `truth` (h, w) bool. MAE is best at 0, the
    others at 1. Where the truth is empty, the weighted F-measure is 0, as it has no recall.
    """
    p = probability.astype(np.float64)
    least, most = p.min(), p.max()
    if most > least:
        p = (p - least) / (most - least)
    return {
        name: measure(p, truth)
        for name, measure in _MEASURES.items()
        if names is None or name in names
    }


def s_measure(p: np.ndarray, truth: np.ndarray) -> float:
    """Structure: objects and regions alike in equal parts (Fan et al., ICCV 2017, equation 8)."""
    share = truth.mean()
    if share == 0:
        return float(1 - p.mean())
    if share == 1:
        return float(p.mean())
    objects = share * _object_score(p[truth]) + (1 - share) * _object_score(1 - p[~truth])
    return max(0.0, float((objects + _region_score(p, truth)) / 2))


def _object_score(values: np.ndarray) -> float:
    """Near 1 where the values are near 1 and alike (section 3.2)."""
    mean, deviation = values.mean(), values.std(ddof=1) if values.size > 1 else 0.0
    return 2 * mean / (mean**2 + 1 + deviation + _EPS)


def _region_score(p: np.ndarray, truth: np.ndarray) -> float:
    """Similarity of the four parts around the object's centre, by their areas (section 3.1)."""
    rows, columns = (int(np.round(where.mean())) + 1 for where in np.nonzero(truth))
    score = 0.0
    for row in (slice(0, rows), slice(rows, None)):
        for column in (slice(0, columns), slice(columns, None)):
            part = p[row, column]
            if part.size:
                score += part.size / p.size * _similarity(part, truth[row, column])
    return score


def _similarity(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM over a whole part, without its constants."""
    mean_x, mean_y = x.mean(), y.mean()
    free = x.size - 1 + _EPS
    product = ((x - mean_x) * (y - mean_y)).sum() / free
    spread = (np.square(x - mean_x).sum() + np.square(y - mean_y).sum()) / free
    above = 4 * mean_x * mean_y * product
    below = (mean_x**2 + mean_y**2) * spread
    if above == 0:
        return float(below == 0)
    return float(above / (below + _EPS))


def mean_e_measure(p: np.ndarray, truth: np.ndarray) -> float:
    """Alignment of pixels and image means (Fan et al., IJCAI 2018), over thresholds 0 to 255."""
    levels = (p * 255).astype(np.uint8)
    # How many pixels are at or above each threshold, from 255 down, on the object and off it.
    on, off = (
        np.cumsum(np.bincount(levels[where], minlength=256)[::-1]) for where in (truth, ~truth)
    )
    size, objects = truth.size, int(truth.sum())
    found = on + off
    if objects == 0:
        aligned = size - found
    elif objects == size:
        aligned = found
    else:
        mean_found, mean_truth = found / size, objects / size
        aligned = 0.0
        for count, x, y in (
            (on, 1 - mean_found, 1 - mean_truth),
            (off, 1 - mean_found, -mean_truth),
            (objects - on, -mean_found, 1 - mean_truth),
            (size - objects - off, -mean_found, -mean_truth),
        ):
            alignment = 2 * x * y / (x**2 + y**2 + _EPS)
            aligned = aligned + count * (1 + alignment) ** 2 / 4
    return float(np.mean(aligned / (size - 1 + _EPS)))


def weighted_f_measure(p: np.ndarray, truth: np.ndarray) -> float:
    """F-measure whose errors count by neighbourhood and distance (Margolin et al., CVPR 2014)."""
    if not truth.any():
        return 0.0
    distance, nearest = ndimage.distance_transform_edt(~truth, return_indices=True)
    error = np.abs(p - truth)
    # Off the object, the error of its nearest pixel: the object's edge does not leak.
    spread = np.where(truth, error, error[tuple(nearest)])
    offsets = np.arange(-3, 4)
    gaussian = np.exp(-(offsets**2) / (2 * 5**2))
    gaussian /= gaussian.sum()
    for axis in (0, 1):
        spread = ndimage.convolve1d(spread, gaussian, axis, mode="constant")
    error = np.where(truth, np.minimum(error, spread), error)
    importance = np.where(truth, 1.0, 2 - np.exp(np.log(0.5) / 5 * distance))
    weighted = error * importance
    found = truth.sum() - weighted[truth].sum()
    recall = 1 - weighted[truth].mean()
    precision = found / (found + weighted[~truth].sum() + _EPS)
    return float(2 * recall * precision / (recall + precision + _EPS))


def mae(p: np.ndarray, truth: np.ndarray) -> float:
    """The mean absolute error of the map."""
    return float(np.abs(p - truth).mean())


_MEASURES = {
    "s_measure": s_measure,
    "mean_e_measure": mean_e_measure,
    "weighted_f_measure": weighted_f_measure,
    "mae": mae,
}
