"""Attention that never holds all scores at once.

A global block of SAM has 4096 tokens: dense scores would be 12 x 4096 x 4096 a layer. Queries are
taken a few rows of the token map at a time; each chunk is rematerialised in the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

AttentionKind = Literal["chunked", "dense"]

# Queries per chunk: 512 x 4096 float32 scores of 12 heads are 100 MB.
QUERIES_PER_CHUNK = 512


def softmax(scores: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """Softmax over the last axis in float32, returned in the input's dtype."""
    return jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(scores.dtype)


def attend(
    q: Float[Array, "b h n d"],
    k: Float[Array, "b h m d"],
    v: Float[Array, "b h m d"],
    bias: Any = None,
) -> Float[Array, "b h n d"]:
    """Scaled dot-product attention; `bias` (broadcast to b, h, n, m) is added to the scores."""
    scores = jnp.einsum("bhnd,bhmd->bhnm", q * (q.shape[-1] ** -0.5), k)
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    return jnp.einsum("bhnm,bhmd->bhnd", softmax(scores), v)


def relative_table(size: int, rel_pos: Float[Array, "l d"]) -> Float[Array, "n n d"]:
    """The embedding of each (query, key) offset along one axis of `size` tokens (`get_rel_pos`)."""
    offsets = np.arange(size)[:, None] - np.arange(size)[None, :] + size - 1
    return resize_relative(rel_pos, size)[offsets]


def resize_relative(rel_pos: Float[Array, "l d"], size: int) -> Float[Array, "m d"]:
    """The table of `size` tokens' 2 * size - 1 offsets; linear, not antialiased, as torch's."""
    length = 2 * size - 1
    if rel_pos.shape[0] == length:
        return rel_pos
    return jax.image.resize(
        rel_pos.astype(jnp.float32), (length, rel_pos.shape[1]), "linear", antialias=False
    )


def attend_map(
    q: Float[Array, "b h y x d"],
    k: Float[Array, "b h y x d"],
    v: Float[Array, "b h y x d"],
    rel_pos_h: Float[Array, "l d"],
    rel_pos_w: Float[Array, "m d"],
    kind: AttentionKind = "chunked",
) -> Float[Array, "b h y x d"]:
    """Attention over a token map with decomposed relative positions (MViTv2, as SAM's encoder).

    The position bias is a function of the *unscaled* queries. `chunked` equals `dense` up to
    rounding and holds `QUERIES_PER_CHUNK` rows of scores at most.
    """
    batch, heads, height, width, dim = q.shape
    table_h = relative_table(height, rel_pos_h).astype(q.dtype)
    table_w = relative_table(width, rel_pos_w).astype(q.dtype)
    keys, values = (t.reshape(batch, heads, height * width, dim) for t in (k, v))

    def rows(q: Array, table_h: Array) -> Array:
        """`q` (b, h, r, x, d) holds r rows of queries, `table_h` (r, y, d) their offsets."""
        bias_h = jnp.einsum("bhyxd,ykd->bhyxk", q, table_h)
        bias_w = jnp.einsum("bhyxd,xkd->bhyxk", q, table_w)
        bias = bias_h[..., :, None] + bias_w[..., None, :]
        queries = q.reshape(batch, heads, -1, dim)
        bias = bias.reshape(batch, heads, queries.shape[2], height * width)
        return attend(queries, keys, values, bias).reshape(q.shape)

    chunk = rows_per_chunk(height, width)
    if kind == "dense" or chunk == height:
        return rows(q, table_h)
    return _map_rows(rows, q, table_h, chunk)


def rows_per_chunk(height: int, width: int) -> int:
    """The most rows of the token map that divide it and hold at most `QUERIES_PER_CHUNK`."""
    limit = max(1, QUERIES_PER_CHUNK // width)
    return max(r for r in range(1, height + 1) if height % r == 0 and r <= max(limit, 1))


def _map_rows(rows: Callable[[Array, Array], Array], q: Array, table: Array, chunk: int) -> Array:
    batch, heads, _, width, dim = q.shape
    chunks = jnp.moveaxis(q.reshape(batch, heads, -1, chunk, width, dim), 2, 0)
    tables = table.reshape(-1, chunk, *table.shape[1:])
    body = functools.partial(jax.checkpoint, prevent_cse=False)(rows)
    out = jax.lax.map(lambda args: body(*args), (chunks, tables))
    return jnp.moveaxis(out, 0, 2).reshape(q.shape)
