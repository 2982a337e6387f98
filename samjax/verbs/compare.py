"""`samjax compare`."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from samjax.arguments import Outcome, parse
from samjax.config import Config
from samjax.verbs.experiment import open_experiment


@dataclasses.dataclass(frozen=True)
class Compare:
    """Trains several methods one after another, as an experiment file says, and compares them.

    The same command goes on where an interrupted one stopped, and one with other methods or seeds
    adds to the table: it lists every finished run in OUT of the same experiment. Each run is a
    folder of its own, OUT/METHOD/seed_SEED, as `samjax train` leaves it. All runs have the same
    splits: --split-seed draws them, where the data has none, and no seed of --seeds.

    Example: samjax compare experiments/kvasir_lora.py --weights mobile_sam --data Kvasir-SEG --methods decoder lora "lora:rank=8,targets=q+k+v" --seeds 0 1 2
    """  # noqa: E501

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: Path
    """The folder of the runs and of compare.md, compare.csv, compare.json and compare.png."""
    methods: tuple[str, ...] = ()
    """Names of methods, each alone or with settings: NAME:SETTING=VALUE,SETTING=VALUE; several
    values are joined by +, and learning_rate is a setting, too. Settings and the learning rate of
    the experiment and of flags, such as --rank and --learning-rate, are those of --method, the
    experiment's own method, alone; others have their own defaults. --decoder and
    --decoder-learning-rate hold for all."""
    seeds: tuple[int, ...] = ()
    """Seeds that each method is trained with; left out, the experiment's own."""
    baseline: str | None = None
    """Of dense tasks: the method, written as in --methods, over which the gain of each is told, the
    mean relative gain of its metrics; left out, lora_stl where it is there, else the first."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""


def run(argv: list[str], console: Console) -> Outcome:
    """Reads the experiment and the arguments, and runs the verb."""
    experiment = open_experiment(argv, "compare", inspect.getdoc(Compare) or "")
    out = Path("runs") / f"compare_{Path(argv[0]).stem}"
    default = Compare(config=experiment.config, out=out)
    args = parse(Compare, argv[1:], "samjax compare EXPERIMENT.py", default, experiment.doc)
    from samjax.compare import choose_baseline, compare, earlier_runs, plan

    runs = plan(args.config, args.methods, args.seeds or (args.config.seed,), args.out)
    # Before `prepare`, which may download, only what needs no data and no weights is checked.
    earlier = earlier_runs(args.config, runs, args.out, console)
    baseline = choose_baseline(args.config, runs, earlier, args.baseline)
    experiment.prepare(args.config, console)
    comparison = compare(runs, args.out, console, earlier, baseline)
    comparison.print(console)
    if args.json:
        return comparison.to_json(), True
    return {"table": str(args.out / "compare.md"), "errors": comparison.errors}, False
