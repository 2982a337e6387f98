"""What a search found, as a record that a later run can start from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from flax.traverse_util import flatten_dict, unflatten_dict

from samjax.files import read_record
from samjax.models.sam import Sam
from samjax.peft.delta import is_record
from samjax.peft.edges import Edge, edges_text, sites_text
from samjax.peft.nas_lora import NASLoRA, NASLoRADelta
from samjax.peft.resolve import resolve
from samjax.peft.spec import PeftSpec, Rule, pattern_of
from samjax.peft.trees import deltas

Derive = Literal["mixture", "strongest"]
_SETTINGS = ("space", "norm", "nodes", "partial")


def cells(peft: Any) -> dict[str, NASLoRADelta]:
    """The searchable cells of a `peft` tree by their site's path, those in a Stack too."""
    found = {}
    for path, delta in deltas(peft).items():
        for part in getattr(delta, "deltas", (delta,)):
            if isinstance(part, NASLoRADelta):
                found[path] = part
    return found


def architecture(peft: Any, derive: Derive = "mixture") -> dict[str, Any]:
    """The JSON-able record of the cells in a `peft` tree.

    `operators` of each site is what a run starts from: the mixture that was found, or each edge's
    strongest operator but none. `edges` tells the shares. Raises ValueError where there is no cell,
    and where cells differ in more than their operators.
    """
    found = cells(peft)
    kinds = {(d.space, d.norm, _nodes(d), d.partial) for d in found.values()}
    if not found:
        raise ValueError("it has no searchable cell; nas_lora and nas_pc_lora have")
    if len(kinds) > 1:
        raise ValueError("its cells have different spaces, norms, nodes or partial channels")
    return {
        "schema": 1,
        "derive": derive,
        **dict(zip(_SETTINGS, kinds.pop(), strict=True)),
        "sites": {
            pattern_of(path, delta.segments): {
                "operators": edges_text(derived(delta, derive).found()),
                "edges": [_edge_json(edge) for edge in delta.found()],
            }
            for path, delta in found.items()
        },
    }


def _nodes(delta: NASLoRADelta) -> int:
    nodes = 1
    while nodes * (nodes + 1) // 2 < len(delta.edges):
        nodes += 1
    return nodes


def derived(delta: NASLoRADelta, derive: Derive) -> NASLoRADelta:
    """The cell as it is, or with each edge's strongest operator alone."""
    return delta.strongest() if derive == "strongest" else delta


def derive_adapter(spec: PeftSpec, model: Sam, peft: Any, derive: Derive) -> tuple[PeftSpec, Any]:
    """A trained adapter with its cells derived: its spec, with a rule for each cell, and records.

    Raises ValueError for cells in a Stack.
    """
    sites, records, rules = resolve(spec, model).sites, deltas(peft), []
    flat = flatten_dict(peft, is_leaf=lambda _, node: is_record(node))
    for path, cell in cells(peft).items():
        if records[path] is not cell:
            raise ValueError(f"the cell at {path} is in a Stack, and cannot be derived alone")
        small, (_, rule, segments) = derived(cell, derive), sites[path]
        text = edges_text(small.found())
        rules.append(
            Rule(pattern_of(path, segments), dataclasses.replace(rule.config, operators=text))
        )
        flat[*path.split("/"), "delta"] = small
    others = (rule for rule in spec.rules if not isinstance(rule.config, NASLoRA))
    return PeftSpec((*rules, *others)), unflatten_dict(flat)


def left_out(spec: PeftSpec, model: Sam) -> str:
    """What a user should hear where an architecture names some of a model's layers alone."""
    named = [rule.pattern.partition("[")[0] for rule in spec.rules if _names_a_site(rule)]
    tails = {_tail(path) for path in named}
    alike = [site.path for site in model.sites() if _tail(site.path) in tails]
    missing = [path for path in alike if path.startswith("image_encoder/") and path not in named]
    if not named or not missing:
        return ""
    return (
        f"notice: operators names {len(named)} layers of {model.config.name}, and {len(missing)} "
        f"that are like them, such as {missing[0]}, get no adapter"
    )


def _names_a_site(rule: Rule) -> bool:
    return isinstance(rule.config, NASLoRA) and not set("*{") & set(rule.pattern)


def _tail(path: str) -> str:
    return "/".join(path.split("/")[-2:])


def _edge_json(edge: Edge) -> dict[str, Any]:
    shares = dict(zip(edge.operators, edge.shares or (), strict=True))
    return {"weight": 1.0 if edge.weight is None else edge.weight, "shares": shares}


def read_architecture(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The method settings of a file that holds an `architecture`.

    `settings` are those beside it. Raises FileNotFoundError, and ValueError for a file that is
    none, or that contradicts them.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no architecture at {path}; `samjax arch RUN` writes one")
    record = read_record(path, "write it again with `samjax arch`")
    try:
        sites = {str(site): str(entry["operators"]) for site, entry in record["sites"].items()}
        found = {name: record[name] for name in _SETTINGS}
        numbers = all(type(found[name]) is int for name in ("nodes", "partial"))
        known = record["schema"] == 1 and bool(sites) and numbers
    except (KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise ValueError(f"{path} holds no architecture; `samjax arch RUN` writes one")
    method = settings["method"]
    wants = "nas_pc_lora" if found["partial"] > 1 else "nas_lora"
    if method != wants:
        raise ValueError(f"{path} was found with method {wants}, not {method}")
    if method == "nas_lora":
        del found["partial"]  # which is no setting of it
    for name, value in found.items():
        if settings[name] not in (None, value):
            raise ValueError(
                f"{path} was found with {name} {value}, not {settings[name]}; leave it out"
            )
    return {"operators": sites_text(sites), **found}
