"""Attention that never holds all scores at once.

A global block of SAM has 4096 tokens: dense scores would be 12 x 4096 x 4096 a layer. A few rows of
queries of one head are taken at a time, or several heads where the map is small; each chunk is
rematerialised in the backward pass. The batch stays whole: it may be spread over devices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from samjax.models.flash import fits, flash, fold_positions

# `cudnn` and `splash` are `samjax.models.flash`.
AttentionKind = Literal["chunked", "dense", "cudnn", "splash"]

# 8 MB in float32: a CPU's caches hold it, and its allocator keeps the pages from chunk to chunk.
# 96 MB of scores made the encoder of ViT-B a third slower than 16 MB did.
SCORES_PER_CHUNK = 2 * 2**20


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
    out = jnp.einsum("bhnm,bhmd->bhnd", weights.astype(v.dtype), v)
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
    rounding and holds `SCORES_PER_CHUNK` scores at most, or one row of one head; its derivative is
    written by hand and for reverse mode only. The kernels never hold scores either; maps that they
    do not take, such as windows, are `chunked`.
    """
    height, width = q.shape[2:4]
    table_h = relative_table(height, rel_pos_h).astype(q.dtype)
    table_w = relative_table(width, rel_pos_w).astype(q.dtype)
    if kind == "dense":
        bias_h, bias_w = _biases(q, table_h, table_w)
        bias = bias_h[..., :, None] + bias_w[..., None, :]
        queries, keys, values = (_tokens(t) for t in (q, k, v))
        bias = bias.reshape(*queries.shape[:3], -1)
        return attend(queries, keys, values, bias).reshape(q.shape)
    if kind != "chunked" and fits(kind, height * width, q.shape[-1] + height + width):
        queries, keys = fold_positions(q, k, *_biases(q, table_h, table_w))
        return flash(kind, queries, keys, _tokens(v)).reshape(q.shape)
    # Where a batch is spread over devices, a chunk is of what each of them has.
    devices = max(jax.sharding.get_abstract_mesh().size, 1)
    some_heads, some_rows = chunk_sizes(max(q.shape[0] // devices, 1), *q.shape[1:4])
    chunks = [_split(t, 1, some_heads) for t in (q, k, v)]
    return _join(_map(lambda qkv: _attend_rows(some_rows, *qkv, table_h, table_w), chunks), 1)


def _tokens(x: Array) -> Array:
    """A map (b, h, y, x, d) as a list of tokens (b, h, y * x, d)."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _biases(q: Array, table_h: Array, table_w: Array) -> tuple[Array, Array]:
    """What the keys' rows (b, h, y, x, y) and columns (b, h, y, x, x) add to the scores."""
    bias_h = jnp.einsum("bhyxd,ykd->bhyxk", q, table_h)
    return bias_h, jnp.einsum("bhyxd,xkd->bhyxk", q, table_w)


def _scores(q: Array, k: Array, bias_h: Array, bias_w: Array) -> Array:
    """(b, h, r, x, y, x) in float32: of r rows of queries with all keys.

    The bias is added on the keys' grid: on a flat axis its indices take longer than all the rest.
    """
    scores = jnp.einsum("bhrxd,bhmd->bhrxm", q * (q.shape[-1] ** -0.5), k)
    scores = scores.reshape(*q.shape[:4], bias_h.shape[-1], bias_w.shape[-1])
    return (scores + bias_h[..., :, None] + bias_w[..., None, :]).astype(jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_rows(
    some_rows: int, q: Array, k: Array, v: Array, table_h: Array, table_w: Array
) -> Array:
    """(b, h, y, x, d): attention with `some_rows` rows of queries at a time."""
    return _attend_rows_forward(some_rows, q, k, v, table_h, table_w)[0]


def _attend_rows_forward(some_rows: int, *args: Array) -> tuple[Array, tuple]:
    """Keeps what went in, the output, and of each query the softmax's maximum and sum."""
    q, k, v, table_h, table_w = args
    keys, values = _tokens(k), _tokens(v)

    def rows(chunk: tuple[Array, ...]) -> tuple[Array, ...]:
        scores = _scores(chunk[0], keys, *chunk[1:])
        shape = *scores.shape[:4], -1
        top = scores.reshape(shape).max(axis=-1)
        weights = jnp.exp(scores - top[..., None, None]).reshape(shape)
        total = weights.sum(axis=-1)
        out = jnp.einsum("bhrxm,bhmd->bhrxd", weights.astype(v.dtype), values)
        # The sum divides what the values gave, not the scores, which are many more.
        return (out / total[..., None]).astype(v.dtype), top, total

    chunks = tuple(_split(t, 2, some_rows) for t in (q, *_biases(q, table_h, table_w)))
    out, top, total = (_join(t, 2) for t in _map(rows, chunks))
    return out, (*args, out, top, total)


def _attend_rows_backward(some_rows: int, kept: tuple, d_out: Array) -> tuple[Array, ...]:
    """The scores are computed again, each chunk's once.

    Gradients of keys and values are summed as (d, m): of the two forms of a product that contracts
    both its sides' first axes, this one writes along the scores' axis and is much the faster.
    """
    q, k, v, table_h, table_w, out, top, total = kept
    keys, values = _tokens(k), _tokens(v)
    scale = q.shape[-1] ** -0.5
    biases, pull_biases = jax.vjp(_biases, q, table_h, table_w)
    # Softmax's derivative takes from each weight's gradient their mean under the weights.
    means = (d_out.astype(jnp.float32) * out).sum(axis=-1)

    def rows(sums: tuple[Array, Array], chunk: tuple[Array, ...]) -> tuple[Any, Any]:
        q, bias_h, bias_w, top, share, d_out, mean = chunk
        weights = jnp.exp(_scores(q, keys, bias_h, bias_w) - top[..., None, None])
        weights = weights * share[..., None, None]
        grid, flat = weights.shape, (*weights.shape[:4], -1)
        d_weights = jnp.einsum("bhrxd,bhmd->bhrxm", d_out, values).reshape(grid)
        d_scores = weights * (d_weights.astype(jnp.float32) - mean[..., None, None])
        weights, d_flat = (t.reshape(flat).astype(q.dtype) for t in (weights, d_scores))
        product = partial(jnp.einsum, "bhrxm,bhrxd->bhdm")
        new = product(d_flat, q), product(weights, d_out)
        sums = jax.tree.map(lambda total, part: total + part.astype(jnp.float32), sums, new)
        d_q = jnp.einsum("bhrxm,bhmd->bhrxd", d_flat, keys)
        return sums, (d_q, d_scores.sum(axis=-1), d_scores.sum(axis=-2))

    zeros = jnp.zeros((*keys.shape[:2], keys.shape[3], keys.shape[2]), jnp.float32)
    chunks = tuple(_split(t, 2, some_rows) for t in (q, *biases, top, 1 / total, d_out, means))
    (d_k, d_v), per_row = jax.lax.scan(rows, (zeros, zeros), chunks)
    d_q, d_bias_h, d_bias_w = (_join(t, 2) for t in per_row)
    more, d_table_h, d_table_w = pull_biases((d_bias_h.astype(q.dtype), d_bias_w.astype(q.dtype)))
    d_k, d_v = (jnp.swapaxes(t, 2, 3).reshape(k.shape).astype(k.dtype) for t in (d_k * scale, d_v))
    return d_q * scale + more, d_k, d_v, d_table_h, d_table_w


_attend_rows.defvjp(_attend_rows_forward, _attend_rows_backward)


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


def _map(function: Callable[[Any], Any], chunks: Any) -> Any:
    """`jax.lax.map`, without a loop where there is one chunk."""
    if jax.tree.leaves(chunks)[0].shape[0] > 1:
        return jax.lax.map(function, chunks)
    one = function(jax.tree.map(lambda x: x[0], chunks))
    return jax.tree.map(lambda x: x[None], one)
