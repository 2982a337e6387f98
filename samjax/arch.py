"""What a search found, shown: the work of `samjax arch`.

architecture.json   what later runs can start from (`--operators FILE`)
architecture.png    each operator's share by layer, at the end and over training
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from samjax import peft as peft_lib
from samjax.config import Config
from samjax.files import write_beside, write_json
from samjax.peft.architecture import Derive, architecture, derive_adapter
from samjax.run import open_model
from samjax.terminal import print_wide

NAME = "architecture"


def find(adapter: Path, derive: Derive) -> dict[str, Any]:
    """The architecture in an adapter file. Raises ValueError where it has none."""
    file = peft_lib.read(adapter)
    try:
        return architecture(peft_lib.records(file), derive)
    except ValueError as error:
        raise ValueError(f"{adapter}: {error}") from None


def write_derived(config: Config, adapter: Path, derive: Derive, out: Path) -> None:
    """Writes a trained adapter with its cells derived, for the weights of `config`."""
    file = peft_lib.read(adapter)
    model, variables = open_model(config, adapter)
    spec, records = derive_adapter(file.spec, model, variables["peft"], derive)
    variables = {"params": variables["params"], "peft": records}
    peft_lib.save(out, spec, model, variables, file.base_sha256, file.metadata)


def edges(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each edge of each site by a short name: its shares, and its weight in its node."""
    named = {}
    for site, entry in found["sites"].items():
        short = site.removeprefix("image_encoder/")
        for i, edge in enumerate(entry["edges"]):
            named[f"{short} edge {i}" if len(entry["edges"]) > 1 else short] = edge
    return named


def entropy(shares: dict[str, float]) -> float:
    """In nats; 0 is one operator alone, log(operators) all of them alike."""
    return -sum(share * math.log(share) for share in shares.values() if share > 0)


def strongest(shares: dict[str, float]) -> str:
    """The operator with the largest share, but none where there is another."""
    return max((name for name in shares if name != "none"), key=shares.__getitem__, default="none")


def operators(found: dict[str, Any]) -> list[str]:
    """The operators that some edge has."""
    return list(dict.fromkeys(n for edge in edges(found).values() for n in edge["shares"]))


def show(found: dict[str, Any], console: Console) -> None:
    """Prints a row an edge: each operator's share, the entropy, the strongest but none."""
    names = operators(found)
    several = found["nodes"] > 1
    table = Table(box=box.SIMPLE)
    table.add_column("layer")
    for name in (*names, "entropy", *(["weight"] if several else [])):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("strongest")
    for edge, entry in edges(found).items():
        shares = entry["shares"]
        cells = [f"{shares[n]:.3f}" if n in shares else "" for n in names]
        cells += [f"{entropy(shares):.3f}", *([f"{entry['weight']:.3f}"] if several else [])]
        table.add_row(edge, *cells, strongest(shares))
    print_wide(table, console)


def agreement(found: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How alike two searches of the same edges and operators ended.

    `same` of `edges` have the same strongest operator, `chance` is how many would by chance;
    `correlation` is that of the shares' logarithms over operators, each edge's mean taken away (1
    alike, 0 unrelated, None where shares do not differ). Raises ValueError for other edges or
    operators.
    """
    pairs = [(edge["shares"], edges(other).get(name)) for name, edge in edges(found).items()]
    if len(pairs) != len(edges(other)) or not all(
        entry is not None and set(entry["shares"]) == set(shares) for shares, entry in pairs
    ):
        raise ValueError("its layers or operators are others; compare searches of one experiment")
    ours, theirs, same, chance = [], [], 0, 0.0
    for shares, entry in pairs:
        assert entry is not None
        same += strongest(shares) == strongest(entry["shares"])
        chance += 1 / max(1, len(shares) - ("none" in shares))
        for values, into in ((shares, ours), (entry["shares"], theirs)):
            logs = np.log(np.maximum([values[name] for name in shares], 1e-12))
            into.extend(logs - logs.mean())
    norm = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
    return {
        "same": same,
        "edges": len(pairs),
        "chance": chance,
        "correlation": float(np.dot(ours, theirs)) / norm if norm else None,
    }


def write(found: dict[str, Any], json_file: Path, metrics: Path | None, plots: bool) -> list[Path]:
    """Writes the JSON, and if `plots` the picture beside it; returns what was written.

    `metrics` is the log of the run, from which the picture's second part comes.
    """
    write_json(json_file, found)
    if not plots:
        return [json_file]
    picture = json_file.with_suffix(".png")
    with write_beside(picture) as temporary:
        _plot(found, [] if metrics is None else history(metrics, found), temporary)
    return [json_file, picture]


def history(metrics: Path, found: dict[str, Any]) -> list[tuple[int, np.ndarray]]:
    """Of each logged step the shares (edges, operators) of the architecture, NaN where none is."""
    names, steps = operators(found), []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        rows = []
        for site, record in found["sites"].items():
            path = site.partition("[")[0]
            for i in range(len(record["edges"])):
                rows.append([entry.get(f"{path}/edge_{i}/{name}", math.nan) for name in names])
        shares = np.array(rows, np.float64)
        if not np.isnan(shares).all():
            steps.append((int(entry["step"]), shares))
    return steps


def _plot(found: dict[str, Any], steps: list[tuple[int, np.ndarray]], path: Path) -> None:
    """Heat maps: edges by operators at the end, and for each operator edges by steps."""
    from matplotlib.figure import Figure

    names, rows = operators(found), edges(found)
    final = np.array([[e["shares"].get(n, math.nan) for n in names] for e in rows.values()])
    panels = len(names) if len(steps) > 1 else 0
    columns = 1 + math.ceil(panels / 2)
    height = max(4.0, 0.22 * len(rows) + 1.5)
    figure = Figure(figsize=(4.5 + 2.6 * (columns - 1), height * (2 if panels else 1)))
    figure.set_layout_engine("constrained")
    grid = figure.add_gridspec(2 if panels else 1, columns)
    axes = figure.add_subplot(grid[:, 0])
    largest = float(np.nanmax(np.stack([final, *(s for _, s in steps)])))
    style: dict[str, Any] = {"aspect": "auto", "vmin": 0.0, "vmax": largest, "cmap": "viridis"}
    image = axes.imshow(final, interpolation="nearest", **style)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
    axes.set_title("shares at the end")
    for i in range(panels):
        axes = figure.add_subplot(grid[i % 2, 1 + i // 2])
        over = np.stack([shares[:, i] for _, shares in steps], axis=1)
        extent = (steps[0][0], steps[-1][0], len(rows) - 0.5, -0.5)
        axes.imshow(over, interpolation="nearest", extent=extent, **style)
        axes.set_title(names[i], fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.set_yticks([])
    figure.colorbar(image, ax=figure.axes, label="share", shrink=0.6)
    figure.savefig(path, format="png", dpi=120)
