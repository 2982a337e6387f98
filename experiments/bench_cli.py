"""The command line of the comparisons of ViT-B: `bench_peers.py` and `bench_ta_lora.py`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console

from samjax.allocator import keep_freed_memory
from samjax.arguments import parse
from samjax.bench.rounds import check_rounds
from samjax.models import SamConfig, VitConfig
from samjax.terminal import error_console


@dataclasses.dataclass(frozen=True)
class Size:
    """What all comparisons of ViT-B have in common."""

    rounds: int = 5
    """How often each is timed, after one round to warm up; medians are reported."""
    image_size: int = 1024
    """Side of the input in pixels; smaller ones are for a quick try."""
    depth: int = 12
    """Blocks of the encoder; fewer are for a quick try."""
    cores: int | None = None
    """CPU cores for each; left out, all that this process may use."""
    json: bool = False
    """Print one JSON object in place of the table, on one line, last on stdout."""

    def config(self) -> SamConfig:
        """ViT-B at this size and depth. Raises ValueError where there is none."""
        check_rounds(self.rounds)
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, not {self.depth}")
        globals_ = tuple(i for i in VitConfig().global_attn_indexes if i < self.depth)
        vit = VitConfig(
            depth=self.depth,
            global_attn_indexes=globals_,
            pretrain_grid=self.image_size // VitConfig().patch_size,
        )
        return SamConfig(image_encoder=vit).with_image_size(self.image_size)


def run(
    cls: type[Size],
    argv: list[str],
    prog: str,
    bench: Callable[[Any, Console], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> int:
    """Reads the arguments, measures and prints; returns the exit code."""
    keep_freed_memory()  # as `samjax` does
    jax.config.update("jax_platforms", "cpu")  # in this process; `started` tells the others
    try:
        args = parse(cls, argv, prog, None, None)
        result = bench(args, error_console())
    except (ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"{prog}: {' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: interrupted\n")
        return 130
    sys.stdout.write(json.dumps(result) + "\n" if args.json else table(result))
    return 0


def restrict_cores(cores: int | None) -> int:
    """Keeps this process and its children on so many cores; returns how many there are."""
    if not hasattr(os, "sched_setaffinity"):
        if cores is not None:
            raise ValueError("--cores needs Linux, which can keep a process on some cores")
        return os.cpu_count() or 1
    allowed = sorted(os.sched_getaffinity(0))
    cores = len(allowed) if cores is None else cores
    if not 1 <= cores <= len(allowed):
        raise ValueError(f"--cores {cores}: this process may use 1 to {len(allowed)}")
    os.sched_setaffinity(0, allowed[:cores])
    return cores
