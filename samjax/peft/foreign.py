"""What other libraries' adapters have in common: how they become a spec and trees of samjax's.

`samjax.peft.huggingface` reads peft's folders, `samjax.peft.samed` SAMed's files.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from samjax.models.sam import Sam
from samjax.nn import BUFFERS, SiteInfo
from samjax.peft.delta import Method
from samjax.peft.spec import PeftSpec, Rule, Train
from samjax.peft.trees import attach
from weights_convert import expected_shapes
from weights_convert.errors import shown
from weights_convert.table import Leaf, from_samjax

_DECODER = "mask_decoder/"


@dataclasses.dataclass(frozen=True)
class Adapted:
    """What an adapter has at one site: a method's settings and the arrays of its record."""

    method: Method
    # By the record's field, those of LoRA within DoRA too; axes are samjax's.
    arrays: dict[str, np.ndarray]
    segments: tuple[str, ...] = ()


def meta_names(model: Sam) -> dict[str, tuple[str, Leaf]]:
    """The path and the leaf of each of a model's tensors by Meta's name."""
    rows = {path: from_samjax(path) for path in expected_shapes(model.config)}
    return {row[0]: (path, row[1]) for path, row in rows.items() if row is not None}


def check_factors(
    source: str, name: str, a: np.ndarray, b: np.ndarray, rank: int, kernel: Sequence[int]
) -> None:
    """Raises ValueError where factors do not fit a torch kernel of shape `kernel`, or the rank."""
    if a.ndim != len(kernel) or b.ndim != len(kernel):
        raise ValueError(
            f"{source}: the factors of {shown(name)} have {a.ndim} and {b.ndim} axes, not "
            f"{len(kernel)}; copy the adapter again"
        )
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise ValueError(
            f"{source}: the factors of {shown(name)} have the ranks {a.shape[0]} and {b.shape[1]} "
            f"where {rank} is said; copy the whole adapter again"
        )
    out, *window = kernel
    expected = (rank, *window), (out, rank, *(1 for _ in window[1:]))
    for array, shape in zip((a, b), expected, strict=True):
        if array.shape != shape:
            raise ValueError(
                f"{source}: a factor of {shown(name)} is {list(array.shape)} where these weights "
                f"take {list(shape)}; pass the weights that the adapter was trained on"
            )


def trained_leaves(
    source: str, params: Any, tensors: Mapping[str, tuple[str, Leaf, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Trained leaves by path, of (path, leaf, tensor) by the tensor's name.

    What no method trains, such as the matrix of positions, must be the weights' own and is left
    out. Raises ValueError where a tensor does not fit `params`.
    """
    base = flatten_dict(params, sep="/")
    leaves: dict[str, np.ndarray] = {}
    for name, (path, leaf, tensor) in tensors.items():
        expected = leaf.torch_shape(base[path].shape)
        if tensor.shape != expected:
            raise ValueError(
                f"{source}: {shown(name)} is {list(tensor.shape)} where these weights have "
                f"{list(expected)}; pass the weights that the adapter was trained on, or leave its "
                "trained tensors out (--without-decoder)"
            )
        array = leaf.to_samjax(tensor).astype(np.float32)
        if path.rpartition("/")[2] not in BUFFERS:
            leaves[path] = array
        elif not np.allclose(array, base[path], rtol=1e-2, atol=1e-3):
            raise ValueError(
                f"{source}: {shown(name)} is not that of these weights, and samjax trains none: "
                "pass the weights that the adapter was trained on, or leave its trained tensors "
                "out (--without-decoder)"
            )
    return leaves


def assemble(
    source: str,
    model: Sam,
    params: Any,
    sites: Mapping[str, Adapted],
    leaves: Mapping[str, np.ndarray],
) -> tuple[PeftSpec, dict[str, Any]]:
    """The spec and the variables ({"params", "peft"}) of an adapter.

    `sites`: what is adapted, by the site's path; `leaves`: trained leaves of the model by path.
    Raises ValueError, one sentence, for numbers that are not finite or a rank no site can have.
    """
    for path, array in (
        *((f"{site}/{k}", v) for site, has in sites.items() for k, v in has.arrays.items()),
        *leaves.items(),
    ):
        if not np.isfinite(array).all():
            raise ValueError(
                f"{source}: what it holds for {path} is not finite: it is damaged or its training "
                "diverged"
            )
    spec = PeftSpec((*_method_rules(model, sites), *_train_rules(model, leaves)))
    try:
        peft = flatten_dict(attach(spec, model, params, jax.random.key(0)), sep="/")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    for path, adapted in sites.items():
        peft[f"{path}/delta"] = _filled(peft[f"{path}/delta"], adapted.arrays)
    flat = flatten_dict(params, sep="/") | dict(leaves)
    return spec, {"params": unflatten_dict(flat, sep="/"), "peft": unflatten_dict(peft, sep="/")}


def _filled(record: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The record with its arrays in place; those of a record within it likewise."""
    changes = {}
    for f in dataclasses.fields(record):
        if f.name in arrays:
            changes[f.name] = arrays[f.name]
        elif dataclasses.is_dataclass(inner := getattr(record, f.name)):
            changes[f.name] = _filled(inner, arrays)
    return dataclasses.replace(record, **changes)


def _method_rules(model: Sam, sites: Mapping[str, Adapted]) -> list[Rule]:
    groups: dict[tuple[Method, tuple[str, ...]], list[str]] = {}
    for path, adapted in sites.items():
        groups.setdefault((adapted.method, adapted.segments), []).append(path)
    infos: tuple[SiteInfo, ...] = model.sites()
    rules = []
    for (method, segments), paths in groups.items():
        suffix = f"[{','.join(segments)}]" if segments else ""
        candidates = [info.path for info in infos if info.kind in method.kinds]
        rules += [Rule(p + suffix, method) for p in _patterns(paths, candidates)]
    return rules


def _train_rules(model: Sam, leaves: Collection[str]) -> list[Rule]:
    every = [p for p in expected_shapes(model.config) if p.rpartition("/")[2] not in BUFFERS]
    rules = []
    for top in dict.fromkeys(path.partition("/")[0] for path in leaves):
        candidates = [path for path in every if path.startswith(f"{top}/")]
        chosen = [path for path in leaves if path.startswith(f"{top}/")]
        whole = set(chosen) == set(candidates)
        config = Train(group="decoder") if f"{top}/" == _DECODER else Train()
        patterns = [f"{top}/**"] if whole else _patterns(chosen, candidates)
        rules += [Rule(pattern, config) for pattern in patterns]
    return rules


def _patterns(paths: Sequence[str], candidates: Sequence[str]) -> list[str]:
    """Patterns that match `paths` and no other candidate: `*` for numbers where all are chosen."""
    chosen = set(paths)
    others = {_template(path) for path in candidates if path not in chosen}
    return list(
        dict.fromkeys(
            template if (template := _template(path)) not in others else path for path in paths
        )
    )


def _template(path: str) -> str:
    return re.sub(r"_\d+(?=/|$)", "_*", path)
