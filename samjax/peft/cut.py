"""How much of the image encoder comes before all that a spec adapts or trains.

That much gives the same for an image all through training: it can be computed once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from samjax.models.sam import Sam
from samjax.peft.delta import UNTRAINED
from samjax.peft.spec import PeftSpec
from samjax.peft.trees import attach, deltas, groups

_ENCODER = "image_encoder/"


@dataclasses.dataclass(frozen=True)
class Cut:
    """Where the unchanging part of an image encoder ends."""

    # One of the encoder's `points`: the part of that name is the first that can change.
    point: str
    # How many of its parts lie before, and how many there are.
    before: int
    parts: int
    # The first path, in the encoder's order, of what trains or is adapted; "" where nothing is.
    because: str


def find_cut(spec: PeftSpec, model: Sam) -> Cut:
    """The last point of the image encoder before which nothing can change; computes nothing.

    A leaf that trains can, and so can a site that has a record, whether or not that trains: it may
    depend on the task or on chance, or add to the loss.
    """
    points = model.make_encoder(parent=None).points
    parts = points[:-1]
    first, because = len(parts), ""
    for path in _changing(spec, model):
        inner = path.removeprefix(_ENCODER)
        starts = (i for i, name in enumerate(parts) if inner.startswith((f"{name}/", f"{name}_")))
        # A leaf of no part, such as the positions that are added to patches, is of the first.
        place = next(starts, 0)
        if place < first:
            first, because = place, path
    return Cut(points[first], first, len(parts), because)


def _changing(spec: PeftSpec, model: Sam) -> Iterator[str]:
    """The paths in the image encoder of leaves that train and of sites that have a record."""
    params = model.init_params_shapes()
    peft = jax.eval_shape(lambda p: attach(spec, model, p, jax.random.key(0)), params)
    names: Any = groups(spec, model, {"params": params, "peft": peft})["params"]
    trained = (
        "/".join(path) for path, name in flatten_dict(names).items() if name not in UNTRAINED
    )
    for path in (*trained, *deltas(peft)):
        if path.startswith(_ENCODER):
            yield path


def params_before(model: Sam, params: Any, point: str) -> dict[str, Any]:
    """`params` with the leaves alone that the image encoder reads before one of its points."""
    points = model.make_encoder(parent=None).points
    later = points[points.index(point) : -1]
    prefixes = tuple(f"{name}{end}" for name in later for end in "/_")
    flat = flatten_dict(params["image_encoder"], sep="/")
    kept = {path: leaf for path, leaf in flat.items() if not path.startswith(prefixes)}
    return {"image_encoder": unflatten_dict(kept, sep="/")}
