"""The command line: `samjax VERB ...`; every verb is a dataclass that tyro reads.

Results go to stdout, progress and messages to stderr. With `--json` the last line of stdout is one
JSON object. An error is one sentence on stderr and an exit code other than 0.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional, UseAppendAction

from samjax.arguments import numbers, parse
from samjax.config import Config
from samjax.terminal import Interrupted, notices_on

_HELP = """usage: samjax VERB ...

Segment Anything in JAX, made to be fine-tuned with few parameters.

verbs:
  convert   weights from PyTorch to samjax and back
            samjax convert sam_vit_b_01ec64.pth sam_vit_b
  predict   masks for an image from points and boxes
            samjax predict photo.jpg --weights sam_vit_b --point 320,200,1 --out masks
  train     fine-tune, as an experiment file says
            samjax train experiments/kvasir_lora.py --weights mobile_sam.pt --data Kvasir-SEG
  eval      Dice and IoU of a run, or of an experiment's weights before training
            samjax eval runs/kvasir_lora --split test
  params    how many numbers a method trains
            samjax params --model vit_b --method lora
  merge     fold an adapter into its weights
            samjax merge --weights mobile_sam.pt --adapter runs/kvasir_lora/adapter.safetensors dst

`samjax VERB --help` lists a verb's options.
"""


@dataclasses.dataclass(frozen=True)
class Convert:
    """Converts weights: to a samjax checkpoint, or back to a .safetensors file with Meta's names.

    Example: samjax convert sam_vit_b_01ec64.pth sam_vit_b
    """

    src: Positional[Path]
    """A samjax checkpoint, or a .pth or .safetensors file of SAM, MobileSAM or LiteMedSAM."""
    dst: Positional[Path]
    """Where to write; must not exist."""
    to: Literal["samjax", "meta"] = "samjax"
    """samjax: a checkpoint folder; meta: a .safetensors file for PyTorch."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""

    def run(self, console: Console) -> dict[str, Any]:
        """Writes the converted weights."""
        from samjax.weights import convert

        config = convert(self.src, self.dst, self.to)
        console.print(f"{self.src} holds {config.name}; written to {self.dst}")
        return {"model": config.name, "dst": str(self.dst), "to": self.to}


