"""What the models of `bench_peers.py` and `bench_gpu.py` have in common, whatever their library."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from samjax.models import SamConfig, VitConfig

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all workers are told."""

    config: dict[str, Any]  # of a SAM with a ViT, as `SamConfig.to_json` gives it
    weights: str  # a .safetensors file of the whole model with Meta's names
    cores: int
    device: str = "cpu"  # or gpu
    dtype: str = "float32"
    batch_size: int = 1
    compiled: bool = False  # by torch.compile
    # Of encoders.
    product: int = 0  # the side of the matrix product
    embedding: str = ""  # the .npy file to write
    scenic: str | None = None  # a checkout of scenic
    # Of training: methods as `samjax compare` takes them, with their ranks.
    methods: dict[str, int | None] = dataclasses.field(default_factory=dict)

    def load(self) -> tuple[SamConfig, Tensors]:
        """The model's config and its tensors."""
        return SamConfig.from_json(self.config), load_file(self.weights)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that is ready: calls without arguments, which return when their result is there."""

    calls: dict[str, Callable[[], Any]]
    facts: dict[str, Any]  # JSON-able
    # The most bytes that a call holds beyond what was held before it; None where nothing tells.
    peak: Callable[[str], int | None]
    # What `calls["encode"]` returns as (b, rows, columns, channels), float32.
    as_array: Callable[[Any], np.ndarray] = np.asarray


def random_image(config: SamConfig, batch_size: int) -> np.ndarray:
    """(b, h, w, 3) float32 images that are normalised already."""
    shape = (batch_size, *config.frame.shape, 3)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def vit_of(config: SamConfig) -> VitConfig:
    """The config of the encoder, which is a ViT."""
    assert isinstance(config.image_encoder, VitConfig)
    return config.image_encoder


def box_of(config: SamConfig) -> np.ndarray:
    """A box in the middle of the image: (x0, y0, x1, y1)."""
    return np.array([0.25, 0.25, 0.75, 0.75], np.float32) * config.frame.height


def method_name(text: str) -> str:
    """The name of a method with settings."""
    return text.partition(":")[0]


def versions(*packages: str) -> str:
    """Packages with their versions."""
    return ", ".join(f"{p.replace('_', '-')} {importlib.metadata.version(p)}" for p in packages)


def host_peak(call: Callable[[], Any]) -> int | None:
    """The most bytes that the process holds during a call, beyond what it held before it.

    None where there is no Linux to tell.
    """
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what loading has left free would be used again, unseen
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(kilobytes)
