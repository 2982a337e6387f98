"""SAM-PARSER: new coefficients for the bases of a layer's own weights (Peng et al. 2024).

All axes of the kernel but the output channels are flattened, and the matrix is decomposed (their
section 4), W = U diag(s) V^T; the bases are the columns of U and V, the coefficients are s. Of SAM,
the paper takes the two convolutions of the neck and trains their coefficients alone: 256 + 256
numbers.

Differs from the paper: what is trained is the change of the coefficients, zeros at first, which is
added to W; the paper and its code train s itself, which gives the same layer, but a weight decay
would draw it to zero in the stead of SAM's own value. The authors' code runs V, s and U as two
convolutions one after another; here they are multiplied into one kernel, which costs the layer
nothing but that product. The singular vectors are computed from the weights, in float64, whenever
an adapter is made or loaded, and are not in its file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from samjax.nn import Context, Site, SiteInfo
from samjax.peft.delta import DERIVED, Additive, Delta, Method, field

TRAINED = ("coefficients", "bases", "both")


@struct.dataclass
class SAMParserDelta(Additive):
    """y = site(x) whose kernel is W + U diag(shift) V^T, of the singular vectors of W."""

    reads_kernel: ClassVar[bool] = True

    shift: Any = field()  # (rank,)
    u: Any = field(DERIVED)  # (out, rank)
    v: Any = field(DERIVED)  # (in, rank); of a convolution (k * k * in, rank)

    def __call__(self, site: Site, x: Float[Array, "*b n"], ctx: Context) -> Float[Array, "*c m"]:
        """One call of the layer, with the adapted kernel."""
        return site.apply(x, *self.merge(site.info, site.kernel, site.bias, ctx))

    def update(self, site: Site, x: Float[Array, "*b n"], ctx: Context) -> Float[Array, "*c m"]:
        """The layer whose kernel is U diag(shift) V^T, without bias."""
        return site.apply(x, self.kernel_update(site.info, site.kernel, ctx), None)

    def kernel_update(self, info: SiteInfo, kernel: Any, ctx: Context) -> Any:
        """U diag(shift) V^T."""
        return _kernel(self.u, self.shift, self.v, info)

    def scaled(self, factor: Any) -> SAMParserDelta:
        """The delta with its `shift` multiplied."""
        return self.replace(shift=self.shift * factor)  # pyrefly: ignore[missing-attribute]

    def fingerprint(self) -> Sequence[float]:
        """Projections of U diag(w) V^T on fixed random vectors, for fixed weights w.

        Signs of singular vectors leave them as they are, as they leave the layer, and rounding
        moves them by 1e-6; another choice among the vectors of (nearly) equal singular values
        moves them by about the angle between the choices. Hence neighbours have weights far apart.
        """
        u, v = np.float64(self.u), np.float64(self.v)
        golden = (np.sqrt(5) - 1) / 2
        weights = np.arange(u.shape[1]) * golden % 1
        # The one generator whose numbers NumPy promises never to change.
        random = np.random.RandomState(0)
        left, right = (random.standard_normal((8, len(bases))) for bases in (u, v))
        return ((left @ u) * weights * (right @ v)).sum(axis=1).tolist()


@struct.dataclass
class SAMParserBasesDelta(Delta):
    """y = site(x) whose kernel is U diag(s) V^T, with U and V trained; s is SAM's own."""

    alone: ClassVar[str] = (
        "its bases are trained, so that it takes the place of the kernel and adds nothing to it"
    )
    u: Any = field(decay=False)  # (out, rank)
    v: Any = field(decay=False)  # (in, rank); of a convolution (k * k * in, rank)
    # Well conditioned: machines agree on it without a fingerprint.
    s: Any = field(DERIVED)  # (rank,)

    def __call__(self, site: Site, x: Float[Array, "*b n"], ctx: Context) -> Float[Array, "*c m"]:
        """One call of the layer, with the rebuilt kernel."""
        return site.apply(x, *self.merge(site.info, site.kernel, site.bias, ctx))

    def merge(self, info: SiteInfo, kernel: Any, bias: Any, ctx: Context) -> tuple[Any, Any]:
        """The rebuilt kernel."""
        return _kernel(self.u, self.coefficients, self.v, info), bias

    @property
    def coefficients(self) -> Any:
        """What the bases are weighted with, (rank,)."""
        return self.s


