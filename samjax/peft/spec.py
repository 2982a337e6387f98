"""Rules that say what adapts and what trains, and the functions from trees to trees they drive.

    spec = PeftSpec((
        Rule("image_encoder/**/attn/qkv[q,v]", LoRA(rank=4)),
        Rule("mask_decoder/**", Train(group="decoder")),
    ))
    peft = attach(spec, model, params, jax.random.key(0))
    model.apply({"params": params, "peft": peft}, ...)

First match wins; every rule must match something; what no rule claims is frozen. `*` matches
within one component of a path, `**` any number of components, `{a,b}` either of two.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import math
import re
import zlib
from typing import Any, get_args, get_type_hints

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from samjax.models.sam import Sam
from samjax.nn import BUFFERS, Context, Site, SiteInfo
from samjax.peft.adaptformer import AdaptFormer
from samjax.peft.compose import Stack
from samjax.peft.conv_lora import ConvLoRA
from samjax.peft.delta import (
    FROZEN,
    UNTRAINED,
    WEIGHTS,
    Delta,
    Method,
    NotMergeable,
    is_delta,
    is_record,
)
from samjax.peft.dora import DoRA
from samjax.peft.fact import FacT
from samjax.peft.houlsby import Houlsby
from samjax.peft.lora import LoRA
from samjax.peft.lora_conv import LoRAConv
from samjax.peft.sam_parser import SAMParser
from samjax.peft.ssf import SSF

# The methods that a spec can name in an adapter file.
METHODS: dict[str, type[Method]] = {
    "lora": LoRA,
    "dora": DoRA,
    "lora_conv": LoRAConv,
    "stack": Stack,
    "conv_lora": ConvLoRA,
    "fact": FacT,
    "adapter": Houlsby,
    "adaptformer": AdaptFormer,
    "ssf": SSF,
    "sam_parser": SAMParser,
}
_SHARED = "shared"


@dataclasses.dataclass(frozen=True)
class Train:
    """Trains leaves of the model itself; `group` names them for `optax.partition`.

    `last`: only what lies in the encoder's last so many blocks.
    """

    group: str = WEIGHTS
    last: int | None = None


@dataclasses.dataclass(frozen=True)
class Freeze:
    """Keeps leaves frozen that a later rule would train."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A pattern and what happens to what it matches.

    With `Train` or `Freeze` the pattern matches paths of `params`' leaves; with a method it matches
    sites of the kinds that the method adapts, and may end in the segments of a fused projection:
    `.../attn/qkv[q,v]`.
    """

    pattern: str
    config: Any

    @property
    def adapts(self) -> bool:
        """True for a method, which adds records; False for Train and Freeze."""
        return not isinstance(self.config, Train | Freeze)


@dataclasses.dataclass(frozen=True)
class PeftSpec:
    """An ordered set of rules: one PEFT method, or a mixture."""

    rules: tuple[Rule, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """A JSON-able list, one dict a rule; `from_json` is its inverse."""
        return [{"pattern": r.pattern, **_encode(r.config)} for r in self.rules]

    @staticmethod
    def from_json(data: Any) -> PeftSpec:
        """Rebuilds a spec. Raises ValueError naming what it does not know."""
        if not isinstance(data, list):
            raise ValueError(
                f"not a PEFT spec: {type(data).__name__} where a list of rules should be"
            )
        rules = []
        try:
            for entry in data:
                if not isinstance(entry, dict):
                    raise TypeError(f"a rule is {type(entry).__name__}, not an object")
                options = dict(entry)
                pattern = _typed("pattern", options.pop("pattern"), str)
                rules.append(Rule(pattern, _decode(options)))
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not a PEFT spec: {error}") from None
        return PeftSpec(tuple(rules))


_KINDS: dict[str, type] = {**METHODS, "train": Train, "freeze": Freeze}


def _encode(config: Any) -> dict[str, Any]:
    """The settings of a rule as JSON; a stack holds settings in its own."""
    kind = next(name for name, cls in _KINDS.items() if cls is type(config))
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {
        "kind": kind,
        **{k: [_encode(m) for m in v] if isinstance(v, tuple) else v for k, v in fields.items()},
    }


def _decode(data: dict[str, Any]) -> Any:
    """The inverse of `_encode`."""
    kind = _typed("kind", data["kind"], str)
    if kind not in _KINDS:
        nearest = difflib.get_close_matches(kind, _KINDS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown PEFT method {kind!r}; the nearest is {nearest}, and this samjax knows "
            f"{', '.join(_KINDS)}"
        )
    cls = _KINDS[kind]
    hints = get_type_hints(cls)
    types = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    # What is no field, the constructor refuses.
    options = {
        name: _decode_methods(name, value)
        if cls is Stack
        else _typed(f"{name} of {kind}", value, types.get(name, Any))
        for name, value in data.items()
        if name != "kind"
    }
    return cls(**options)


def _decode_methods(name: str, value: Any) -> tuple[Any, ...]:
    """The methods of a stack, none of which is a stack."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise TypeError(f"{name} of stack is {type(value).__name__}, not a list of methods")
    for entry in value:
        if entry.get("kind") in ("stack", "train", "freeze"):
            raise TypeError(f"a stack holds {entry['kind']}, which is no method to stack")
    return tuple(_decode(entry) for entry in value)


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A value of a JSON file as a field's annotation wants it; whole numbers serve as float.

    Raises TypeError for another type, and for a number that is not finite.
    """
    if kind is Any:
        return value
    kinds = get_args(kind) or (kind,)
    given = type(value)
    if given not in kinds and not (given is int and float in kinds):
        wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise TypeError(f"{name} is {value!r}, not {wanted}")
    if float not in kinds or value is None:
        return value
    if not math.isfinite(value):
        raise TypeError(f"{name} is {value!r}, not a finite number")
    return float(value)


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A spec applied to one model: which rule claims which site and which leaf."""

    sites: dict[str, tuple[SiteInfo, Rule, tuple[str, ...]]]
    leaves: dict[str, Rule]


