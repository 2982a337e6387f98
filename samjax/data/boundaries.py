"""Edges between the regions of a label map, one pixel wide."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int
from scipy import ndimage


def boundaries(labels: Int[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Where the Laplacian of the labels (four neighbours) is not 0, thinned."""
    return thin(ndimage.laplace(labels.astype(np.int64), mode="mirror") != 0)


def thin(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Takes pixels off the mask's rims until lines of one pixel are left, connected as before.

    Guo and Hall (1989), the variant with two turns, as scikit-image's `thin` has it; what lies
    outside the image is not of the mask.
    """
    padded = np.pad(mask, 1)
    while True:
        before = padded.copy()
        for turn in (0, 4):
            padded[1:-1, 1:-1] &= ~_removable(padded, turn)
        if (padded == before).all():
            return padded[1:-1, 1:-1]


# Row and column of the neighbours: east first, then against the clock.
_AROUND = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))


def _removable(padded: Bool[np.ndarray, "h2 w2"], turn: int) -> Bool[np.ndarray, "h w"]:
    """The paper's three conditions, of the neighbours x1 to x8; the third is turned round."""
    height, width = padded.shape[0] - 2, padded.shape[1] - 2
    x = [padded[1 + i : 1 + i + height, 1 + j : 1 + j + width] for i, j in _AROUND]
    sides, corners = x[0::2], x[1::2]
    after = [*sides[1:], sides[0]]  # the side that follows on each corner
    crossings = sum(
        (~side & (corner | later)).astype(np.int8)
        for side, corner, later in zip(sides, corners, after, strict=True)
    )
    first = sum((s | c).astype(np.int8) for s, c in zip(sides, corners, strict=True))
    second = sum((c | s).astype(np.int8) for c, s in zip(corners, after, strict=True))
    fewest = np.minimum(first, second)
    kept = (x[turn + 1] | x[(turn + 2) % 8] | ~x[(turn + 7) % 8]) & x[turn]
    return (crossings == 1) & (fewest >= 2) & (fewest <= 3) & ~kept
