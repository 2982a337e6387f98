"""AdaptFormer: a bottleneck in parallel with the MLP branch (Chen et al. 2022, section 3.2).

    mlp(norm2(x)) + scale * (dropout(relu(LN(x) D + d)) U + u)

x is the residual stream before the branch's norm. The bottleneck has a LayerNorm of its own, as in
the code of SAM-COBOT, whose settings (bottleneck 16, scale 1, dropout 0.1) are the defaults here:
322,752 numbers on SAM ViT-B. D is Kaiming-uniform, U and the biases are zero, as in the authors'
code: the identity at the start.

Differs from the paper: the scale is 1 and the bottleneck 16, where the paper's best are 0.1 and 64;
the LayerNorm is in the paper's equation, but the authors' training scripts leave it out.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from samjax.nn import Context, Site, SiteInfo
from samjax.peft.delta import BUFFER, Additive, Method, NotMergeable, check_settings, field, static
from samjax.peft.houlsby import affine, bottleneck_layers
from samjax.peft.lora import drop

# torch's default, which the authors' LayerNorm has.
_EPSILON = 1e-5


@struct.dataclass
class AdaptFormerDelta(Additive):
    """site(x) + scale * up(dropout(relu(down(norm(x)))))."""

    norm_scale: Any = field()  # (channels,)
    norm_bias: Any = field()  # (channels,)
    down: Any = field()  # (channels, bottleneck)
    down_bias: Any = field()  # (bottleneck,)
    up: Any = field()  # (bottleneck, channels)
    up_bias: Any = field()  # (channels,)
    scale: Any = field(BUFFER)  # ()
    dropout: float = static(0.0)

    def update(self, site: Site, x: Float[Array, "*b c"], ctx: Context) -> Float[Array, "*b c"]:
        """scale * up(dropout(relu(down(norm(x))))), the norm in float32."""
        wide = x.astype(jnp.float32)
        # The two-pass variance: the residual stream has channels far from zero.
        variance = jnp.var(wide, axis=-1, keepdims=True)
        normed = jax.nn.standardize(wide, variance=variance, epsilon=_EPSILON)
        normed = (normed * self.norm_scale + self.norm_bias).astype(x.dtype)
        hidden = jax.nn.relu(affine(normed, self.down, self.down_bias))
        hidden = drop(hidden, self.dropout, site, ctx)
        return affine(hidden, self.up * self.scale, self.up_bias * self.scale)

    def kernel_update(self, info: SiteInfo, kernel: Any, ctx: Context) -> Any:
        """Raises NotMergeable."""
        raise NotMergeable(
            "AdaptFormer has a norm and a ReLU beside its branch, which no kernel of it can hold"
        )


@dataclasses.dataclass(frozen=True)
class AdaptFormer(Method):
    """Settings of AdaptFormer, for MLP branches.

    `bottleneck`: its hidden channels; `scale`: what its output is multiplied by; `dropout`:
    probability with which a hidden channel is zeroed in training.

    Raises ValueError for a bottleneck below 1, a scale that is not positive, a dropout outside
    [0, 1).
    """

    kinds: ClassVar[tuple[str, ...]] = ("branch",)

    bottleneck: int = 16
    scale: float = 1.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_settings(self, ["bottleneck"], ["scale"])

    def init(self, key: Any, site: Site, segments: tuple[str, ...]) -> AdaptFormerDelta:
        """The record for one branch."""
        return AdaptFormerDelta(
            norm_scale=jnp.ones(site.info.kernel_shape, jnp.float32),
            norm_bias=jnp.zeros(site.info.kernel_shape, jnp.float32),
            **bottleneck_layers(key, site.info, self.bottleneck),
            scale=jnp.float32(self.scale),
            dropout=self.dropout,
        )
