"""Rules that say what adapts and what trains, and the functions from trees to trees they drive.

    spec = PeftSpec((
        Rule("image_encoder/**/attn/qkv[q,v]", LoRA(rank=4)),
        Rule("mask_decoder/**", Train(group="decoder")),
    ))
    peft = attach(spec, model, params, jax.random.key(0))
    model.apply({"params": params, "peft": peft}, ...)

First match wins; every rule must match something; what no rule claims is frozen. `*` matches
within one component of a path, `**` any number of components.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import re
import zlib
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from samjax.models.sam import Sam
from samjax.nn import BUFFERS, Context, Site, SiteInfo
from samjax.peft.delta import BUFFER, FROZEN, WEIGHTS, Delta, groups_of, is_delta
from samjax.peft.lora import LoRA

# The methods that a spec can name in an adapter file.
METHODS: dict[str, type] = {"lora": LoRA}


@dataclasses.dataclass(frozen=True)
class Train:
    """Trains leaves of the model itself; `group` names them for `optax.partition`."""

    group: str = WEIGHTS


@dataclasses.dataclass(frozen=True)
class Freeze:
    """Keeps leaves frozen that a later rule would train."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A pattern and what happens to what it matches.

    With `Train` or `Freeze` the pattern matches paths of `params`' leaves; with a method it matches
    sites, and may end in the segments of a fused projection: `.../attn/qkv[q,v]`.
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
        kinds = {cls: name for name, cls in _KINDS.items()}
        return [
            {"pattern": r.pattern, "kind": kinds[type(r.config)], **dataclasses.asdict(r.config)}
            for r in self.rules
        ]

    @staticmethod
    def from_json(data: Any) -> PeftSpec:
        """Rebuilds a spec. Raises ValueError naming what it does not know."""
        rules = []
        try:
            for entry in data:
                options = dict(entry)
                pattern, kind = options.pop("pattern"), options.pop("kind")
                if kind not in _KINDS:
                    raise ValueError(
                        f"unknown PEFT method {kind!r}; this samjax knows {', '.join(_KINDS)}"
                    )
                rules.append(Rule(pattern, _KINDS[kind](**options)))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a PEFT spec: {error}") from None
        return PeftSpec(tuple(rules))


_KINDS: dict[str, type] = {**METHODS, "train": Train, "freeze": Freeze}


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A spec applied to one model: which rule claims which site and which leaf."""

    sites: dict[str, tuple[SiteInfo, Rule, tuple[str, ...]]]
    leaves: dict[str, Rule]


def resolve(spec: PeftSpec, model: Sam) -> Resolved:
    """Matches every rule. Raises ValueError for a rule that claims nothing."""
    sites = {info.path: info for info in model.sites()}
    leaves = ["/".join(path) for path in flatten_dict(model.init_params_shapes())]
    trained = [path for path in leaves if path.rsplit("/", 1)[-1] not in BUFFERS]
    resolved = Resolved({}, {})
    for rule in spec.rules:
        path_pattern, segments = _split_segments(rule)
        regex = _to_regex(path_pattern)
        claims: dict[str, Any] = resolved.sites if rule.adapts else resolved.leaves
        candidates = list(sites) if rule.adapts else trained
        matched = [path for path in candidates if regex.fullmatch(path)]
        if not matched:
            nearest = difflib.get_close_matches(path_pattern, candidates, n=1, cutoff=0.0)
            kind = "site" if rule.adapts else "leaf"
            raise ValueError(
                f"rule {rule.pattern!r} matches no {kind} of {model.config.name}; "
                f"the closest {kind} is {nearest[0]!r}"
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
    return resolved


def attach(spec: PeftSpec, model: Sam, params: Any, key: Any) -> dict[str, Any]:
    """The `peft` tree of a spec: a record under each adapted site's path; the identity at first.

    Each site's random numbers depend on `key` and on its own path alone.
    """
    flat = flatten_dict(params)
    peft = {}
    for path, (info, rule, segments) in resolve(spec, model).sites.items():
        parts = tuple(path.split("/"))
        site = Site(info, flat[(*parts, "kernel")], flat.get((*parts, "bias")), apply=None)
        site_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        peft[(*parts, "delta")] = rule.config.init(site_key, site, segments)
    return unflatten_dict(peft)


def deltas(peft: Any) -> dict[str, Delta]:
    """The records of a `peft` tree by their site's path."""
    flat = flatten_dict(peft, is_leaf=lambda _, node: is_delta(node))
    return {"/".join(path[:-1]): record for path, record in flat.items()}


def check_sites(model: Sam, params: Any, peft: Any) -> None:
    """Raises ValueError for a record that a forward pass does not call exactly once.

    Linen ignores an entry of `peft` that no site reads: a misplaced record would do nothing.
    """
    shapes = jax.eval_shape(lambda: {"params": params, "peft": peft})
    calls = collections.Counter(info.path for info in model.sites(shapes))
    for path in deltas(peft):
        if calls[path] != 1:
            nearest = difflib.get_close_matches(path, list(calls), n=1, cutoff=0.0)
            raise ValueError(
                f"the record at {path!r} is called {calls[path]} times in a forward pass of "
                f"{model.config.name}, not once; the closest site is {nearest[0]!r}"
            )


def groups(spec: PeftSpec, model: Sam, variables: Any) -> Any:
    """`variables` ({"params", "peft"}) with each leaf replaced by its group's name.

    `frozen` and `buffer` never train; the others are labels for `optax.partition`.
    """
    claims = resolve(spec, model).leaves

    def group(path: tuple[str, ...]) -> str:
        rule = claims.get("/".join(path))
        return rule.config.group if rule and isinstance(rule.config, Train) else FROZEN

    params = {path: group(path) for path in flatten_dict(variables["params"])}
    peft = jax.tree.map(groups_of, variables.get("peft", {}), is_leaf=is_delta)
    return {"params": unflatten_dict(params), "peft": peft}


def trainable(spec: PeftSpec, model: Sam, variables: Any) -> Any:
    """The boolean tree over `variables` that optax masks take: True where a leaf trains."""
    return jax.tree.map(lambda g: g not in (FROZEN, BUFFER), groups(spec, model, variables))


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
    reason, where a record cannot be folded.
    """
    flat = flatten_dict(params)
    infos = {info.path: info for info in model.sites()}
    for path, delta in deltas(peft).items():
        parts = tuple(path.split("/"))
        kernel, bias = flat[(*parts, "kernel")], flat.get((*parts, "bias"))
        new = delta.merge(infos[path], kernel, bias, ctx or Context())
        for name, old, value in zip(("kernel", "bias"), (kernel, bias), new, strict=True):
            if value is not None:
                flat[(*parts, name)] = value if old is None else value.astype(old.dtype)
    return unflatten_dict(flat)


def _split_segments(rule: Rule) -> tuple[str, tuple[str, ...]]:
    match = re.fullmatch(r"(.*)\[([\w,\s]+)\]", rule.pattern)
    if match is None or not rule.adapts:
        return rule.pattern, ()
    return match[1], tuple(name.strip() for name in match[2].split(","))


def _check_segments(rule: Rule, info: SiteInfo, segments: tuple[str, ...]) -> None:
    known = info.segments.names if info.segments else ()
    unknown = [name for name in segments if name not in known]
    if unknown:
        has = f"has the segments {', '.join(known)}" if known else "has no segments"
        raise ValueError(f"rule {rule.pattern!r} names {unknown[0]!r}, but {info.path} {has}")


def _to_regex(pattern: str) -> re.Pattern[str]:
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(tokens.get(part, re.escape(part)) for part in parts))
