"""Several methods at one budget: a run of each with each seed, and one table of them all.

The folder of a comparison holds the run folders LABEL/seed_SEED, and, rewritten after each run,

compare.md    the table of the methods, and of the runs
compare.csv   one row a run
compare.json  both
compare.png   Dice over the numbers that train
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from samjax import peft as peft_lib
from samjax.config import Config
from samjax.files import check_writable, read_record, write_beside, write_json, writing
from samjax.lock import check_free, run_lock
from samjax.method_text import with_method
from samjax.peft.recipes import RECIPES
from samjax.run import BEFORE, changed_setting, check_out, open_model, open_sources, train
from samjax.terminal import Interrupted
from samjax.training.memory import gigabytes

_SUMMARY = "summary.json"
_BASELINE = "before training"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a comparison."""

    method: str  # as it was asked for
    config: Config
    out: Path

    @property
    def started(self) -> bool:
        """Whether its folder is one that a run goes on in."""
        return (self.out / "config.json").is_file()

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return (self.out / _SUMMARY).is_file()


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of a run; None is what is not, or not yet."""

    method: str
    seed: int
    run: str
    state: Literal["finished", "failed", "waiting"]
    error: str | None = None
    learning_rate: float | None = None  # of what the method trains
    decoder_learning_rate: float | None = None  # None where the decoder does not train
    trainable: int | None = None  # numbers
    dice_before: float | None = None
    iou_before: float | None = None
    dice: float | None = None
    iou: float | None = None
    steps: int | None = None
    steps_per_second: float | None = None  # by the median
    step_bytes: int | None = None
    step_bytes_from: str | None = None  # compiler or estimate
    adapter_file_bytes: int | None = None


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
    dice: Spread | None
    iou: Spread | None
    steps_per_second: float | None = None
    step_bytes: int | None = None
    step_bytes_from: str | None = None
    adapter_file_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs of a comparison as they are at some moment."""

    config: Config  # the experiment's: what the runs have in common
    rows: tuple[Row, ...]
    summaries: tuple[dict[str, Any], ...]  # of the finished runs

    @property
    def errors(self) -> int:
        """How many runs failed."""
        return sum(row.state == "failed" for row in self.rows)

    def lines(self) -> list[Line]:
        """The baseline, where it is known, and then a line for each method."""
        rows = {row.seed: row for row in self.rows if row.dice_before is not None}
        baseline = Line(
            method=_BASELINE,
            seeds=tuple(rows),
            failed=(),
            learning_rate=None,
            trainable=0,
            dice=_spread([row.dice_before for row in rows.values()]),
            iou=_spread([row.iou_before for row in rows.values()]),
        )
        methods = dict.fromkeys(row.method for row in self.rows)
        return [baseline] * bool(rows) + [self._line(method) for method in methods]

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
            dice=_spread([row.dice for row in done]),
            iou=_spread([row.iou for row in done]),
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
            f"evaluated with prompt {config.evaluation_prompt}",
            f"device {_said(s['device'] for s in self.summaries) or 'unknown'}",
            f"date {_said(s['date'] for s in self.summaries) or 'unknown'}",
            f"seeds {seeds} (mean ± sample standard deviation over those that a method has)",
        ]
        return "Budget: " + ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """What compare.json holds."""
        return {
            "budget": self.budget(),
            "methods": [dataclasses.asdict(line) for line in self.lines()],
            "runs": [dataclasses.asdict(row) for row in self.rows],
            "errors": self.errors,
        }

    def print(self, console: Console) -> None:
        """Prints the methods, the budget and what failed."""
        table = Table(box=box.SIMPLE)
        for i, name in enumerate(_COLUMNS):
            table.add_column(name, justify="right" if i else "left", overflow="fold")
        for line in self.lines():
            table.add_row(*_cells(line))
        # As wide as it needs to be: what is no terminal counts as a narrow one.
        table.width = console.measure(table, options=console.options.update(width=200)).maximum
        console.print(table, crop=False)
        for text in (self.budget(), *self._failures()):
            console.print(text)

    def _failures(self) -> list[str]:
        return [
            f"Failed: {row.method}, seed {row.seed}: {row.error}"
            for row in self.rows
            if row.state == "failed"
        ]

    def markdown(self) -> str:
        """The methods, the budget, what failed, and the runs."""
        methods = _markdown(_COLUMNS, [_cells(line) for line in self.lines()])
        runs = [
            [row.method, str(row.seed), row.state, *(_number(v) for v in _metrics(row))]
            for row in self.rows
        ]
        names = ["method", "seed", "run", "Dice before", "IoU before", "Dice", "IoU", "steps/s"]
        parts = [methods, self.budget(), *self._failures(), _markdown(names, runs)]
        return "\n\n".join(parts) + "\n"


