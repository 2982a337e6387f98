"""What every adapter record shares: groups of fields, and what a record can do.

A *delta* is a small `flax.struct` record stored in the `peft` collection under its site's path:

    delta(site, x, ctx) -> y                        in the site's stead; may call site(x)
    delta.merge(info, kernel, bias, ctx)            -> (kernel, bias), or raises NotMergeable
    delta.scaled(factor)                            -> delta, or raises NotComposable

and a *method* is a frozen dataclass of settings that makes deltas. Fields of records are typed
`Any` with the shape in a comment: under masks, labels and vmap they hold other things than arrays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from samjax.nn import Context, Site, SiteInfo

# Group of a leaf that no optimiser sees.
FROZEN = "frozen"
# Group of arrays in a record that are neither trained nor counted, such as a scale. They are
# arrays, not static fields, so that adapters can be swapped without recompiling.
BUFFER = "buffer"
# Group of arrays that follow from the site's kernel, such as its singular vectors: neither trained
# nor counted, and not in adapter files, since `init` computes them again.
DERIVED = "derived"
WEIGHTS = "weights"
# Group of what chooses among operators, which an optimiser of its own trains.
ARCH = "arch"
UNTRAINED = frozenset({FROZEN, BUFFER, DERIVED})


def field(group: str = WEIGHTS, decay: bool = True) -> Any:
    """A field of a record that holds arrays of one group.

    `decay` False keeps weight decay from it; it never acts on arrays of one axis.
    """
    return struct.field(metadata={"group": group, "decay": decay})


def static(default: Any = dataclasses.MISSING) -> Any:
    """A field of a record that is part of the program, not of its data."""
    return struct.field(pytree_node=False, default=default)


class NotMergeable(ValueError):
    """A delta cannot be folded into its site's kernel; the message says why."""


class NotComposable(ValueError):
    """A delta cannot be scaled, or share its site with another; the message says why."""


class Record:
    """A record in the `peft` collection: a delta, or what several deltas share."""

    def groups(self) -> Any:
        """The record with each array replaced by the name of its group."""
        return self._map_fields(lambda field, _: field["group"], Record.groups)

    def metrics(self) -> dict[str, Any]:
        """Numbers about the record that are worth a place in a run's log, by name."""
        return {}

    def decays(self) -> Any:
        """The record with each array replaced by whether weight decay acts on it."""
        return self._map_fields(lambda field, leaf: field["decay"] and leaf.ndim > 1, Record.decays)

    def _map_fields(self, of_array: Callable[[Any, Any], Any], of_record: Any) -> Any:
        """The record with each array replaced, by its field's metadata and the array."""
        changes = {
            f.name: jax.tree.map(
                lambda node, f=f: (
                    of_record(node) if is_record(node) else of_array(f.metadata, node)
                ),
                getattr(self, f.name),
                is_leaf=is_record,
            )
            for f in dataclasses.fields(self)  # pyrefly: ignore[bad-argument-type]
            if f.metadata.get("pytree_node", True)
        }
        return dataclasses.replace(self, **changes)  # pyrefly: ignore[bad-argument-type]


class Delta(Record):
    """A record that computes a site's output."""

    # Why the delta cannot share its site; empty where it can. Where it is not, the delta has
    # multiples only if it defines `scaled` itself.
    alone: ClassVar[str] = ""
    # Whether, at a linear layer and dropout aside, what it makes of a token depends on that alone.
    by_token: ClassVar[bool] = True
    # Whether it computes with the site's kernel itself, in float32, and not by calling the site.
    reads_kernel: ClassVar[bool] = False
    # The name of the record in `peft["shared"]` that it needs.
    shared: str | None = None

    def __call__(self, site: Site, x: Any, ctx: Context) -> Any:
        """The adapted output of the site for input `x`."""
        raise NotImplementedError

    def merge(self, info: SiteInfo, kernel: Any, bias: Any, ctx: Context) -> tuple[Any, Any]:
        """Kernel and bias that give the adapted output without the delta; float32 arithmetic.

        `bias` is None where the site has none. Raises NotMergeable.
        """
        raise NotImplementedError

    def scaled(self, factor: Any) -> Delta:
        """The delta whose change of the output is `factor` times this one's."""
        raise NotComposable(f"{type(self).__name__}: {self.alone}")

    def collapsed(self) -> tuple[Delta, Method | None]:
        """The smallest record with the same effect, and settings whose record has its form.

        Where there is none smaller it is this one, and None.
        """
        return self, None

    def fingerprint(self) -> Sequence[Any]:
        """Numbers that tell whether derived arrays are those that it was trained with."""
        return ()


