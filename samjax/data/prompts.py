"""Prompts as the model takes them: drawn from the truth for training, or given by a user.

A prompt is `coords` (n, 2), points as (x, y), and `labels` (n,), which say what each point is. The
number of slots n is static, so that one trace serves every mixture of kinds; slots that a prompt
does not need are `ABSENT`, which the model masks out of the decoder's attention, so that padding
gives exactly what no padding gives. The order is SAM's: points, then one `NOT_A_POINT` at (0, 0)
where there are points and no box, then the two corners of the box.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32
from numpy.typing import ArrayLike

ABSENT = -2
NOT_A_POINT = -1
NEGATIVE = 0
POSITIVE = 1
BOX_UPPER_LEFT = 2
BOX_LOWER_RIGHT = 3


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """The mixture of prompts to train with: which kinds, how often, and how noisy.

    Each sample draws one kind by weight. Raises ValueError for a setting out of its range.
    """

    # Weight of no prompt at all: automatic segmentation.
    none: float = 1.0
    # Weight of the truth's box, jittered.
    box: float = 0.0
    # Weight of between 1 and `max_points` points inside the mask.
    points: float = 0.0
    # Each edge of a box moves by a uniform share of the box's side in [-box_jitter, box_jitter],
    # clipped to the image.
    box_jitter: float = 0.1
    # In place of that: each edge of a box moves outward by a whole number of pixels of the model's
    # input (after resizing, before padding), uniform from 0 to this, clipped to the image. MedSAM
    # has 20, at 1024 px; SAM-PARSER's script has 19 on a grid of 256, which at 1024 px is 76.
    box_outward: int = 0
    # The most points of a prompt; the number is uniform.
    max_points: int = 3
    # Every point but the first falls outside the mask with probability 1/2.
    negative_points: bool = False
    # Rounds after the first prompt, each with a point where the last prediction was wrong and that
    # prediction as mask prompt. Without any, the first prompt is all.
    corrective_points: int = 0

    def __post_init__(self) -> None:
        weights = (self.none, self.box, self.points)
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise ValueError(
                "the prompt weights none, box and points must be finite and not negative, and one "
                f"must be positive, but they are {weights}"
            )
        if not 0 <= self.box_jitter < 0.5:
            raise ValueError(
                "box_jitter must lie in [0, 0.5), since opposite edges could cross at 0.5, but is "
                f"{self.box_jitter}"
            )
        if self.box_outward < 0:
            raise ValueError(f"box_outward must not be negative, but is {self.box_outward}")
        if self.box_outward and self.box_jitter:
            raise ValueError(
                f"box_outward {self.box_outward} moves a box's edges in place of box_jitter "
                f"{self.box_jitter}: set box_jitter to 0, or leave box_outward out"
            )
        if self.max_points < 1:
            raise ValueError(f"max_points must be at least 1, but is {self.max_points}")
        if self.corrective_points < 0:
            raise ValueError(
                f"corrective_points must not be negative, but is {self.corrective_points}"
            )

    @property
    def slots(self) -> int:
        """The number of slots n that the largest enabled kind needs; 0 without prompts."""
        return max(2 if self.box else 0, self.max_points + 1 if self.points else 0)


def sample_prompt(
    rng: np.random.Generator, mask: Bool[np.ndarray, "h w"], config: PromptConfig
) -> tuple[Float32[np.ndarray, "n 2"], Int32[np.ndarray, " n"]]:
    """Draws one prompt for a mask; coords are pixels of the mask, n is `config.slots`.

    An empty mask has no box and no point inside: its prompt is of the kind `none`. What
    `box_outward` does, in pixels of the model's input, is left to `move_outward`.
    """
    weights = np.array([config.none, config.box, config.points], np.float64)
    kind = ("none", "box", "points")[rng.choice(3, p=weights / weights.sum())]
    if kind == "none" or not mask.any():
        prompt = encode_prompt(None, None, None)
    elif kind == "box":
        prompt = encode_prompt(None, None, _jitter_box(rng, mask, config.box_jitter))
    else:
        prompt = encode_prompt(*_sample_points(rng, mask, config), None)
    return pad_prompt(*prompt, config.slots)


def move_outward(
    coords: Float32[np.ndarray, "n 2"],
    labels: Int32[np.ndarray, " n"],
    moves: Int[np.ndarray, "4"],
    size: tuple[int, int],
) -> Float32[np.ndarray, "n 2"]:
    """A prompt whose box, where it has one, is larger: coords are pixels of the model's input.

    `moves` are the pixels by which its left, upper, right and lower edges move outward; `size` is
    the image's (height, width) within the input, which the box stays in.
    """
    height, width = size
    moved = coords.copy()
    upper_left, lower_right = labels == BOX_UPPER_LEFT, labels == BOX_LOWER_RIGHT
    moved[upper_left] = np.maximum(coords[upper_left] - moves[:2], 0)
    moved[lower_right] = np.minimum(coords[lower_right] + moves[2:], (width, height))
    return moved


def moves_of(name: str, seed: int, most: int) -> Int[np.ndarray, "4"]:
    """Whole numbers from 0 to `most`, uniform over names, that depend on name and seed alone.

    They are bytes of a hash, so that they are the same everywhere and with every version of NumPy.
    """
    digest = hashlib.sha256(f"box/{seed}/{name}".encode()).digest()
    draws = (int.from_bytes(digest[i : i + 8], "big") for i in range(0, 32, 8))
    return np.array([draw % (most + 1) for draw in draws])


def encode_prompt(
    points: ArrayLike | None, labels: ArrayLike | None, box: ArrayLike | None
) -> tuple[Float32[np.ndarray, "n 2"], Int32[np.ndarray, " n"]]:
    """Puts a user's prompt into the model's order, in the pixels that it was given in.

    Args:
      points: (k, 2) as (x, y), or None.
      labels: (k,), 1 for a point inside the object and 0 for one outside; None without points.
      box: (4,) as (x0, y0, x1, y1), or None.

    Returns coords and labels with k + 1 slots for points, 2 for a box, k + 2 for both and 0 for
    neither. Raises ValueError for wrong shapes, other labels, and a box without an inside.
    """
    coords, kinds = _check_points(points, labels)
    if box is not None:
        corners = _check_box(box)
        kinds = np.append(kinds, (BOX_UPPER_LEFT, BOX_LOWER_RIGHT))
        coords = np.concatenate([coords, corners])
    elif len(coords):
        kinds = np.append(kinds, NOT_A_POINT)
        coords = np.concatenate([coords, np.zeros((1, 2))])
    return coords.astype(np.float32), kinds.astype(np.int32)


def pad_prompt(
    coords: Float32[np.ndarray, "n 2"], labels: Int32[np.ndarray, " n"], slots: int
) -> tuple[Float32[np.ndarray, "m 2"], Int32[np.ndarray, " m"]]:
    """Fills a prompt up to `slots` slots with `ABSENT` ones at (0, 0)."""
    missing = slots - len(labels)
    if missing < 0:
        raise ValueError(f"the prompt needs {len(labels)} slots, but slots is {slots}")
    return (
        np.pad(coords, ((0, missing), (0, 0))),
        np.pad(labels, (0, missing), constant_values=ABSENT),
    )


def box_of(mask: Bool[np.ndarray, "h w"]) -> Float32[np.ndarray, "4"]:
    """The tight box (x0, y0, x1, y1) of a mask: x1 and y1 are one past its last column and row.

    So a mask that touches the image's lower edge has y1 = h. Raises ValueError for an empty mask.
    """
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not columns.size:
        raise ValueError("an empty mask has no box")
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def central_point(mask: Bool[np.ndarray, "h w"]) -> Float32[np.ndarray, "2"]:
    """The pixel (x, y) of the mask that is farthest from the mask's border.

    Distances are chessboard distances and the image's edge counts as border: the result is the
    middle of a largest square inside the mask; of several, the one nearest to their mean. Raises
    ValueError for an empty mask.
    """
    x0, y0, x1, y1 = box_of(mask).astype(int)
    crop = mask[y0:y1, x0:x1]
    sums = np.pad(crop.astype(np.int32), ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)

    def corners_of_squares(side: int) -> np.ndarray:
        """(m, 2) upper left corners (row, column) of the squares of `side` inside the mask."""
        area = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
        return np.argwhere(area == side * side)

    low, high = 0, (min(crop.shape) - 1) // 2  # a square of side 2 * radius + 1 fits the crop
    while low < high:
        radius = (low + high + 1) // 2
        low, high = (radius, high) if len(corners_of_squares(2 * radius + 1)) else (low, radius - 1)
    centres = corners_of_squares(2 * low + 1) + low
    row, column = centres[np.square(centres - centres.mean(axis=0)).sum(axis=1).argmin()]
    return np.array([column + x0, row + y0], np.float32)


def _jitter_box(rng: np.random.Generator, mask: np.ndarray, jitter: float) -> np.ndarray:
    box = box_of(mask).astype(np.float64)
    sides = np.tile(box[2:] - box[:2], 2)
    height, width = mask.shape
    moved = box + rng.uniform(-jitter, jitter, 4) * sides
    return np.clip(moved, 0.0, np.tile((width, height), 2).astype(np.float64))


def _sample_points(
    rng: np.random.Generator, mask: np.ndarray, config: PromptConfig
) -> tuple[np.ndarray, np.ndarray]:
    """(k, 2) coords and (k,) labels, positives first."""
    count = int(rng.integers(1, config.max_points + 1))
    negatives = int(rng.binomial(count - 1, 0.5)) if config.negative_points else 0
    if mask.all():
        negatives = 0
    inside = rng.choice(np.flatnonzero(mask), count - negatives)
    outside = rng.choice(np.flatnonzero(~mask), negatives) if negatives else inside[:0]
    rows, columns = np.unravel_index(np.concatenate([inside, outside]), mask.shape)
    labels = np.repeat([POSITIVE, NEGATIVE], [count - negatives, negatives])
    return np.stack([columns, rows], axis=-1), labels


def _check_points(
    points: ArrayLike | None, labels: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray]:
    if (points is None) != (labels is None):
        raise ValueError("points and labels go together: give both or neither")
    if points is None:
        return np.zeros((0, 2)), np.zeros(0, np.int32)
    coords, kinds = np.asarray(points, np.float64), np.asarray(labels)
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise ValueError(f"points must have shape (k, 2), (x, y) each, but have {coords.shape}")
    if not np.isfinite(coords).all():
        raise ValueError("points must be finite numbers")
    if kinds.shape != coords.shape[:1]:
        raise ValueError(
            f"labels must have shape ({len(coords)},), one for each point, but have shape "
            f"{kinds.shape}"
        )
    wrong = [label for label in kinds.tolist() if label not in (NEGATIVE, POSITIVE)]
    if wrong:
        raise ValueError(
            f"labels must be 1 (inside the object) or 0 (outside), but one is {wrong[0]!r}"
        )
    return coords, kinds


def _check_box(box: ArrayLike) -> np.ndarray:
    corners = np.asarray(box, np.float64)
    if corners.shape != (4,) or not np.isfinite(corners).all():
        raise ValueError(f"box must be four finite numbers (x0, y0, x1, y1), but is {box}")
    x0, y0, x1, y1 = corners.tolist()
    if x1 <= x0 or y1 <= y0:
        raise ValueError(
            f"box must be (x0, y0, x1, y1) with x1 > x0 and y1 > y0, but is ({x0:g}, {y0:g}, "
            f"{x1:g}, {y1:g})"
        )
    return corners.reshape(2, 2)
