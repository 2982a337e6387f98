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
    """samjax: a checkpoint folder; meta: a .safetensors file for PyTorch; hf: a folder for
    transformers' SamModel."""
    model: str | None = None
    """What the weights are, such as vit_b or medsam; left out, the adapter knows it."""
    verify: bool = True
    """Run the adapted and the merged model on a test image and compare them."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""

    def run(self, console: Console) -> dict[str, Any]:
        """Writes the merged weights."""
        from samjax import peft
        from samjax.loading import load_adapted
        from samjax.weights import check_destination, write_weights

        check_destination(self.dst, self.to)
        model, params, records = load_adapted(self.weights, self.adapter, model=self.model)
        check_destination(self.dst, self.to, model.config)
        merged = peft.merge(model, params, records)
        result: dict[str, Any] = {"model": model.config.name, "dst": str(self.dst), "to": self.to}
        if self.verify:
            differences = peft.verify_merge(model, params, records, merged)
            console.print(
                "merged and adapted model differ at most by "
                + ", ".join(f"{value:.1e} ({name})" for name, value in differences.items())
                + " of the outputs' deviation"
            )
            result["max_difference"] = differences
        write_weights(self.dst, model.config, merged, self.to)
        console.print(f"{self.adapter} merged into {self.weights}; written to {self.dst}")
        return result


def run(argv: list[str], console: Console) -> Outcome:
    """Reads the arguments and runs the verb."""
    args = parse(Merge, argv, "samjax merge", None, None)
    return args.run(console), args.json