class Additive(Delta):
    """A delta that adds to its site's output, whatever else is added there."""

    def update(self, site: Site, x: Any, ctx: Context) -> Any:
        """What is added to the site's output for input `x`."""
        raise NotImplementedError

    def kernel_update(self, info: SiteInfo, kernel: Any, ctx: Context) -> Any:
        """What is added to the kernel (float32) when the delta is folded into it."""
        raise NotImplementedError

    def __call__(self, site: Site, x: Any, ctx: Context) -> Any:
        """The site's output and the update."""
        return site(x) + self.update(site, x, ctx)

    def merge(self, info: SiteInfo, kernel: Any, bias: Any, ctx: Context) -> tuple[Any, Any]:
        """The kernel and its update."""
        kernel = None if kernel is None else jnp.asarray(kernel, jnp.float32)
        return kernel + self.kernel_update(info, kernel, ctx), bias

    def scaled(self, factor: Any) -> Any:
        """The delta with its `scale` multiplied."""
        return self.replace(scale=self.scale * factor)  # pyrefly: ignore[missing-attribute]


class Method:
    """The settings of a method; a frozen dataclass that makes its record for a site."""

    # The kinds of sites that it can adapt; a rule's pattern passes over all others.
    kinds: ClassVar[tuple[str, ...]] = ("dense",)
    # True where a record holds what it derives from the kernel, which must not train beside it.
    fixes_kernel: ClassVar[bool] = False

    def init(self, key: Any, site: Site, segments: tuple[str, ...]) -> Delta:
        """A record that leaves the site's output unchanged; `segments` () means the whole output.

        Raises ValueError where the site does not suit the settings.
        """
        raise NotImplementedError

    def init_shared(
        self, key: Any, sites: Sequence[tuple[SiteInfo, tuple[str, ...]]]
    ) -> dict[str, Record]:
        """Records, by name, that the deltas share of all sites that have these settings."""
        return {}


def is_record(node: Any) -> bool:
    """True for a record, whatever its fields hold."""
    return isinstance(node, Record)


def is_delta(node: Any) -> bool:
    """True for a delta, whatever its fields hold."""
    return isinstance(node, Delta)


def segment_width(info: SiteInfo, segments: tuple[str, ...]) -> int:
    """Output channels of each of `segments`, or of the whole output where there are none."""
    out = info.kernel_shape[-1]
    return out // len(info.segments.names) if info.segments is not None and segments else out


def join_segments(info: SiteInfo, segments: tuple[str, ...], parts: Sequence[Any]) -> Any:
    """The output whose named segments are `parts` and whose others are zero."""
    if info.segments is None or not segments:
        return parts[0]
    return info.segments.join(dict(zip(segments, parts, strict=True)))


def check_settings(method: Method, counts: Sequence[str], positive: Sequence[str] = ()) -> None:
    """Raises ValueError for a count below 1, a number that is not positive and finite, a dropout.

    `counts` and `positive` name fields of the settings; None stands for a default. A dropout must
    be a probability, and not drop everything.
    """
    kind = type(method).__name__
    for name in counts:
        if (value := getattr(method, name)) < 1:
            raise ValueError(f"{kind}: {name} must be at least 1, not {value}")
    for name in positive:
        value = getattr(method, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{kind}: {name} must be positive and finite, not {value}")
    dropout = getattr(method, "dropout", 0.0)
    if not 0 <= dropout < 1:
        raise ValueError(f"{kind}: dropout must be in [0, 1), not {dropout}")


def check_rank(method: str, rank: int, info: SiteInfo, limit: int) -> None:
    """Raises ValueError for a rank that no matrix of this site can have."""
    if rank > limit:
        raise ValueError(
            f"{method}: rank {rank} is more than {info.path} can have, {limit}; choose a lower rank"
        )
