"""Adapters together: two at one site, scaled, blended, padded, and several in one batch.

Deltas that add to their site's output (`Additive`: LoRA and its kin, FacT, AdaptFormer, the
coefficients of SAM-PARSER) stack in any order: y = site(x) + the sum of their updates. Those that
rescale or transform what they find (DoRA, SSF, adapters in series) have no such sum; they are
refused with the reason.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Int

from samjax.nn import Context, Site, SiteInfo
from samjax.peft.delta import (
    Additive,
    Delta,
    Method,
    NotComposable,
    Record,
    field,
    is_delta,
    is_record,
)
from samjax.peft.dora import DoRADelta
from samjax.peft.lora import LoRADelta
from samjax.peft.lora_conv import LoRAConvDelta


@struct.dataclass
class StackDelta(Additive):
    """y = site(x) + the updates of all `deltas`, which are additive."""

    deltas: Any = field()

    @property
    def by_token(self) -> bool:  # pyrefly: ignore[bad-override]
        """Whether all do."""
        return all(delta.by_token for delta in self.deltas)

    @property
    def reads_kernel(self) -> bool:  # pyrefly: ignore[bad-override]
        """Whether one of them does."""
        return any(delta.reads_kernel for delta in self.deltas)

    def update(self, site: Site, x: Array, ctx: Context) -> Array:
        """The sum of the updates; each has random numbers of its own."""
        parts = (delta.update(site, x, _nth_context(ctx, i)) for i, delta in enumerate(self.deltas))
        return sum(parts, start=jnp.zeros((), x.dtype))

    def kernel_update(self, info: SiteInfo, kernel: Any, ctx: Context) -> Any:
        """The sum of the updates of the kernel."""
        return sum(delta.kernel_update(info, kernel, ctx) for delta in self.deltas)

    def scaled(self, factor: Any) -> StackDelta:
        """Every delta scaled."""
        return self.replace(deltas=tuple(delta.scaled(factor) for delta in self.deltas))

    def metrics(self) -> dict[str, Any]:
        """Those of all deltas, under their places."""
        return {
            f"{i}/{name}": value
            for i, delta in enumerate(self.deltas)
            for name, value in delta.metrics().items()
        }

    def fingerprint(self) -> Sequence[Any]:
        """Those of all deltas, one after another."""
        return [number for delta in self.deltas for number in delta.fingerprint()]


@dataclasses.dataclass(frozen=True)
class Stack(Method):
    """Several methods at the same sites, such as LoRA beside SAM-PARSER.

    Raises ValueError for fewer than two methods, for one that is itself a Stack, and where no kind
    of site is common to all; NotComposable (when it is attached) where one of them cannot share its
    site.
    """

    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        if len(self.methods) < 2:
            raise ValueError("a Stack needs two methods or more")
        for method in self.methods:
            if not isinstance(method, Method) or isinstance(method, Stack):
                raise ValueError(f"a Stack holds methods such as LoRA, not {type(method).__name__}")
        if not self.kinds:
            adapt = (f"{type(m).__name__} adapts {' and '.join(m.kinds)}" for m in self.methods)
            raise ValueError(
                f"no kind of site is common to the methods of a Stack: {', '.join(adapt)}; give "
                "each a rule of its own"
            )

    @property
    def kinds(self) -> tuple[str, ...]:  # pyrefly: ignore[bad-override]
        """The kinds of sites that all of its methods adapt."""
        first, *others = (method.kinds for method in self.methods)
        return tuple(kind for kind in first if all(kind in other for other in others))

    @property
    def fixes_kernel(self) -> bool:  # pyrefly: ignore[bad-override]
        """True where one of its methods does."""
        return any(method.fixes_kernel for method in self.methods)

    def init(self, key: Any, site: Site, segments: tuple[str, ...]) -> StackDelta:
        """The records of all methods."""
        made = [
            method.init(jax.random.fold_in(key, i), site, segments)
            for i, method in enumerate(self.methods)
        ]
        return _stacked(site.info.path, made)

    def init_shared(
        self, key: Any, sites: Sequence[tuple[SiteInfo, tuple[str, ...]]]
    ) -> dict[str, Record]:
        """What each of the methods shares. Raises ValueError where two share under one name."""
        shared: dict[str, Record] = {}
        for i, method in enumerate(self.methods):
            new = method.init_shared(jax.random.fold_in(key, i), sites)
            if both := shared.keys() & new.keys():
                raise ValueError(f"two methods of a Stack share {min(both)!r}; use one of them")
            shared |= new
        return shared


def scale(peft: Any, factor: float) -> Any:
    """The adapter whose every change of an output is `factor` times that of `peft`.

    Raises NotComposable for a method that has no such multiple.
    """
    return _map_deltas(lambda path, delta: _at(path, delta.scaled, jnp.float32(factor)), peft)


def stack(*trees: Any) -> Any:
    """The adapter that changes each output by the sum of what the `trees` change it by.

    They may have been trained apart, on the same base. Raises NotComposable where two meet at a
    site and one of them is not additive.
    """
    total: dict[str, Any] = {}
    for tree in trees:
        tree = _renamed(tree, total.get("shared", {}))
        flat, new = (flatten_dict(t, is_leaf=lambda _, n: is_record(n)) for t in (total, tree))
        for path, record in new.items():
            meets = path in flat
            flat[path] = _stacked("/".join(path[:-1]), [flat[path], record]) if meets else record
        total = unflatten_dict(flat)
    return total


def interpolate(first: Any, second: Any, weight: float) -> Any:
    """(1 - weight) of the first adapter's change of each output, and `weight` of the second's."""
    return stack(scale(first, 1 - weight), scale(second, weight))


def pad_rank(peft: Any, rank: int) -> Any:
    """The same adapter with LoRA factors of a larger `rank`, the added columns and rows zero.

    They may lie in a stack, in DoRA or at a convolution. Adapters of equal ranks are swapped
    without compiling anew, and go side by side. Raises ValueError for a rank below an adapter's
    own.
    """

    def pad(path: str, delta: Delta) -> Delta:
        if isinstance(delta, StackDelta):
            return delta.replace(deltas=tuple(pad(path, part) for part in delta.deltas))
        if isinstance(delta, DoRADelta):
            return delta.replace(lora=pad(path, delta.lora))
        if not isinstance(delta, LoRADelta | LoRAConvDelta):
            return delta
        more = rank - delta.a.shape[-1]
        if more < 0:
            raise ValueError(f"{path} has rank {delta.a.shape[-1]}; pad to that or more")

        def longer(factor: Any, axis: int) -> Any:
            widths = [(0, 0)] * factor.ndim
            widths[axis] = (0, more)
            return jnp.pad(factor, widths)

        return delta.replace(a=longer(delta.a, -1), b=longer(delta.b, -2))

    return _map_deltas(pad, peft)


def side_by_side(trees: Sequence[Any]) -> Any:
    """Several adapters as one tree whose arrays have a leading axis, one entry an adapter.

    `jax.vmap` over that axis (`params` unmapped) runs all of them, and `pick` gives each image of a
    batch its own. Raises ValueError where they are not of one method, rank and set of sites.
    """
    if not trees:
        raise ValueError("side_by_side needs one adapter or more")
    shapes = [jax.eval_shape(lambda t=tree: t) for tree in trees]
    for number, other in enumerate(shapes[1:], start=1):
        same = jax.tree.structure(other) == jax.tree.structure(shapes[0])
        if not same or jax.tree.leaves(other) != jax.tree.leaves(shapes[0]):
            raise ValueError(
                f"adapter {number} differs from adapter 0 in its method, sites or shapes; "
                "`pad_rank` makes the ranks of LoRA agree"
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def pick(adapters: Any, which: Int[Array, " b"]) -> Any:
    """The adapter of each image, from those that are `side_by_side`: leading axis b."""
    return jax.tree.map(lambda leaf: leaf[which], adapters)


def _stacked(path: str, records: Sequence[Any]) -> StackDelta:
    """One record of several; stacks are flattened. Raises NotComposable."""
    for record in records:
        if record.alone or not isinstance(record, Additive):
            raise NotComposable(f"{path}: {type(record).__name__} cannot share it: {record.alone}")
    parts = (r.deltas if isinstance(r, StackDelta) else (r,) for r in records)
    return StackDelta(deltas=tuple(delta for part in parts for delta in part))


def _nth_context(ctx: Context, index: int) -> Context:
    rng = ctx.rng if ctx.rng is None else jax.random.fold_in(ctx.rng, index)
    return ctx.replace(rng=rng)  # pyrefly: ignore[missing-attribute]


def _map_deltas(function: Any, peft: Any) -> Any:
    flat = flatten_dict(peft, is_leaf=lambda _, node: is_record(node))
    return unflatten_dict(
        {
            path: function("/".join(path[:-1]), node) if is_delta(node) else node
            for path, node in flat.items()
        }
    )


def _at(path: str, function: Any, *arguments: Any) -> Any:
    """Names the site in a NotComposable."""
    try:
        return function(*arguments)
    except NotComposable as error:
        raise NotComposable(f"{path}: {error}") from None


def _renamed(tree: Any, taken: Any) -> Any:
    """The tree with shared records under names that are not `taken`."""
    own = tree.get("shared", {})
    used, names = {*taken, *own}, {}
    for name in own:
        if name in taken:
            free = (f"{name}_{number}" for number in itertools.count(1))
            names[name] = next(new for new in free if new not in used)
            used.add(names[name])
    if not names:
        return tree

    def rename(_: str, delta: Any) -> Any:
        if isinstance(delta, StackDelta):
            return delta.replace(deltas=tuple(rename("", part) for part in delta.deltas))
        return delta.replace(shared=names[delta.shared]) if delta.shared in names else delta

    shared = {names.get(name, name): record for name, record in own.items()}
    return {**_map_deltas(rename, tree), "shared": shared}
