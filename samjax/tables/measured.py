"""What was measured: runs in a folder, and the record of earlier ones in a JSON file.

A record lies beside the experiment files, in measured/NAME.json, and `samjax table --record` writes
it:

    {"runs": [{
      "command": ..., "date": ..., "machine": ..., "note": ...,
      "config": the settings that its cells have in common, as in a run's config.json,
      "cells": [{"column": ..., "method": as samjax compare takes it, "seeds": [...],
                 "steps": ..., "metrics": {NAME: {"mean": ..., "deviation": ...}}}]
    }]}

Metrics are as evaluations give them: shares in [0, 1], metres, degrees.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from samjax.compare import label_of
from samjax.comparison import Spread
from samjax.config import Config, read_run_config
from samjax.data.sources import is_tfds
from samjax.files import read_record, write_json, writing
from samjax.method_text import with_method
from samjax.tables.table import SPEED, UNTRAINED, Column, Row, method_in

SUMMARY = "summary.json"
# In a method's folder: the command that last ran it, and where.
COMMAND = "command.json"
# In the folder of a column that is timed: what `samjax bench methods --json` prints.
BENCH = "bench.json"


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the runs of one cell gave."""

    column: str
    method: str  # as it was run
    config: Config  # of its runs, but for method and seed
    seeds: tuple[int, ...]
    metrics: Mapping[str, Spread]
    steps: int | None
    command: str
    date: str
    machine: str
    note: str = ""
    # Its column's, where its runs are; None where they are recorded.
    folder: Path | None = None

    def settings(self) -> dict[str, Any]:
        """All settings of its runs, flat, the method's among them."""
        return flat_settings(self.config, self.method)


# Settings that change nothing in what is measured, or name what a reader has elsewhere.
_ELSEWHERE = frozenset(
    "weights data seed eval_batch_size fsdp attention remat cache_features log_every gallery "
    "checkpoint_every validate_every best_metric metrics accumulate".split()
)


# Settings that an evaluation without training depends on.
_OF_EVALUATION = (
    *("model", "image_size", "objects", "classes", "tasks", "eval_prompt", "eval_box_outward"),
    *("fractions", "split_seed", "test_split", "dtype"),
)


def flat_settings(config: Config, method: str) -> dict[str, Any]:
    """The settings of a run that its result depends on, those in groups as GROUP.NAME.

    Without training, those of the model, the data and the evaluation alone.
    """
    if method != UNTRAINED:
        config = with_method(config, method)
    flat: dict[str, Any] = {}
    for name, value in config.resolved().items():
        if name in _ELSEWHERE:
            continue
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    flat["eval_prompt"] = config.evaluation_prompt
    if config.method.method == "decoder":  # whose rate it is
        flat.pop("optimizer.learning_rate")
    # Steps, where they are set, say what epochs would.
    flat.pop("epochs" if config.steps is not None else "steps")
    if method == UNTRAINED:
        return {name: flat[name] for name in _OF_EVALUATION}
    return flat


def read_runs(folder: Path, row: Row, column: Column) -> tuple[list[Measured], list[str]]:
    """What the finished runs of a cell in a table's folder gave, and notices.

    There is one or none: runs of other settings than the last finished one are left out, with a
    notice. Raises ValueError for a file that is damaged.
    """
    at, method = folder / column.name, method_in(row, column)
    if column.timed:
        return _read_bench(at, method, column), []
    inside = SUMMARY if method == UNTRAINED else f"seed_*/{SUMMARY}"
    files, when = list((at / label_of(method)).glob(inside)), "after"
    if method == UNTRAINED and not files:  # every run is evaluated before training
        files, when = list(at.glob(f"*/seed_*/{SUMMARY}")), "before"
    found = []
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        summary = read_record(file, "delete it, and the same command goes on")
        config = read_run_config(file.parent)
        found.append((file.parent, config, flat_settings(config, method), summary))
    if not found:
        return [], []
    _, config, settings, last = found[-1]
    agree = [run for run in found if run[2] == settings]
    notices = [
        f"not in the table: {run[0]}, whose settings are not those of the last run"
        for run in found
        if run not in agree
    ]
    by_seed = {config.seed: summary[when] for _, config, _, summary in agree}
    # The folder of a run is in that of its method; that of an evaluation alone is one.
    of_last = found[-1][0]
    command = _command(of_last if when == "after" and method == UNTRAINED else of_last.parent)
    return [
        Measured(
            column=column.name,
            method=method,
            config=dataclasses.replace(config, seed=0),
            seeds=() if method == UNTRAINED else tuple(sorted(by_seed)),
            metrics=spreads(list(by_seed.values())),
            steps=None if method == UNTRAINED else last["steps"],
            command=command.get("command", ""),
            date=last["date"],
            machine=command.get("machine", last["device"]),
            folder=at,
        )
    ], notices


