"""LoRA: low-rank updates of linear layers (Hu et al. 2022, section 4.1), and rsLoRA.

On a fused qkv projection each chosen segment has factors of its own, as in SAMed (Zhang and Liu
2023): rank 4 on q and v of SAM ViT-B is 147,456 numbers. rsLoRA (Kalajdzievski 2023) divides by the
root of the rank, so that the update does not shrink as the rank grows.

Differs from the paper: A is Kaiming-uniform, as in the authors' code, not Gaussian.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from samjax.nn import Context, Site, SiteInfo
from samjax.ops import matmul
from samjax.peft.delta import (
    BUFFER,
    Additive,
    Method,
    check_rank,
    check_settings,
    field,
    join_segments,
    segment_width,
    static,
)


@struct.dataclass
class LoRADelta(Additive):
    """y = site(x) + scale * (x A) B, for each adapted segment of the output."""

    a: Any = field()  # (segments, in, rank)
    b: Any = field()  # (segments, rank, out of one segment)
    scale: Any = field(BUFFER)  # ()
    segments: tuple[str, ...] = static()
    dropout: float = static(0.0)

    def update(self, site: Site, x: Float[Array, "*b n"], ctx: Context) -> Float[Array, "*b m"]:
        """scale * (x A) B; never forms the full update of the kernel."""
        x = drop(x, self.dropout, site, ctx)
        # One product with all A side by side, then one with each B.
        num, width, rank = self.a.shape
        a = self.a.astype(x.dtype).swapaxes(0, 1).reshape(width, num * rank)
        b = (self.b * self.scale).astype(x.dtype)
        low = matmul(x, a).reshape(*x.shape[:-1], num, rank)
        parts = [matmul(low[..., i, :], b[i]) for i in range(num)]
        return join_segments(site.info, self.segments, parts)

    def kernel_update(self, info: SiteInfo, kernel: Any, ctx: Context) -> Any:
        """scale * A B."""
        ab = jnp.einsum(
            "sir,sro->sio",
            self.a.astype(jnp.float32),
            self.b.astype(jnp.float32) * self.scale,
            precision=jax.lax.Precision.HIGHEST,
        )
        return join_segments(info, self.segments, list(ab))


def drop(x: Array, rate: float, site: Site, ctx: Context) -> Array:
    """Dropout of a site's input while training: `ctx.rng` is None otherwise."""
    if not rate or ctx.rng is None:
        return x
    keep = jax.random.bernoulli(ctx.key(site.info.path), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class LowRank(Method):
    """Settings of LoRA and of the methods that hold its two factors.

    `rank`: columns of A; `alpha`: the update is scaled by alpha / rank (None: alpha = rank, so that
    the scale is 1); `dropout`: probability with which an input of A is zeroed in training;
    `rank_stabilized`: rsLoRA, alpha / sqrt(rank) in the stead of alpha / rank.

    Raises ValueError for a rank below 1, an alpha that is not positive, a dropout outside [0, 1).
    """

    rank: int = 4
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        check_settings(self, ["rank"], ["alpha"])

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def linear(self, key: Any, info: SiteInfo, segments: tuple[str, ...]) -> LoRADelta:
        """LoRA's factors for one linear layer, or for some `segments` of a fused one."""
        width, out = info.kernel_shape[0], segment_width(info, segments)
        check_rank(self._name, self.rank, info, min(width, out))
        num = max(1, len(segments))
        return LoRADelta(
            a=kaiming_uniform(key, (num, width, self.rank), width),
            b=jnp.zeros((num, self.rank, out), jnp.float32),
            scale=jnp.float32(self.scale),
            segments=segments,
            dropout=self.dropout,
        )


@dataclasses.dataclass(frozen=True)
class LoRA(LowRank):
    """Settings of LoRA. A is Kaiming-uniform (a = sqrt 5), B is zero: the identity at the start."""

    def init(self, key: Any, site: Site, segments: tuple[str, ...]) -> LoRADelta:
        """The record for one linear layer, or for some `segments` of a fused one."""
        return self.linear(key, site.info, segments)


def kaiming_uniform(key: Any, shape: tuple[int, ...], fan_in: int) -> Array:
    """torch's `kaiming_uniform_(a=sqrt(5))`: the uniform distribution on +-1 / sqrt(fan_in)."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
