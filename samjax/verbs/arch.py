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
    against: tuple[Path, ...] = ()
    """Other finished runs of the experiment, say with other seeds: whether they found the same."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""

    def show(self, console: Console) -> dict[str, Any]:
        """Prints and writes the architecture."""
        from samjax import arch
        from samjax.files import check_parent
        from samjax.run_folder import ADAPTER, finished_run_config
        from samjax.training.loop import METRICS

        def adapter_of(run: Path) -> Path:
            return run / ADAPTER if run.is_dir() else run

        is_run = self.run.is_dir()
        config = finished_run_config(self.run) if is_run else None
        folder, trained = self.run if is_run else self.run.parent, adapter_of(self.run)
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
        agreements = {}
        for other in self.against:
            if other.is_dir():
                finished_run_config(other)
            try:
                agreements[str(other)] = arch.agreement(
                    found, arch.find(adapter_of(other), self.derive)
                )
            except ValueError as error:
                raise ValueError(f"{other}: {error}") from None
        arch.show(found, console)
        for name, alike in agreements.items():
            correlation = alike["correlation"]
            console.print(
                f"{name}: the same strongest operator in {alike['same']} of {alike['edges']} "
                f"(by chance {alike['chance']:.1f})"
                + ("" if correlation is None else f", correlation of shares {correlation:.2f}")
            )
        plots = importlib.util.find_spec("matplotlib") is not None
        if not plots:
            console.print("without matplotlib there is no picture: pip install 'samjax[plot]'")
        log = self.run / METRICS
        files = arch.write(found, out, log if is_run and log.is_file() else None, plots)
        if self.adapter is not None and config is not None:
            arch.write_derived(config, trained, self.derive, self.adapter)
            files.append(self.adapter)
        alike = {"agreement": agreements} if agreements else {}
        return {**found, **alike, "files": [str(file) for file in files]}


def run(argv: list[str], console: Console) -> Outcome:
    """Reads the arguments and runs the verb."""
    args = parse(Arch, argv, "samjax arch", None, None)
    result = args.show(console)
    return (result, True) if args.json else ({"written": result["files"]}, False)
