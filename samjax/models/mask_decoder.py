"""SAM's mask decoder: a two-way transformer, four mask tokens and an IoU head.

`segment_anything/modeling/{mask_decoder,transformer}.py`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from samjax.models.attention import attend
from samjax.nn import Context, ConvTranspose2x2, Dense, Embedding, LayerNorm
from samjax.ops import gelu


class Attention(nn.Module):
    """Attention with separate projections, optionally to fewer channels."""

    num_heads: int
    internal_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        q: Float[Array, "b n c"],
        k: Float[Array, "b m c"],
        v: Float[Array, "b m c"],
        ctx: Context,
        bias: Float[Array, "b 1 1 m"] | None = None,
    ) -> Float[Array, "b n c"]:
        """`bias` is added to the scores: it masks empty prompt slots out of the keys."""
        dim = q.shape[-1]

        def heads(x: Array, name: str) -> Array:
            x = Dense(self.internal_dim, dtype=self.dtype, name=name)(x, ctx)
            return x.reshape(*x.shape[:2], self.num_heads, -1).swapaxes(1, 2)

        out = attend(heads(q, "q_proj"), heads(k, "k_proj"), heads(v, "v_proj"), bias)
        out = out.swapaxes(1, 2).reshape(*q.shape[:2], self.internal_dim)
        return Dense(dim, dtype=self.dtype, name="out_proj")(out, ctx)


class TokenMlp(nn.Module):
    """The decoder's MLP: ReLU, not GELU."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"], ctx: Context) -> Float[Array, "*b c"]:
        """(..., c) -> (..., c)."""
        hidden = jax.nn.relu(Dense(self.hidden, dtype=self.dtype, name="lin1")(x, ctx))
        return Dense(x.shape[-1], dtype=self.dtype, name="lin2")(hidden, ctx)


