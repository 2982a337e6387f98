"""A spec applied to a model: which rule claims which site and which leaf."""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any

from flax.traverse_util import flatten_dict

from samjax.models.sam import Sam
from samjax.nn import BUFFERS, SiteInfo
from samjax.peft.spec import PeftSpec, Rule, Train


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
    if rule.first_block:
        if not 0 < rule.first_block < len(blocks):
            raise ValueError(
                f"first_block is {rule.first_block}, and {model.config.name} has {len(blocks)} "
                f"blocks; choose 0 to {len(blocks) - 1}"
            )
        early = tuple(f"{block}/" for block in blocks[: rule.first_block])
        leaves = [path for path in leaves if not path.startswith(early)]
        sites = {path: info for path, info in sites.items() if not path.startswith(early)}
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
