"""Windows of a token map: cut, padded below and to the right, and put together again."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def partition(x: Float[Array, "b h w c"], size: int) -> Float[Array, "n s s c"]:
    """Cuts a map into (b * windows, size, size, c); zeros fill what the map lacks."""
    batch, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, -height % size), (0, -width % size), (0, 0)))
    rows, columns = x.shape[1] // size, x.shape[2] // size
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