class TwoWayAttentionBlock(nn.Module):
    """Self-attention of tokens, tokens to image, MLP, image to tokens."""

    num_heads: int
    mlp_dim: int
    skip_first_layer_pe: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "b n c"],
        keys: Float[Array, "b m c"],
        query_pe: Float[Array, "b n c"],
        key_pe: Float[Array, "1 m c"],
        token_bias: Float[Array, "b 1 1 n"],
        ctx: Context,
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b m c"]]:
        """Updated tokens and image tokens."""
        dim = queries.shape[-1]

        def attention(name: str, internal_dim: int) -> Attention:
            return Attention(self.num_heads, internal_dim, self.dtype, name=name)

        def norm(name: str) -> LayerNorm:
            return LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)

        self_attn = attention("self_attn", dim)
        if self.skip_first_layer_pe:
            queries = self_attn(queries, queries, queries, ctx, token_bias)
        else:
            q = queries + query_pe
            queries = queries + self_attn(q, q, queries, ctx, token_bias)
        queries = norm("norm1")(queries, ctx)

        to_image = attention("cross_attn_token_to_image", dim // 2)
        queries = queries + to_image(queries + query_pe, keys + key_pe, keys, ctx)
        queries = norm("norm2")(queries, ctx)

        queries = queries + TokenMlp(self.mlp_dim, self.dtype, name="mlp")(queries, ctx)
        queries = norm("norm3")(queries, ctx)

        to_tokens = attention("cross_attn_image_to_token", dim // 2)
        keys = keys + to_tokens(keys + key_pe, queries + query_pe, queries, ctx, token_bias)
        return queries, norm("norm4")(keys, ctx)


class TwoWayTransformer(nn.Module):
    """Tokens and image attend to each other `depth` times, then tokens to the image once more."""

    depth: int
    num_heads: int
    mlp_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b n c"],
        image: Float[Array, "b m c"],
        image_pe: Float[Array, "1 m c"],
        token_bias: Float[Array, "b 1 1 n"],
        ctx: Context,
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b m c"]]:
        """Processed tokens and image tokens."""
        queries, keys = tokens, image
        for i in range(self.depth):
            block = TwoWayAttentionBlock(
                self.num_heads, self.mlp_dim, i == 0, self.dtype, name=f"layers_{i}"
            )
            queries, keys = block(queries, keys, tokens, image_pe, token_bias, ctx)
        attention = Attention(
            self.num_heads, tokens.shape[-1] // 2, self.dtype, name="final_attn_token_to_image"
        )
        queries = queries + attention(queries + tokens, keys + image_pe, keys, ctx)
        norm = LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm_final_attn")
        return norm(queries, ctx), keys


class Mlp(nn.Module):
    """Three linear layers with ReLU between them."""

    hidden: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"], ctx: Context) -> Float[Array, "*b d"]:
        """(..., c) -> (..., features)."""
        for i, width in enumerate((self.hidden, self.hidden)):
            x = jax.nn.relu(Dense(width, dtype=self.dtype, name=f"layers_{i}")(x, ctx))
        return Dense(self.features, dtype=self.dtype, name="layers_2")(x, ctx)


class TokenDecoder(nn.Module):
    """What decoders with SAM's tokens share: the transformer and the upscaling of its map."""

    dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    dtype: Any = jnp.float32

    @nn.nowrap
    def decode_tokens(
        self,
        num_masks: int,
        image_embeddings: Float[Array, "e h w c"],
        image_pe: Float[Array, "h w c"],
        sparse: Float[Array, "b n c"],
        dense: Float[Array, "b h w c"],
        present: Bool[Array, "b n"],
        ctx: Context,
    ) -> tuple[Float[Array, "b k c"], Float[Array, "b h w 2 2 2 2 d"]]:
        """The tokens after the transformer, and the map that their masks are read from.

        Tokens: of the IoU, of `num_masks` masks, then the prompt's. Of each pixel of the map, its
        place within the block that it is enlarged to follows its own: twice as many pixels a side,
        and again. To be called from a subclass's compact method, whose parameters these are.
        """
        batch, height, width, _ = dense.shape
        output_tokens = jnp.concatenate(
            [
                Embedding(1, self.dim, name="iou_token")(),
                Embedding(num_masks, self.dim, name="mask_tokens")(),
            ]
        )
        output_tokens = jnp.broadcast_to(output_tokens, (batch, num_masks + 1, self.dim))
        tokens = jnp.concatenate([output_tokens, sparse], axis=1).astype(self.dtype)
        present = jnp.pad(present, ((0, 0), (num_masks + 1, 0)), constant_values=True)
        token_bias = jnp.where(present, 0.0, -1e9)[:, None, None, :]

        source = (image_embeddings + dense).astype(self.dtype).reshape(batch, -1, self.dim)
        image_pe = image_pe.reshape(1, -1, self.dim).astype(self.dtype)
        transformer = TwoWayTransformer(
            self.depth, self.num_heads, self.mlp_dim, self.dtype, name="transformer"
        )
        tokens, source = transformer(tokens, source, image_pe, token_bias, ctx)

        upscaled = source.reshape(batch, height, width, self.dim)
        for i, features in ((0, self.dim // 4), (3, self.dim // 8)):
            name = f"output_upscaling_{i}"
            upscaled = ConvTranspose2x2(features, self.dtype, name=name)(upscaled)
            if i == 0:
                norm = LayerNorm(dtype=self.dtype, name="output_upscaling_1")
                upscaled = norm(upscaled, ctx)
            upscaled = gelu(upscaled)
        return tokens, upscaled


def masks_of(
    hyper: Float[Array, "b m d"], upscaled: Float[Array, "b h w 2 2 2 2 d"]
) -> Float[Array, "b m h4 w4"]:
    """Masks (b, m, 4 h, 4 w) float32 as products of their tokens' vectors with the upscaled map."""
    batch, height, width = upscaled.shape[:3]
    # Only now, with one number a pixel, do the blocks go to their places.
    logits = jnp.einsum("bmc,bhwijklc->bmhikwjl", hyper, upscaled)
    return logits.reshape(batch, hyper.shape[1], 4 * height, 4 * width).astype(jnp.float32)


class MaskDecoder(TokenDecoder):
    """Predicts `num_multimask_outputs` + 1 masks and their IoUs for each prompt."""

    num_multimask_outputs: int = 3
    iou_head_hidden_dim: int = 256

    @nn.compact
    def __call__(
        self,
        image_embeddings: Float[Array, "e h w c"],
        image_pe: Float[Array, "h w c"],
        sparse: Float[Array, "b n c"],
        dense: Float[Array, "b h w c"],
        present: Bool[Array, "b n"],
        ctx: Context,
    ) -> tuple[Float[Array, "b m h4 w4"], Float[Array, "b m"]]:
        """Logits (b, 4, 4 h, 4 w) and IoU predictions (b, 4) in float32; e is 1 or b.

        Mask 0 is the single-mask output; 1 to 3 are the multi-mask outputs. Tokens that are not
        `present` are masked out of every attention.
        """
        num_masks = self.num_multimask_outputs + 1
        tokens, upscaled = self.decode_tokens(
            num_masks, image_embeddings, image_pe, sparse, dense, present, ctx
        )
        hyper = [
            Mlp(self.dim, self.dim // 8, self.dtype, name=f"output_hypernetworks_mlps_{i}")(
                tokens[:, 1 + i], ctx
            )
            for i in range(num_masks)
        ]
        logits = masks_of(jnp.stack(hyper, axis=1), upscaled)
        iou_head = Mlp(self.iou_head_hidden_dim, num_masks, self.dtype, name="iou_prediction_head")
        iou = iou_head(tokens[:, 0], ctx)
        return logits, iou.astype(jnp.float32)
