"""What a NAS-LoRA's cell of the space `linear` collapses into: one convolution of rank channels.

y = site(x) + scale * conv(x A) B
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

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
    NotMergeable,
    check_rank,
    check_settings,
    field,
    join_segments,
    segment_width,
    static,
)
from samjax.peft.lora import kaiming_uniform


@struct.dataclass
class CollapsedDelta(Additive):
    """y = site(x) + scale * conv(x A) B: a cell that has become one convolution.

    It sees the first c channels of x A, and the others pass it by.
    """

    by_token: ClassVar[bool] = False

    a: Any = field()  # (in, rank)
    kernel: Any = field()  # (k, k, c, c)
    b: Any = field()  # (segments, rank, out of one segment)
    scale: Any = field(BUFFER)  # ()
    segments: tuple[str, ...] = static()

    def update(
        self, site: Site, x: Float[Array, "n h w c"], ctx: Context
    ) -> Float[Array, "n h w d"]:
        """scale * conv(x A) B; the convolution is computed in float32."""
        return between(self, site, x)

    def mixed(self, z: Float[Array, "n h w r"]) -> Float[Array, "n h w r"]:
        """The convolution of the first channels, the others beside it."""
        c = self.kernel.shape[-1]
        return jnp.concatenate([convolve(z[..., :c], self.kernel), z[..., c:]], axis=-1)

    def kernel_update(self, info: SiteInfo, kernel: Any, ctx: Context) -> Any:
        """scale * A K B, where the convolution is 1 x 1. Raises NotMergeable elsewhere."""
        size = self.kernel.shape[0]
        if size > 1:
            raise NotMergeable(
                f"its cell looks at {size} x {size} tokens, and the layer at one: a convolution of "
                f"{self.kernel.shape[-1]} channels stays"
            )
        low, c = self.a.astype(jnp.float32), self.kernel.shape[-1]
        mixed = jnp.matmul(low[:, :c], self.kernel[0, 0], precision=jax.lax.Precision.HIGHEST)
        low = jnp.concatenate([mixed, low[:, c:]], axis=-1)
        b = self.b.astype(jnp.float32) * self.scale
        update = jnp.matmul(low, b, precision=jax.lax.Precision.HIGHEST)
        return join_segments(info, self.segments, list(update))


@dataclasses.dataclass(frozen=True)
class Collapsed(Method):
    """Settings of a cell that has become one convolution, of `size` x `size` tokens.

    `channels` of the `rank` go through it. Raises ValueError for a count below 1, an even size, and
    more channels than the rank.
    """

    rank: int
    size: int
    channels: int

    def __post_init__(self) -> None:
        check_settings(self, ["rank", "size", "channels"])
        if self.size % 2 == 0 or self.channels > self.rank:
            raise ValueError(
                f"Collapsed: size must be odd and channels at most the rank {self.rank}, not "
                f"{self.size} and {self.channels}"
            )

    def init(self, key: Any, site: Site, segments: tuple[str, ...]) -> CollapsedDelta:
        """A record that is LoRA: its convolution is the identity, B is zero."""
        info, rank, middle = site.info, self.rank, self.size // 2
        width, out = info.kernel_shape[0], segment_width(info, segments)
        check_rank("Collapsed", rank, info, min(width, out))
        kernel = jnp.zeros((self.size, self.size, self.channels, self.channels), jnp.float32)
        return CollapsedDelta(
            a=kaiming_uniform(key, (width, rank), width),
            kernel=kernel.at[middle, middle].set(jnp.eye(self.channels)),
            b=jnp.zeros((max(1, len(segments)), rank, out), jnp.float32),
            scale=jnp.float32(1),
            segments=segments,
        )


def between(delta: Any, site: Site, x: Float[Array, "n h w c"]) -> Float[Array, "n h w d"]:
    """scale * C(x A) B, where C is what a delta with a, b and scale makes of a map (`mixed`)."""
    z = matmul(x, delta.a.astype(x.dtype)).astype(jnp.float32)
    z = delta.mixed(z).astype(x.dtype)
    b = (delta.b * delta.scale).astype(x.dtype)
    parts = [matmul(z, b[i]) for i in range(b.shape[0])]
    return join_segments(site.info, delta.segments, parts)


def convolve(
    z: Float[Array, "n h w c"], kernel: Float[Array, "k k c c"]
) -> Float[Array, "n h w c"]:
    """A convolution with zeros around the map, in full float32: it is small, and it collapses."""
    return jax.lax.conv_general_dilated(
        z,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