def _command(folder: Path) -> dict[str, Any]:
    file = folder / COMMAND
    return read_record(file, "delete it") if file.is_file() else {}


def _read_bench(folder: Path, method: str, column: Column) -> list[Measured]:
    if not (folder / BENCH).is_file():
        return []
    result = read_record(folder / BENCH, "delete it, and the same command times again")
    timed = result["methods"].get(method)
    if timed is None:
        return []
    command = _command(folder / label_of(method))
    images = [result["batch_size"] / seconds for seconds in timed["all_seconds"]]
    speed = Spread(result["batch_size"] / timed["seconds"], statistics.stdev(images))
    return [
        Measured(
            column=column.name,
            method=method,
            config=dataclasses.replace(
                column.config,
                model=result["model"],
                image_size=result["image_size"][0],
                batch_size=result["batch_size"],
            ),
            seeds=(),
            metrics={SPEED: speed},
            steps=None,
            command=command.get("command", ""),
            date=command.get("date", ""),
            machine=command.get("machine", result["device"]),
            folder=folder,
        )
    ]


def spreads(metrics: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Mean and sample deviation of each metric that all have."""
    names = [name for name in metrics[0] if all(name in other for other in metrics)]
    values = {name: [other[name] for other in metrics] for name in names}
    return {
        name: Spread(statistics.fmean(x), statistics.stdev(x) if len(x) > 1 else None)
        for name, x in values.items()
    }


def read_recorded(path: Path) -> list[Measured]:
    """The record in a file, the newest first; [] where there is none.

    Raises ValueError, naming the file, for one that is damaged.
    """
    if not path.is_file():
        return []
    mend = "restore it, or delete it"
    record = read_record(path, mend)
    found = []
    try:
        for run in record["runs"]:
            config = Config.from_json(run["config"])
            for cell in run["cells"]:
                found.append(
                    Measured(
                        column=cell["column"],
                        method=cell["method"],
                        config=config,
                        seeds=tuple(cell["seeds"]),
                        metrics={name: Spread(**value) for name, value in cell["metrics"].items()},
                        steps=cell["steps"],
                        command=run["command"],
                        date=run["date"],
                        machine=run["machine"],
                        note=run["note"],
                    )
                )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): {mend}") from None
    return found


def write_recorded(path: Path, new: Iterable[Measured]) -> int:
    """Puts what was measured into the record in a file, in the place of the same cells' there.

    Returns how many cells are new. The file is whole or as it was. Raises ValueError where what is
    there is damaged, OSError where the disk refuses.
    """
    new = list(new)
    cells = {(m.column, m.method) for m in new}
    kept = [m for m in read_recorded(path) if (m.column, m.method) not in cells]
    runs: dict[str, dict[str, Any]] = {}
    for measured in (*new, *kept):
        head = {
            **{name: getattr(measured, name) for name in ("command", "date", "machine", "note")},
            "config": _portable(measured.config).to_json(),
        }
        run = runs.setdefault(json.dumps(head), {**head, "cells": []})
        run["cells"].append(
            {
                "column": measured.column,
                "method": measured.method,
                "seeds": list(measured.seeds),
                "steps": measured.steps,
                "metrics": {k: dataclasses.asdict(v) for k, v in measured.metrics.items()},
            }
        )
    with writing(path):
        path.parent.mkdir(exist_ok=True)
    write_json(path, {"runs": list(runs.values())})
    return len(new)


def _portable(config: Config) -> Config:
    """The config without its method, and without the paths of the machine that it was run on."""
    plain = Config()
    return dataclasses.replace(
        config,
        method=dataclasses.replace(plain.method, decoder=config.method.decoder),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=None),
        stages=None,
        weights=Path(config.weights).name,
        data=config.data if is_tfds(config.data) else Path(config.data).name,
    )
