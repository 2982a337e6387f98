"""Conv-LoRA: LoRA with a mixture of convolutions between its factors (Zhong et al., ICLR 2024).

    z = x A,  y = site(x) + scale * (z + E_i(z)) B,  E_i(z) = down_i(GELU(conv_i(up_i(z))))

z is a map of `rank` channels, and expert i, of 1 to `experts`, enlarges it i times, convolves it
3 x 3 and brings it back: a local prior at the scale of objects. A gate chooses one expert for each
item of the batch axis, that is for each window in windowed blocks and for each image in global
ones, from the map's mean; in training noise is added to its logits. What it chooses is not
multiplied by the gate's weight, which is 1. The choice has no gradient: the gate learns from the
balance loss alone, which punishes experts that are chosen more often than others (Shazeer et al.
2017, appendix A).

Of the enlarged map `down` reads no more than four by four points a token, since bicubic
interpolation without antialiasing has four taps an axis. Only those points are computed; `up`, the
convolution's shifts and the zeros around the map are one small matrix an axis, picked by the gate.
An expert thus costs the same whatever its scale, nothing is computed for experts that are not
chosen, and no shape depends on the gate.

Differs from the paper: it sums over experts weighted by the gate, the authors' code (AutoGluon)
adds the chosen expert's output as it is, and so does this. The code goes through `log(exp(...))`,
which is left out. Where all logits are equal, as they are at the start without noise, the first
expert is chosen.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from samjax.models.image_encoder import bicubic_matrix
from samjax.nn import Context, Site, SiteInfo
from samjax.ops import gelu, matmul
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
from samjax.peft.lora import drop, kaiming_uniform

# Small products, whose resampling a device's coarse default would blur.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
_KERNEL = 3
# Points an axis that bicubic interpolation reads.
_TAPS = 4
# The least deviation of the gate's noise.
_LEAST_NOISE = 1e-2


@struct.dataclass
class ConvLoRADelta(Additive):
    """y = site(x) + scale * (z + E_i(z)) B with z = x A, for each adapted segment of the output."""

    by_token: ClassVar[bool] = False

    a: Any = field()  # (in, rank)
    b: Any = field()  # (segments, rank, out of one segment)
    kernel: Any = field()  # (experts, 3, 3, rank, rank)
    bias: Any = field(decay=False)  # (experts, rank)
    w_gate: Any = field()  # (rank, experts)
    w_noise: Any = field()  # (rank, experts)
    scale: Any = field(BUFFER)  # ()
    balance: Any = field(BUFFER)  # ()
    segments: tuple[str, ...] = static()
    dropout: float = static(0.0)

    def update(
        self, site: Site, x: Float[Array, "n h w c"], ctx: Context
    ) -> Float[Array, "n h w d"]:
        """scale * (z + E_i(z)) B; gate and experts are computed in float32."""
        x = drop(x, self.dropout, site, ctx)
        z = matmul(x, self.a.astype(x.dtype)).astype(jnp.float32)
        chosen = self._choose(z, site, ctx)
        z = (z + convolved(z, chosen, self.kernel, self.bias)).astype(x.dtype)
        b = (self.b * self.scale).astype(x.dtype)
        parts = [matmul(z, b[i]) for i in range(b.shape[0])]
        return join_segments(site.info, self.segments, parts)

    def kernel_update(self, info: SiteInfo, kernel: Any, ctx: Context) -> Any:
        """Raises NotMergeable."""
        raise NotMergeable(
            "Conv-LoRA looks at neighbouring tokens and is not linear, so no kernel has its effect"
        )

    def _choose(self, z: Float[Array, "n h w r"], site: Site, ctx: Context) -> Int[Array, " n"]:
        """The expert of each map; in training with noise, and a loss that balances them."""
        pooled = z.mean(axis=(1, 2))
        clean = _einsum("nr,re->ne", pooled, self.w_gate)
        if ctx.rng is None:
            return clean.argmax(axis=-1)
        spread = jax.nn.softplus(_einsum("nr,re->ne", pooled, self.w_noise)) + _LEAST_NOISE
        # Folded once more: dropout draws from the site's own key.
        key = jax.random.fold_in(ctx.key(site.info.path), 1)
        noisy = clean + jax.random.normal(key, clean.shape) * spread
        site.add_loss(self.balance * imbalance(clean, noisy, spread))
        return noisy.argmax(axis=-1)


def imbalance(
    clean: Float[Array, "n e"], noisy: Float[Array, "n e"], spread: Float[Array, "n e"]
) -> Float[Array, ""]:
    """CV^2 of how often each expert is chosen, and of the probability that it is.

    The probability is that of other noise of deviation `spread` on this expert's logit, with that
    on the others as it is. It has a gradient, the count has none.
    """
    experts = clean.shape[-1]
    if experts == 1:
        return jnp.zeros(())
    best, second = jnp.split(jax.lax.top_k(noisy, 2)[0], 2, axis=-1)
    to_beat = jnp.where(noisy > second, second, best)
    load = jax.scipy.special.ndtr((clean - to_beat) / spread).sum(axis=0)
    importance = jax.nn.one_hot(noisy.argmax(axis=-1), experts).sum(axis=0)
    return _squared_variation(importance) + _squared_variation(load)


def _squared_variation(x: Float[Array, " e"]) -> Float[Array, ""]:
    return x.var(ddof=1) / (jnp.square(x.mean()) + 1e-10)


def convolved(
    z: Float[Array, "n h w r"],
    chosen: Int[Array, " n"],
    kernel: Float[Array, "e 3 3 r r"],
    bias: Float[Array, "e r"],
) -> Float[Array, "n h w r"]:
    """E_i(z) of each map's `chosen` expert, counted from 0."""
    height, width, experts = z.shape[1], z.shape[2], kernel.shape[0]
    rows, columns = (jnp.asarray(_points(size, experts))[chosen] for size in (height, width))
    taps = jnp.asarray(_taps(experts))[chosen]
    # p and q number the points of an axis, i and j the convolution's shifts. Channels come before
    # columns, so that products need no transposes.
    high = _einsum("npih,nhwr->npirw", rows, z)
    high = _einsum("npirw,nijrs->npsjw", high, kernel[chosen])
    high = _einsum("npsjw,nqjw->npsq", high, columns)
    high = gelu(high + bias[chosen][:, None, :, None])
    high = high.reshape(-1, height, _TAPS, z.shape[3], width, _TAPS)
    return _einsum("nhirwj,ni,nj->nhwr", high, taps, taps)


