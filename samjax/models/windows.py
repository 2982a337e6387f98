"""Windows of a token map: cut, padded below and to the right, and put together again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from samjax.nn import Context, unrecorded


def partition(x: Float[Array, "b h w c"], size: int, fill: Any = None) -> Float[Array, "n s s c"]:
    """Cuts a map into (b * windows, size, size, c).

    Where it has no tokens, zeros or `fill` (c,) stand.
    """
    batch, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, -height % size), (0, -width % size), (0, 0)))
    rows, columns = x.shape[1] // size, x.shape[2] // size
    if fill is not None:
        lacks = np.ones(x.shape[1:3], bool)
        lacks[:height, :width] = False
        # A row of the batch each: its gradient is then summed over places before it is over images,
        # which lie on several devices.
        fill = jnp.broadcast_to(fill, (batch, 1, 1, channels))
        x = x + fill * lacks[..., None].astype(x.dtype)
    x = x.reshape(batch, rows, size, columns, size, channels).swapaxes(2, 3)
    return x.reshape(-1, size, size, channels)


def unpartition(
    windows: Float[Array, "n s s c"], batch: int, height: int, width: int
) -> Float[Array, "b h w c"]:
    """The inverse of `partition` for a (batch, height, width) map: the padding is cut off."""
    size, channels = windows.shape[1], windows.shape[3]
    rows, columns = -(-height // size), -(-width // size)
    x = windows.reshape(batch, rows, columns, size, size, channels).swapaxes(2, 3)
    return x.reshape(batch, rows * size, columns * size, channels)[:, :height, :width]


def within(
    x: Float[Array, "b h w c"],
    size: int,
    before: Callable[[Array, Context], Array],
    attend: Callable[[Array], Array],
    after: Callable[[Array, Context], Array],
    ctx: Context,
    by_token: bool,
) -> Float[Array, "b h w d"]:
    """`after(attend(before(x)))` within windows; tokens of padding take part, and `before` is
    given zeros for them.

    `by_token` says that `before` and `after` look at each token alone. They are then spared the
    padding, but for the one token that tells what `before` makes of it; else their adapters see
    windows, and the layers themselves are spared it (`Context.around`).
    """
    shape = x.shape[:3]
    if not by_token:
        ctx = ctx.replace(around=partial(_spared, shape))
        return unpartition(after(attend(before(partition(x, size), ctx)), ctx), *shape)
    y, fill = before(x, ctx), None
    if shape[1] % size or shape[2] % size:
        with unrecorded():
            fill = before(jnp.zeros((1, 1, 1, x.shape[3]), x.dtype), ctx)[0, 0, 0]
    return after(unpartition(attend(partition(y, size, fill)), *shape), ctx)


def _spared(shape: tuple[int, int, int], apply: Callable[..., Array]) -> Callable[..., Array]:
    """A layer, called with windows of a (batch, height, width) map, that computes the map alone.

    What it makes of the last token stands for all of the padding: before attention all padding is
    the same, and after it nothing reads it.
    """

    def applied(x: Array, kernel: Any, bias: Any) -> Array:
        y = apply(unpartition(x, *shape), kernel, bias)
        fill = apply(x[-1:, -1:, -1:], kernel, bias)[0, 0, 0]
        return partition(y, x.shape[1], fill)

    return applied
