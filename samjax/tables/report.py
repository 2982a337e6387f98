"""A table as text and as JSON: published and measured side by side, and where each comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samjax.comparison import Spread
from samjax.config import Config
from samjax.problems import problem_of
from samjax.tables.cells import Cell
from samjax.tables.table import TRAINABLE, Column, Metric, Table


def markdown(table: Table, cells: Sequence[Cell]) -> str:
    """The whole table: a block for each column, its protocol, and notes on what was measured."""
    notes = _Notes()
    parts = [f"# {table.title}", f"Published: {table.source}."]
    for column in dict.fromkeys(cell.column.name for cell in cells):
        parts += _block([cell for cell in cells if cell.column.name == column], notes)
    parts += [f"[{i}] {text}" for i, text in enumerate(notes.texts, start=1)]
    reasons = dict.fromkeys((c.row.name, c.row.unavailable) for c in cells if c.row.unavailable)
    parts += [f"Not available: {name}: {reason}." for name, reason in reasons]
    parts += [f"Failed: {c.row.name} on {c.column.name}: {c.error}" for c in cells if c.error]
    return "\n\n".join((*parts, *table.notes)) + "\n"


class _Notes:
    """Numbered notes; the same text has one number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def _block(cells: Sequence[Cell], notes: _Notes) -> list[str]:
    """One column: a heading, its protocol, and its rows."""
    column = cells[0].column
    heads, places = ["method"], []
    for metric in column.metrics:
        if any(metric.name in cell.published for cell in cells):
            heads += [f"{metric.title}, published", "measured"]
            places.append((metric, True))
        else:
            heads.append(f"{metric.title}, measured")
            places.append((metric, False))
    rows = [heads]
    for cell in cells:
        marks = _marks(cell, notes)
        row = [cell.row.name]
        for metric, both in places:
            published = cell.published.get(metric.name)
            row += [published.text if published else "-"] * both
            row.append(_measured(cell, metric, marks))
        rows.append(row)
    said = [f"Protocol: {protocol(column)}.", *_measured_with(cells)]
    return [f"## {column.title}", "\n".join(said), _aligned(rows)]


def _measured_with(cells: Sequence[Cell]) -> list[str]:
    """With which model and budget a column was measured, where any of it was."""
    found: dict[str, bool] = {}
    for cell in cells:
        if cell.measured is None or cell.state not in ("own", "recorded"):
            continue
        config = cell.measured.config
        text = f"{config.model} at {_said(config.image_size)} px"
        text += "" if cell.column.timed else f", {_length(config)}"
        found[text] = found.get(text, False) or bool(cell.differences())
    unlike = {False: "", True: " (NOT THE PROTOCOL, see the notes)"}
    texts = (text + unlike[differs] for text, differs in found.items())
    return [f"Measured with: {'; '.join(texts)}."] if found else []


def _measured(cell: Cell, metric: Metric, marks: str) -> str:
    value = cell.value(metric.name)
    if metric.name == TRAINABLE and value is not None:
        return _number(value, metric)
    if cell.state in ("own", "recorded"):
        return "-" if value is None else _number(value, metric) + marks
    return cell.state


def _number(value: Spread, metric: Metric) -> str:
    text = f"{value.mean * metric.scale:.{metric.decimals}f}"
    if value.deviation is not None:
        text += f" ± {value.deviation * metric.scale:.{metric.decimals}f}"
    return text


def _marks(cell: Cell, notes: _Notes) -> str:
    """The numbers of a cell's notes: where it was measured, and what is not the protocol's."""
    if cell.measured is None or cell.state not in ("own", "recorded"):
        return ""
    shared, of_method = {}, {}
    for name, pair in cell.differences().items():
        # What a row's method sets differs from row to row.
        own = name.startswith("method.") or name in ("optimizer.learning_rate", "stages")
        (of_method if own else shared)[name] = pair
    numbers = [notes.number(_where(cell) + _unlike(shared))]
    if of_method:
        text = f"run as `{cell.measured.method}`" + _unlike(of_method)
        numbers.append(notes.number(text))
    return f" [{', '.join(map(str, numbers))}]"


