"""What computes: its name, its cores, how busy it is."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from rich.console import Console

# A busier machine is told of.
_QUIET = 0.25


def facts(console: Console) -> dict[str, Any]:
    """What every result says of the machine, as a JSON-able dict; tells the user of other work."""
    return {
        "device": device_name(),
        "jax": jax.__version__,
        "threads": num_threads(),
        "load": machine_load(console),
    }


def described(result: Mapping[str, Any]) -> str:
    """The same as words."""
    return f"{result['device']}, {result['threads']} threads, jax {result['jax']}"


def machine_load(console: Console) -> float:
    """How busy the machine is with other work, of which the user is told."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows has none
    if load > _QUIET:
        console.print(f"warning: other work runs on this machine (load {load:.1f}); times grow")
    return load


def num_threads() -> int:
    """How many cores this process may use, which is how many threads libraries take."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_name() -> str:
    """What computes: an accelerator's name, or the processor's."""
    device = jax.devices()[0]
    return cpu_name() if device.platform == "cpu" else device.device_kind


def cpu_name() -> str:
    """What the machine calls its processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
