"""FacT: one pair of factors for all layers of a width, and a small matrix a layer (Jie, Deng 2023).

The updates of all layers are stacked into one tensor and decomposed: dW = scale * U Sigma V, where
U (width, rank) and V (rank, width) belong to every layer and only Sigma (rank, rank) to one. In the
tensor-train form (TT) each Sigma is stored. In the Tucker form (TK) all are mixed from a core
C (rank, rank, rank) that every layer shares: Sigma = C p, and a layer stores its p (rank).

A layer wider on one side is cut into *slots* of the width: d -> 4d of an MLP has four, one a piece
of its output, 4d -> d four, one a piece of its input, and each has a Sigma. U, V and C lie in
`peft["shared"]`, once for each width: SAM's ViT has one, TinyViT one for each of its stages.

Differs from the paper: U, V and C are shared by layers of equal width, since TinyViT has several.
p is drawn Xavier-uniform layer by layer, not as one matrix of all slots, so that it is larger at
first. In the authors' TK, the four Sigma of an MLP's layer are interleaved over its pieces; here
each piece has its own. By default q, k and v adapt, without proj and the MLP, and nothing is
dropped, where the authors drop a tenth.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
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
    Record,
    check_rank,
    check_settings,
    field,
    join_segments,
    segment_width,
    static,
)
from samjax.peft.lora import drop, kaiming_uniform


@struct.dataclass
class FacTFactors(Record):
    """What all layers of one width share; a slot stores its Sigma (TT)."""

    u: Any = field()  # (width, rank)
    v: Any = field()  # (rank, width)

    def sigma(self, slots: Float[Array, "i o r r"]) -> Float[Array, "i o r r"]:
        """The Sigma of a layer's slots."""
        return slots


@struct.dataclass
class TuckerFactors(FacTFactors):
    """What all layers of one width share; a slot's Sigma is C p (TK)."""

    core: Any = field()  # C, (rank, rank, rank)

    def sigma(self, slots: Float[Array, "i o r"]) -> Float[Array, "i o r r"]:
        """The Sigma of a layer's slots."""
        highest = jax.lax.Precision.HIGHEST
        return jnp.einsum("abc,ioc->ioab", self.core, slots, precision=highest)


@struct.dataclass
class FacTDelta(Additive):
    """y = site(x) + scale * x U Sigma V, for each slot of the site."""

    # TT: Sigma, (pieces of the input, pieces of the output, rank, rank); TK: p, without the last.
    # The pieces of the output are those of the first segment, then those of the next.
    slots: Any = field()
    scale: Any = field(BUFFER)  # ()
    segments: tuple[str, ...] = static()
    shared: str = static()  # pyrefly: ignore[bad-override]
    dropout: float = static(0.0)

    def update(self, site: Site, x: Float[Array, "*b n"], ctx: Context) -> Float[Array, "*b m"]:
        """scale * x U Sigma V; never forms the full update of the kernel."""
        factors = ctx.shared[self.shared]
        sigma = factors.sigma(self.slots)
        ins, outs, rank, _ = sigma.shape
        low = matmul(x.reshape(*x.shape[:-1], ins, -1), factors.u.astype(x.dtype))
        # One product with the Sigma of all slots.
        sigma = sigma.astype(x.dtype).swapaxes(1, 2).reshape(ins * rank, outs * rank)
        low = matmul(low.reshape(*x.shape[:-1], ins * rank), sigma)
        low = low.reshape(*x.shape[:-1], outs, rank)
        low = drop(low, self.dropout, site, ctx)
        y = matmul(low, (factors.v * self.scale).astype(x.dtype))
        num = max(1, len(self.segments))
        y = y.reshape(*x.shape[:-1], num, -1)
        return join_segments(site.info, self.segments, [y[..., i, :] for i in range(num)])

    def kernel_update(self, info: SiteInfo, kernel: Any, ctx: Context) -> Any:
        """scale * U Sigma V."""
        factors = ctx.shared[self.shared]
        sigma = factors.sigma(self.slots)
        num = max(1, len(self.segments))
        pieces = jnp.einsum(
            "ua,msnab,bw->smunw",
            factors.u.astype(jnp.float32),
            sigma.reshape(len(sigma), num, -1, *sigma.shape[2:]).astype(jnp.float32),
            factors.v.astype(jnp.float32) * self.scale,
            precision=jax.lax.Precision.HIGHEST,
        )
        rows = sigma.shape[0] * factors.u.shape[0]
        return join_segments(info, self.segments, list(pieces.reshape(num, rows, -1)))


