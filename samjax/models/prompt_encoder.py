"""SAM's prompt encoder: points, boxes and masks (`segment_anything/modeling/prompt_encoder.py`)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from samjax.nn import Context, Conv, Embedding, LayerNorm
from samjax.ops import gelu


@struct.dataclass
class Prompts:
    """A batch of prompts, one per mask to predict, in fixed slots.

    `coords` (b, n, 2): (x, y) in pixels of the model's input.
    `labels` (b, n) int32: 1 foreground, 0 background, 2 and 3 a box's upper left and lower right
    corner, -1 SAM's "not a point" token (it follows points that come without a box), -2 an empty
    slot, which the decoder masks out: padding gives what no padding gives.
    `masks` (b, 4 h, 4 w) logits of an earlier prediction for an (h, w) embedding, or None.
    `has_mask` (b,) bool: where it is False the prompt has no mask after all; None: all have.
    """

    coords: Any
    labels: Any
    masks: Any = None
    has_mask: Any = None

    @staticmethod
    def none(batch: int) -> Prompts:
        """No prompt at all: automatic segmentation with the no-mask embedding."""
        return Prompts(jnp.zeros((batch, 0, 2)), jnp.zeros((batch, 0), jnp.int32))


class PositionEmbeddingRandom(nn.Module):
    """Random Fourier features of coordinates in [0, 1]; float32 whatever the compute dtype."""

    num_pos_feats: int

    @nn.compact
    def __call__(self, coords: Float[Array, "*b 2"]) -> Float[Array, "*b c"]:
        """(..., 2) as (x, y) in [0, 1] -> (..., 2 * num_pos_feats)."""
        matrix = self.param(
            "positional_encoding_gaussian_matrix",
            nn.initializers.normal(1.0),
            (2, self.num_pos_feats),
        )
        phase = jnp.matmul(
            2 * coords.astype(jnp.float32) - 1, matrix, precision=jax.lax.Precision.HIGHEST
        )
        phase = 2 * np.pi * phase
        return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)

    def of_grid(self, grid: tuple[int, int]) -> Float[Array, "h w c"]:
        """Of every token of an (h, w) image embedding."""
        y, x = ((jnp.arange(n, dtype=jnp.float32) + 0.5) / n for n in grid)
        return self(jnp.stack(jnp.broadcast_arrays(x[None, :], y[:, None]), axis=-1))


class PromptEncoder(nn.Module):
    """Encodes prompts into sparse tokens and a dense map."""

    embed_dim: int
    # (height, width) in pixels of the model's input.
    input_shape: tuple[int, int]
    mask_in_chans: int = 16
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Names submodules as the original does."""
        self.pe_layer = PositionEmbeddingRandom(self.embed_dim // 2)
        self.point_embeddings = [Embedding(1, self.embed_dim) for _ in range(4)]
        self.not_a_point_embed = Embedding(1, self.embed_dim)
        self.no_mask_embed = Embedding(1, self.embed_dim)
        hidden = self.mask_in_chans
        self.mask_downscaling_0 = Conv(hidden // 4, 2, 2, dtype=self.dtype)
        self.mask_downscaling_1 = LayerNorm(dtype=self.dtype)
        self.mask_downscaling_3 = Conv(hidden, 2, 2, dtype=self.dtype)
        self.mask_downscaling_4 = LayerNorm(dtype=self.dtype)
        self.mask_downscaling_6 = Conv(self.embed_dim, 1, dtype=self.dtype)

    def dense_pe(self, grid: tuple[int, int]) -> Float[Array, "h w c"]:
        """The positional encoding of every token of an (h, w) image embedding."""
        return self.pe_layer.of_grid(grid)

    def embed_points(
        self, coords: Float[Array, "b n 2"], labels: Int[Array, "b n"]
    ) -> Float[Array, "b n c"]:
        """Sparse embeddings of points and box corners; see `Prompts` for the labels."""
        height, width = self.input_shape
        position = self.pe_layer((coords + 0.5) / jnp.array([width, height], jnp.float32))
        table = jnp.concatenate(
            [self.not_a_point_embed()] + [embedding() for embedding in self.point_embeddings]
        )
        kind = table[jnp.clip(labels, -1, 3) + 1]
        return jnp.where((labels >= 0)[..., None], position, 0.0) + kind

    def embed_masks(self, masks: Float[Array, "b h w"], ctx: Context) -> Float[Array, "b gh gw c"]:
        """Dense embeddings of low-resolution mask logits."""
        x = gelu(self.mask_downscaling_1(self.mask_downscaling_0(masks[..., None], ctx), ctx))
        x = gelu(self.mask_downscaling_4(self.mask_downscaling_3(x, ctx), ctx))
        return self.mask_downscaling_6(x, ctx)

    def __call__(
        self, prompts: Prompts, grid: tuple[int, int], ctx: Context
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b gh gw c"], Bool[Array, "b n"]]:
        """Sparse tokens, the dense map on an (h, w) `grid`, and which tokens are real."""
        sparse = self.embed_points(prompts.coords, prompts.labels)
        # Read in either case, so that initialisation touches it.
        no_mask = self.no_mask_embed()
        dense = jnp.broadcast_to(
            no_mask[:, None, None, :], (prompts.labels.shape[0], *grid, self.embed_dim)
        )
        if prompts.masks is not None:
            embedded = self.embed_masks(prompts.masks, ctx)
            if prompts.has_mask is not None:
                present = prompts.has_mask[:, None, None, None]
                embedded = jnp.where(present, embedded, dense.astype(embedded.dtype))
            dense = embedded
        return sparse, dense, prompts.labels > -2
