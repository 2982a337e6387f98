"""`samjax bench`: a class of settings for each thing that it measures."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from samjax.arguments import Outcome, parse
from samjax.files import check_parent, write_beside


@dataclasses.dataclass(frozen=True)
class Methods:
    """Times the training step of several methods side by side, beside the bounds that FLOPs set.

    Weights, images and masks are random; nothing is downloaded. Steps per second are relative to
    those of a step that trains the mask decoder alone. A bound is what they would be if time went
    by FLOPs alone: of what a method needs, and with the attention that is computed again to save
    memory.

    Example: samjax bench methods --model vit_t --image-size 512 --methods lora lora:rank=64
    """

    model: str = "vit_b"
    """vit_b, vit_l, vit_h, medsam, vit_t (MobileSAM) or lite_medsam."""
    image_size: int | None = None
    """Side of the model's input in pixels; left out, the model's own."""
    methods: tuple[str, ...] | None = None
    """Which methods beside decoder, by name, with settings as for `samjax compare`, such as
    lora:rank=8; left out, all."""
    batch_size: int = 1
    """Images a step."""
    rounds: int = 5
    """How often each is timed, after one round to warm up; medians are reported."""
    out: Path | None = None
    """A file for the table, as Markdown."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""

    def run(self, console: Console) -> dict[str, Any]:
        """Prints the table; with `json`, returns what it says and every time that was taken."""
        from samjax import bench

        if self.out is not None:
            check_parent(self.out)
        result = bench.bench_methods(
            self.model, self.image_size, self.methods, self.batch_size, self.rounds, console
        )
        rows, caption = bench.methods_rows(result), bench.methods_caption(result)
        console.print(caption)
        bench.print_table(rows, console)
        if self.out is not None:
            with write_beside(self.out) as temporary:
                temporary.write_text(f"{caption}\n\n{bench.markdown(rows)}", encoding="utf-8")
        if self.json:
            return result
        return {} if self.out is None else {"table": str(self.out)}


_BENCHES = {"methods": Methods}

_HELP = f"""usage: samjax bench WHAT ...

Measures speed and memory on this machine. WHAT is one of: {", ".join(_BENCHES)}.

Example: samjax bench methods --model vit_t --image-size 512

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
