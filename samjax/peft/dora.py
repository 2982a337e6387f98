"""DoRA: LoRA turns the columns of a kernel, and their length adapts by itself (Liu et al. 2024).

    W' = m * (W + s A B) / ||W + s A B||        norms over the inputs, one for each output channel

The magnitude m starts as ||W||. As in section 4.3 of the paper the gradient takes the norm below
the line for a constant. On a fused projection each chosen segment has factors and a magnitude of
its own, and the other segments stay as they are.

The layer's product x W is used as it is, and neither W + s A B nor a product with it is formed:
with D = s A B, ||W + D||^2 = ||W||^2 + 2 <W, D> + ||D||^2, and both inner products follow from
A^T W and A^T A, which have as many rows as the rank.

Differs from the paper: A is Kaiming-uniform, as for `lora`; with dropout, only the input of A is
dropped, and x W is not. A column of W that is all zeros stays so: its direction is not defined.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from samjax.nn import Context, Site, SiteInfo
from samjax.peft.delta import DERIVED, Delta, field, join_segments
from samjax.peft.lora import LowRank

_HIGHEST = jax.lax.Precision.HIGHEST


@struct.dataclass
class DoRADelta(Delta):
    """y = gain * (x W + the update of `lora`) + bias, with gain = magnitude / ||W + s A B||."""

    alone: ClassVar[str] = (
        "DoRA sets the length of the kernel's columns, which is no update that could be scaled or "
        "added to another; merge it, and adapt the merged weights"
    )

    reads_kernel: ClassVar[bool] = True

    lora: Any = field()  # LoRADelta
    magnitude: Any = field(decay=False)  # (segments, out of one segment)
    # ||W||, kept so that the gain of a new record is exactly 1; W therefore never trains.
    norm: Any = field(DERIVED)  # (segments, out of one segment)

    def __call__(self, site: Site, x: Float[Array, "*b n"], ctx: Context) -> Float[Array, "*b m"]:
        """The site's product and LoRA's, rescaled for each channel; then the bias."""
        y = site.apply(x, site.kernel, None) + self.lora.update(site, x, ctx)
        y = (y * self.gain(site.info, site.kernel)).astype(y.dtype)
        return y if site.bias is None else y + site.bias.astype(y.dtype)

    def merge(self, info: SiteInfo, kernel: Any, bias: Any, ctx: Context) -> tuple[Any, Any]:
        """W', and the bias as it is."""
        kernel = jnp.asarray(kernel, jnp.float32)
        updated = kernel + self.lora.kernel_update(info, kernel, ctx)
        return updated * self.gain(info, kernel), bias

    def gain(self, info: SiteInfo, kernel: Float[Array, "n m"]) -> Float[Array, " m"]:
        """magnitude / ||W + s A B|| of each output channel; 1 for segments that are not adapted."""
        a = self.lora.a.astype(jnp.float32)
        b = self.lora.b.astype(jnp.float32) * self.lora.scale
        # Segments are cut after the product, since their columns may lie apart.
        aw = jnp.einsum("sir,io->sro", a, kernel.astype(jnp.float32), precision=_HIGHEST)
        aw = jnp.stack(
            [columns[i] for i, columns in enumerate(_columns(info, self.lora.segments, aw))]
        )
        aa = jnp.einsum("sir,siq->srq", a, a, precision=_HIGHEST)
        with_base = jnp.sum(aw * b, axis=1)
        with_itself = jnp.sum(jnp.einsum("srq,sqo->sro", aa, b, precision=_HIGHEST) * b, axis=1)
        norm = jnp.where(self.norm > 0, self.norm, 1)
        # ||W + D||^2 / ||W||^2, which is 1 at the start: so is then the gain, to the bit.
        growth = 1 + (2 * with_base + with_itself) / jnp.square(norm)
        shrink = jax.lax.rsqrt(jnp.maximum(growth, jnp.finfo(jnp.float32).eps))
        gain = self.magnitude / norm * jax.lax.stop_gradient(shrink)
        return 1 + join_segments(info, self.lora.segments, list(gain - 1))


@dataclasses.dataclass(frozen=True)
class DoRA(LowRank):
    """Settings of DoRA, those of LoRA: the identity at the start."""

    # For `norm`.
    fixes_kernel: ClassVar[bool] = True

    def init(self, key: Any, site: Site, segments: tuple[str, ...]) -> DoRADelta:
        """The record for one linear layer, or for some `segments` of a fused one."""
        kernel = jnp.asarray(site.kernel, jnp.float32)
        columns = _columns(site.info, segments, kernel)
        norm = jnp.stack([jnp.linalg.norm(part, axis=0) for part in columns])
        return DoRADelta(lora=self.linear(key, site.info, segments), magnitude=norm, norm=norm)


def _columns(info: SiteInfo, segments: tuple[str, ...], y: Array) -> list[Array]:
    """The last axis of each of `segments`, or all of it where there are none."""
    if info.segments is None or not segments:
        return [y]
    parts = info.segments.split(y)
    return [parts[name] for name in segments]
