"""SAM's ViT image encoder (Kirillov et al. 2023; `segment_anything/modeling/image_encoder.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from samjax.models import windows
from samjax.models.attention import AttentionKind, attend_map
from samjax.models.configs import VitConfig
from samjax.nn import (
    Context,
    Conv,
    Dense,
    LayerNorm,
    Remat,
    Segments,
    act_by_token,
    call_branch,
    rematerialized,
)
from samjax.ops import gelu


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"], ctx: Context) -> Float[Array, "*b c"]:
        """(..., c) -> (..., c)."""
        hidden = gelu(Dense(self.hidden, dtype=self.dtype, name="lin1")(x, ctx))
        return Dense(x.shape[-1], dtype=self.dtype, name="lin2")(hidden, ctx)


class Attention(nn.Module):
    """Multi-head attention over a token map with decomposed relative positions.

    `window_size` 0 means global attention.
    """

    num_heads: int
    window_size: int
    # (rows, columns) of the token map for which the relative-position tables were made.
    table_grid: tuple[int, int]
    kind: AttentionKind = "chunked"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], ctx: Context) -> Float[Array, "b h w c"]:
        """(b, h, w, c) -> (b, h, w, c)."""
        dim = x.shape[-1]
        rel_pos_h, rel_pos_w = (
            self.param(name, nn.initializers.zeros, (2 * size - 1, dim // self.num_heads))
            for name, size in zip(("rel_pos_h", "rel_pos_w"), self.table_grid, strict=True)
        )
        segments = Segments(("q", "k", "v"), "thirds", self.num_heads)
        qkv = Dense(3 * dim, dtype=self.dtype, segments=segments, name="qkv")
        proj = Dense(dim, dtype=self.dtype, name="proj")

        def attend(qkv: Array) -> Array:
            qkv = qkv.reshape(*qkv.shape[:3], 3, self.num_heads, -1)
            q, k, v = jnp.moveaxis(qkv, (3, 4), (0, 2))
            out = attend_map(q, k, v, rel_pos_h, rel_pos_w, self.kind)
            return jnp.moveaxis(out, 1, 3).reshape(*qkv.shape[:3], dim)

        if not self.window_size:
            return proj(attend(qkv(x, ctx)), ctx)
        # Padding comes after the norm: padded tokens take part in attention, as in SAM.
        by_token = act_by_token(self, "qkv", "proj")
        return windows.within(x, self.window_size, qkv, attend, proj, ctx, by_token)


class Block(nn.Module):
    """A transformer block; `window_size` 0 means global attention."""

    config: VitConfig
    window_size: int
    attention: AttentionKind = "chunked"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], ctx: Context) -> Float[Array, "b h w c"]:
        """(b, h, w, c) -> (b, h, w, c)."""
        dim = x.shape[-1]
        window = (self.window_size, self.window_size)
        attn = Attention(
            num_heads=self.config.num_heads,
            window_size=self.window_size,
            table_grid=window if self.window_size else self.config.position_grid,
            kind=self.attention,
            dtype=self.dtype,
            name="attn",
        )
        norm1, norm2 = (LayerNorm(dtype=self.dtype, name=name) for name in ("norm1", "norm2"))
        mlp = Mlp(4 * dim, dtype=self.dtype, name="mlp")

        x = x + call_branch(attn, lambda x: attn(norm1(x, ctx), ctx), x, ctx)
        return x + call_branch(mlp, lambda x: mlp(norm2(x, ctx), ctx), x, ctx)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens."""

    embed_dim: int
    patch_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], ctx: Context) -> Float[Array, "b gh gw c"]:
        """(b, h, w, 3) -> (b, h / patch, w / patch, c)."""
        conv = Conv(self.embed_dim, self.patch_size, self.patch_size, dtype=self.dtype, name="proj")
        return conv(x, ctx)


# The point of an encoder after which it has nothing more to do.
EMBEDDING = "embedding"