@struct.dataclass
class SAMParserBothDelta(SAMParserBasesDelta):
    """The same with coefficients s + shift, which are trained as well."""

    shift: Any = field()  # (rank,)

    @property
    def coefficients(self) -> Any:
        """The sum of SAM's own and their change, (rank,)."""
        return self.s + self.shift


@dataclasses.dataclass(frozen=True)
class SAMParser(Method):
    """Settings of SAM-PARSER. The identity at the start; to rounding where bases are trained.

    `train`: the coefficients (the paper's method), the bases, or both (its Table 2).

    Raises ValueError for anything else, and for a rule that names segments of a layer.
    """

    kinds: ClassVar[tuple[str, ...]] = ("conv", "dense")
    fixes_kernel: ClassVar[bool] = True
    train: str = "coefficients"

    def __post_init__(self) -> None:
        if self.train not in TRAINED:
            raise ValueError(
                f"SAMParser: train must be one of {', '.join(TRAINED)}, not {self.train!r}"
            )

    def init(self, key: Any, site: Site, segments: tuple[str, ...]) -> Delta:
        """The record for one layer: its bases, and no change of their coefficients."""
        path, shape = site.info.path, site.info.kernel_shape
        if segments:
            raise ValueError(
                f"SAMParser decomposes the whole kernel of {path}; leave out the segments "
                f"[{','.join(segments)}]"
            )
        if not isinstance(site.kernel, jax.core.Tracer) and not np.isfinite(site.kernel).all():
            raise ValueError(
                f"SAMParser: the kernel of {path} is not finite and has no singular vectors; "
                "convert the weights again"
            )
        flat, out = int(np.prod(shape[:-1])), shape[-1]
        rank = min(flat, out)
        shapes = [
            jax.ShapeDtypeStruct(s, jnp.float32) for s in ((out, rank), (rank,), (flat, rank))
        ]
        # NumPy's, since float64 is off in JAX: in float32, machines would not agree on the bases.
        if isinstance(site.kernel, jax.core.Tracer):
            u, s, v = jax.pure_callback(_decompose, shapes, site.kernel)
        else:  # a callback may wait for ever for the only thread of a single core, which it holds
            u, s, v = map(jnp.asarray, _decompose(site.kernel))
        shift = jnp.zeros(rank, jnp.float32)
        if self.train == "coefficients":
            return SAMParserDelta(shift=shift, u=u, v=v)
        if self.train == "bases":
            return SAMParserBasesDelta(u=u, v=v, s=s)
        return SAMParserBothDelta(u=u, v=v, s=s, shift=shift)


def _decompose(kernel: Any) -> list[np.ndarray]:
    """U, s and V in float32; the largest component of each column of U is positive."""
    matrix = np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1]).T
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    largest = np.take_along_axis(u, np.abs(u).argmax(axis=0)[None], axis=0)
    sign = np.where(largest < 0, -1.0, 1.0)
    return [np.float32(u * sign), np.float32(s), np.float32(vt.T * sign)]


def _kernel(u: Any, coefficients: Any, v: Any, info: SiteInfo) -> Array:
    """U diag(coefficients) V^T in the kernel's own shape; float32."""
    u, coefficients, v = (jnp.asarray(a, jnp.float32) for a in (u, coefficients, v))
    product = jnp.einsum("nr,or->no", v * coefficients, u, precision=jax.lax.Precision.HIGHEST)
    return product.reshape(info.kernel_shape)
