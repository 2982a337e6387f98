"""LoRA: low-rank updates of linear layers (Hu et al. 2022, section 4.1).

On a fused qkv projection each chosen segment has factors of its own, as in SAMed (Zhang and Liu
2023): rank 4 on q and v of SAM ViT-B is 147,456 numbers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from samjax.nn import Context, Site, SiteInfo
from samjax.peft.delta import BUFFER, field, static


@struct.dataclass
class LoRADelta:
    """y = site(x) + scale * (x A) B, for each adapted segment of the output."""

    a: Any = field()  # (segments, in, rank)
    b: Any = field()  # (segments, rank, out of one segment)
    scale: Any = field(BUFFER)  # ()
    segments: tuple[str, ...] = static()
    dropout: float = static(0.0)

    def __call__(self, site: Site, x: Float[Array, "*b n"], ctx: Context) -> Float[Array, "*b m"]:
        """The adapted output; never forms the full update of the kernel."""
        y = site(x)
        if self.dropout and ctx.rng is not None:
            keep = jax.random.bernoulli(ctx.key(site.info.path), 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        # One product with all A side by side, then one with each B.
        num, width, rank = self.a.shape
        a = self.a.astype(x.dtype).swapaxes(0, 1).reshape(width, num * rank)
        b = (self.b * self.scale).astype(x.dtype)
        low = (x @ a).reshape(*x.shape[:-1], num, rank)
        updates = [low[..., i, :] @ b[i] for i in range(num)]
        return y + self._spread(site.info, updates)

    def merge(self, info: SiteInfo, kernel: Any, bias: Any, ctx: Context) -> tuple[Any, Any]:
        """W + scale * A B, in float32."""
        ab = jnp.einsum(
            "sir,sro->sio",
            self.a.astype(jnp.float32),
            self.b.astype(jnp.float32) * self.scale,
            precision=jax.lax.Precision.HIGHEST,
        )
        return kernel.astype(jnp.float32) + self._spread(info, list(ab)), bias

    def _spread(self, info: SiteInfo, updates: list[Array]) -> Array:
        if info.segments is None or not self.segments:
            return updates[0]
        return info.segments.join(dict(zip(self.segments, updates, strict=True)))


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Settings of LoRA. A is Kaiming-uniform (a = sqrt 5), B is zero: the identity at the start.

    `rank`: columns of A; `alpha`: the update is scaled by alpha / rank (None: alpha = rank, so that
    the scale is 1); `dropout`: probability with which an input of A is zeroed in training.

    Raises ValueError for a rank below 1, an alpha that is not positive, a dropout outside [0, 1).
    """

    rank: int = 4
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA: rank must be at least 1, not {self.rank}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"LoRA: alpha must be positive, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA: dropout must be in [0, 1), not {self.dropout}")

    def init(self, key: Any, site: Site, segments: tuple[str, ...]) -> LoRADelta:
        """The record for one linear layer, or for some `segments` of a fused one."""
        info = site.info
        if info.kind != "dense":
            raise ValueError(f"LoRA adapts linear layers, and {info.path} is a {info.kind} layer")
        width, out = info.kernel_shape
        if info.segments is not None and segments:
            out //= len(info.segments.names)
        num = max(1, len(segments))
        # kaiming_uniform(a=sqrt(5)) of torch is the uniform distribution on +-1 / sqrt(fan_in).
        bound = width**-0.5
        return LoRADelta(
            a=jax.random.uniform(key, (num, width, self.rank), jnp.float32, -bound, bound),
            b=jnp.zeros((num, self.rank, out), jnp.float32),
            scale=jnp.float32((self.alpha or self.rank) / self.rank),
            segments=segments,
            dropout=self.dropout,
        )