def _where(cell: Cell) -> str:
    measured = cell.measured
    assert measured is not None
    seeds = "" if not measured.seeds else f", {_seeds(measured.seeds)}"
    steps = "" if measured.steps is None else f", {measured.steps} steps"
    if measured.folder is not None:
        begin = f"run in {measured.folder}{steps}{seeds}, {measured.date}"
    else:
        begin = f"recorded, {measured.date}{steps}{seeds}"
    weights = Path(measured.config.weights).name
    data = measured.config.data if measured.config.data != cell.column.config.data else ""
    parts = [begin, measured.machine, weights and f"weights {weights}", data and f"data {data}"]
    parts += [measured.command and f"`{measured.command}`", measured.note]
    return "; ".join(part for part in parts if part)


def _seeds(seeds: Sequence[int]) -> str:
    several = "s" if len(seeds) > 1 else ""
    return f"seed{several} {', '.join(map(str, seeds))}"


def _unlike(differences: dict[str, tuple[Any, Any]]) -> str:
    if not differences:
        return ""
    texts = (f"{name} {_said(a)}, not {_said(b)}" for name, (a, b) in differences.items())
    return "; NOT THE PROTOCOL: " + "; ".join(texts)


def _said(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_said, value)) or "none"
    if value is None:
        return "its own"
    return f"{value:g}" if isinstance(value, float) else str(value)


def protocol(column: Column) -> str:
    """What a run of a column is, in one line."""
    config = column.config
    parts = [f"{config.model} at {_said(config.image_size)} px, batch {config.batch_size}"]
    if column.timed:
        return f"{parts[0]}; training steps timed by `samjax bench methods`, random weights"
    rate = column.learning_rate
    parts += [
        _length(config),
        f"learning rate {'of each method' if rate is None else format(rate, 'g')}, of the mask "
        f"decoder {config.optimizer.decoder_learning_rate:g}",
        f"weight decay {config.optimizer.weight_decay:g}",
        *([] if config.tasks else [f"loss {config.loss.kind}"]),
        f"evaluated with {problem_of(config).conditions}",
        f"data {config.data}",
    ]
    return ", ".join(parts)


def _length(config: Config) -> str:
    return f"{config.steps} steps" if config.steps else f"{config.epochs:g} epochs"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    head, *body = ([cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))


def to_json(table: Table, cells: Sequence[Cell]) -> dict[str, Any]:
    """The same; published numbers in the units of the measured ones."""
    return {
        "title": table.title,
        "source": table.source,
        "notes": list(table.notes),
        "cells": [_cell_json(cell) for cell in cells],
        "errors": sum(cell.state == "failed" for cell in cells),
    }


def _cell_json(cell: Cell) -> dict[str, Any]:
    scales = {metric.name: metric.scale for metric in cell.column.metrics}

    def in_units(value: float | None, name: str) -> float | None:
        return None if value is None else float(f"{value / scales[name]:.9g}")

    published = {
        name: {"mean": in_units(p.mean, name), "deviation": in_units(p.deviation, name)}
        for name, p in cell.published.items()
    }
    values = {name: cell.value(name) for name in scales}
    found: dict[str, Any] = {
        "row": cell.row.name,
        "method": cell.row.method,
        "dataset": cell.column.name,
        "state": cell.state,
        "published": published,
        "measured": {n: dataclasses.asdict(value) for n, value in values.items() if value},
    }
    if cell.row.unavailable:
        found["reason"] = cell.row.unavailable
    if cell.error:
        found["error"] = cell.error
    if (measured := cell.measured) is not None:
        found |= {
            "run_as": measured.method,
            "seeds": list(measured.seeds),
            "steps": measured.steps,
            "command": measured.command,
            "date": measured.date,
            "machine": measured.machine,
            "note": measured.note,
            "folder": measured.folder and str(measured.folder),
            "not_the_protocol": {k: list(pair) for k, pair in cell.differences().items()},
        }
    return found