_COLUMNS = (
    *("method", "learning rate", "trainable numbers", "seeds", "Dice", "IoU"),
    *("steps/s", "memory of a step", "adapter file"),
)


def plan(config: Config, methods: Sequence[str], seeds: Sequence[int], out: Path) -> list[Run]:
    """The runs: every method with the first seed, then with the next.

    Raises ValueError for a method, a setting or a seed that cannot be, FileExistsError and
    ValueError where a folder holds something else, and PermissionError where `out` is read-only.
    """
    if not methods:
        raise ValueError(f"no methods: pass --methods with some of {', '.join(RECIPES)}")
    for name, values in (("methods", methods), ("seeds", seeds)):
        if len(set(values)) < len(values):
            twice = next(value for value in values if list(values).count(value) > 1)
            raise ValueError(f"{name} has {twice} twice: leave one out")
    configs = {text: with_method(config, text) for text in methods}
    labels: dict[str, str] = {}
    for i, text in enumerate(methods):
        other = labels.setdefault(_label(text).lower(), text)  # some file systems ignore case
        resolved = configs[text].resolved()
        same = next((t for t in methods[:i] if configs[t].resolved() == resolved), other)
        if same != text:
            raise ValueError(f"{same} and {text} are the same method: leave one out")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose a folder with --out")
    check_free(out)
    check_writable(out)
    runs = [
        Run(
            text, dataclasses.replace(configs[text], seed=seed), out / _label(text) / f"seed_{seed}"
        )
        for seed in seeds
        for text in methods
    ]
    for run in runs:
        check_out(run.config, run.out, resume=run.started)
    return runs


def _label(text: str) -> str:
    """A method as a folder's name."""
    return re.sub(r"[^\w.=+,-]+", "_", text)


def _text(label: str) -> str:
    """The method of a folder's name. Raises ValueError for a name that `_label` does not give."""
    for name in sorted(RECIPES, key=len, reverse=True):  # lora_conv is no lora
        if label == name:
            return name
        if label.startswith(f"{name}_"):
            return f"{name}:{label.removeprefix(f'{name}_')}"
    raise ValueError(f"{label} is no method")


def earlier_runs(config: Config, runs: Sequence[Run], out: Path, console: Console) -> list[Run]:
    """Finished runs of earlier commands in `out` at the budget of `config`, as they were finished.

    Those that are not what the experiment makes of their method and seed now are left out, with a
    sentence.
    """
    planned = {run.out for run in runs}
    files = sorted(out.glob(f"*/seed_*/{_SUMMARY}"), key=lambda file: file.stat().st_mtime)
    found = []
    for folder in (file.parent for file in files if file.parent not in planned):
        try:
            text, seed = _text(folder.parent.name), int(folder.name.removeprefix("seed_"))
            own = dataclasses.replace(with_method(config, text), seed=seed)
            changed = changed_setting(folder, own)
        except ValueError as error:
            changed = str(error)
        if changed:
            console.print(f"not in the table: {folder}: {changed}")
        else:
            found.append(Run(text, own, folder))
    return found


def compare(
    runs: Sequence[Run], out: Path, console: Console, earlier: Sequence[Run] = ()
) -> Comparison:
    """Trains what is not finished of `plan`'s runs, and returns the comparison, which is on disk.

    It shows `earlier_runs` as well. A run that fails does not keep the others from theirs. Raises
    ValueError, before any training, for data, weights or a method that cannot be used, RuntimeError
    where another process compares in `out`, and `samjax.terminal.Interrupted` when the user stops
    it.
    """
    _check(runs, console)
    plots = importlib.util.find_spec("matplotlib") is not None
    if not plots:
        console.print("without matplotlib there is no compare.png: pip install 'samjax[plot]'")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with run_lock(out):
        failures: dict[Path, str] = {}
        # By the first seed the methods stand as they were asked for, whichever command did.
        shown = sorted((*earlier, *runs), key=lambda run: run.config.seed)
        comparison = _gather(shown, failures)
        _write(comparison, out, plots)
        for i, run in enumerate(runs):
            if run.finished:
                continue
            console.print(f"run {i + 1} of {len(runs)}: {run.method}, seed {run.config.seed}")
            try:
                _train(run, shown, console)
            except (Interrupted, KeyboardInterrupt):
                raise Interrupted(
                    f"stopped in {run.out}, whose state is saved; the same command goes on"
                ) from None
            except (ValueError, OSError, RuntimeError, MemoryError) as error:
                # Its text alone: the traceback would keep the run's arrays.
                failures[run.out] = " ".join(str(error).split()) or type(error).__name__
                console.print(f"failed: {failures[run.out]}")
            comparison = _gather(shown, failures)
            _write(comparison, out, plots)
        return comparison