@dataclasses.dataclass(frozen=True)
class Predict:
    """Predicts masks for an image.

    Without points and boxes there is no prompt: for adapters that were trained so. Points and one
    box together are one prompt; several boxes are several prompts.

    Example: samjax predict photo.jpg --weights sam_vit_b --box 40,30,210,180 --out masks
    """

    image: Positional[Path]
    """An image file."""
    weights: str
    """A samjax checkpoint, or a .pth or .safetensors file."""
    out: Path
    """The folder to write masks and the overlay to; files of the same names are replaced."""
    adapter: Path | None = None
    """An adapter file that `samjax train` wrote for these weights."""
    point: UseAppendAction[tuple[str, ...]] = ()
    """X,Y,LABEL in pixels; label 1 is the object, 0 the background. May be repeated."""
    box: UseAppendAction[tuple[str, ...]] = ()
    """X0,Y0,X1,Y1 in pixels; edges may lie on the image's. May be repeated."""
    multimask: bool = False
    """Three masks per prompt instead of one."""
    image_size: int | None = None
    """Side of the model's input; left out, the adapter's, or the model's own."""
    save_logits: bool = False
    """Write logits.npz: low_res_logits, iou_predictions, image_embeddings."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""

    def run(self, console: Console) -> dict[str, Any]:
        """Writes mask_*.png and overlay.png."""
        from samjax.predict_files import predict_files

        return predict_files(
            self.image,
            self.weights,
            self.out,
            adapter=self.adapter,
            points=[numbers(text, "--point", ("X", "Y", "LABEL")) for text in self.point],
            boxes=[numbers(text, "--box", ("X0", "Y0", "X1", "Y1")) for text in self.box],
            multimask=self.multimask,
            image_size=self.image_size,
            save_logits=self.save_logits,
            console=console,
        )


@dataclasses.dataclass(frozen=True)
class Train:
    """Fine-tunes as an experiment file says; its settings can be changed by flags.

    Example: samjax train experiments/kvasir_lora.py --data Kvasir-SEG --epochs 5 --out runs/k
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: Path
    """The run's folder."""
    resume: bool = False
    """Go on where an interrupted run in --out stopped."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""


@dataclasses.dataclass(frozen=True)
class EvalRun:
    """Evaluates a finished run: Dice and IoU over a split, and a CSV with one row per image.

    Example: samjax eval runs/kvasir_lora --split test
    """

    split: Literal["train", "validation", "test"] = "test"
    """Which part of the data."""
    eval_prompt: Literal["none", "box", "point"] | None = None
    """No prompt, the truth's box or its most central point; left out, as in the run."""
    csv: Path | None = None
    """Where the metrics of each image go; left out, RUN/eval_SPLIT.csv."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""


@dataclasses.dataclass(frozen=True)
class EvalExperiment:
    """Evaluates an experiment's weights as they are, without training.

    Example: samjax eval experiments/kvasir_lora.py --eval-prompt box --image-size 1024
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    split: Literal["train", "validation", "test"] = "test"
    """Which part of the data."""
    csv: Path | None = None
    """Where the metrics of each image go; left out, nowhere."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""


@dataclasses.dataclass(frozen=True)
class Params:
    """Counts what a method trains in a model; needs no weights.

    Example: samjax params --model vit_b --method lora
    """

    method: Annotated[Any, tyro.conf.arg(name="")]
    model: str = "vit_b"
    """vit_b, vit_l, vit_h, vit_t (MobileSAM) or lite_medsam."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""

    def run(self, console: Console) -> dict[str, Any]:
        """Prints the report and the counts."""
        from samjax.models import MODELS, Sam
        from samjax.peft import report

        if self.model not in MODELS:
            raise ValueError(f"unknown model {self.model!r}; known are {', '.join(MODELS)}")
        counts = report(self.method.spec(), Sam(MODELS[self.model]))
        console.print(str(counts))
        names = ("total", "adapter", "decoder", "trainable")
        return {name: getattr(counts, name) for name in names}


