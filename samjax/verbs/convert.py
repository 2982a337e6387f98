"""`samjax convert`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from tyro.conf import Positional

from samjax.arguments import Outcome, parse


@dataclasses.dataclass(frozen=True)
class Convert:
    """Converts weights: to a samjax checkpoint, or back to PyTorch, Meta's SAM or HuggingFace's.

    Example: samjax convert sam_vit_b_01ec64.pth sam_vit_b
    """

    src: Positional[Path]
    """A samjax checkpoint, a .pth or .safetensors file, a folder of HuggingFace's SamModel, or a
    name of `samjax weights list`."""
    dst: Positional[Path]
    """Where to write; must not exist."""
    to: Literal["samjax", "meta", "hf"] = "samjax"
    """samjax: a checkpoint folder; meta: a .safetensors file for PyTorch; hf: a folder for
    transformers' SamModel."""
    model: str | None = None
    """What the weights are, such as vit_b or medsam, where several models have the same tensors."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""

    def run(self, console: Console) -> dict[str, Any]:
        """Writes the converted weights."""
        from samjax.weights import convert

        config = convert(self.src, self.dst, self.to, self.model)
        console.print(f"{self.src} holds {config.name}; written to {self.dst}")
        return {"model": config.name, "dst": str(self.dst), "to": self.to}


def run(argv: list[str], console: Console) -> Outcome:
    """Reads the arguments and runs the verb."""
    args = parse(Convert, argv, "samjax convert", None, None)
    return args.run(console), args.json
