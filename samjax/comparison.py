"""What a comparison found, and how it is shown: as text, and as files in its folder.

compare.md    the table of the methods, and of the runs
compare.csv   one row a run
compare.json  both
compare.png   the first metric over the numbers that train
"""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from samjax.config import Config
from samjax.evaluation.task_metrics import relative_gain
from samjax.files import write_beside, write_json
from samjax.problems import problem_of
from samjax.terminal import print_wide
from samjax.training.memory import gigabytes

_UNTRAINED = "before training"
# Of dense tasks: what sums their metrics up, over those of a baseline, in percent.
GAIN = "gain"


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of a run; None is what is not, or not yet."""

    method: str
    seed: int
    run: str
    state: Literal["finished", "failed", "unfinished", "waiting"]
    error: str | None = None
    learning_rate: float | None = None  # of what the method trains
    decoder_learning_rate: float | None = None  # None where the decoder does not train
    trainable: int | None = None  # numbers
    beside_decoder: int | None = None  # of them, what is not the mask decoder's
    before: Mapping[str, float] = dataclasses.field(default_factory=dict)  # metrics
    after: Mapping[str, float] = dataclasses.field(default_factory=dict)
    steps: int | None = None
    steps_per_second: float | None = None  # by the median
    step_bytes: int | None = None
    step_bytes_from: str | None = None  # compiler or estimate
    adapter_file_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Its fields, each metric as METRIC_before and METRIC."""
        fields = dataclasses.asdict(self)
        before, after = fields.pop("before"), fields.pop("after")
        return {**fields, **{f"{name}_before": value for name, value in before.items()}, **after}


