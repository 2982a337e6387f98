"""`samjax eval`."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from samjax.arguments import Outcome, parse
from samjax.config import Config
from samjax.files import check_parent
from samjax.hosts import Hosts, in_turn, on_first
from samjax.verbs.experiment import open_experiment
from samjax.verbs.processes import in_processes

if TYPE_CHECKING:
    from samjax.evaluation.evaluate import Evaluation


@dataclasses.dataclass(frozen=True)
class EvalRun:
    """Evaluates a finished run: its metrics over a split (by default Dice, IoU, S-measure, mean
    E-measure, weighted F-measure and MAE), and a CSV with one row per image, or, with objects each,
    per object. Of dense tasks, all metrics of each.

    Example: samjax eval runs/kvasir_lora --split test
    """

    split: Literal["train", "validation", "test"] | None = None
    """Which part of the data; left out, the run's test_split, which is test but for some sets."""
    eval_prompt: Literal["none", "box", "point"] | None = None
    """No prompt, the truth's box or its most central point; left out, as in the run."""
    eval_box_outward: int | None = None
    """The most pixels of the model's input by which a box's edges move outward; left out, as in
    the run, or 0 with an eval_prompt."""
    metrics: tuple[str, ...] | None = None
    """What is measured of masks, by the names in docs/metrics.md; left out, as in the run."""
    adapter: Path | None = None
    """Another adapter than the run's own, such as one that `samjax arch` derived from it."""
    weights: str | None = None
    """Where the run's weights are now; left out, where they were."""
    data: str | None = None
    """Where the data is now; left out, where it was."""
    csv: Path | None = None
    """Where the metrics of each image go; left out, RUN/eval_SPLIT_PROMPT.csv (of dense tasks
    eval_SPLIT.csv), with the pixels of eval_box_outward and the name of another adapter at its
    end."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""
    hosts: Annotated[Hosts, tyro.conf.arg(name="")] = Hosts()


@dataclasses.dataclass(frozen=True)
class EvalExperiment:
    """Evaluates an experiment's weights as they are, without training.

    Example: samjax eval experiments/kvasir_lora.py --weights mobile_sam --data Kvasir-SEG --eval-prompt box --image-size 1024
    """  # noqa: E501

    config: Annotated[Config, tyro.conf.arg(name="")]
    split: Literal["train", "validation", "test"] | None = None
    """Which part of the data; left out, the run's test_split, which is test but for some sets."""
    csv: Path | None = None
    """Where the metrics of each image go; left out, nowhere."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""
    hosts: Annotated[Hosts, tyro.conf.arg(name="")] = Hosts()


def run(argv: list[str], console: Console) -> Outcome:
    """Reads the run or the experiment and the arguments, and runs the verb."""
    if argv and Path(argv[0]).is_dir():
        of_run = parse(EvalRun, argv[1:], "samjax eval RUN", None, None)
        target = Path(argv[0])
        return in_processes(
            of_run.hosts, "eval", argv, console, lambda console: _eval_run(target, of_run, console)
        )
    experiment = open_experiment(argv, "eval", inspect.getdoc(EvalRun) or "")
    default = EvalExperiment(config=experiment.config)
    args = parse(EvalExperiment, argv[1:], "samjax eval EXPERIMENT.py", default, experiment.doc)

    def work(console: Console) -> Outcome:
        from samjax.run import evaluate_weights

        on_first(lambda: _check_csv(args.csv))
        in_turn(lambda: experiment.prepare(args.config, console))
        result = evaluate_weights(args.config, args.split or args.config.test_split, console)
        return _outcome(result, args.csv), args.json

    return in_processes(args.hosts, "eval", argv, console, work)


def _eval_run(target: Path, args: EvalRun, console: Console) -> Outcome:
    from samjax.run import evaluate_run
    from samjax.run_folder import finished_run_config

    outward = args.eval_box_outward
    config = finished_run_config(
        target,
        eval_prompt=args.eval_prompt,
        eval_box_outward=0 if outward is None and args.eval_prompt else outward,
        metrics=args.metrics,
        weights=args.weights,
        data=args.data,
    )
    mark = f"_{args.adapter.stem}" if args.adapter else ""
    prompt = "" if config.tasks else f"_{config.evaluation_prompt}{config.eval_box_outward or ''}"
    split = args.split or config.test_split
    csv = args.csv or target / f"eval_{split}{prompt}{mark}.csv"
    on_first(lambda: _check_csv(csv))
    result = evaluate_run(target, config, split, console, args.adapter)
    return _outcome(result, csv), args.json


def _outcome(result: Evaluation, csv: Path | None) -> dict[str, Any]:
    if csv is not None:
        on_first(lambda: result.write_csv(csv))
    return {**result.mean, "images": len(result.names), "csv": str(csv) if csv else None}


def _check_csv(csv: Path | None) -> None:
    """Raises, before any work, where the metrics could not be written."""
    if csv is None:
        return
    if csv.is_dir():
        raise IsADirectoryError(f"{csv} is a folder; choose a file with --csv")
    check_parent(csv)
