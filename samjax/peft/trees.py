"""The functions from trees to trees that a spec drives.

peft = attach(spec, model, params, jax.random.key(0))
model.apply({"params": params, "peft": peft}, ...)
train, frozen = partition(variables, trainable(spec, model, variables))
merged = merge(model, params, peft)
"""

from __future__ import annotations

import collections
import difflib
import zlib
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from samjax.models.msam import MSam
from samjax.models.sam import Sam
from samjax.nn import Context, Site, SiteInfo
from samjax.peft.delta import (
    FROZEN,
    UNTRAINED,
    Delta,
    Method,
    NotMergeable,
    is_delta,
    is_record,
)
from samjax.peft.resolve import resolve
from samjax.peft.spec import PeftSpec, Train

_SHARED = "shared"


def attach(spec: PeftSpec, model: Sam, params: Any, key: Any) -> dict[str, Any]:
    """The `peft` tree of a spec: a record under each adapted site's path; the identity at first.

    What sites share lies under `shared`. Each site's random numbers depend on `key` and on its own
    path alone. Raises ValueError where a site does not suit its method's settings.
    """
    flat = flatten_dict(params)
    peft: dict[tuple[str, ...], Any] = {}
    same_settings: dict[Method, list[tuple[SiteInfo, tuple[str, ...]]]] = {}
    patterns: dict[Method, str] = {}
    for path, (info, rule, segments) in resolve(spec, model).sites.items():
        parts = tuple(path.split("/"))
        kernel, bias = flat.get((*parts, info.kernel_name)), flat.get((*parts, "bias"))
        site = Site(info, kernel, bias, apply=_no_apply)
        peft[(*parts, "delta")] = rule.config.init(_key(key, path), site, segments)
        same_settings.setdefault(rule.config, []).append((info, segments))
        patterns.setdefault(rule.config, rule.pattern)
    owners: dict[str, str] = {}
    for config, sites in same_settings.items():
        for name, record in config.init_shared(_key(key, type(config).__name__), sites).items():
            if (_SHARED, name) in peft:
                raise ValueError(
                    f"rules {owners[name]!r} and {patterns[config]!r} each make a record {name!r} "
                    "for their sites to share, and there can be one; give both the same settings, "
                    "with the same Stack around them if any"
                )
            peft[(_SHARED, name)], owners[name] = record, patterns[config]
    return unflatten_dict(peft)


def _key(key: Any, name: str) -> Any:
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _no_apply(x: Any, kernel: Any, bias: Any) -> Any:
    raise RuntimeError("a site cannot be called while its record is made")


def deltas(peft: Any) -> dict[str, Delta]:
    """The deltas of a `peft` tree by their site's path."""
    flat = flatten_dict(peft, is_leaf=lambda _, node: is_record(node))
    return {"/".join(path[:-1]): record for path, record in flat.items() if is_delta(record)}


def metrics(peft: Any) -> dict[str, Any]:
    """What the deltas of a `peft` tree tell of themselves, each under its site's path."""
    return {
        f"{path}/{name}": value
        for path, delta in deltas(peft).items()
        for name, value in delta.metrics().items()
    }


def shared_names(delta: Delta) -> list[str]:
    """The names of the records in `peft["shared"]` that a delta needs."""
    inner = [name for part in getattr(delta, "deltas", ()) for name in shared_names(part)]
    return inner if delta.shared is None else [delta.shared, *inner]


def check_sites(model: Sam, params: Any, peft: Any) -> None:
    """Raises ValueError for a record that a forward pass does not call exactly once.

    Linen ignores an entry of `peft` that no site reads: a misplaced record would do nothing. What
    is shared must be there, and used.
    """
    needed = _check_shared(peft)
    for name in sorted(peft.get(_SHARED, {})):
        if name not in needed:
            raise ValueError(f"no site reads the shared record {name!r}; remove it")
    shapes = jax.eval_shape(lambda: {"params": params, "peft": peft})
    _check_calls(model, deltas(peft), model.sites(shapes))


def _check_shared(peft: Any) -> set[str]:
    """The names of the shared records that deltas need. Raises ValueError for one not there."""
    needed = {name: path for path, delta in deltas(peft).items() for name in shared_names(delta)}
    for name in sorted(needed):
        if name not in peft.get(_SHARED, {}):
            raise ValueError(f"the record at {needed[name]!r} needs the shared record {name!r}")
    return set(needed)


def _check_calls(model: Sam, records: dict[str, Delta], sites: tuple[SiteInfo, ...]) -> None:
    """Raises ValueError for a record whose site is not called once."""
    calls = collections.Counter(info.path for info in sites)
    for path in records:
        if calls[path] != 1:
            nearest = difflib.get_close_matches(path, list(calls), n=1, cutoff=0.0)
            raise ValueError(
                f"the record at {path!r} is called {calls[path]} times in a forward pass of "
                f"{model.config.name}, not once; the closest site is {nearest[0]!r}"
            )


