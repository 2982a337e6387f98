"""SSF: scaling and shifting features (Lian et al. 2022, section 3.2).

    gamma * site(x) + beta             gamma, beta: one number an output channel

at every linear layer, convolution and norm of the encoder. It folds into all of them: the kernel's
output channels are multiplied by gamma, and the bias becomes gamma * bias + beta; of a norm the
kernel is its scale, since gamma * (n(x) * scale + bias) + beta has the same form. A layer without
bias (the convolutions of the neck and those before a BatchNorm) has gamma alone: beta could not be
folded, and the norm that follows has its own.

Stored are the offsets gamma - 1 and beta, so that a multiple of the adapter is that of its arrays.
Weight decay spares them.

Differs from the paper: gamma starts at 1 and beta at 0, exactly, where the authors' code draws them
from N(1, 0.02) and N(0, 0.02); no beta without a bias.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from samjax.nn import Context, Site, SiteInfo
from samjax.peft.delta import Delta, Method, field, join_segments, segment_width, static


@struct.dataclass
class SSFDelta(Delta):
    """y = (1 + scale) * site(x) + shift, for each adapted segment of the output."""

    scale: Any = field(decay=False)  # (segments, out of one segment)
    # (segments, out of one segment); None where the layer has no bias
    shift: Any = field(decay=False)
    segments: tuple[str, ...] = static()

    alone: ClassVar[str] = "it rescales what its site gives, so that the order would matter"

    # A convolution with a stride changes the map, so that the axes have names of their own.
    def __call__(self, site: Site, x: Float[Array, "*b n"], ctx: Context) -> Float[Array, "*ob m"]:
        """The site's output, scaled and shifted."""
        y = site(x)
        scale, shift = self._offsets(site.info)
        # Not y * (1 + scale): bfloat16 would round the factor to a multiple of 1/128.
        change = y * scale.astype(y.dtype)
        return y + (change if shift is None else change + shift.astype(y.dtype))

    def merge(self, info: SiteInfo, kernel: Any, bias: Any, ctx: Context) -> tuple[Any, Any]:
        """Kernel and bias times gamma, and beta added to the bias."""
        scale, shift = self._offsets(info)
        kernel = jnp.asarray(kernel, jnp.float32) * (1 + scale)
        if shift is None:
            return kernel, bias
        return kernel, jnp.asarray(bias, jnp.float32) * (1 + scale) + shift

    def scaled(self, factor: Any) -> SSFDelta:
        """Both offsets scaled."""
        shift = None if self.shift is None else self.shift * factor
        return self.replace(scale=self.scale * factor, shift=shift)

    def _offsets(self, info: SiteInfo) -> tuple[Any, Any]:
        """gamma - 1 and beta (or None) of all output channels, float32."""

        def whole(offsets: Any) -> Any:
            return join_segments(info, self.segments, list(offsets.astype(jnp.float32)))

        return whole(self.scale), None if self.shift is None else whole(self.shift)


@dataclasses.dataclass(frozen=True)
class SSF(Method):
    """SSF has no settings."""

    kinds: ClassVar[tuple[str, ...]] = ("dense", "conv", "norm")

    def init(self, key: Any, site: Site, segments: tuple[str, ...]) -> SSFDelta:
        """The record for one layer, or for some `segments` of a fused one."""
        shape = max(1, len(segments)), segment_width(site.info, segments)
        return SSFDelta(
            scale=jnp.zeros(shape, jnp.float32),
            shift=jnp.zeros(shape, jnp.float32) if site.info.use_bias else None,
            segments=segments,
        )
