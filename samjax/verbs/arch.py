"""`samjax arch`."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from tyro.conf import Positional

from samjax.arguments import Outcome, parse


@dataclasses.dataclass(frozen=True)
class Arch:
    """Shows the architecture that a run of nas_lora or nas_pc_lora found, and writes it down.

    Example: samjax arch runs/kvasir_nas_lora

    A later run starts from it, without a search: --method nas_lora --operators architecture.json
    """

    run: Positional[Path]
    """A finished run's folder, or an adapter file."""
    derive: Literal["mixture", "strongest"] = "mixture"
    """What later runs start from: the mixture that was found, or its strongest operators."""
    out: Path | None = None
    """Where the JSON goes, and beside it the picture; left out, architecture.json in the run's
    folder or beside the adapter."""
    adapter: Path | None = None
    """Where the run's trained adapter goes with its cells derived, for `samjax eval RUN --adapter`;
    left out, nowhere."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""

    def show(self, console: Console) -> dict[str, Any]:
        """Prints and writes the architecture."""
        from samjax import arch
        from samjax.files import check_parent
        from samjax.run import ADAPTER, finished_run_config
        from samjax.training.loop import METRICS

        is_run = self.run.is_dir()
        config = finished_run_config(self.run) if is_run else None
        folder, trained = (self.run, self.run / ADAPTER) if is_run else (self.run.parent, self.run)
        out = self.out or folder / f"{arch.NAME}.json"
        if out.suffix != ".json":
            raise ValueError(f"{out} must end in .json, by which --operators knows it")
        check_parent(out)
        if self.adapter is not None:
            check_parent(self.adapter)
            if config is None:
                raise ValueError("--adapter needs a run's folder, which knows its weights")
            if self.adapter.exists():
                raise FileExistsError(f"{self.adapter} exists already; choose another --adapter")
        found = arch.find(trained, self.derive)
        arch.show(found, console)
        plots = importlib.util.find_spec("matplotlib") is not None
        if not plots:
            console.print("without matplotlib there is no picture: pip install 'samjax[plot]'")
        log = self.run / METRICS
        files = arch.write(found, out, log if is_run and log.is_file() else None, plots)
        if self.adapter is not None and config is not None:
            arch.write_derived(config, trained, self.derive, self.adapter)
            files.append(self.adapter)
        return {**found, "files": [str(file) for file in files]}


def run(argv: list[str], console: Console) -> Outcome:
    """Reads the arguments and runs the verb."""
    args = parse(Arch, argv, "samjax arch", None, None)
    result = args.show(console)
    return (result, True) if args.json else ({"written": result["files"]}, False)