@dataclasses.dataclass(frozen=True)
class FacT(Method):
    """Settings of FacT. V is zero: the identity at the start.

    U and the Sigma of TT are drawn as torch draws a linear layer, C and p of TK Xavier-uniform.

    `rank`: columns of U; `form`: "tt" stores each Sigma, "tk" mixes it from a shared core; `scale`:
    what the update is multiplied by; `dropout`: probability with which an input of V is zeroed in
    training. Rules with equal settings share their factors.

    Raises ValueError for a rank below 1, an unknown form, a scale that is not positive, a dropout
    outside [0, 1).
    """

    rank: int = 8
    form: str = "tt"
    scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_settings(self, ["rank"], ["scale"])
        if self.form not in ("tt", "tk"):
            raise ValueError(f"FacT: form must be tt or tk, not {self.form!r}")

    def init(self, key: Any, site: Site, segments: tuple[str, ...]) -> FacTDelta:
        """The record for one linear layer, or for some `segments` of a fused one."""
        width, ins, outs = _pieces(site.info, segments)
        check_rank("FacT", self.rank, site.info, width)
        if self.form == "tt":
            # Pieces of the input add up: their Sigma are one linear layer from all of them.
            shape = (ins, outs, self.rank, self.rank)
            slots = kaiming_uniform(key, shape, ins * self.rank)
        else:
            slots = _xavier_uniform(key, (ins, outs, self.rank), ins * outs, self.rank)
        return FacTDelta(
            slots=slots,
            scale=jnp.float32(self.scale),
            segments=segments,
            shared=self._name(width),
            dropout=self.dropout,
        )

    def init_shared(
        self, key: Any, sites: Sequence[tuple[SiteInfo, tuple[str, ...]]]
    ) -> dict[str, Record]:
        """U, V and, for TK, C of each width."""
        shared: dict[str, Record] = {}
        for width in sorted({_pieces(info, segments)[0] for info, segments in sites}):
            shared[self._name(width)] = self._factors(jax.random.fold_in(key, width), width)
        return shared

    def _factors(self, key: Any, width: int) -> FacTFactors:
        to_u, to_core = jax.random.split(key)
        u = kaiming_uniform(to_u, (width, self.rank), width)
        v = jnp.zeros((self.rank, width), jnp.float32)
        if self.form == "tt":
            return FacTFactors(u, v)
        core = _xavier_uniform(to_core, (self.rank,) * 3, self.rank**2, self.rank**2)
        return TuckerFactors(u, v, core)

    def _name(self, width: int) -> str:
        """What the record in `peft["shared"]` is called that layers of this width share."""
        return f"fact_{self.form}_{width}"


def _pieces(info: SiteInfo, segments: tuple[str, ...]) -> tuple[int, int, int]:
    """The width of a slot, and how many pieces of it the input and the chosen output have.

    Raises ValueError where the wider side is no multiple of the other.
    """
    wide_in, wide_out = info.kernel_shape[0], segment_width(info, segments)
    width = min(wide_in, wide_out)
    if max(wide_in, wide_out) % width:
        raise ValueError(
            f"FacT: {info.path} maps {wide_in} channels to {wide_out}, and neither is a multiple "
            "of the other; leave it out of the rule"
        )
    return width, wide_in // width, max(1, len(segments)) * (wide_out // width)


def _xavier_uniform(key: Any, shape: tuple[int, ...], fan_in: int, fan_out: int) -> Array:
    """torch's `xavier_uniform_`: the uniform distribution on +-sqrt(6 / (fan_in + fan_out))."""
    bound = math.sqrt(6 / (fan_in + fan_out))
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
