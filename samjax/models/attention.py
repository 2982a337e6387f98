"""Attention that never holds all scores at once.

A global block of SAM has 4096 tokens: dense scores would be 12 x 4096 x 4096 a layer. A few rows of
queries of one head are taken at a time, or several heads where the map is small; each chunk is
rematerialised in the backward pass. The batch stays whole: it may be spread over devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

AttentionKind = Literal["chunked", "dense"]

# 16 MB in float32: a CPU's caches hold it, and its allocator keeps the pages from chunk to chunk.
# Six times as many scores made the encoder of ViT-B a third slower (docs/performance.md).
SCORES_PER_CHUNK = 4 * 2**20
# The name, for policies of `jax.checkpoint`, of the weighted values in `attend`.
_KEPT = "attended"


def attend(
    q: Float[Array, "b h n d"],
    k: Float[Array, "b h m d"],
    v: Float[Array, "b h m d"],
    bias: Any = None,
) -> Float[Array, "b h n d"]:
    """Scaled dot-product attention; `bias` (broadcast to b, h, n, m) is added to the scores.

    Softmax is float32. Its sum divides what the values gave, not the scores, which are many more.
    """
    scores = jnp.einsum("bhnd,bhmd->bhnm", q * (q.shape[-1] ** -0.5), k)
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    scores = scores.astype(jnp.float32)
    # The result does not depend on the maximum: it only keeps exp from overflowing.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    out = checkpoint_name(jnp.einsum("bhnm,bhmd->bhnd", weights.astype(v.dtype), v), _KEPT)
    return (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)


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
    rounding and holds `SCORES_PER_CHUNK` scores at most, or one row of one head.
    """
    height, width = q.shape[2:4]
    table_h = relative_table(height, rel_pos_h).astype(q.dtype)
    table_w = relative_table(width, rel_pos_w).astype(q.dtype)

    def rows(q: Array, table_h: Array, k: Array, v: Array) -> Array:
        """`q` (b, g, r, x, d) holds r rows of queries, `table_h` (r, y, d) their offsets."""
        bias_h = jnp.einsum("bhyxd,ykd->bhyxk", q, table_h)
        bias_w = jnp.einsum("bhyxd,xkd->bhyxk", q, table_w)
        bias = bias_h[..., :, None] + bias_w[..., None, :]
        queries, keys, values = (t.reshape(*t.shape[:2], -1, t.shape[-1]) for t in (q, k, v))
        bias = bias.reshape(*queries.shape[:3], -1)
        return attend(queries, keys, values, bias).reshape(q.shape)

    if kind == "dense":
        return rows(q, table_h, k, v)
    # The backward pass computes the scores again, but not what they weigh.
    policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
    body = jax.checkpoint(rows, prevent_cse=False, policy=policy)
    some_heads, some_rows = chunk_sizes(*q.shape[:4])

    def heads(q: Array, k: Array, v: Array) -> Array:
        """All rows of some heads: (b, g, y, x, d)."""
        chunks = _split(q, 2, some_rows), _split(table_h, 0, some_rows)
        return _join(_map(lambda chunk: body(*chunk, k, v), chunks), 2)

    return _join(_map(lambda qkv: heads(*qkv), [_split(t, 1, some_heads) for t in (q, k, v)]), 1)


def chunk_sizes(batch: int, heads: int, height: int, width: int) -> tuple[int, int]:
    """How many heads and how many rows of queries are taken at a time: divisors of all.

    As many as `SCORES_PER_CHUNK` allows, but one row of one head at least.
    """
    row = batch * width * height * width
    rows = _divisor(height, SCORES_PER_CHUNK // row)
    return (_divisor(heads, SCORES_PER_CHUNK // (rows * row)) if rows == height else 1), rows


def _divisor(size: int, limit: int) -> int:
    return max(i for i in range(1, size + 1) if size % i == 0 and i <= max(limit, 1))


def _split(x: Array, axis: int, size: int) -> Array:
    """Chunks of `size` along an axis, on a leading axis of their own."""
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _join(chunks: Array, axis: int) -> Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(chunks, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _map(function: Callable[[Any], Array], chunks: Any) -> Array:
    """`jax.lax.map`, without a loop where there is one chunk."""
    if jax.tree.leaves(chunks)[0].shape[0] > 1:
        return jax.lax.map(function, chunks)
    return function(jax.tree.map(lambda x: x[0], chunks))[None]
