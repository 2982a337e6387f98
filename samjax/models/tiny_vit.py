"""TinyViT-5M as image encoder: MobileSAM (Zhang et al. 2023) and LiteMedSAM.

Three things differ from the ViT: the fused qkv lies head by head, the norm sits inside the
attention and therefore *after* the zero padding of windows, and convolutions carry a BatchNorm,
which stays unfused and in inference mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from samjax.models import windows
from samjax.models.attention import attend
from samjax.models.configs import TinyVitConfig
from samjax.models.image_encoder import EMBEDDING, apply_neck, parts_between
from samjax.nn import (
    BatchNorm,
    Context,
    Conv,
    Dense,
    DepthwiseConv,
    LayerNorm,
    Remat,
    Segments,
    act_by_token,
    call_branch,
    rematerialized,
)
from samjax.ops import gelu


class ConvBN(nn.Module):
    """A convolution without bias, then a BatchNorm."""

    features: int
    kernel_size: int = 1
    stride: int = 1
    depthwise: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], ctx: Context) -> Float[Array, "b oh ow d"]:
        """(b, h, w, c) -> (b, h / stride, w / stride, features)."""
        if self.depthwise:
            x = DepthwiseConv(self.kernel_size, self.stride, self.dtype, name="c")(x)
        else:
            x = Conv(self.features, self.kernel_size, self.stride, False, self.dtype, name="c")(
                x, ctx
            )
        return BatchNorm(dtype=self.dtype, name="bn")(x, ctx)


class PatchEmbed(nn.Module):
    """Two convolutions with a GELU between them."""

    config: TinyVitConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], ctx: Context) -> Float[Array, "b gh gw c"]:
        """(b, h, w, 3) -> (b, h / stride^2, w / stride^2, c)."""
        dim, k, s = self.config.embed_dims[0], self.config.patch_kernel, self.config.patch_stride
        x = gelu(ConvBN(dim // 2, k, s, dtype=self.dtype, name="seq_0")(x, ctx))
        return ConvBN(dim, k, s, dtype=self.dtype, name="seq_2")(x, ctx)


class MBConv(nn.Module):
    """Inverted bottleneck: expand by 4, depthwise 3 x 3, project back, add, GELU."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], ctx: Context) -> Float[Array, "b h w c"]:
        """(b, h, w, c) -> (b, h, w, c)."""
        dim = x.shape[-1]
        y = gelu(ConvBN(4 * dim, dtype=self.dtype, name="conv1")(x, ctx))
        y = gelu(ConvBN(4 * dim, 3, depthwise=True, dtype=self.dtype, name="conv2")(y, ctx))
        return gelu(x + ConvBN(dim, dtype=self.dtype, name="conv3")(y, ctx))


class PatchMerging(nn.Module):
    """Widens the channels and, with `stride` 2, halves the map."""

    features: int
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], ctx: Context) -> Float[Array, "b oh ow d"]:
        """(b, h, w, c) -> (b, h / stride, w / stride, features)."""
        d, dtype = self.features, self.dtype
        x = gelu(ConvBN(d, dtype=dtype, name="conv1")(x, ctx))
        x = gelu(ConvBN(d, 3, self.stride, depthwise=True, dtype=dtype, name="conv2")(x, ctx))
        return ConvBN(d, dtype=dtype, name="conv3")(x, ctx)


