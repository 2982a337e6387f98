"""What a search found, as a record that a later run can start from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from samjax.files import read_record
from samjax.peft.edges import Edge, edges_text, sites_text
from samjax.peft.nas_lora import NASLoRADelta
from samjax.peft.trees import deltas

Derive = Literal["mixture", "strongest"]
_SETTINGS = ("space", "norm", "nodes", "partial")


def cells(peft: Any) -> dict[str, NASLoRADelta]:
    """The searchable cells of a `peft` tree by their site's path."""
    found = deltas(peft)
    return {path: delta for path, delta in found.items() if isinstance(delta, NASLoRADelta)}


def architecture(peft: Any, derive: Derive = "mixture") -> dict[str, Any]:
    """The JSON-able record of the cells in a `peft` tree.

    `operators` of each site is what a run starts from: the mixture that was found, or each edge's
    strongest operator but none. `edges` tells the shares. Raises ValueError where there is no cell.
    """
    found = cells(peft)
    if not found:
        raise ValueError("it has no searchable cell; nas_lora and nas_pc_lora have")
    first = next(iter(found.values()))
    nodes = 1
    while nodes * (nodes + 1) // 2 < len(first.edges):
        nodes += 1
    return {
        "schema": 1,
        "derive": derive,
        "space": first.space,
        "norm": first.norm,
        "nodes": nodes,
        "partial": first.partial,
        "sites": {
            pattern_of(path, delta): {
                "operators": edges_text(derived(delta, derive).found()),
                "edges": [_edge_json(edge) for edge in delta.found()],
            }
            for path, delta in found.items()
        },
    }


def derived(delta: NASLoRADelta, derive: Derive) -> NASLoRADelta:
    """The cell as it is, or with each edge's strongest operator alone."""
    return delta.strongest() if derive == "strongest" else delta


def pattern_of(path: str, delta: NASLoRADelta) -> str:
    """The pattern of a rule for a record's site."""
    return f"{path}[{','.join(delta.segments)}]" if delta.segments else path


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
        known = record["schema"] == 1 and bool(sites) and isinstance(found["partial"], int)
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
    if settings["targets"] is not None:
        raise ValueError(f"{path} names the sites; leave out targets")
    return {"operators": sites_text(sites), **found}
