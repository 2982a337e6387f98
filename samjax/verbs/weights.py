"""`samjax weights`."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Literal

from rich.console import Console
from rich.filesize import decimal
from tyro.conf import Positional

from samjax.arguments import Outcome, parse
from samjax.catalog import CATALOG, get


@dataclasses.dataclass(frozen=True)
class Weights:
    """Lists the weights that samjax knows by name, or gets one of them.

    Every verb takes these names where it takes weights. Files are downloaded once, into
    $SAMJAX_CACHE or samjax/ in the user's cache folder, and verified.

    Example: samjax weights get sam_vit_b
    """

    action: Positional[Literal["list", "get"]]
    """list shows all; get downloads one, unless it is there, and prints its path."""
    name: Positional[str | None] = None
    """Which one to get."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""

    def run(self, console: Console) -> dict[str, Any]:
        """Prints the table or the path; with `json`, returns what it says."""
        if (self.action == "get") != (self.name is not None):
            raise ValueError("say `samjax weights list`, or `samjax weights get NAME`")
        if self.name is None:
            result, text = {"weights": _entries()}, _table()
        else:
            path = str(get(self.name, console))
            result, text = {"model": CATALOG[self.name].model, "path": path}, path + "\n"
        if self.json:
            return result
        sys.stdout.write(text)
        return {}


def _entries() -> dict[str, dict[str, Any]]:
    return {
        name: {
            **dataclasses.asdict(entry),
            "source": str(entry.source),
            "path": str(entry.path) if entry.path.exists() else None,
        }
        for name, entry in CATALOG.items()
    }


def _table() -> str:
    rows = [("name", "model", "size", "license", "in the cache")]
    for name, entry in CATALOG.items():
        cached = "yes" if entry.path.exists() else "no"
        rows.append((name, entry.model, decimal(entry.size), entry.license, cached))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    folder = next(iter(CATALOG.values())).path.parent
    return "\n".join([*lines, f"cache: {folder}"]) + "\n"


def run(argv: list[str], console: Console) -> Outcome:
    """Reads the arguments and runs the verb."""
    args = parse(Weights, argv, "samjax weights", None, None)
    return args.run(console), args.json
