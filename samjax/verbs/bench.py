"""`samjax bench`: a class of settings for each thing that it measures."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.console import Console

from samjax.arguments import Outcome, parse
from samjax.files import check_parent, write_beside
from samjax.models.attention import AttentionKind
from samjax.nn import Remat

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class _Bench:
    """What all of them have in common: how often, and where the result goes."""

    module: ClassVar[str]  # of `samjax.bench`

    rounds: int = 5
    """How often each is timed, after one round to warm up; medians are reported."""
    out: Path | None = None
    """A file for the table, as Markdown."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""

    def arguments(self) -> tuple[Any, ...]:
        """What `measure` takes before the rounds and the console."""
        raise NotImplementedError

    def run(self, console: Console) -> dict[str, Any]:
        """Prints the table; with `json`, returns what it says and every time that was taken."""
        from samjax.bench.tables import markdown, print_table

        if self.out is not None:
            check_parent(self.out)
        bench = importlib.import_module(f"samjax.bench.{self.module}")
        result = bench.measure(*self.arguments(), self.rounds, console)
        rows, caption = bench.rows(result), bench.caption(result)
        console.print(caption)
        print_table(rows, console)
        if self.out is not None:
            with write_beside(self.out) as temporary:
                temporary.write_text(f"{caption}\n\n{markdown(rows)}", encoding="utf-8")
        if self.json:
            return result
        return {} if self.out is None else {"table": str(self.out)}


@dataclasses.dataclass(frozen=True)
class Encoder(_Bench):
    """Times a model's image encoder with several kinds of attention, dtypes and batch sizes.

    Weights and images are random; nothing is downloaded. Each combination stands beside the first,
    and beside the rate of a large matrix product in its dtype on this machine.

    Example: samjax bench encoder --model vit_b --dtype float32 bfloat16 --batch-size 1 4
    """

    module: ClassVar[str] = "encoder"

    model: str = "vit_b"
    """vit_b, vit_l, vit_h, medsam, vit_t (MobileSAM) or lite_medsam."""
    image_size: int | None = None
    """Side of the model's input in pixels; left out, the model's own."""
    attention: tuple[AttentionKind, ...] | None = None
    """Kinds of attention of a ViT; left out, all."""
    dtype: tuple[Dtype, ...] = ("float32",)
    """Compute dtypes."""
    batch_size: tuple[int, ...] = (1,)
    """Images a call."""

    def arguments(self) -> tuple[Any, ...]:
        """See `_Bench`."""
        return self.model, self.image_size, self.attention, self.dtype, self.batch_size


@dataclasses.dataclass(frozen=True)
class Methods(_Bench):
    """Times the training step of several methods side by side, beside the bounds that FLOPs set.

    Weights, images and masks are random; nothing is downloaded. Steps per second are relative to
    those of a step that trains the mask decoder alone. A bound is what they would be if time went
    by FLOPs alone: of what a method needs, and with the attention that is computed again to save
    memory.

    Example: samjax bench methods --model vit_t --image-size 512 --methods lora lora:rank=64
    """

    module: ClassVar[str] = "methods"

    model: str = "vit_b"
    """vit_b, vit_l, vit_h, medsam, vit_t (MobileSAM) or lite_medsam."""
    image_size: int | None = None
    """Side of the model's input in pixels; left out, the model's own."""
    methods: tuple[str, ...] | None = None
    """Which methods beside decoder, by name, with settings as for `samjax compare`, such as
    lora:rank=8; left out, all."""
    batch_size: int = 1
    """Images a step."""

    def arguments(self) -> tuple[Any, ...]:
        """See `_Bench`."""
        return self.model, self.image_size, self.methods, self.batch_size