def parts_between(points: Sequence[str], start: str, stop: str) -> Sequence[str]:
    """The parts of an encoder that run from one of its points to another.

    A point has the name of the part that comes after it. "" is the first point as `start`, and
    the last one as `stop`.
    """
    first = points.index(start) if start else 0
    return points[first : points.index(stop or EMBEDDING)]


def apply_neck(x: Array, features: int, dtype: Any, ctx: Context) -> Float[Array, "b h w d"]:
    """The neck of every SAM encoder, to be called in the encoder's compact method."""
    x = Conv(features, 1, use_bias=False, dtype=dtype, name="neck_0")(x, ctx)
    x = LayerNorm(dtype=dtype, name="neck_1")(x, ctx)
    x = Conv(features, 3, use_bias=False, dtype=dtype, name="neck_2")(x, ctx)
    return LayerNorm(dtype=dtype, name="neck_3")(x, ctx)


class ImageEncoderViT(nn.Module):
    """ViT-B, -L or -H with windowed attention, four global blocks and a convolutional neck."""

    config: VitConfig
    out_chans: int = 256
    attention: AttentionKind = "chunked"
    dtype: Any = jnp.float32
    remat: Remat = "none"

    @property
    def points(self) -> tuple[str, ...]:
        """Where it can be cut: before each of its parts, and at its end."""
        blocks = (f"blocks_{i}" for i in range(self.config.depth))
        return ("patch_embed", *blocks, "neck", EMBEDDING)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], ctx: Context, start: str = "", stop: str = ""
    ) -> Float[Array, "b gh gw d"]:
        """Normalised images (b, h, w, 3) -> image embeddings (b, h / 16, w / 16, out_chans).

        From `start` to `stop`, two of its `points`, it is a part of that: what comes before the
        one is not computed but given, and what comes before the other is the result.
        """
        config, parts = self.config, parts_between(self.points, start, stop)
        if "patch_embed" in parts:
            embed = PatchEmbed(config.embed_dim, config.patch_size, self.dtype, name="patch_embed")
            x = embed(x, ctx)
            pos_embed = self.param(
                "pos_embed",
                nn.initializers.normal(0.02),
                (1, *config.position_grid, config.embed_dim),
            )
            x = x + resize_positions(pos_embed, x.shape[1], x.shape[2]).astype(self.dtype)
        block_type = rematerialized(Block, self.remat)
        for i in range(config.depth):
            if f"blocks_{i}" not in parts:
                continue
            window = 0 if i in config.global_attn_indexes else config.window_size
            block = block_type(config, window, self.attention, self.dtype, name=f"blocks_{i}")
            x = block(x, ctx)
        return apply_neck(x, self.out_chans, self.dtype, ctx) if "neck" in parts else x


def resize_positions(
    pos_embed: Float[Array, "1 n m c"], height: int, width: int
) -> Float[Array, "1 h w c"]:
    """Absolute positions for another grid, as torch's bicubic `F.interpolate`, not antialiased."""
    if pos_embed.shape[1:3] == (height, width):
        return pos_embed
    rows = bicubic_matrix(pos_embed.shape[1], height).astype(np.float32)
    columns = bicubic_matrix(pos_embed.shape[2], width).astype(np.float32)
    return jnp.einsum("ih,bhwc,jw->bijc", rows, pos_embed, columns, precision="highest")


def bicubic_matrix(size_in: int, size_out: int) -> Float[np.ndarray, "m n"]:
    """One axis of torch's bicubic interpolation (a = -0.75, border pixels repeated) as a matrix."""
    a = -0.75
    source = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    base = np.floor(source).astype(np.int64)
    matrix = np.zeros((size_out, size_in))
    for tap in range(-1, 3):
        x = np.abs(source - (base + tap))
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        weight = np.where(x <= 1, near, far)
        np.add.at(matrix, (np.arange(size_out), np.clip(base + tap, 0, size_in - 1)), weight)
    return matrix
