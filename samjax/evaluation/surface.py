"""How far the outlines of two masks lie apart, on the host."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool
from scipy import ndimage


def hd95(predicted: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"]) -> float:
    """The 95th percentile of the Hausdorff distance of two masks, in pixels.

    It is that of `medpy.metric.binary.hd95`, which SAMed and TransUNet report: an outline is the
    object's pixels that have a neighbour, of four, which is none (beyond the image there is no
    object); each pixel of either outline has its distance to the nearest of the other, and the
    percentile is one of all these distances together.

    Two empty masks agree: 0. Of one empty mask the distance is the image's diagonal, the most that
    there can be, as BraTS has it (373.13 mm, the diagonal of its volumes): a miss is not left out
    of the mean, and does not look like a hit, as the 0 of SAMed's code does.
    """
    if not predicted.any() or not truth.any():
        return float(np.hypot(*truth.shape)) if predicted.any() or truth.any() else 0.0
    # Beyond the box around both objects there are none, and distances within it are the image's.
    rows, columns = (np.flatnonzero((predicted | truth).any(axis=axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    one, other = _outline(predicted[box]), _outline(truth[box])
    distances = _distances(one, other), _distances(other, one)
    return float(np.percentile(np.concatenate(distances), 95))


def _outline(mask: np.ndarray) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask)


def _distances(of: np.ndarray, to: np.ndarray) -> np.ndarray:
    """From each pixel of one outline to the nearest of the other."""
    return ndimage.distance_transform_edt(~to)[of]