@functools.lru_cache(maxsize=32)
def _points(size: int, experts: int) -> Float[np.ndarray, "e p 3 n"]:
    """One axis of `up` for each expert, at the points that `down` reads and at both neighbours.

    Beyond the border there are zeros.
    """
    matrices = []
    for scale in range(1, experts + 1):
        enlarged = np.pad(bicubic_matrix(size, size * scale), ((1, 1), (0, 0)))
        first = np.arange(size)[:, None] * scale + _first_tap(scale)
        points = np.clip(first + np.arange(_TAPS), 0, size * scale - 1).reshape(-1, 1)
        matrices.append(enlarged[points + np.arange(_KERNEL)])
    return np.stack(matrices).astype(np.float32)


@functools.lru_cache(maxsize=32)
def _taps(experts: int) -> Float[np.ndarray, "e 4"]:
    """The weights of the points that `down` reads, which are the same for all tokens."""
    rows = []
    for scale in range(1, experts + 1):
        # The middle one of five tokens reads nothing beyond the border.
        middle = bicubic_matrix(5 * scale, 5)[2]
        first = 2 * scale + _first_tap(scale)
        rows.append(middle[first : first + _TAPS])
    return np.stack(rows).astype(np.float32)


def _first_tap(scale: int) -> int:
    """Where `down` begins to read for token 0: token t lies at (t + 1/2) * scale - 1/2."""
    return (scale - 1) // 2 - 1


@dataclasses.dataclass(frozen=True)
class ConvLoRA(Method):
    """Settings of Conv-LoRA; the defaults are the authors'.

    `rank`: columns of A; `alpha`: the update is scaled by alpha / rank; `experts`: how many
    convolutions, at scales 1, 2, ...; `balance`: weight of the loss that balances them; `dropout`:
    probability with which an input of A is zeroed in training. A fused projection has one A and one
    B, or, where segments are named, one A and a B for each.

    Raises ValueError for a rank or a number of experts below 1, an alpha that is not positive, a
    balance below 0, a dropout outside [0, 1).
    """

    rank: int = 3
    alpha: float = 32.0
    experts: int = 8
    balance: float = 1e-2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_settings(self, ["rank", "experts"], ["alpha"])
        if not self.balance >= 0:
            raise ValueError(f"ConvLoRA: balance must be at least 0, not {self.balance}")

    def init(self, key: Any, site: Site, segments: tuple[str, ...]) -> ConvLoRADelta:
        """The record for a linear layer of the image encoder. B is zero: the identity.

        A and the kernels are torch's defaults, the gate is zero. Raises ValueError for a layer of
        the decoder, whose tokens are no map.
        """
        info, rank, experts = site.info, self.rank, self.experts
        if not info.path.startswith("image_encoder/"):
            raise ValueError(
                f"ConvLoRA: {info.path} sees a list of tokens, and a convolution needs a map; "
                "choose layers of image_encoder"
            )
        width, out = info.kernel_shape[0], segment_width(info, segments)
        check_rank("ConvLoRA", rank, info, min(width, out))
        factor, kernel = jax.random.split(key)
        shape = (experts, _KERNEL, _KERNEL, rank, rank)
        return ConvLoRADelta(
            a=kaiming_uniform(factor, (width, rank), width),
            b=jnp.zeros((max(1, len(segments)), rank, out), jnp.float32),
            kernel=kaiming_uniform(kernel, shape, _KERNEL * _KERNEL * rank),
            bias=jnp.zeros((experts, rank), jnp.float32),
            w_gate=jnp.zeros((rank, experts), jnp.float32),
            w_noise=jnp.zeros((rank, experts), jnp.float32),
            scale=jnp.float32(self.alpha / rank),
            balance=jnp.float32(self.balance),
            segments=segments,
            dropout=self.dropout,
        )
