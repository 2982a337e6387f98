"""The Segment Anything Model: image encoder, prompt encoder, mask decoder."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from samjax.models.attention import AttentionKind
from samjax.models.configs import SamConfig, TinyVitConfig
from samjax.models.image_encoder import ImageEncoderViT
from samjax.models.mask_decoder import MaskDecoder
from samjax.models.prompt_encoder import PromptEncoder, Prompts
from samjax.models.tiny_vit import TinyViT
from samjax.nn import Context, Remat, SiteInfo, record_sites
from samjax.preprocess import normalize

DETERMINISTIC = Context()
# Images, or what the image encoder has made of them so far.
EncoderInput = UInt8[Array, "b fh fw 3"] | Float[Array, "b th tw tc"]


class Sam(nn.Module):
    """A SAM of any size. Parameter paths follow the original's keys.

    `variables` of `apply` are `{"params": ..., "peft": ...}`; the second tree is optional. With
    `dtype=bfloat16`, parameters may stay float32; softmax, norms and outputs are float32. With
    `remat="blocks"` the backward pass keeps what enters each block of the encoder and computes the
    rest again: a fraction of the memory for about a third more work.

    With `start`, one of the image encoder's `points`, `encode` begins there: in place of images it
    takes what `encode_to` gave up to that point.
    """

    config: SamConfig
    attention: AttentionKind = "chunked"
    dtype: Any = jnp.float32
    remat: Remat = "none"
    start: str = ""

    def setup(self) -> None:
        """Names submodules as the original does."""
        config = self.config
        self.image_encoder = self.make_encoder()
        self.prompt_encoder = PromptEncoder(
            config.prompt_embed_dim, config.frame.shape, dtype=self.dtype
        )
        self.mask_decoder = self.make_decoder()

    def make_encoder(self, **options: Any) -> TinyViT | ImageEncoderViT:
        """An image encoder of the config; `options` are Linen's, such as a name."""
        encoder, dim = self.config.image_encoder, self.config.prompt_embed_dim
        if isinstance(encoder, TinyVitConfig):
            return TinyViT(encoder, dim, self.dtype, self.remat, **options)
        return ImageEncoderViT(encoder, dim, self.attention, self.dtype, self.remat, **options)

    def make_decoder(self, **options: Any) -> MaskDecoder:
        """A mask decoder of the config; `options` are Linen's, such as a name."""
        config = self.config
        return MaskDecoder(
            config.prompt_embed_dim,
            config.decoder_depth,
            config.decoder_num_heads,
            config.decoder_mlp_dim,
            dtype=self.dtype,
            **options,
        )

    def encode(
        self,
        image: EncoderInput,
        input_size: Int[Array, "b 2"],
        ctx: Context = DETERMINISTIC,
    ) -> Float[Array, "b h w c"]:
        """Image embeddings (b, fh / 16, fw / 16, 256).

        `image`: uint8 RGB, resized and padded as `samjax.preprocess.prepare_image` does, or what
        `start` says; `input_size`: (height, width) of each image without its padding.
        """
        if self.start:
            x = image.astype(self.dtype)
            return self.image_encoder(x, self._with_shared(ctx), self.start)
        return self.encode_normalized(self._normalized(image, input_size), ctx)

    def encode_to(
        self, image: UInt8[Array, "b fh fw 3"], input_size: Int[Array, "b 2"], stop: str
    ) -> Float[Array, "b th tw tc"]:
        """What the encoder without adapters makes of images up to one of its `points`."""
        return self.image_encoder(self._normalized(image, input_size), DETERMINISTIC, stop=stop)

    def _normalized(self, image: Any, input_size: Any) -> Array:
        config = self.config
        return normalize(
            image, input_size, config.normalization, config.pixel_mean, config.pixel_std
        )

    def encode_normalized(
        self, x: Float[Array, "b fh fw 3"], ctx: Context = DETERMINISTIC
    ) -> Float[Array, "b h w c"]:
        """Image embeddings of images that are normalised and padded already."""
        return self.image_encoder(x, self._with_shared(ctx))

    def decode(
        self,
        image_embeddings: Float[Array, "e h w c"],
        prompts: Prompts,
        ctx: Context = DETERMINISTIC,
    ) -> tuple[Float[Array, "b m h4 w4"], Float[Array, "b m"]]:
        """Low-resolution logits (b, 4, 4 h, 4 w) and IoU predictions (b, 4), float32.

        One embedding serves all b prompts, or each prompt has its own (e = b). Output 0 is SAM's
        single mask, 1 to 3 its multi-mask outputs.
        """
        grid, ctx = image_embeddings.shape[1:3], self._with_shared(ctx)
        sparse, dense, present = self.prompt_encoder(prompts, grid, ctx)
        image_pe = self.prompt_encoder.dense_pe(grid)
        return self.mask_decoder(image_embeddings, image_pe, sparse, dense, present, ctx)

    def __call__(
        self,
        image: EncoderInput,
        input_size: Int[Array, "b 2"],
        prompts: Prompts,
        ctx: Context = DETERMINISTIC,
    ) -> tuple[Float[Array, "b m h4 w4"], Float[Array, "b m"]]:
        """`encode`, then `decode` with one prompt an image."""
        return self.decode(self.encode(image, input_size, ctx), prompts, ctx)

    def _with_shared(self, ctx: Context) -> Context:
        return ctx.replace(shared=self.get_variable("peft", "shared"))

    def init_params(self, key: Any) -> dict[str, Any]:
        """Randomly initialised `params`, a nested dict of float32 arrays."""
        return self.init(key, *self.example())["params"]

    def init_params_shapes(self) -> dict[str, Any]:
        """The nested dict of `jax.ShapeDtypeStruct` that `params` must match; computes nothing."""
        return _trace(self)[0]

    def example(self) -> tuple[Any, ...]:
        """Arguments of a forward pass that touches every parameter."""
        height, width = self.config.frame.shape
        mask = jnp.zeros((1, *self.config.low_res_shape))
        return (
            jnp.zeros((1, height, width, 3), jnp.uint8),
            jnp.array([[height, width]], jnp.int32),
            Prompts(jnp.zeros((1, 1, 2)), jnp.zeros((1, 1), jnp.int32), mask),
        )

    def sites(self, variables: dict[str, Any] | None = None) -> tuple[SiteInfo, ...]:
        """Every site, in the order in which a forward pass calls it; computes nothing.

        Dense layers, convolutions, norms and branches. What is called twice is listed twice.
        """
        return _trace(self)[1] if variables is None else _visited(self, variables)


@functools.lru_cache(maxsize=32)
def _trace(model: Sam) -> tuple[dict[str, Any], tuple[SiteInfo, ...]]:
    """Shapes and sites of a model: asked for often, and seconds to trace for ViT-H."""
    shapes = jax.eval_shape(model.init_params, jax.random.key(0))
    return shapes, _visited(model, {"params": shapes})


def _visited(model: Sam, variables: dict[str, Any]) -> tuple[SiteInfo, ...]:
    with record_sites() as visits:
        jax.eval_shape(lambda v: model.apply(v, *model.example()), variables)
    return tuple(visits)
