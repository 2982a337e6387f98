"""Runs the missing cells of a table, with the machinery of `samjax compare`, a column at a time.

The folder of a table holds that of each column, and that is a comparison: METHOD/seed_SEED, with
compare.md beside them.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from rich.console import Console

from samjax.bench import machine, methods
from samjax.compare import Run, check, choose_baseline, compare, earlier_runs, label_of, plan
from samjax.config import Config
from samjax.data.sources import TFDS, is_tfds
from samjax.files import check_writable, read_record, write_json, writing
from samjax.run import evaluate_weights, open_sources
from samjax.run_folder import with_absolute_paths
from samjax.tables.cells import find_recorded
from samjax.tables.measured import BENCH, COMMAND, SUMMARY, Measured, flat_settings, read_runs
from samjax.tables.table import UNTRAINED, Column, Row, Table, config_in, method_in

_ROUNDS = 5  # of a timing, as `samjax bench methods` has it
# What times must have in common to stand side by side.
_OF_TIMES = ("model", "image_size", "batch_size", "device", "threads", "jax")


def missing(
    table: Table,
    rows: Sequence[Row],
    column: Column,
    seeds: Sequence[int],
    runs: Path,
    recorded: Sequence[Measured],
) -> list[Row]:
    """The rows whose cell in a column is to be run at the column's settings.

    Not those that samjax cannot run, that have a run of every seed in `runs`, or that are recorded
    with these seeds and the very settings: what was measured otherwise is no substitute, and of
    speed what was measured elsewhere.
    """
    found = []
    for row in rows:
        if row.unavailable:
            continue
        config_in(row, column)  # which says where a method cannot be
        wanted = flat_settings(column.config, method_in(row, column))
        there = read_runs(runs, row, column)[0]
        if (before := find_recorded(table, row, column, recorded)) and not column.timed:
            there = [*there, before]
        there = [measured for measured in there if measured.settings() == wanted]
        seedless = column.timed or row.method == UNTRAINED
        if not any(seedless or set(seeds) <= set(m.seeds) for m in there):
            found.append(row)
    return found


def _is_there(row: Row, column: Column, runs: Path) -> bool:
    """Whether an evaluation without training, with the column's settings, is in the runs by now."""
    wanted = flat_settings(column.config, row.method)
    return any(m.settings() == wanted for m in read_runs(runs, row, column)[0])


def check_data(columns: Sequence[Column], asked: bool, console: Console) -> dict[str, int]:
    """How many training images each column has whose data can be used, by name; opens all of it.

    The others are named together: left out with a notice, or, where they are `asked` for by name,
    or are all that there are, a ValueError.
    """
    unprepared, broken, usable = [], [], {}
    for column in columns:
        try:
            if _unprepared(column.config):
                unprepared.append(f"{_dataset(column.config)} for {column.name}")
                continue
            usable[column.name] = len(open_sources(column.config, console)["train"])
        except (ValueError, OSError, RuntimeError) as error:
            broken.append(f"{column.name}: {' '.join(str(error).split())}")
    if unprepared:
        names = ", ".join(dict.fromkeys(unprepared))
        example = unprepared[0].partition(" for ")
        fix = (
            f"run `samjax data prepare {example[0]}` and so on, or give a folder, such as "
            f"--data {example[2]}=PATH"
        )
        broken.insert(0, f"not prepared: {names} ({fix})")
    if broken and (asked or not usable):
        raise ValueError("; ".join(broken))
    for text in broken:
        console.print(f"left out: {text}")
    return usable


def _unprepared(config: Config) -> bool:
    if not is_tfds(config.data):
        return False
    from samjax.data.builders import default_data_dir, prepared_folder

    return not prepared_folder(_dataset(config), default_data_dir()).is_dir()