def groups(spec: PeftSpec, model: Sam, variables: Any) -> Any:
    """`variables` ({"params", "peft"}) with each leaf replaced by its group's name.

    `frozen`, `buffer` and `derived` never train; the others are labels for `optax.partition`.
    """
    claims = resolve(spec, model).leaves

    def group(path: tuple[str, ...]) -> str:
        rule = claims.get("/".join(path))
        return rule.config.group if rule and isinstance(rule.config, Train) else FROZEN

    params = {path: group(path) for path in flatten_dict(variables["params"])}
    peft = jax.tree.map(lambda r: r.groups(), variables.get("peft", {}), is_leaf=is_record)
    return {"params": unflatten_dict(params), "peft": peft}


def trainable(spec: PeftSpec, model: Sam, variables: Any) -> Any:
    """The boolean tree over `variables` that optax masks take: True where a leaf trains."""
    return jax.tree.map(lambda g: g not in UNTRAINED, groups(spec, model, variables))


def as_computed(variables: Any, dtype: Any, trains: Any = None) -> Any:
    """`variables` whose frozen kernels have the dtype that the model computes in.

    Layers round their kernels to `dtype` at each call (what a CPU compiles may leave that out), so
    that a bfloat16 model loses nothing and needs half the room. Left as they are: what trains
    (`trains` is the boolean tree of `trainable`; None: nothing does), what is not a layer's kernel,
    and kernels that a delta computes with itself. Leaves may be `jax.ShapeDtypeStruct` within
    `jax.eval_shape` alone.
    """
    readers = {path for path, d in deltas(variables.get("peft", {})).items() if d.reads_kernel}
    trained = {} if trains is None else flatten_dict(trains["params"])

    def stored(path: tuple[str, ...], leaf: Any) -> Any:
        frozen = path[-1] == "kernel" and not trained.get(path, False)
        if not frozen or "/".join(path[:-1]) in readers:
            return leaf
        return leaf.astype(dtype, copy=False)

    params = {path: stored(path, leaf) for path, leaf in flatten_dict(variables["params"]).items()}
    return {**variables, "params": unflatten_dict(params)}


def start(spec: PeftSpec, model: Sam, params: Any, key: Any) -> dict[str, Any]:
    """{"params", "peft"} as a run begins with them: adapters attached, the rest `as_computed`."""
    variables = {"params": params, "peft": attach(spec, model, params, key)}
    return as_computed(variables, model.dtype, trainable(spec, model, variables))


def partition(tree: Any, mask: Any) -> tuple[Any, Any]:
    """Splits a tree into (where mask is True, the rest); the holes are None."""
    return (
        jax.tree.map(lambda m, x: x if m else None, mask, tree),
        jax.tree.map(lambda m, x: None if m else x, mask, tree),
    )


def combine(first: Any, second: Any) -> Any:
    """The inverse of `partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None
    )


def merge(
    model: Sam, params: Any, peft: Any, ctx: Context | None = None, *, task: str | None = None
) -> Any:
    """Folds every record into its kernel: plain `params` that need no adapter.

    Of a model of dense tasks, `task` names the one to fold for, where records differ by task: its
    encoder then is a plain one, and other tasks need their own. Arithmetic is float32, the result
    has each kernel's own dtype. Raises NotMergeable, with the reason, where a record cannot be
    folded; ValueError where it is at no site, or lacks what it shares with others, and for a task
    that there is not, with the nearest.
    """
    if task is not None:
        if not isinstance(model, MSam):
            raise ValueError(f"{model.config.name} here predicts masks and has no task {task!r}")
        ctx = (ctx or Context()).replace(task=model.index(task))
    merged, reasons = fold(model, params, peft, ctx)
    for path, reason in reasons.items():
        raise NotMergeable(f"{path}: {reason}")
    return merged


def fold(
    model: Sam, params: Any, peft: Any, ctx: Context | None = None
) -> tuple[Any, dict[str, str]]:
    """`merge`, but what cannot be folded is left as it is, and the reasons are told by site."""
    flat, sites, records = flatten_dict(params), model.sites(), deltas(peft)
    infos = {info.path: info for info in sites}
    _check_shared(peft)
    _check_calls(model, records, sites)
    ctx = (ctx or Context()).replace(shared=peft.get(_SHARED))
    reasons = {}
    for path, delta in records.items():
        parts, info = tuple(path.split("/")), infos[path]
        names = (*parts, info.kernel_name), (*parts, "bias")
        olds = tuple(flat.get(name) for name in names)
        try:
            news = delta.merge(info, *olds, ctx)
            if olds[1] is None and news[1] is not None:
                raise NotMergeable("the layer has no bias that could take the delta's")
        except NotMergeable as error:
            reasons[path] = str(error)
            continue
        for name, old, new in zip(names, olds, news, strict=True):
            if old is not None:
                flat[name] = new.astype(old.dtype)
    return unflatten_dict(flat), reasons
