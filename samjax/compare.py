"""Several methods at one budget: a run of each with each seed, and one table of them all.

The folder of a comparison holds the run folders LABEL/seed_SEED, and the files of
`samjax.comparison`, rewritten after each run.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from samjax import peft as peft_lib
from samjax.comparison import Comparison, Row, with_gains, write
from samjax.config import Config
from samjax.files import check_writable, read_record, writing
from samjax.lock import check_free, run_lock
from samjax.method_text import with_method
from samjax.peft.recipes import RECIPES
from samjax.run import BEFORE, open_model, open_sources, train
from samjax.run_folder import changed_setting, check_out
from samjax.terminal import Interrupted
from samjax.training.loop import check_stages

_SUMMARY = "summary.json"
# What dense tasks are measured against, where nothing else is asked for: no task is helped, and
# none is harmed by another.
_BASELINE = "lora_stl"


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
        other = labels.setdefault(label_of(text).lower(), text)  # some file systems ignore case
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
            text,
            dataclasses.replace(configs[text], seed=seed),
            out / label_of(text) / f"seed_{seed}",
        )
        for seed in seeds
        for text in methods
    ]
    for run in runs:
        check_out(run.config, run.out, resume=run.started)
    return runs


def label_of(text: str) -> str:
    """A method, given as its text, as a folder's name."""
    return re.sub(r"[^\w.=+,-]+", "_", text)


def _text(label: str) -> str:
    """The method of a folder's name. Raises ValueError for a name that `label_of` does not give."""
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
        except (ValueError, OSError) as error:
            changed = str(error)
        if changed:
            console.print(f"not in the table: {folder}: {changed}")
        else:
            found.append(Run(text, own, folder))
    return found


def choose_baseline(
    config: Config, runs: Sequence[Run], earlier: Sequence[Run], asked: str | None
) -> str | None:
    """The method of a comparison of dense tasks that the others' gain is over.

    The one `asked` for, else lora_stl with whatever settings, else the first; None for masks.
    Raises ValueError where a baseline is asked for that is not there, or of masks.
    """
    if not config.tasks:
        if asked is not None:
            raise ValueError("a baseline is what dense tasks are measured against: leave it out")
        return None
    methods = list(dict.fromkeys(run.method for run in _shown(runs, earlier)))
    if asked is None:
        return next((text for text in methods if text.split(":")[0] == _BASELINE), methods[0])
    if asked not in methods:
        nearest = difflib.get_close_matches(asked, methods, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"the baseline {asked!r} is no method of this comparison; the nearest is {nearest}, "
            f"and it has {', '.join(methods)}"
        )
    return asked


def _shown(runs: Sequence[Run], earlier: Sequence[Run]) -> list[Run]:
    """By the first seed the methods stand as they were asked for, whichever command did."""
    return sorted((*earlier, *runs), key=lambda run: run.config.seed)


def compare(
    runs: Sequence[Run],
    out: Path,
    console: Console,
    earlier: Sequence[Run] = (),
    baseline: str | None = None,
) -> Comparison:
    """Trains what is not finished of `plan`'s runs, and returns the comparison, which is on disk.

    It shows `earlier_runs` as well, and the gain over a `baseline` of `choose_baseline`.
    A run that fails does not keep the others from theirs. Raises ValueError, before any training,
    for data, weights or a method that cannot be used, RuntimeError where another process compares
    in `out`, and `samjax.terminal.Interrupted` when the user stops it.
    """
    check(runs, console)
    plots = importlib.util.find_spec("matplotlib") is not None
    if not plots:
        console.print("without matplotlib there is no compare.png: pip install 'samjax[plot]'")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with run_lock(out):
        failures: dict[Path, str] = {}
        shown = _shown(runs, earlier)
        comparison = _gather(shown, failures, baseline)
        write(comparison, out, plots)
        for i, run in enumerate(runs):
            if run.finished:
                continue
            console.print(f"run {i + 1} of {len(runs)}: {run.method}, seed {run.config.seed}")
            try:
                _train(run, shown, console)
            except (Interrupted, KeyboardInterrupt):
                write(_gather(shown, failures, baseline), out, plots)
                raise Interrupted(
                    f"stopped in {run.out}; the same command goes on from what it has saved"
                ) from None
            except (ValueError, OSError, RuntimeError, MemoryError) as error:
                # Its text alone: the traceback would keep the run's arrays.
                failures[run.out] = " ".join(str(error).split()) or type(error).__name__
                console.print(f"failed: {failures[run.out]}")
            comparison = _gather(shown, failures, baseline)
            write(comparison, out, plots)
        return comparison


def check(runs: Sequence[Run], console: Console, train_images: int | None = None) -> None:
    """Raises ValueError where data, weights or methods of runs to be done cannot be used.

    The data is opened, but where it is known how many images it has to train on.
    """
    unfinished = [run for run in runs if not run.finished]
    if not unfinished:
        return
    if train_images is None:
        train_images = len(open_sources(unfinished[0].config, console)["train"])
    model, _ = open_model(unfinished[0].config)
    for run in {run.method: run for run in unfinished}.values():
        try:
            run.config.num_devices()
            spec = run.config.spec()
            peft_lib.report(spec, model)
            check_stages(run.config, model, spec, train_images)
        except ValueError as error:
            raise ValueError(f"{run.method}: {error}") from None


def _train(run: Run, runs: Sequence[Run], console: Console) -> None:
    same_seed = (x.out for x in runs if x.config.seed == run.config.seed and x.out != run.out)
    before_in = next((folder for folder in same_seed if (folder / BEFORE).is_file()), None)
    train(run.config, run.out, resume=run.started, console=console, before_in=before_in)


def _gather(runs: Sequence[Run], failures: dict[Path, str], baseline: str | None) -> Comparison:
    rows, summaries = [], []
    for run in runs:
        config = run.config
        row = Row(
            run.method,
            config.seed,
            str(run.out),
            "unfinished" if run.started else "waiting",
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
                beside_decoder=summary.get("beside_decoder"),
                before=summary["before"],
                after=summary["after"],
                steps=summary["steps"],
                steps_per_second=1 / seconds if seconds else None,
                step_bytes=summary.get("step_bytes"),
                step_bytes_from=summary.get("step_bytes_from"),
                adapter_file_bytes=summary["file_bytes"],
            )
        rows.append(row)
    if baseline is not None:
        rows = with_gains(runs[0].config, rows, baseline)
    return Comparison(runs[0].config, tuple(rows), tuple(summaries), baseline)
