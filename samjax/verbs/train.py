"""`samjax train`."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from samjax.arguments import Outcome, parse
from samjax.config import Config
from samjax.hosts import Hosts, in_turn, on_first
from samjax.verbs.experiment import open_experiment
from samjax.verbs.processes import in_processes


@dataclasses.dataclass(frozen=True)
class Train:
    """Fine-tunes as an experiment file says; its settings can be changed by flags.

    Example: samjax train experiments/kvasir_lora.py --weights mobile_sam --data Kvasir-SEG --epochs 5
    """  # noqa: E501

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: Path
    """The run's folder."""
    resume: bool = False
    """Go on where an interrupted run in --out stopped."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""
    hosts: Annotated[Hosts, tyro.conf.arg(name="")] = Hosts()


def run(argv: list[str], console: Console) -> Outcome:
    """Reads the experiment and the arguments, and runs the verb."""
    experiment = open_experiment(argv, "train", inspect.getdoc(Train) or "")
    default = Train(config=experiment.config, out=Path("runs") / Path(argv[0]).stem)
    args = parse(Train, argv[1:], "samjax train EXPERIMENT.py", default, experiment.doc)

    def work(console: Console) -> Outcome:
        from samjax.run import train
        from samjax.run_folder import check_out

        # Before `prepare`, which may download.
        args.config.num_devices()
        on_first(lambda: check_out(args.config, args.out, args.resume))
        in_turn(lambda: experiment.prepare(args.config, console))
        return train(args.config, args.out, resume=args.resume, console=console), args.json

    return in_processes(args.hosts, "train", argv, console, work)
