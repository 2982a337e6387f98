"""TA-LoRA: one low-rank tensor a layer for all tasks (Wang, Ye and Zhang, 2024, arXiv 2403.10971).

    y = site(x) + scale * x U1 M_t U2^T        M_t = sum over v of U3[t, v] * G[:, :, v]

The updates of T tasks are the slices of one tensor in Tucker form, of which U1, U2 and the core G
are shared and U3 has a row a task: a further task adds rank_task numbers a layer. G is zero at
first, the identity. Which task it is, the context says (`Context.task`), as a traced value: one
program serves all tasks, and `jax.vmap` over tasks computes once what comes before the first
adapted layer.

Differs from the paper: its text was not at hand; the form is that of its successor's code (MTSAM,
ICLR 2025), which draws U1, U2 and U3 from N(0, 1) (`init_scale` "normal"). By default U1 and U2 are
divided by the root of their width, so that their columns are nearly orthonormal from the start, to
which the regularisation draws them anyway, and an update has LoRA's size.
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
from samjax.peft.lora import drop


@struct.dataclass
class TALoRADelta(Additive):
    """y = site(x) + scale * x U1 M_t U2^T, for each adapted segment of the output."""

    core: Any = field()  # (rank_in, rank_out, rank_task)
    u1: Any = field()  # (in, rank_in)
    u2: Any = field()  # (segments, rank_out, out of one segment)
    u3: Any = field(decay=False)  # (tasks, rank_task)
    scale: Any = field(BUFFER)  # ()
    segments: tuple[str, ...] = static()
    dropout: float = static(0.0)
    orthogonality: float = static(0.0)

    def update(self, site: Site, x: Float[Array, "*b c"], ctx: Context) -> Float[Array, "*b d"]:
        """scale * x U1 M_t U2^T of the context's task. Raises ValueError without a task."""
        x = drop(x, self.dropout, site, ctx)
        z = matmul(matmul(x, self.u1.astype(x.dtype)), self.mixed(ctx).astype(x.dtype))
        parts = [matmul(z, part.astype(x.dtype)) for part in self.u2]
        return join_segments(site.info, self.segments, parts)

    def mixed(self, ctx: Context) -> Float[Array, "p q"]:
        """scale * M_t: the core at the context's task, in float32."""
        if ctx.task is None:
            raise ValueError(
                "TA-LoRA adapts to a task: give its index, Context(task=...), or choose one with "
                "--task"
            )
        row = self.u3[ctx.task]
        return self.scale * jnp.einsum(
            "pqv,v->pq", self.core, row, precision=jax.lax.Precision.HIGHEST
        )

    def kernel_update(self, info: SiteInfo, kernel: Any, ctx: Context) -> Any:
        """scale * U1 M_t U2^T of the context's task. Raises ValueError without a task."""
        high = jax.lax.Precision.HIGHEST
        low = jnp.matmul(self.u1.astype(jnp.float32), self.mixed(ctx), precision=high)
        parts = jnp.matmul(low, self.u2.astype(jnp.float32), precision=high)
        return join_segments(info, self.segments, list(parts))

    def departures(self) -> list[Any]:
        """Distances (Frobenius) of U1^T U1, U2^T U2 and each slice's G_v^T G_v from the identity.

        The terms of the successor's regularisation.
        """
        rows = jnp.moveaxis(self.u2, 1, 0).reshape(self.u2.shape[1], -1)
        slices = [self.core[..., v] for v in range(self.core.shape[-1])]
        return [_distance(self.u1), _distance(rows.T), *map(_distance, slices)]


def _distance(a: Float[Array, "n r"]) -> Float[Array, ""]:
    """||A^T A - I||, whose derivative is 0 where the norm is 0."""
    gram = jnp.matmul(a.T, a, precision=jax.lax.Precision.HIGHEST) - jnp.eye(a.shape[1])
    squared = jnp.square(gram).sum()
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)


@dataclasses.dataclass(frozen=True)
class TALoRA(Method):
    """Settings of TA-LoRA.

    `tasks`: how many there are; `rank_in`, `rank_out`, `rank_task`: the sides of the core;
    `scale` of the update; `dropout`: probability with which an input of U1 is zeroed in training;
    `orthogonality`: weight of the regularisation in the loss; `init_scale`: "scaled" or "normal",
    see above.

    Raises ValueError for a count below 1, a scale that is not positive, a negative weight, and a
    dropout outside [0, 1).
    """

    tasks: int
    rank_in: int = 32
    rank_out: int = 32
    rank_task: int = 4
    scale: float = 0.5
    dropout: float = 0.0
    orthogonality: float = 1.0
    init_scale: str = "scaled"

    def __post_init__(self) -> None:
        check_settings(self, ["tasks", "rank_in", "rank_out", "rank_task"], ["scale"])
        if not 0 <= self.orthogonality < math.inf:
            raise ValueError(
                f"TALoRA: orthogonality must not be negative, but is {self.orthogonality}"
            )
        if self.init_scale not in ("scaled", "normal"):
            raise ValueError(
                f"TALoRA: init_scale must be scaled or normal, not {self.init_scale!r}"
            )

    def init(self, key: Any, site: Site, segments: tuple[str, ...]) -> TALoRADelta:
        """The record for a linear layer. The core is zero: the identity for every task."""
        info, parts = site.info, max(1, len(segments))
        width, out = info.kernel_shape[0], segment_width(info, segments)
        check_rank("TALoRA", self.rank_in, info, width)
        check_rank("TALoRA", self.rank_out, info, parts * out)
        first, second, third = jax.random.split(key, 3)
        scaled = self.init_scale == "scaled"
        u1 = jax.random.normal(first, (width, self.rank_in))
        u2 = jax.random.normal(second, (parts, self.rank_out, out))
        return TALoRADelta(
            core=jnp.zeros((self.rank_in, self.rank_out, self.rank_task), jnp.float32),
            u1=u1 / width**0.5 if scaled else u1,
            u2=u2 / (parts * out) ** 0.5 if scaled else u2,
            u3=jax.random.normal(third, (self.tasks, self.rank_task)),
            scale=jnp.float32(self.scale),
            segments=segments,
            dropout=self.dropout,
            orthogonality=self.orthogonality,
        )


def orthogonality(peft: Any) -> Float[Array, ""] | None:
    """The regularisation: the mean over all layers' `TALoRADelta.departures`, each by its weight.

    None without TA-LoRA.
    """
    from samjax.peft.trees import deltas

    terms = [
        part.orthogonality * term
        for delta in deltas(peft).values()
        for part in getattr(delta, "deltas", (delta,))
        if isinstance(part, TALoRADelta)
        for term in part.departures()
    ]
    return jnp.mean(jnp.stack(terms)) if terms else None
