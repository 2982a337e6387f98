"""LoRA on convolutions, as HuggingFace's peft has it.

    y = conv(x, W) + bias + s * (conv(x, A) B)        W' = W + s * sum over r of A[:, :, :, r] B[r]

A is a convolution to `rank` channels with the layer's own kernel size, stride and padding, B a 1x1
convolution from them to the layer's channels. The factors are those of the kernel as a matrix of
(k * k * in) rows, so that its update has this rank.

Differs from the paper: Hu et al. (2022) adapt linear layers alone. Their code also has
convolutions, with factors of rank k * rank that mix kernel rows with channels and have no
activation form; this is peft's later form, which has one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from samjax.nn import Context, Site, SiteInfo
from samjax.ops import matmul
from samjax.peft.delta import BUFFER, Additive, check_rank, field, static
from samjax.peft.lora import LowRank, drop, kaiming_uniform


@struct.dataclass
class LoRAConvDelta(Additive):
    """y = site(x) + scale * (conv(x, A) B)."""

    a: Any = field()  # (k, k, in, rank)
    b: Any = field()  # (rank, out)
    scale: Any = field(BUFFER)  # ()
    dropout: float = static(0.0)

    def update(
        self, site: Site, x: Float[Array, "b h w c"], ctx: Context
    ) -> Float[Array, "b oh ow d"]:
        """scale * (conv(x, A) B), with the site's own convolution."""
        low = site.apply(drop(x, self.dropout, site, ctx), self.a, None)
        return matmul(low, (self.b * self.scale).astype(low.dtype))

    def kernel_update(self, info: SiteInfo, kernel: Any, ctx: Context) -> Any:
        """scale * A B, with A as a matrix of (k * k * in) rows."""
        b = self.b.astype(jnp.float32) * self.scale
        return jnp.matmul(self.a.astype(jnp.float32), b, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class LoRAConv(LowRank):
    """Settings of LoRA on convolutions, those of LoRA: the identity at the start.

    Depthwise convolutions are no sites: they have k * k numbers a channel already.
    """

    kinds: ClassVar[tuple[str, ...]] = ("conv",)

    def init(self, key: Any, site: Site, segments: tuple[str, ...]) -> LoRAConvDelta:
        """The record for one convolution."""
        *window, out = site.info.kernel_shape
        fan_in = math.prod(window)
        check_rank(self._name, self.rank, site.info, min(fan_in, out))
        return LoRAConvDelta(
            a=kaiming_uniform(key, (*window, self.rank), fan_in),
            b=jnp.zeros((self.rank, out), jnp.float32),
            scale=jnp.float32(self.scale),
            dropout=self.dropout,
        )