class Attention(nn.Module):
    """Attention within windows, with a learnt bias per head and absolute offset."""

    num_heads: int
    window_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], ctx: Context) -> Float[Array, "b h w c"]:
        """(b, h, w, c) -> (b, h, w, c)."""
        size, dim = self.window_size, x.shape[-1]
        biases = self.param(
            "attention_biases", nn.initializers.zeros, (self.num_heads, size * size)
        )
        norm = LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")
        segments = Segments(("q", "k", "v"), "heads", self.num_heads)
        qkv = Dense(3 * dim, dtype=self.dtype, segments=segments, name="qkv")
        proj = Dense(dim, dtype=self.dtype, name="proj")

        def attend_windows(qkv: Array) -> Array:
            qkv = qkv.reshape(-1, size * size, self.num_heads, 3, dim // self.num_heads)
            q, k, v = jnp.moveaxis(qkv, (3, 2), (0, 2))
            out = attend(q, k, v, biases[:, offset_indices(size)])
            return jnp.moveaxis(out, 1, 2).reshape(-1, size, size, dim)

        # Zeros are normalised inside the attention: padded tokens become the norm's bias.
        by_token = act_by_token(self, "qkv", "proj")

        def before(x: Array, ctx: Context) -> Array:
            return qkv(norm(x, ctx), ctx)

        return windows.within(x, size, before, attend_windows, proj, ctx, by_token)


def offset_indices(size: int) -> np.ndarray:
    """(s * s, s * s) indices of the bias for each pair of tokens of a window.

    Offsets (|dy|, |dx|) are numbered in order of first appearance, which for a raster scan is
    |dy| * size + |dx|.
    """
    y, x = (a.ravel() for a in np.divmod(np.arange(size * size), size))
    return np.abs(y[:, None] - y[None, :]) * size + np.abs(x[:, None] - x[None, :])


class Mlp(nn.Module):
    """Norm, then two linear layers with a GELU between them."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"], ctx: Context) -> Float[Array, "*b c"]:
        """(..., c) -> (..., c)."""
        dim = x.shape[-1]
        x = LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x, ctx)
        hidden = gelu(Dense(4 * dim, dtype=self.dtype, name="fc1")(x, ctx))
        return Dense(dim, dtype=self.dtype, name="fc2")(hidden, ctx)


class Block(nn.Module):
    """Windowed attention, a depthwise convolution, an MLP."""

    num_heads: int
    window_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], ctx: Context) -> Float[Array, "b h w c"]:
        """(b, h, w, c) -> (b, h, w, c)."""
        dim = x.shape[-1]
        attn = Attention(self.num_heads, self.window_size, self.dtype, name="attn")
        mlp = Mlp(self.dtype, name="mlp")
        x = x + call_branch(attn, lambda x: attn(x, ctx), x, ctx)
        x = ConvBN(dim, 3, depthwise=True, dtype=self.dtype, name="local_conv")(x, ctx)
        return x + call_branch(mlp, lambda x: mlp(x, ctx), x, ctx)


class Stage(nn.Module):
    """One resolution of TinyViT; the first is convolutional."""

    config: TinyVitConfig
    index: int
    dtype: Any = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], ctx: Context, parts: Sequence[str]
    ) -> Float[Array, "b oh ow d"]:
        """(b, h, w, c) -> (b, h / stride, w / stride, channels of the next stage).

        Of its blocks and its `downsample` those run that are among the encoder's `parts`.
        """
        config, i = self.config, self.index
        conv_type, block_type = (rematerialized(block, self.remat) for block in (MBConv, Block))
        for j in range(config.depths[i]):
            if f"layers_{i}/blocks_{j}" not in parts:
                continue
            if i == 0:
                x = conv_type(self.dtype, name=f"blocks_{j}")(x, ctx)
            else:
                heads, window = config.num_heads[i], config.window_sizes[i]
                x = block_type(heads, window, self.dtype, name=f"blocks_{j}")(x, ctx)
        last = len(config.depths) - 1
        if f"layers_{i}/downsample" in parts:
            # MobileSAM keeps the resolution of the last stage.
            stride = 1 if i + 1 == last else 2
            merge = PatchMerging(config.embed_dims[i + 1], stride, self.dtype, name="downsample")
            x = merge(x, ctx)
        return x


class TinyViT(nn.Module):
    """TinyViT with SAM's neck."""

    config: TinyVitConfig
    out_chans: int = 256
    dtype: Any = jnp.float32
    remat: Remat = "none"

    @property
    def points(self) -> tuple[str, ...]:
        """Where it can be cut: before each of its parts, and at its end."""
        depths, names = self.config.depths, ["patch_embed"]
        for i, depth in enumerate(depths):
            names += [f"layers_{i}/blocks_{j}" for j in range(depth)]
            names += [f"layers_{i}/downsample"] if i + 1 < len(depths) else []
        return (*names, "neck", EMBEDDING)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], ctx: Context, start: str = "", stop: str = ""
    ) -> Float[Array, "b gh gw d"]:
        """Normalised images (b, h, w, 3) -> image embeddings (b, h / p, w / p, out_chans).

        `start` and `stop` are as in `samjax.models.image_encoder.ImageEncoderViT`.
        """
        parts = parts_between(self.points, start, stop)
        if "patch_embed" in parts:
            x = PatchEmbed(self.config, self.dtype, name="patch_embed")(x, ctx)
        for i in range(len(self.config.depths)):
            x = Stage(self.config, i, self.dtype, self.remat, name=f"layers_{i}")(x, ctx, parts)
        return apply_neck(x, self.out_chans, self.dtype, ctx) if "neck" in parts else x
