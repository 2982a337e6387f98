"""Adapters in series with a residual branch (Houlsby et al. 2019, section 2.1).

A bottleneck works on the branch's output y and is added to it, before the residual stream takes it:

    y + relu(y D + d) U + u            D: (channels, bottleneck), U: (bottleneck, channels)

U and u start at zero, so that the branch is what it was. SAM-PARSER's text compares with one after
the attention alone (`targets=("attn",)` of the recipe).

Differs from the paper: U starts at zero and D is Kaiming-uniform, where the paper draws both from a
narrow Gaussian, which is near the identity only; norms don't train beside the adapters; the
nonlinearity, which the paper leaves open, is ReLU, as in SAM-PARSER's text.
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
from samjax.peft.delta import Delta, Method, NotMergeable, check_settings, field
from samjax.peft.lora import kaiming_uniform


@struct.dataclass
class HoulsbyDelta(Delta):
    """y + up(relu(down(y))), where y = site(x)."""

    down: Any = field()  # (channels, bottleneck)
    down_bias: Any = field()  # (bottleneck,)
    up: Any = field()  # (bottleneck, channels)
    up_bias: Any = field()  # (channels,)

    alone: ClassVar[str] = "in series it works on what its site gives, which another would change"

    def __call__(self, site: Site, x: Float[Array, "*b c"], ctx: Context) -> Float[Array, "*b c"]:
        """The branch's output and the bottleneck's of it."""
        y = site(x)
        return y + affine(jax.nn.relu(affine(y, self.down, self.down_bias)), self.up, self.up_bias)

    def merge(self, info: SiteInfo, kernel: Any, bias: Any, ctx: Context) -> tuple[Any, Any]:
        """Raises NotMergeable."""
        raise NotMergeable("the adapter has a ReLU, which no kernel of its branch can hold")

    def scaled(self, factor: Any) -> HoulsbyDelta:
        """The last layer scaled."""
        return self.replace(up=self.up * factor, up_bias=self.up_bias * factor)


@dataclasses.dataclass(frozen=True)
class Houlsby(Method):
    """Settings of an adapter in series with a branch. `bottleneck`: its hidden channels.

    Raises ValueError for a bottleneck below 1.
    """

    kinds: ClassVar[tuple[str, ...]] = ("branch",)

    bottleneck: int = 16

    def __post_init__(self) -> None:
        check_settings(self, ["bottleneck"])

    def init(self, key: Any, site: Site, segments: tuple[str, ...]) -> HoulsbyDelta:
        """The record for one branch."""
        return HoulsbyDelta(**bottleneck_layers(key, site.info, self.bottleneck))


def bottleneck_layers(key: Any, info: SiteInfo, bottleneck: int) -> dict[str, Any]:
    """Two linear layers, the first Kaiming-uniform with zero biases, the second zero."""
    (channels,) = info.kernel_shape
    return {
        "down": kaiming_uniform(key, (channels, bottleneck), channels),
        "down_bias": jnp.zeros((bottleneck,), jnp.float32),
        "up": jnp.zeros((bottleneck, channels), jnp.float32),
        "up_bias": jnp.zeros((channels,), jnp.float32),
    }


def affine(
    x: Float[Array, "*b n"], kernel: Float[Array, "n m"], bias: Float[Array, " m"]
) -> Float[Array, "*b m"]:
    """A linear layer in the dtype of `x`."""
    return matmul(x, kernel.astype(x.dtype)) + bias.astype(x.dtype)