def _check(runs: Sequence[Run], console: Console) -> None:
    """Raises where data, weights or methods of runs that are to be done cannot be used."""
    unfinished = [run for run in runs if not run.finished]
    if not unfinished:
        return
    open_sources(unfinished[0].config, console)
    model, _ = open_model(unfinished[0].config)
    for run in {run.method: run for run in unfinished}.values():
        try:
            peft_lib.report(run.config.method.spec(), model)
        except ValueError as error:
            raise ValueError(f"{run.method}: {error}") from None


def _train(run: Run, runs: Sequence[Run], console: Console) -> None:
    same_seed = (x.out for x in runs if x.config.seed == run.config.seed and x.out != run.out)
    before_in = next((folder for folder in same_seed if (folder / BEFORE).is_file()), None)
    train(run.config, run.out, resume=run.started, console=console, before_in=before_in)


def _gather(runs: Sequence[Run], failures: dict[Path, str]) -> Comparison:
    rows, summaries = [], []
    for run in runs:
        config = run.config
        row = Row(
            run.method,
            config.seed,
            str(run.out),
            "waiting",
            learning_rate=config.learning_rate,
            decoder_learning_rate=(
                None if config.method.decoder == "none" else config.optimizer.decoder_learning_rate
            ),
        )
        if run.out in failures:
            row = dataclasses.replace(row, state="failed", error=failures[run.out])
        elif run.finished:
            summary = read_record(run.out / _SUMMARY, "delete it, and the same command goes on")
            summaries.append(summary)
            seconds = summary["seconds_per_step"]
            row = dataclasses.replace(
                row,
                state="finished",
                trainable=summary.get("trainable"),
                dice_before=summary["before"]["dice"],
                iou_before=summary["before"]["iou"],
                dice=summary["after"]["dice"],
                iou=summary["after"]["iou"],
                steps=summary["steps"],
                steps_per_second=1 / seconds if seconds else None,
                step_bytes=summary.get("step_bytes"),
                step_bytes_from=summary.get("step_bytes_from"),
                adapter_file_bytes=summary["file_bytes"],
            )
        rows.append(row)
    return Comparison(runs[0].config, tuple(rows), tuple(summaries))


def _write(comparison: Comparison, out: Path, plots: bool) -> None:
    write_json(out / "compare.json", comparison.to_json())
    with write_beside(out / "compare.md") as temporary:
        temporary.write_text(comparison.markdown(), encoding="utf-8")
    with (
        write_beside(out / "compare.csv") as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in comparison.rows)
    if plots and comparison.summaries:
        with write_beside(out / "compare.png") as temporary:
            _plot(comparison, temporary)


def _plot(comparison: Comparison, path: Path) -> None:
    """Dice over the numbers that train, a point a method; matplotlib's figures draw with Agg."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", xlabel="trainable numbers", ylabel="Dice (test)")
    axes.grid(alpha=0.3)
    counts = []
    for i, line in enumerate(comparison.lines()):
        if line.dice is None:
            continue
        if not line.trainable:
            axes.axhline(line.dice.mean, color="grey", linestyle="--", label=line.method)
            continue
        counts.append(line.trainable)
        style: dict[str, Any] = {"fmt": "osD^v"[i // 10 % 5], "color": f"C{i % 10}", "capsize": 4}
        axes.errorbar(
            line.trainable, line.dice.mean, line.dice.deviation, label=line.method, **style
        )
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


def _cells(line: Line) -> list[str]:
    failed = f" (failed: seed {', '.join(map(str, line.failed))})" if line.failed else ""
    memory = "" if line.step_bytes is None else gigabytes(line.step_bytes)
    return [
        line.method + failed,
        "" if line.learning_rate is None else f"{line.learning_rate:g}",
        "" if line.trainable is None else f"{line.trainable:,}",
        ", ".join(map(str, line.seeds)),
        str(line.dice or ("failed" if line.failed else "")),
        str(line.iou or ("failed" if line.failed else "")),
        "" if line.steps_per_second is None else f"{line.steps_per_second:.3g}",
        memory + (" (estimate)" if line.step_bytes_from == "estimate" else ""),
        "" if not line.adapter_file_bytes else f"{line.adapter_file_bytes / 1e6:.2f} MB",
    ]


def _metrics(row: Row) -> tuple[float | None, ...]:
    return row.dice_before, row.iou_before, row.dice, row.iou, row.steps_per_second


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("--:" for _ in names[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, rule, *rows))


def _said(values: Any) -> str:
    """The different values, in order; one where all agree."""
    return ", ".join(dict.fromkeys(values))