@dataclasses.dataclass(frozen=True)
class Train(_Bench):
    """Times the training step of one method or experiment at several batch sizes and settings.

    Weights, images and truths are random; nothing is downloaded. Of several values of several
    settings each combination is timed; what is left out is the experiment's own, or the default of
    `samjax train`, and of a method one image a step. What the step needs at least, in FLOPs, stands
    beside the rate of a large matrix product in its dtype on this machine.

    Example: samjax bench train --what lora:rank=8 --batch-size 1 2 4 --remat none blocks
    """

    module: ClassVar[str] = "train"

    what: str = "lora"
    """A method with settings as for `samjax compare`, such as lora:rank=8, or an experiment file,
    whose data and weights are not read."""
    model: str = "vit_b"
    """vit_b, vit_l, vit_h, medsam, vit_t (MobileSAM) or lite_medsam."""
    image_size: int | None = None
    """Side of the model's input in pixels; left out, the model's own."""
    batch_size: tuple[int, ...] | None = None
    """Images a step."""
    accumulate: tuple[int, ...] | None = None
    """Parts that a batch is cut into."""
    dtype: tuple[Dtype, ...] | None = None
    """Compute dtypes."""
    remat: tuple[Remat, ...] | None = None
    """What the backward pass computes again: nothing, or the inside of each block."""
    attention: tuple[AttentionKind, ...] | None = None
    """Kinds of attention of a ViT."""
    cache_features: tuple[Literal["off", "on"], ...] | None = None
    """on: the step begins with what is computed once for each image before anything trains."""

    def arguments(self) -> tuple[Any, ...]:
        """See `_Bench`."""
        names = ("batch_size", "accumulate", "dtype", "remat", "attention", "cache_features")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return self.what, self.model, self.image_size, given


@dataclasses.dataclass(frozen=True)
class Eval(_Bench):
    """Times an evaluation: the model, counts at the image's size, and the host's measures.

    Weights, images and masks are random; nothing is downloaded.

    Example: samjax bench eval --model vit_t --batch-size 1 4 --truth-size 480 640
    """

    module: ClassVar[str] = "evaluation"

    model: str = "vit_b"
    """vit_b, vit_l, vit_h, medsam, vit_t (MobileSAM) or lite_medsam."""
    image_size: int | None = None
    """Side of the model's input in pixels; left out, the model's own."""
    batch_size: tuple[int, ...] = (4,)
    """Images a step."""
    dtype: Dtype = "float32"
    """The compute dtype."""
    truth_size: tuple[int, int] = (768, 1024)
    """Height and width of the images that are measured, in pixels."""

    def arguments(self) -> tuple[Any, ...]:
        """See `_Bench`."""
        return self.model, self.image_size, self.batch_size, self.dtype, self.truth_size


@dataclasses.dataclass(frozen=True)
class Data(_Bench):
    """Times the input pipeline alone, its parts, and the training step that it feeds.

    Example: samjax bench data --data Kvasir-SEG --model vit_t --method lora --batch-size 4
    """

    module: ClassVar[str] = "data"

    data: str | None = None
    """Images and masks, as for `samjax train`; left out, JPEGs are made up."""
    size: tuple[int, int] = (768, 1024)
    """Height and width of made-up images, in pixels."""
    model: str = "vit_b"
    """vit_b, vit_l, vit_h, medsam, vit_t (MobileSAM) or lite_medsam."""
    image_size: int | None = None
    """Side of the model's input in pixels; left out, the model's own."""
    method: str = "lora"
    """The method whose step is fed, with settings as for `samjax compare`."""
    batch_size: int = 4
    """Images a step."""

    def arguments(self) -> tuple[Any, ...]:
        """See `_Bench`."""
        model = self.model, self.image_size, self.method, self.batch_size
        return self.data, self.size, *model


_BENCHES: dict[str, type[_Bench]] = {
    "encoder": Encoder,
    "methods": Methods,
    "train": Train,
    "eval": Eval,
    "data": Data,
}

_HELP = """usage: samjax bench WHAT ...

Measures speed and memory on this machine, side by side, with random weights. WHAT is one of

  encoder  the image encoder: kinds of attention, dtypes, batch sizes
           samjax bench encoder --dtype float32 bfloat16
  methods  the training steps of methods, beside the bounds that FLOPs set
           samjax bench methods --model vit_t --image-size 512
  train    the training step of a method or an experiment: batch sizes, settings
           samjax bench train --what lora --batch-size 1 2 --remat none blocks
  eval     an evaluation: the model and the metrics
           samjax bench eval --model vit_t --batch-size 1 4
  data     the input pipeline, beside the step that it feeds
           samjax bench data --data my_images --model vit_t

`samjax bench WHAT --help` lists its options.
"""


def run(argv: list[str], console: Console) -> Outcome:
    """Reads the arguments and runs the verb."""
    if argv and argv[0] in ("-h", "--help"):
        sys.stdout.write(_HELP)
        raise SystemExit(0)
    what, rest = (argv[0], argv[1:]) if argv else ("", [])
    if what not in _BENCHES:
        nearest = difflib.get_close_matches(what, _BENCHES, n=1, cutoff=0)[0]
        raise ValueError(f"samjax bench has no {what!r}; the nearest is {nearest}")
    args = parse(_BENCHES[what], rest, f"samjax bench {what}", None, None)
    return args.run(console), args.json