def resolve(spec: PeftSpec, model: Sam) -> Resolved:
    """Matches every rule.

    Raises ValueError for a rule that claims nothing, and for a kernel that trains where a method
    holds what it derives from it.
    """
    sites = {info.path: info for info in model.sites()}
    blocks = _blocks(model)
    leaves = ["/".join(path) for path in flatten_dict(model.init_params_shapes())]
    trained = [path for path in leaves if path.rsplit("/", 1)[-1] not in BUFFERS]
    resolved = Resolved({}, {})
    for rule in spec.rules:
        path_pattern, segments = _split_segments(rule)
        regex = _to_regex(path_pattern)
        claims: dict[str, Any] = resolved.sites if rule.adapts else resolved.leaves
        candidates = _candidates(rule, model, sites, blocks, trained)
        matched = [path for path in candidates if regex.fullmatch(path)]
        if not matched:
            nearest = difflib.get_close_matches(path_pattern, candidates, n=1, cutoff=0.0)
            kind = f"{_kinds(rule)} site" if rule.adapts else "leaf"
            closest = f"the closest {kind} is {nearest[0]!r}" if nearest else "it has none"
            raise ValueError(
                f"rule {rule.pattern!r} matches no {kind} of {model.config.name}; {closest}"
            )
        new = [path for path in matched if path not in claims]
        if not new:
            raise ValueError(
                f"rule {rule.pattern!r} claims nothing, since earlier rules claim all that it "
                "matches; move it up or remove it"
            )
        for path in new:
            claims[path] = (sites[path], rule, segments) if rule.adapts else rule
            if rule.adapts:
                _check_segments(rule, sites[path], segments)
    _check_kernels(resolved)
    return resolved


def _check_kernels(resolved: Resolved) -> None:
    """Raises ValueError where a rule trains a kernel from which a record derives arrays."""
    for path, (info, rule, _) in resolved.sites.items():
        leaf = f"{path}/{info.kernel_name}"
        trains = resolved.leaves.get(leaf)
        if rule.config.fixes_kernel and trains and isinstance(trains.config, Train):
            raise ValueError(
                f"rule {trains.pattern!r} trains {leaf}, which rule {rule.pattern!r} "
                f"({type(rule.config).__name__}) takes as it is; put a Freeze rule for that leaf "
                "before it"
            )


