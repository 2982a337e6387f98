"""`samjax table`."""

from __future__ import annotations

import dataclasses
import difflib
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from tyro.conf import Positional

from samjax.arguments import Outcome, parse
from samjax.config import Config
from samjax.files import check_parent, write_beside

_FOLDER = Path("experiments")
# What only runs take.
_OF_RUNS = ("data", "weights", "model", "image_size", "epochs", "seeds")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a paper: its published numbers, and beside them what was measured.

    Without a name it lists the tables in experiments/. Measured are runs in --runs, and else those
    that are recorded in measured/ beside the table's file; notes say which, and in what they are
    not the paper's protocol. --run runs the cells that are missing, each dataset as `samjax
    compare` does, and goes on where it was stopped. Datasets that are not there are named at once,
    and the cells of the others run.

    Example: samjax table conv_lora_binary --run --datasets kvasir_seg --methods lora conv_lora
    """

    name: Positional[str | None] = None
    """A table's file, or its name in experiments/."""
    run: bool = False
    """Run the missing cells."""
    runs: Path | None = None
    """The folder of the runs, DATASET/METHOD/seed_SEED; left out, runs/NAME."""
    methods: tuple[str, ...] = ()
    """Rows, by name or method; left out, all."""
    datasets: tuple[str, ...] = ()
    """Columns; left out, all."""
    data: tuple[str, ...] = ()
    """Data of the datasets to be run, each DATASET=PATH; left out, tfds:NAME, as prepared by
    `samjax data prepare`."""
    weights: str | None = None
    """Weights to run, a file or a name; left out, the paper's."""
    model: str | None = None
    """What the weights are, such as vit_t; left out, what their name says, else the paper's."""
    image_size: tuple[int, ...] | None = None
    """The model's input in pixels, a side, or height and width; left out, the paper's."""
    epochs: float | None = None
    """Passes over the training split; left out, the paper's."""
    seeds: tuple[int, ...] = ()
    """Seeds of each cell; left out, the table's."""
    record: bool = False
    """Write what the runs in --runs gave into measured/NAME.json beside the table's file."""
    out: Path | None = None
    """A file for the table, as Markdown."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""


def run(argv: list[str], console: Console) -> Outcome:
    """Reads the arguments and runs the verb."""
    args = parse(Table, argv, "samjax table", None, None)
    if args.name is None:
        return _list(args)
    if not args.run and (given := [n for n in _OF_RUNS if getattr(args, n) not in (None, ())]):
        raise ValueError(f"--{given[0].replace('_', '-')} is for cells that run: add --run")
    if args.out is not None:
        check_parent(args.out)
    from samjax.tables.cells import cells_of, record_file
    from samjax.tables.measured import write_recorded
    from samjax.tables.report import markdown, to_json
    from samjax.tables.table import find_table, load_table

    file = find_table(args.name, _FOLDER)
    table = load_table(file)
    rows, columns = table.chosen(args.methods, args.datasets)
    runs = args.runs or Path("runs") / file.stem
    if args.record:
        check_parent(file.parent / "measured")
    failures, missed = {}, 0
    if args.run:
        command = shlex.join(["samjax", "table", *argv])
        failures, missed = _run(args, table, rows, columns, file, runs, command, console)
    cells, notices = cells_of(table, rows, columns, file, runs, failures)
    for notice in notices:
        console.print(notice)
    if args.record:
        own = [cell.measured for cell in cells if cell.measured and cell.measured.folder]
        if not own:
            raise ValueError(f"nothing to record: {runs} holds no finished run of this table")
        write_recorded(record_file(file), own)
        console.print(f"{len(own)} cells are recorded in {record_file(file)}")
    text = markdown(table, cells)
    if args.out is not None:
        with write_beside(args.out) as temporary:
            temporary.write_text(text, encoding="utf-8")
    result = to_json(table, cells)
    result["errors"] += missed
    if args.json:
        return result, True
    sys.stdout.write(text)
    said: dict[str, Any] = {} if args.out is None else {"table": str(args.out)}
    return said | ({"errors": result["errors"]} if result["errors"] else {}), False


def _list(args: Table) -> Outcome:
    from samjax.tables.table import tables_in

    tables = tables_in(_FOLDER)
    if not tables:
        raise ValueError(
            f"there are no tables in {_FOLDER.absolute()}: run this where experiments/ is, or name "
            "a table's file"
        )
    return ({"tables": tables}, True) if args.json else (dict(tables), False)


def _run(
    args: Table,
    table: Any,
    rows: Any,
    columns: Any,
    file: Path,
    runs: Path,
    command: str,
    console: Console,
) -> tuple[dict[tuple[str, str], str], int]:
    """The errors by row and column, and how many datasets were not there."""
    from samjax.tables.cells import recorded_beside
    from samjax.tables.missing import check_data, jobs_of, missing, run_jobs

    seeds = args.seeds or table.seeds
    data = _data_of(args.data, [column.name for column in columns])
    recorded = recorded_beside(table, file)
    to_do = {}
    for column in columns:
        config = _with_flags(column.config, args, data.get(column.name))
        column = dataclasses.replace(column, config=config)
        if needed := missing(table, rows, column, seeds, runs, recorded):
            to_do[column.name] = column, needed
    if not to_do:
        console.print("no cell is missing")
        for row in rows:
            if row.unavailable:
                console.print(f"{row.name} cannot be run: {row.unavailable}")
        return {}, 0
    trained = [column for column, _ in to_do.values() if not column.timed]
    usable = check_data(trained, bool(args.datasets), console) if trained else {}
    left = {name: job for name, job in to_do.items() if job[0].timed or name in usable}
    jobs = jobs_of(left, usable, seeds, runs)
    return run_jobs(jobs, runs, command, console), len(to_do) - len(left)


def _data_of(texts: tuple[str, ...], names: list[str]) -> dict[str, str]:
    found = dict(text.partition("=")[::2] for text in texts)
    for name, path in found.items():
        if not path:
            raise ValueError(f"--data takes DATASET=PATH, not {name!r}")
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"--data has no dataset {name!r} to give a path; the nearest is {nearest}, chosen "
                f"are {', '.join(names)}"
            )
    return found


def _with_flags(config: Config, args: Table, data: str | None) -> Config:
    """The protocol with what the command line changes of it."""
    from samjax.catalog import CATALOG

    changes: dict[str, Any] = {} if data is None else {"data": data}
    if args.weights is not None:
        changes["weights"] = args.weights
        if args.weights in CATALOG:
            changes["model"] = CATALOG[args.weights].model
    if args.model is not None:
        changes["model"] = args.model
    if args.image_size is not None:
        if len(args.image_size) > 2:
            raise ValueError("--image-size takes a side, or height and width")
        side = args.image_size[0]
        changes["image_size"] = side if len(args.image_size) == 1 else args.image_size
    if args.epochs is not None:
        changes |= {"epochs": args.epochs, "steps": None}
    return dataclasses.replace(config, **changes)
