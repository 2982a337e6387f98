"""The cells of a table: what was published, and what was measured, here or before."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from samjax import peft as peft_lib
from samjax.comparison import Spread
from samjax.models import MODELS, MSam, Sam
from samjax.tables.measured import Measured, flat_settings, read_recorded, read_runs
from samjax.tables.table import (
    TRAINABLE,
    UNTRAINED,
    Column,
    Published,
    Row,
    Table,
    config_in,
    method_in,
)

State = Literal["own", "recorded", "not run", "failed", "not available"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row in one column."""

    row: Row
    column: Column
    published: Mapping[str, Published]  # by metric
    measured: Measured | None = None
    # Numbers that train at the protocol, where a metric of the column counts them.
    trainable: int | None = None
    error: str = ""  # of a run that failed just now

    @property
    def state(self) -> State:
        """Whether it was measured, and where."""
        if self.row.unavailable:
            return "not available"
        if self.error:
            return "failed"
        if self.measured is None:
            return "not run"
        return "recorded" if self.measured.folder is None else "own"

    def value(self, metric: str) -> Spread | None:
        """The value of a metric, as evaluations give it; None where it is not known."""
        if metric == TRAINABLE:
            return None if self.trainable is None else Spread(self.trainable, None)
        return self.measured and self.measured.metrics.get(metric)

    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Settings in which what was measured differs from the protocol: (measured, protocol)."""
        if self.measured is None:
            return {}
        theirs = flat_settings(self.column.config, method_in(self.row, self.column))
        return _differences(self.measured.settings(), theirs)


def cells_of(
    table: Table,
    rows: Sequence[Row],
    columns: Sequence[Column],
    file: Path,
    runs: Path,
    failures: Mapping[tuple[str, str], str] | None = None,
) -> tuple[list[Cell], list[str]]:
    """The cells, column by column, and notices of runs that are left out.

    Runs in the folder `runs` come before what is recorded beside the table's `file`. `failures`
    are errors by row and column. Raises ValueError for a record or a run that is damaged.
    """
    recorded = recorded_beside(table, file)
    cells, notices = [], []
    for column in columns:
        counted = any(metric.name == TRAINABLE for metric in column.metrics)
        for row in rows:
            cell = Cell(row, column, table.published(row, column))
            if not row.unavailable:
                own, told = read_runs(runs, row, column)
                notices += told
                cell = dataclasses.replace(
                    cell,
                    measured=own[0] if own else find_recorded(table, row, column, recorded),
                    trainable=_trainable(row, column) if counted else None,
                    error=(failures or {}).get((row.name, column.name), ""),
                )
            cells.append(cell)
    return cells, notices


def record_file(file: Path) -> Path:
    """Where the record of a table's own runs is, given the table's file."""
    return file.parent / "measured" / f"{file.stem}.json"


def recorded_beside(table: Table, file: Path) -> list[Measured]:
    """All records that a table reads, its own first."""
    names = dict.fromkeys((file.stem, *table.records))
    files = (record_file(file).with_name(f"{name}.json") for name in names)
    return [measured for path in files for measured in read_recorded(path)]


def find_recorded(
    table: Table, row: Row, column: Column, recorded: Iterable[Measured]
) -> Measured | None:
    """The record of a cell: of its very method, or else of the same one with other settings.

    Of several that have a metric of the column, the one whose settings differ least from the
    protocol's. With another method's settings only where no other row has the same method, since
    the record could be that row's.
    """
    wanted = {metric.name for metric in column.metrics}
    here = [m for m in recorded if m.column == column.name and wanted & m.metrics.keys()]
    method = method_in(row, column)
    found = [m for m in here if m.method in (method, row.method)]
    name = method.partition(":")[0]
    if not found and sum(other.method.partition(":")[0] == name for other in table.rows) == 1:
        found = [m for m in here if m.method.partition(":")[0] == name]
    protocol = flat_settings(column.config, method)
    return min(found, key=lambda m: len(_differences(m.settings(), protocol)), default=None)


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (ours.get(name), theirs.get(name))
        for name in {**theirs, **ours}
        if ours.get(name) != theirs.get(name)
    }


def _trainable(row: Row, column: Column) -> int:
    if row.method == UNTRAINED:
        return 0
    config, known = config_in(row, column), MODELS[column.config.model]
    model = MSam(known, tasks=config.parsed_tasks()) if config.tasks else Sam(known)
    return peft_lib.report(config.spec(), model).trainable