@dataclasses.dataclass(frozen=True)
class Spread:
    """A mean over seeds, and the sample's standard deviation where there are several."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        """Four decimals, as metrics have them."""
        deviation = "" if self.deviation is None else f" ± {self.deviation:.4f}"
        return f"{self.mean:.4f}{deviation}"


@dataclasses.dataclass(frozen=True)
class Line:
    """A method over its finished runs."""

    method: str
    seeds: tuple[int, ...]  # of the finished runs
    failed: tuple[int, ...]  # seeds
    learning_rate: float | None
    trainable: int | None
    beside_decoder: int | None
    metrics: Mapping[str, Spread]
    steps_per_second: float | None = None
    step_bytes: int | None = None
    step_bytes_from: str | None = None
    adapter_file_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Its fields, each metric as one of them."""
        fields = dataclasses.asdict(self)
        return {**fields, **fields.pop("metrics")}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs of a comparison as they are at some moment."""

    config: Config  # the experiment's: what the runs have in common
    rows: tuple[Row, ...]
    summaries: tuple[dict[str, Any], ...]  # of the finished runs
    baseline: str | None = None  # the method that the others' `GAIN` is over

    @property
    def errors(self) -> int:
        """How many runs failed."""
        return sum(row.state == "failed" for row in self.rows)

    def lines(self) -> list[Line]:
        """What is before training, where it is known, and then a line for each method."""
        rows = {row.seed: row for row in self.rows if row.before}
        untrained = Line(
            method=_UNTRAINED,
            seeds=tuple(rows),
            failed=(),
            learning_rate=None,
            trainable=0,
            beside_decoder=0,
            metrics=_spreads([row.before for row in rows.values()]),
        )
        methods = dict.fromkeys(row.method for row in self.rows)
        return [untrained] * bool(rows) + [self._line(method) for method in methods]

    def _line(self, method: str) -> Line:
        rows = [row for row in self.rows if row.method == method]
        done = [row for row in rows if row.state == "finished"]
        speeds = _spread([row.steps_per_second for row in done])
        largest = max(done, key=lambda row: row.step_bytes or 0, default=None)
        return Line(
            method=method,
            seeds=tuple(row.seed for row in done),
            failed=tuple(row.seed for row in rows if row.state == "failed"),
            learning_rate=rows[0].learning_rate,
            trainable=done[0].trainable if done else None,
            beside_decoder=done[0].beside_decoder if done else None,
            metrics=_spreads([row.after for row in done]),
            steps_per_second=speeds and speeds.mean,
            step_bytes=largest and largest.step_bytes,
            step_bytes_from=largest and largest.step_bytes_from,
            adapter_file_bytes=max((row.adapter_file_bytes or 0 for row in done), default=None),
        )

    def budget(self) -> str:
        """What the runs have in common, in one line."""
        config = self.config
        steps = _said(str(s["steps"]) for s in self.summaries) or config.steps
        size = _said("x".join(map(str, s["input_size"])) for s in self.summaries)
        seeds = _said(str(row.seed) for row in self.rows)
        decoder = (row.decoder_learning_rate for row in self.rows)
        rates = _said(f"{rate:g}" for rate in decoder if rate is not None)
        parts = [
            f"{steps} steps" if steps else f"{config.epochs:g} epochs",
            f"batch {config.batch_size}",
            f"{size or 'unknown'} px",
            f"weights {config.weights}",
            f"data {config.data} (where it has no splits of its own, split seed "
            f"{config.split_seed} draws them)",
            *([f"mask decoder at learning rate {rates}"] if rates else []),
            f"evaluated with {problem_of(config).conditions}",
            f"device {_said(s['device'] for s in self.summaries) or 'unknown'}",
            f"date {_said(s['date'] for s in self.summaries) or 'unknown'}",
            f"seeds {seeds} (mean ± sample standard deviation over those that a method has)",
        ]
        return "Budget: " + ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """What compare.json holds."""
        return {
            "budget": self.budget(),
            **({"baseline": self.baseline} if self.baseline else {}),
            "methods": [line.to_json() for line in self.lines()],
            "runs": [row.to_json() for row in self.rows],
            "errors": self.errors,
        }

    def print(self, console: Console) -> None:
        """Prints the methods, the budget and what failed."""
        table = Table(box=box.SIMPLE)
        names, *rows = self._table()
        for i, name in enumerate(names):
            table.add_column(name, justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        print_wide(table, console)
        for text in (self.budget(), *self._notes()):
            console.print(text)

    def _notes(self) -> list[str]:
        """What the gain is, where there is one, and what failed."""
        gain = (
            f"{self._titles[GAIN]}: the mean over tasks of the mean relative gain of their metrics "
            f"over the mean of {self.baseline}'s runs, in percent, positive where better"
        )
        failures = [
            f"Failed: {row.method}, seed {row.seed}: {row.error}"
            for row in self.rows
            if row.state == "failed"
        ]
        return [gain] * (GAIN in self._metrics()) + failures

    def markdown(self) -> str:
        """The methods, the budget, the notes, and the runs."""
        runs = [["method", "seed", "run", *(self._titles[m] for m in self._metrics()), "steps/s"]]
        for row in self.rows:
            values = [*(row.after.get(metric) for metric in self._metrics()), row.steps_per_second]
            runs.append([row.method, str(row.seed), row.state, *map(_number, values)])
        parts = [_markdown(self._table()), self.budget(), *self._notes(), _markdown(runs)]
        return "\n\n".join(parts) + "\n"

    def _metrics(self) -> list[str]:
        """Those that some run has, or what a comparison is about, where none has any."""
        known = {name for row in self.rows for name in row.after} or {self.config.best[0]}
        return [name for name in self._titles if name in known]

    @property
    def _titles(self) -> Mapping[str, str]:
        return {**problem_of(self.config).titles, GAIN: f"Δ over {self.baseline} (%)"}

    def _table(self) -> list[list[str]]:
        """The names of the columns, then the cells of each line."""
        metrics = self._metrics()
        names = ["method", "learning rate", "trainable numbers", "beside the decoder", "seeds"]
        names += [*(self._titles[name] for name in metrics), *("steps/s", "memory of a step")]
        return [[*names, "adapter file"], *(_cells(line, metrics) for line in self.lines())]


def with_gains(config: Config, rows: Sequence[Row], baseline: str) -> tuple[Row, ...]:
    """The rows; where the baseline has finished runs, the finished ones have `GAIN` as a metric.

    It is over the mean of the baseline's runs, so that the mean of a method's gains over its seeds
    is the gain of its mean metrics.
    """
    means = _spreads([row.after for row in rows if row.method == baseline and row.after])
    over = {name: spread.mean for name, spread in means.items()}
    if not over:
        return tuple(rows)

    def with_gain(row: Row) -> Row:
        gain = relative_gain(config.parsed_tasks(), row.after, over)
        return dataclasses.replace(row, after={**row.after, GAIN: gain})

    return tuple(with_gain(row) if row.after else row for row in rows)


def write(comparison: Comparison, out: Path, plots: bool) -> None:
    """Writes the files into the folder `out`; the picture, which needs matplotlib, if `plots`."""
    write_json(out / "compare.json", comparison.to_json())
    with write_beside(out / "compare.md") as temporary:
        temporary.write_text(comparison.markdown(), encoding="utf-8")
    with (
        write_beside(out / "compare.csv") as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        rows = [row.to_json() for row in comparison.rows]
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    if plots and comparison.summaries:
        with write_beside(out / "compare.png") as temporary:
            _plot(comparison, temporary)


def _plot(comparison: Comparison, path: Path) -> None:
    """The metric over the numbers that train, a point a method; matplotlib's figures draw with Agg.

    The metric is the one that validations compare.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

    metric = comparison.config.best[0]
    title = problem_of(comparison.config).titles[metric]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", xlabel="trainable numbers", ylabel=f"{title} (test)")
    axes.grid(alpha=0.3)
    counts = []
    for i, line in enumerate(comparison.lines()):
        found = line.metrics.get(metric)
        if found is None:
            continue
        if not line.trainable:
            axes.axhline(found.mean, color="grey", linestyle="--", label=line.method)
            continue
        counts.append(line.trainable)
        style: dict[str, Any] = {"fmt": "osD^v"[i // 10 % 5], "color": f"C{i % 10}", "capsize": 4}
        axes.errorbar(line.trainable, found.mean, found.deviation, label=line.method, **style)
    if counts and max(counts) < 10 * min(counts):  # too few powers of ten to tell them apart
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    # Not beside the points: methods with the same decoder are near each other.
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, format="png", dpi=150)


def _spread(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


def _spreads(rows: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Of each metric that all rows have."""
    if not rows:
        return {}
    known = [name for name in rows[0] if all(name in row for row in rows)]
    spreads = {name: _spread([row[name] for row in rows]) for name in known}
    return {name: spread for name, spread in spreads.items() if spread is not None}


def _cells(line: Line, metrics: Sequence[str]) -> list[str]:
    failed = f" (failed: seed {', '.join(map(str, line.failed))})" if line.failed else ""
    memory = "" if line.step_bytes is None else gigabytes(line.step_bytes)
    return [
        line.method + failed,
        "" if line.learning_rate is None else f"{line.learning_rate:g}",
        *("" if n is None else f"{n:,}" for n in (line.trainable, line.beside_decoder)),
        ", ".join(map(str, line.seeds)),
        *(str(line.metrics.get(name, "failed" if line.failed else "")) for name in metrics),
        "" if line.steps_per_second is None else f"{line.steps_per_second:.3g}",
        memory + (" (estimate)" if line.step_bytes_from == "estimate" else ""),
        "" if not line.adapter_file_bytes else f"{line.adapter_file_bytes / 1e6:.2f} MB",
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _markdown(table: Sequence[Sequence[str]]) -> str:
    names, *rows = table
    rule = ["---", *("--:" for _ in names[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, rule, *rows))


def _said(values: Any) -> str:
    """The different values, in order; one where all agree."""
    return ", ".join(dict.fromkeys(values))