def _dataset(config: Config) -> str:
    """The dataset of tfds:NAME, or of a part of it, tfds:NAME/PART."""
    return config.data.removeprefix(TFDS).partition("/")[0]


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be done in one column."""

    column: Column
    rows: tuple[Row, ...]  # that are missing
    runs: tuple[Run, ...]  # of trained methods
    train_images: int


def jobs_of(
    columns: Mapping[str, tuple[Column, Sequence[Row]]],
    train_images: Mapping[str, int],
    seeds: Sequence[int],
    runs: Path,
) -> list[Job]:
    """What is to be done, by column and its missing rows, and `check_data`'s counts.

    Raises as `samjax.compare.plan`, where a folder holds a run of other settings, for one.
    """
    check_writable(runs)
    jobs = []
    for column, rows in columns.values():
        texts = [method_in(row, column) for row in rows if row.method != UNTRAINED]
        untrained = runs / column.name / label_of(UNTRAINED)
        if len(texts) < len(rows) and (untrained / SUMMARY).is_file():
            raise ValueError(
                f"{untrained} holds an evaluation of other settings: choose another folder with "
                "--runs, or delete it"
            )
        planned: list[Run] = []
        if texts and not column.timed:
            try:
                planned = plan(column.config, texts, seeds, runs / column.name)
            except ValueError as error:
                raise ValueError(f"{error}; another folder is chosen with --runs") from None
        images = train_images.get(column.name, 0)
        jobs.append(Job(column, tuple(rows), tuple(planned), images))
    return jobs


def run_jobs(
    jobs: Sequence[Job], runs: Path, command: str, console: Console
) -> dict[tuple[str, str], str]:
    """Runs all of it, and returns the errors by row and column: none keeps others from theirs.

    Raises, before any training, ValueError for weights or methods that cannot be used, and
    `samjax.terminal.Interrupted` when the user stops.
    """
    for job in jobs:
        check(job.runs, console, job.train_images)
    failures: dict[tuple[str, str], str] = {}
    for i, job in enumerate(jobs):
        folder = runs / job.column.name
        console.print(f"dataset {i + 1} of {len(jobs)}: {job.column.name}")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        by_text = {method_in(row, job.column): row.name for row in job.rows}
        try:
            for text in by_text:
                if text != UNTRAINED:
                    _note_command(folder / label_of(text), command)
            if job.column.timed:
                _time(job, folder, console)
            if job.runs:
                config = job.column.config
                earlier = earlier_runs(config, job.runs, folder, console)
                baseline = choose_baseline(config, job.runs, earlier, None)
                found = compare(job.runs, folder, console, earlier, baseline)
                failures |= {
                    (by_text[row.method], job.column.name): f"seed {row.seed}: {row.error}"
                    for row in found.rows
                    if row.state == "failed" and row.method in by_text
                }
            for row in job.rows:
                if row.method == UNTRAINED and not _is_there(row, job.column, runs):
                    out = folder / label_of(UNTRAINED)
                    _evaluate(job.column.config, out, console)
                    _note_command(out, command)
        except (ValueError, OSError, MemoryError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            console.print(f"failed: {job.column.name}: {text}")
            for row in job.rows:
                failures.setdefault((row.name, job.column.name), text)
    return failures


def _note_command(folder: Path, command: str) -> None:
    facts = {"device": machine.device_name(), "threads": machine.num_threads()}
    name = machine.described({**facts, "jax": jax.__version__})
    today = datetime.date.today().isoformat()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / COMMAND, {"command": command, "date": today, "machine": name})


def _time(job: Job, folder: Path, console: Console) -> None:
    """Times all of a column's missing rows in turns, which is how they can be compared.

    What was timed before is kept where it is of the same machine.
    """
    config = job.column.config
    texts = [method_in(row, job.column) for row in job.rows]
    side = config.image_size
    assert not isinstance(side, tuple)  # a timed column has none
    result = methods.measure(config.model, side, texts, config.batch_size, _ROUNDS, console)
    if (folder / BENCH).is_file():
        before = read_record(folder / BENCH, "delete it, and the same command times again")
        if all(before.get(key) == result[key] for key in _OF_TIMES):
            result["methods"] = before["methods"] | result["methods"]
        else:
            console.print(f"left out: what {folder / BENCH} had, of another machine or step")
    write_json(folder / BENCH, result)


def _evaluate(config: Config, out: Path, console: Console) -> None:
    """SAM as it is; its folder is like that of a run."""
    console.print("evaluating the weights as they are")
    found = evaluate_weights(config, config.test_split, console)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", with_absolute_paths(config).to_json())
    found.write_csv(out / "eval_test.csv")
    today = datetime.date.today().isoformat()
    summary = {"after": found.mean, "steps": 0, "device": machine.device_name(), "date": today}
    write_json(out / SUMMARY, summary)
