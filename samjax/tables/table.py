"""A table of a paper as data: rows, columns with their protocols, and the published numbers.

An experiment file that is a table defines `table() -> Table`. Its docstring tells the protocol,
where the published numbers come from, and which choices are not the paper's.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samjax.config import Config, failures_of, run_file
from samjax.method_text import with_method

# The method of a row that is SAM as it is.
UNTRAINED = "untrained"
# A metric that is counted, in any model, and not measured: how many numbers train.
TRAINABLE = "trainable"
# The metric of a column that is timed.
SPEED = "images_per_second"

_NUMBER = r"-?\d+(?:\.\d+)?"


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of a column, and how the table writes it: the value times `scale`, rounded."""

    # As evaluations call it, such as iou or depth/absolute_error; or `TRAINABLE`, or `SPEED`.
    name: str
    title: str
    scale: float = 100.0
    decimals: int = 1


@dataclasses.dataclass(frozen=True)
class Published:
    """A number of a paper, in the table's own unit, with what stands behind its ±, if anything."""

    mean: float
    deviation: float | None = None
    text: str = ""

    @staticmethod
    def parse(text: str) -> Published:
        """The number of "82.9" or "82.9±0.6". Raises ValueError for anything else."""
        found = re.fullmatch(rf"({_NUMBER})(?:±({_NUMBER}))?", text)
        if found is None:
            raise ValueError(f"a published number is such as 82.9, 82.9±0.6 or -, not {text!r}")
        deviation = None if found[2] is None else float(found[2])
        return Published(float(found[1]), deviation, text.replace("±", " ± "))


@dataclasses.dataclass(frozen=True)
class Row:
    """A row: what the paper calls it, and the method that reproduces it."""

    name: str
    # As `samjax compare` takes it, such as lora:rank=8; or `UNTRAINED`.
    method: str = ""
    # Its numbers as they stand in the paper, over the metrics of all columns, separated by spaces;
    # - where there is none, and nothing at all where the whole row is not known.
    published: str = ""
    # Why samjax cannot run it.
    unavailable: str = ""


@dataclasses.dataclass(frozen=True)
class Column:
    """What the rows are measured on: a dataset with its protocol and its metrics.

    Raises ValueError for a timed one of two sides, since steps are timed on squares.
    """

    # A folder's name, and what --datasets and --data call it.
    name: str
    title: str
    # The protocol: a run but for its method.
    config: Config
    metrics: tuple[Metric, ...]
    # Peak learning rate of what each method adapts; left out, the one that suits the method.
    learning_rate: float | None = None
    # Whether its rows are timed by `samjax bench methods` and not trained on data.
    timed: bool = False

    def __post_init__(self) -> None:
        size = self.config.image_size
        if self.timed and isinstance(size, tuple):
            raise ValueError(f"{self.name} is timed at one side, not at {size[0]} x {size[1]}")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table. Raises ValueError where rows or columns share a name, or a row lacks numbers."""

    title: str
    # Where the published numbers stand.
    source: str
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    # What each cell is run with.
    seeds: tuple[int, ...] = (0,)
    # Names of files of recorded runs beside the table's own, in measured/ beside its file.
    records: tuple[str, ...] = ()
    # What a reader must know, a sentence each.
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, names in (
            ("rows", [row.name for row in self.rows]),
            ("columns", [column.name for column in self.columns]),
        ):
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"two {what} are called {twice[0]!r}: rename one")
        count = sum(len(column.metrics) for column in self.columns)
        for row in self.rows:
            if bool(row.method) == bool(row.unavailable):
                raise ValueError(f"row {row.name!r} needs a method, or why it has none")
            numbers = row.published.split()
            if numbers and len(numbers) != count:
                raise ValueError(
                    f"row {row.name!r} has {len(numbers)} published numbers and the columns have "
                    f"{count} metrics: write - where there is none"
                )
            for number in numbers:
                if number != "-":
                    Published.parse(number)

    def published(self, row: Row, column: Column) -> dict[str, Published]:
        """The numbers of a cell by metric, those that there are."""
        numbers = iter(row.published.split())
        found = {}
        for other in self.columns:
            for metric in other.metrics:
                text = next(numbers, "-")
                if other is column and text != "-":
                    found[metric.name] = Published.parse(text)
        return found

    def chosen(
        self, rows: Sequence[str], columns: Sequence[str]
    ) -> tuple[tuple[Row, ...], tuple[Column, ...]]:
        """Some rows, by name or method, and some columns, in order; all where none are named.

        Raises ValueError for a name that is none of them.
        """
        by_row = {row.method.partition(":")[0]: row for row in reversed(self.rows)}
        by_row |= {key: row for row in self.rows for key in (row.method, row.name)}
        by_row.pop("", None)
        by_column = {column.name: column for column in self.columns}
        some_rows = [_find(by_row, name, "row") for name in rows] or self.rows
        some_columns = [_find(by_column, name, "dataset") for name in columns] or self.columns
        return (
            tuple(row for row in self.rows if row in some_rows),
            tuple(column for column in self.columns if column in some_columns),
        )


def _find(known: Mapping[str, Any], name: str, what: str) -> Any:
    if name in known:
        return known[name]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"this table has no {what} {name!r}; the nearest is {nearest}, and it has "
        f"{', '.join(known)}"
    )


def method_in(row: Row, column: Column) -> str:
    """The method of a cell, as `samjax compare` takes it, at the column's learning rate."""
    name, _, settings = row.method.partition(":")
    if column.learning_rate is None or name in (UNTRAINED, "decoder") or not name:
        return row.method
    if "learning_rate=" in settings:
        return row.method
    parts = [*filter(None, [settings]), f"learning_rate={column.learning_rate:g}"]
    return f"{name}:{','.join(parts)}"


def config_in(row: Row, column: Column) -> Config:
    """The run of a cell, but for its seed. Raises ValueError for a method that cannot be."""
    text = method_in(row, column)
    return column.config if text == UNTRAINED else with_method(column.config, text)


def load_table(path: Path) -> Table:
    """The table that an experiment file is.

    Raises FileNotFoundError, or ValueError for a file that fails or does not define `table`.
    """
    module = run_file(path)
    with failures_of(path):
        found = module.table() if hasattr(module, "table") else None
    if not isinstance(found, Table):
        raise ValueError(f"{path} defines no function table() -> samjax.tables.table.Table")
    return found


def find_table(name: str, folder: Path) -> Path:
    """The file of a table, given its path or its bare name in a folder.

    Raises FileNotFoundError where there is none, with the nearest name in the folder.
    """
    if Path(name).suffix == ".py" or Path(name).is_file():
        return Path(name)
    tables = tables_in(folder)
    if name in tables:
        return folder / f"{name}.py"
    nearest = difflib.get_close_matches(name, tables, n=1, cutoff=0.0)
    raise FileNotFoundError(
        f"there is no table {name!r} in {folder}; "
        + (f"the nearest is {nearest[0]}, and `samjax table` lists all" if nearest else _WHERE)
    )


_WHERE = "run this where that folder is, or give the path of a table's file"


def tables_in(folder: Path) -> dict[str, str]:
    """The tables in a folder, by name, with what each is in a sentence; runs none of the files."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, OSError):
            continue
        functions = [x for x in tree.body if isinstance(x, ast.FunctionDef)]
        if any(x.name == "table" and not x.args.args for x in functions):
            doc = (ast.get_docstring(tree) or "").partition("\n\n")[0]
            found[path.stem] = " ".join(doc.split())
    return found