@dataclasses.dataclass(frozen=True)
class Merge:
    """Folds an adapter into the weights that it was trained on.

    Example: samjax merge --weights mobile_sam.pt --adapter adapter.safetensors merged
    """

    dst: Positional[Path]
    """Where to write; must not exist."""
    weights: str
    """The weights that the adapter was trained on."""
    adapter: Path
    """An adapter file."""
    to: Literal["samjax", "meta"] = "samjax"
    """samjax: a checkpoint folder; meta: a .safetensors file for PyTorch."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""

    def run(self, console: Console) -> dict[str, Any]:
        """Writes the merged weights."""
        from samjax import peft
        from samjax.loading import load_adapted
        from samjax.weights import check_destination, write_weights

        check_destination(self.dst, self.to)
        model, params, records = load_adapted(self.weights, self.adapter)
        write_weights(self.dst, model.config, peft.merge(model, params, records), self.to)
        if self.to == "meta":
            size = model.config.image_size
            console.print(f"note: the adapter was trained at {size} px, which this file cannot say")
        console.print(f"{self.adapter} merged into {self.weights}; written to {self.dst}")
        return {"model": model.config.name, "dst": str(self.dst), "to": self.to}


def _run_train(argv: list[str], console: Console) -> tuple[dict[str, Any], bool]:
    experiment = _experiment(argv, "train")
    default = Train(config=experiment.config, out=Path("runs") / Path(argv[0]).stem)
    args = parse(Train, argv[1:], "samjax train EXPERIMENT.py", default, experiment.doc)
    from samjax.run import check_out, train

    # Before `prepare`, which may download.
    check_out(args.config, args.out, args.resume)
    experiment.prepare(args.config, console)
    summary = train(args.config, args.out, resume=args.resume, console=console)
    return summary, args.json


def _run_eval(argv: list[str], console: Console) -> tuple[dict[str, Any], bool]:
    from samjax import run

    target = Path(argv[0]) if argv else Path()
    if argv and target.is_dir():
        args = parse(EvalRun, argv[1:], "samjax eval RUN", None, None)
        csv = args.csv or target / f"eval_{args.split}.csv"
        _check_parent(csv)
        result = run.evaluate_run(target, args.split, args.eval_prompt, console)
    else:
        experiment = _experiment(argv, "eval")
        default = EvalExperiment(config=experiment.config)
        prog = "samjax eval EXPERIMENT.py"
        args = parse(EvalExperiment, argv[1:], prog, default, experiment.doc)
        csv = args.csv
        _check_parent(csv)
        experiment.prepare(args.config, console)
        result = run.evaluate_weights(args.config, args.split, console)
    if csv is not None:
        result.write_csv(csv)
    summary = {**result.mean, "images": len(result.names), "csv": str(csv) if csv else None}
    return summary, args.json


def _check_parent(file: Path | None) -> None:
    """Raises, before any work, where a file could not be written."""
    if file is not None and not file.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {file.parent} to write into; create it")


def _experiment(argv: list[str], verb: str) -> Any:
    from samjax.config import load_experiment

    if not argv or argv[0].startswith("-"):
        doc = inspect.getdoc(Train if verb == "train" else EvalRun)
        if argv and argv[0] in ("-h", "--help"):
            what = "EXPERIMENT.py" if verb == "train" else "RUN|EXPERIMENT.py"
            sys.stdout.write(
                f"usage: samjax {verb} {what} [OPTIONS]\n\n{doc}\n\n"
                f"`samjax {verb} EXPERIMENT.py --help` lists the settings and their values.\n"
            )
            raise SystemExit(0)
        raise ValueError(f"samjax {verb} needs an experiment file, such as {_EXAMPLES[verb]}")
    if verb == "eval" and not Path(argv[0]).exists():
        raise FileNotFoundError(f"no run folder and no experiment file at {argv[0]}")
    return load_experiment(argv[0])


_EXAMPLES = {
    "train": "samjax train experiments/demo_nuclei.py",
    "eval": "samjax eval experiments/kvasir_lora.py, or a run folder",
}


def _run_plain(cls: type, default: Any = None) -> Callable[..., tuple[dict[str, Any], bool]]:
    def run(argv: list[str], console: Console) -> tuple[dict[str, Any], bool]:
        args = parse(cls, argv, f"samjax {cls.__name__.lower()}", default, None)
        return args.run(console), args.json

    return run


def _verbs() -> dict[str, Callable[..., tuple[dict[str, Any], bool]]]:
    from samjax.peft.recipes import MethodConfig

    return {
        "convert": _run_plain(Convert),
        "predict": _run_plain(Predict),
        "train": _run_train,
        "eval": _run_eval,
        "params": _run_plain(Params, Params(method=MethodConfig())),
        "merge": _run_plain(Merge),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(_HELP)
        return 0 if arguments else 2
    verbs = _verbs()
    if arguments[0] not in verbs:
        return _fail(f"unknown verb {arguments[0]!r}; samjax has {', '.join(verbs)}")
    try:
        with notices_on(console):
            result, as_json = verbs[arguments[0]](arguments[1:], console)
    except Interrupted as stop:
        return _fail(str(stop), 130)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("SAMJAX_TRACEBACK"):
            raise
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    sys.stdout.write(json.dumps(result) + "\n" if as_json else _plain(result))
    return 0


def _plain(result: dict[str, Any]) -> str:
    def show(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{k} {show(v)}" for k, v in value.items())
        if isinstance(value, list):
            return " ".join(show(v) for v in value)
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    return "".join(f"{key}: {show(value)}\n" for key, value in result.items())


def _fail(message: str, code: int = 1) -> int:
    sys.stderr.write("samjax: " + " ".join(message.split()) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
