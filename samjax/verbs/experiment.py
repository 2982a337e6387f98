"""What the verbs that take an experiment file share."""

from __future__ import annotations

import sys
from pathlib import Path

from samjax.config import Experiment, load_experiment


def open_experiment(argv: list[str], verb: str, doc: str) -> Experiment:
    """The experiment that the first argument names; without one, help or an error."""
    if not argv or argv[0].startswith("-"):
        if argv and argv[0] in ("-h", "--help"):
            what = "RUN|EXPERIMENT.py" if verb == "eval" else "EXPERIMENT.py"
            sys.stdout.write(
                f"usage: samjax {verb} {what} [OPTIONS]\n\n{doc}\n\n"
                f"`samjax {verb} EXPERIMENT.py --help` lists the settings and their values.\n"
            )
            raise SystemExit(0)
        raise ValueError(f"samjax {verb} needs an experiment file, such as {_EXAMPLES[verb]}")
    if verb == "eval" and not Path(argv[0]).exists():
        raise FileNotFoundError(f"no run folder and no experiment file at {argv[0]}")
    return load_experiment(argv[0])


_POLYPS = "experiments/kvasir_lora.py --weights mobile_sam --data Kvasir-SEG"
_EXAMPLES = {
    "train": "samjax train experiments/demo_nuclei.py",
    "plan": "samjax plan experiments/kvasir_lora.py --topology v5e:4x4",
    "compare": f"samjax compare {_POLYPS} --methods decoder lora",
    "eval": f"samjax eval {_POLYPS}, or a run folder",
}
