"""NAS-LoRA and NAS-PC-LoRA: a searchable cell between LoRA's factors (Chen, Su and Tang, 2025).

    y = site(x) + scale * C(x A) B        C(z) = sum over i of softmax(alpha)_i * O_i(z)

z is a map of `rank` channels, of a window in windowed blocks and of the image in global ones. The
operators O_i are those of `samjax.peft.operators`, in one of two spaces. alpha are the architecture
parameters, of the group `arch`, and train with the weights; what was found is kept as the mixture
that it is, or cut down to each edge's strongest operator (`strongest`). With all its weight on
skip_connect the cell is LoRA.

NAS-PC-LoRA (`partial` K > 1, after PC-DARTS, Xu et al. 2020): the first rank / K channels go
through the operators of an edge, the others pass them by, and all are shuffled, so that the next
edge sees others. Behind a single edge the shuffle changes nothing but which row of B is which.

A cell of several `nodes` is a graph as in DARTS: node j sums edges from the cell's input and from
all earlier nodes, here weighted by softmax(beta), PC-DARTS's edge normalisation; its output is the
mean of its nodes. One node is one edge, the paper's formula, where beta would be 1 and is not
there.

In the space `linear` each edge is a convolution of rank channels with zeros around the map: the
mixture's kernel is put together from alpha and the weights, and one convolution computes it. With
one node the cell *collapses* into that one (`collapsed`), exactly, and where only none and
skip_connect remain it folds into the layer's kernel.

Differs from the paper: known are its abstract and, from others' descriptions, this formula;
operators, rank, stages and what PC stands for are not. `docs/methods.md` tells what is
reconstruction.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from samjax.nn import Context, Site, SiteInfo
from samjax.peft.collapsed import Collapsed, CollapsedDelta, between, convolve
from samjax.peft.delta import (
    ARCH,
    BUFFER,
    Additive,
    Delta,
    Method,
    NotMergeable,
    check_rank,
    check_settings,
    field,
    segment_width,
    static,
)
from samjax.peft.edges import Edge, parse_edges
from samjax.peft.lora import drop, kaiming_uniform
from samjax.peft.operators import OPERATORS, Norm, Space

# Deviation of alpha and beta at the start, as in DARTS and PC-DARTS.
_SPREAD = 1e-3


@struct.dataclass
class NASLoRADelta(Additive):
    """y = site(x) + scale * C(x A) B, for each adapted segment of the output.

    `edges` names the operators of each edge; `alpha` and `cell` have an entry for each.
    """

    by_token: ClassVar[bool] = False

    a: Any = field()  # (in, rank)
    b: Any = field()  # (segments, rank, out of one segment)
    alpha: Any = field(ARCH)  # per edge (operators,)
    beta: Any = field(ARCH)  # (edges,), or None for one edge
    cell: Any = field()  # per edge {operator: its weights}
    scale: Any = field(BUFFER)  # ()
    edges: tuple[tuple[str, ...], ...] = static()
    space: Space = static()
    norm: Norm = static()
    partial: int = static()
    segments: tuple[str, ...] = static()
    dropout: float = static(0.0)

    @property
    def rank(self) -> int:
        """Channels between the factors."""
        return self.a.shape[-1]

    @property
    def channels(self) -> int:
        """Channels that go through the cell."""
        return self.rank // self.partial

    def update(
        self, site: Site, x: Float[Array, "n h w c"], ctx: Context
    ) -> Float[Array, "n h w d"]:
        """scale * C(x A) B; the cell is computed in float32."""
        return between(self, site, drop(x, self.dropout, site, ctx))

    def mixed(self, z: Float[Array, "n h w r"]) -> Float[Array, "n h w r"]:
        """C(z)."""
        states, edge = [z], 0
        while edge < len(self.edges):
            incoming = [self._edge(edge + i, state) for i, state in enumerate(states)]
            weights = self.edge_weights(edge, len(states))
            edge += len(states)
            states.append(sum(w * y for w, y in zip(weights, incoming, strict=True)))
        return sum(states[1:], start=jnp.zeros(())) / (len(states) - 1)

    def shares(self) -> list[dict[str, Any]]:
        """Of each edge, the weight of each operator in the mixture."""
        return [
            dict(zip(names, jax.nn.softmax(alpha), strict=True))
            for names, alpha in zip(self.edges, self.alpha, strict=True)
        ]

    def metrics(self) -> dict[str, Any]:
        """Of each edge the entropy of its mixture, in nats, each operator's share, its weight."""
        found: dict[str, Any] = {}
        for i, (shares, weight) in enumerate(zip(self.shares(), self.weights(), strict=True)):
            values = jnp.stack(list(shares.values()))
            found[f"edge_{i}/entropy"] = jax.scipy.special.entr(values).sum()
            found |= {f"edge_{i}/{name}": share for name, share in shares.items()}
            if weight is not None:
                found[f"edge_{i}/weight"] = weight
        return found

    def weights(self) -> list[Any]:
        """What each edge weighs in its node; None where it is the only one."""
        weights: list[Any] = []
        count = 1
        while self.beta is not None and len(weights) < len(self.edges):
            weights += list(self.edge_weights(len(weights), count))
            count += 1
        return weights or [None]

    def edge_weights(self, first: int, count: int) -> Any:
        """Those of `count` edges into one node; they sum to 1."""
        if self.beta is None:
            return [1.0] * count
        return jax.nn.softmax(self.beta[first : first + count])

    def _edge(self, edge: int, z: Float[Array, "n h w r"]) -> Float[Array, "n h w r"]:
        """The mixture of the first channels, the others beside it, shuffled."""
        if self.partial == 1:
            return self._mixture(edge, z)
        first = self._mixture(edge, z[..., : self.channels])
        return shuffle(jnp.concatenate([first, z[..., self.channels :]], axis=-1), self.partial)

    def _mixture(self, edge: int, z: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        if self.space == "linear":
            return convolve(z, self.edge_kernel(edge))
        shares, weights = jax.nn.softmax(self.alpha[edge]), self.cell[edge]
        outputs = (OPERATORS[name].apply(weights[name], z, self.norm) for name in self.edges[edge])
        return sum(share * y for share, y in zip(shares, outputs, strict=True))

    def edge_kernel(self, edge: int) -> Float[Array, "k k c c"]:
        """In the space `linear`: the convolution that an edge's mixture is."""
        shares, weights = jax.nn.softmax(self.alpha[edge]), self.cell[edge]
        kernels = [
            OPERATORS[name].kernel(weights[name], self.channels) for name in self.edges[edge]
        ]
        size = max(kernel.shape[0] for kernel in kernels)
        return sum(
            share * _enlarged(kernel, size) for share, kernel in zip(shares, kernels, strict=True)
        )

    def collapsed(self) -> tuple[Delta, Method | None]:
        """The cell as one convolution of `rank` channels, where it is one."""
        if self._reason():
            return self, None
        delta = self._convolution()
        return delta, Collapsed(self.rank, delta.kernel.shape[0], self.channels)

    def _reason(self) -> str:
        """Why no convolution has the cell's effect; empty where one has."""
        if self.space != "linear":
            return (
                "the cell of this NAS-LoRA has operators that are not linear (space darts), so no "
                "convolution has its effect"
            )
        if len(self.edges) > 1:
            return (
                f"the cell of this NAS-LoRA has {len(self.edges)} edges, and convolutions after "
                "each other are not one convolution at the border of a map"
            )
        return ""

    def _convolution(self) -> CollapsedDelta:
        # B in the order of before the shuffle.
        order = jnp.argsort(shuffle(jnp.arange(self.rank, dtype=jnp.float32), self.partial))
        return CollapsedDelta(
            a=self.a,
            kernel=self.edge_kernel(0),
            b=self.b[:, order],
            scale=self.scale,
            segments=self.segments,
        )

    def kernel_update(self, info: SiteInfo, kernel: Any, ctx: Context) -> Any:
        """scale * A C B, where C is of one token alone. Raises NotMergeable elsewhere."""
        if reason := self._reason():
            raise NotMergeable(reason)
        return self._convolution().kernel_update(info, kernel, ctx)

    def found(self) -> tuple[Edge, ...]:
        """The edges with the shares and weights that they have now."""
        return tuple(
            Edge(
                names,
                tuple(jax.nn.softmax(alpha).tolist()),
                None if weight is None else float(weight),
            )
            for names, alpha, weight in zip(self.edges, self.alpha, self.weights(), strict=True)
        )

    def strongest(self) -> NASLoRADelta:
        """The cell with each edge's strongest operator alone, but none, as DARTS derives it.

        Raises ValueError where an edge has nothing but none.
        """
        edges, cells = [], []
        for names, alpha, cell in zip(self.edges, self.alpha, self.cell, strict=True):
            ranked = sorted(zip(alpha.tolist(), names, strict=True), reverse=True)
            best = next((name for _, name in ranked if name != "none"), None)
            if best is None:
                raise ValueError("an edge of the cell has no operator but none")
            edges.append((best,))
            cells.append({best: cell[best]})
        alphas = tuple(jnp.zeros((1,), jnp.float32) for _ in edges)
        return self.replace(edges=tuple(edges), alpha=alphas, cell=tuple(cells))  # pyrefly: ignore[missing-attribute]


def shuffle(z: Float[Array, "*b r"], groups: int) -> Float[Array, "*b r"]:
    """A channel of each group in turn (ShuffleNet; PC-DARTS)."""
    return z.reshape(*z.shape[:-1], groups, -1).swapaxes(-1, -2).reshape(z.shape)


def _enlarged(kernel: Float[Array, "k k c c"], size: int) -> Float[Array, "m m c c"]:
    border = (size - kernel.shape[0]) // 2
    return jnp.pad(kernel, ((border, border), (border, border), (0, 0), (0, 0)))


@dataclasses.dataclass(frozen=True)
class NASLoRA(Method):
    """Settings of NAS-LoRA.

    `rank`: columns of A; `alpha`: the update is scaled by alpha / rank (None: alpha = rank);
    `operators`: the candidates of every edge, or of each, as `samjax.peft.edges` writes them;
    `space`; `norm` of the space darts; `nodes` of the cell; `partial`: one in so many channels goes
    through the cell; `dropout`: probability with which an input of A is zeroed in training. A fused
    projection has one A and one B, or, where segments are named, one A and a B for each.

    Raises ValueError for a count below 1, an operator that there is not or not in this space, a
    rank that `partial` does not divide, an alpha that is not positive, a dropout outside [0, 1).
    """

    rank: int = 4
    alpha: float | None = None
    operators: str = ""
    space: str = "linear"
    norm: str = "instance"
    nodes: int = 1
    partial: int = 1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_settings(self, ["rank", "nodes", "partial"], ["alpha"])
        for name, known in (("space", ("linear", "darts")), ("norm", ("instance", "none"))):
            if getattr(self, name) not in known:
                given = getattr(self, name)
                raise ValueError(f"NASLoRA: {name} must be {' or '.join(known)}, not {given!r}")
        if self.rank % self.partial:
            raise ValueError(
                f"NASLoRA: partial {self.partial} does not divide the rank {self.rank}; choose one "
                "of " + ", ".join(str(k) for k in range(1, self.rank + 1) if self.rank % k == 0)
            )
        self.edges()

    def edges(self) -> tuple[Edge, ...]:
        """The cell's edges."""
        known = [name for name, op in OPERATORS.items() if self.space == "darts" or op.linear]
        count = self.nodes * (self.nodes + 1) // 2
        edges = parse_edges(self.operators or "+".join(known))
        if len(edges) not in (1, count):
            raise ValueError(
                f"NASLoRA: {self.nodes} nodes have {count} edges, and operators names those of "
                f"{len(edges)}"
            )
        for name in (name for edge in edges for name in edge.operators):
            if name not in known:
                raise ValueError(
                    f"NASLoRA: operators of the space {self.space} are {', '.join(known)}, not "
                    f"{name!r}"
                )
        weights = [edge.weight for edge in edges]
        if any(weight is None for weight in weights) != all(weight is None for weight in weights):
            raise ValueError("NASLoRA: operators gives some edges a weight, and others none")
        return edges * (count if len(edges) == 1 else 1)

    def init(self, key: Any, site: Site, segments: tuple[str, ...]) -> NASLoRADelta:
        """The record for a linear layer of the image encoder. B is zero: the identity.

        A and the operators are torch's defaults, alpha and beta normal of deviation 1e-3. Raises
        ValueError for a layer of the decoder, whose tokens are no map.
        """
        info, rank = site.info, self.rank
        if not info.path.startswith("image_encoder/"):
            raise ValueError(
                f"NASLoRA: {info.path} sees a list of tokens, and a cell needs a map; choose "
                "layers of image_encoder"
            )
        width, out = info.kernel_shape[0], segment_width(info, segments)
        check_rank("NASLoRA", rank, info, min(width, out))
        factor, cells, architecture = jax.random.split(key, 3)
        edges, space = self.edges(), _space(self.space)
        alpha, cell = [], []
        for i, edge in enumerate(edges):
            edge_key = jax.random.fold_in(cells, i)
            if edge.shares is None:
                shape = (len(edge.operators),)
                draw = _SPREAD * jax.random.normal(jax.random.fold_in(architecture, i), shape)
            else:
                draw = jnp.log(jnp.array(edge.shares, jnp.float32))
            alpha.append(draw)
            cell.append(
                {
                    # By place among all operators: what is found starts as in the search.
                    name: OPERATORS[name].init(
                        jax.random.fold_in(edge_key, list(OPERATORS).index(name)),
                        rank // self.partial,
                        space,
                    )
                    for name in edge.operators
                }
            )
        beta = None
        if len(edges) > 1:
            weights = [edge.weight for edge in edges if edge.weight is not None]
            last = jax.random.fold_in(architecture, len(edges))
            beta = _SPREAD * jax.random.normal(last, (len(edges),))
            beta = jnp.log(jnp.array(weights, jnp.float32)) if weights else beta
        return NASLoRADelta(
            a=kaiming_uniform(factor, (width, rank), width),
            b=jnp.zeros((max(1, len(segments)), rank, out), jnp.float32),
            alpha=tuple(alpha),
            beta=beta,
            cell=tuple(cell),
            scale=jnp.float32((self.rank if self.alpha is None else self.alpha) / rank),
            edges=tuple(edge.operators for edge in edges),
            space=space,
            norm="none" if self.norm == "none" else "instance",
            partial=self.partial,
            segments=segments,
            dropout=self.dropout,
        )


def _space(name: str) -> Literal["linear", "darts"]:
    return "darts" if name == "darts" else "linear"
