"""`samjax plan`."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated

import tyro
from rich.console import Console

from samjax.arguments import Outcome, parse
from samjax.config import Config
from samjax.verbs.experiment import open_experiment


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tells what a run needs of each device, and what devices exchange; needs no weights and no data.

    The training and the evaluation step are compiled and not run: for the devices at hand, or for
    TPUs that are not there (which takes the extra `plan`). A batch that is not given is one image a
    device. The step is the one that begins with images, even where a run would train from cached
    features.

    Example: samjax plan experiments/kvasir_lora.py --topology v5e:4x4 --model vit_b --image-size 1024
    """  # noqa: E501

    config: Annotated[Config, tyro.conf.arg(name="")]
    topology: str | None = None
    """TPUs to compile for, KIND:SHAPE, such as v5e:4x4 or v5e:16x16; left out, the devices here."""
    max_batch: bool = False
    """Search the largest batch that fits; each size that is tried is compiled, for minutes."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""


def run(argv: list[str], console: Console) -> Outcome:
    """Reads the experiment and the arguments, and runs the verb."""
    experiment = open_experiment(argv, "plan", inspect.getdoc(Plan) or "")
    default = Plan(config=experiment.config)
    args = parse(Plan, argv[1:], "samjax plan EXPERIMENT.py", default, experiment.doc)
    flags = {argument.partition("=")[0].replace("_", "-") for argument in argv[1:]}
    given = "--batch-size" in flags
    if given and args.max_batch:
        raise ValueError("--max-batch searches the batch: leave out --batch-size")
    from samjax.plan import make_plan
    from samjax.plan_report import show, to_json

    plan = make_plan(
        args.config, args.topology, console, one_each=not given, max_batch=args.max_batch
    )
    show(plan, console)
    return (to_json(plan) if args.json else {}), args.json