def _candidates(
    rule: Rule, model: Sam, sites: dict[str, SiteInfo], blocks: list[str], leaves: list[str]
) -> list[str]:
    """The paths that a rule's pattern chooses from. Raises ValueError where there are none."""
    if rule.adapts:
        return [path for path, info in sites.items() if info.kind in rule.config.kinds]
    last = getattr(rule.config, "last", None)
    if last is None:
        return leaves
    if not 1 <= last <= len(blocks):
        raise ValueError(
            f"rule {rule.pattern!r} trains the last {last} blocks, and {model.config.name} has "
            f"{len(blocks)}; choose 1 to {len(blocks)}"
        )
    chosen = tuple(f"{block}/" for block in blocks[-last:])
    return [path for path in leaves if path.startswith(chosen)]


def _kinds(rule: Rule) -> str:
    return " or ".join(rule.config.kinds)


def _blocks(model: Sam) -> list[str]:
    """The paths of the encoder's blocks, from the first to the last."""
    found = (re.match(r"image_encoder/(?:.*/)?blocks_\d+(?=/)", s.path) for s in model.sites())
    return list(dict.fromkeys(match[0] for match in found if match))


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


def merge(model: Sam, params: Any, peft: Any, ctx: Context | None = None) -> Any:
    """Folds every record into its kernel: plain `params` that need no adapter.

    Arithmetic is float32, the result has each kernel's own dtype. Raises NotMergeable, with the
    reason, where a record cannot be folded; ValueError where it is at no site, or lacks what it
    shares with others.
    """
    flat = flatten_dict(params)
    infos = {info.path: info for info in model.sites()}
    _check_shared(peft)
    _check_calls(model, deltas(peft), model.sites())
    ctx = (ctx or Context()).replace(shared=peft.get(_SHARED))
    for path, delta in deltas(peft).items():
        parts, info = tuple(path.split("/")), infos[path]
        names = (*parts, info.kernel_name), (*parts, "bias")
        olds = tuple(flat.get(name) for name in names)
        try:
            news = delta.merge(info, *olds, ctx)
        except NotMergeable as error:
            raise NotMergeable(f"{path}: {error}") from None
        for name, old, new in zip(names, olds, news, strict=True):
            if old is None and new is not None:
                raise NotMergeable(f"{path} has no {name[-1]} that could take the delta's")
            if old is not None:
                flat[name] = new.astype(old.dtype)
    return unflatten_dict(flat)


def _split_segments(rule: Rule) -> tuple[str, tuple[str, ...]]:
    match = re.fullmatch(r"(.*)\[([\w,\s]+)\]", rule.pattern)
    if match is None or not rule.adapts:
        return rule.pattern, ()
    return match[1], tuple(name.strip() for name in match[2].split(","))


def _check_segments(rule: Rule, info: SiteInfo, segments: tuple[str, ...]) -> None:
    if len(set(segments)) < len(segments):
        twice = next(name for name in segments if segments.count(name) > 1)
        raise ValueError(f"rule {rule.pattern!r} names the segment {twice!r} twice; name it once")
    known = info.segments.names if info.segments else ()
    unknown = [name for name in segments if name not in known]
    if unknown:
        has = f"has the segments {', '.join(known)}" if known else "has no segments"
        raise ValueError(f"rule {rule.pattern!r} names {unknown[0]!r}, but {info.path} {has}")


def _to_regex(pattern: str) -> re.Pattern[str]:
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]", "{": "(?:", "}": ")"}
    depth, regex = 0, ""
    for part in re.split(r"(\*\*/|\*\*|[*?{},])", pattern):
        depth += (part == "{") - (part == "}")
        if depth not in (0, 1):
            break
        regex += "|" if part == "," and depth else tokens.get(part, re.escape(part))
    if depth:
        raise ValueError(f"rule {pattern!r} has a brace without its partner, or one in another")
    return re.compile(regex)
