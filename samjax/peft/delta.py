"""What every adapter record shares: groups of fields, and the two things that it can do.

A *delta* is a small `flax.struct` record stored in the `peft` collection under its site's path:

    delta(site, x, ctx) -> y                        in the site's stead; may call site(x)
    delta.merge(info, kernel, bias, ctx)            -> (kernel, bias), or raises NotMergeable

and a *method* is a frozen dataclass with `init(key, site, segments) -> delta`. Fields are typed
`Any` with the shape in a comment: under masks, labels and vmap they hold other things than arrays.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
from flax import struct

from samjax.nn import Context, Site, SiteInfo

# Group of a leaf that no optimiser sees.
FROZEN = "frozen"
# Group of arrays in a record that are neither trained nor counted, such as a scale. They are
# arrays, not static fields, so that adapters can be swapped without recompiling.
BUFFER = "buffer"
WEIGHTS = "weights"


def field(group: str = WEIGHTS) -> Any:
    """A field of a record that holds arrays of one group: `weights`, `arch` or `buffer`."""
    return struct.field(metadata={"group": group})


def static(default: Any = dataclasses.MISSING) -> Any:
    """A field of a record that is part of the program, not of its data."""
    return struct.field(pytree_node=False, default=default)


class NotMergeable(ValueError):
    """A delta cannot be folded into its site's kernel; the message says why."""


@runtime_checkable
class Delta(Protocol):
    """A record in the `peft` collection."""

    def __call__(self, site: Site, x: Any, ctx: Context) -> Any:
        """The adapted output of the site for input `x`."""

    def merge(self, info: SiteInfo, kernel: Any, bias: Any, ctx: Context) -> tuple[Any, Any]:
        """Kernel and bias that give the adapted output without the delta; float32 arithmetic."""


class Method(Protocol):
    """The settings of a method: how to make its record for one site."""

    def init(self, key: Any, site: Site, segments: tuple[str, ...]) -> Delta:
        """A record that leaves the site's output unchanged; `segments` () means the whole output.

        Raises ValueError where the site is of a kind that the method cannot adapt.
        """


def is_delta(node: Any) -> bool:
    """True for a record, whatever its fields hold."""
    return dataclasses.is_dataclass(node) and isinstance(node, Delta)


def groups_of(delta: Any) -> Any:
    """The record with each array replaced by the name of its group."""
    changes = {
        f.name: jax.tree.map(lambda _, g=f.metadata["group"]: g, getattr(delta, f.name))
        for f in dataclasses.fields(delta)
        if f.metadata.get("pytree_node", True)
    }
    return dataclasses.replace(delta, **changes)
