"""Corrective points: where a prediction is wrong, a simulated user clicks next.

Kirillov et al. 2023, appendix A, "Training algorithm". Coordinates are (x, y) in pixels of the
model's input, whatever the truth's resolution; see `samjax.data.prompts` for the labels.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from samjax.data.prompts import ABSENT, NEGATIVE, NOT_A_POINT, POSITIVE


def sample_pixel(key: Any, region: Bool[Array, "h w"]) -> Int[Array, "2"]:
    """(row, column) of one pixel of a region, each with equal probability; (0, 0) of an empty one.

    One random number, whose rank among the region's pixels is looked up row by row.
    """
    in_row = jnp.sum(region, axis=1, dtype=jnp.int32)
    ends = jnp.cumsum(in_row)
    rank = jax.random.randint(key, (), 0, jnp.maximum(ends[-1], 1))
    row = jnp.argmax(ends > rank)
    rank_in_row = rank - (ends[row] - in_row[row])
    return jnp.stack([row, jnp.argmax(jnp.cumsum(region[row]) > rank_in_row)])


def corrective_point(
    key: Any,
    predicted: Bool[Array, "h w"],
    truth: Bool[Array, "h w"],
    valid: Bool[Array, "h w"],
    frame: tuple[int, int],
) -> tuple[Float[Array, "2"], Int[Array, ""]]:
    """One image's next point, and its label, which is the truth there.

    It lies where the prediction is wrong; without an error, on the object; without an object
    either, the point is `ABSENT`. `frame` is the model's input, (height, width) in pixels.
    """
    errors, foreground = (predicted ^ truth) & valid, truth & valid
    region = jnp.where(errors.any(), errors, foreground)
    row, column = sample_pixel(key, region)
    label = jnp.where(truth[row, column], POSITIVE, NEGATIVE)
    scale = jnp.array([frame[1] / truth.shape[1], frame[0] / truth.shape[0]], jnp.float32)
    # A pixel's integer coordinates are those of its centre.
    point = (jnp.stack([column, row]) + 0.5) * scale - 0.5
    exists = region.any()
    return jnp.where(exists, point, 0.0), jnp.where(exists, label, ABSENT)


def make_room(
    coords: Float[Array, "b n 2"], labels: Int[Array, "b n"], points: int
) -> tuple[Float[Array, "b m 2"], Int[Array, "b m"]]:
    """Appends empty slots: one for each point to come, and the last for `NOT_A_POINT`."""
    extra = (0, points + 1)
    return (
        jnp.pad(coords, ((0, 0), extra, (0, 0))),
        jnp.pad(labels, ((0, 0), extra), constant_values=ABSENT),
    )


def put_point(
    coords: Float[Array, "b n 2"],
    labels: Int[Array, "b n"],
    slot: Any,
    point: Float[Array, "b 2"],
    label: Int[Array, " b"],
) -> tuple[Float[Array, "b n 2"], Int[Array, "b n"]]:
    """Prompts that `make_room` widened, with one point more, in a slot that was empty.

    The last slot becomes `NOT_A_POINT` where points and no box are there and nothing else has that
    label. The order of the slots is not SAM's, but the decoder does not see an order.
    """
    coords, labels = coords.at[:, slot].set(point), labels.at[:, slot].set(label)
    others = labels[:, :-1]
    points = (others == POSITIVE) | (others == NEGATIVE)
    closed = (others == NOT_A_POINT) | (others > POSITIVE)  # above it are the corners of a box
    last = jnp.where(points.any(axis=1) & ~closed.any(axis=1), NOT_A_POINT, ABSENT)
    return coords, labels.at[:, -1].set(last)
