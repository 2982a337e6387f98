"""`samjax merge`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from tyro.conf import Positional

from samjax.arguments import Outcome, parse


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
    to: Literal["samjax", "meta", "hf"] = "samjax"
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


def run(argv: list[str], console: Console) -> Outcome:
    """Reads the arguments and runs the verb."""
    args = parse(Merge, argv, "samjax merge", None, None)
    return args.run(console), args.json
