"""Reading the tensors of a checkpoint file, whose format its first bytes tell."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import safetensors

from weights_convert.errors import CheckpointError, told
from weights_convert.torch_zip import read_torch_zip

_LOG = logging.getLogger("samjax")
_PREFIX = "module."  # what torch's DistributedDataParallel puts before every name


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a `.safetensors` file or a torch `.pth`, `.pt` archive, by name.

    The content decides, not the extension. torch is not needed and nothing in the file is ever
    run. A state dict under `model`, `state_dict` or `model_state_dict` is taken out, and a
    `module.` before every name is dropped; either is logged. Arrays may be read-only and may share
    memory. Raises FileNotFoundError, or ValueError with one sentence on what is wrong.
    """
    path = Path(path)
    with told(str(path)):
        return _without_prefix(path, _read(path))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What the header of a `.safetensors` file says besides its tensors; {} for another file.

    Raises as `read_tensors`.
    """
    path = Path(path)
    with told(str(path)):
        if not _is_safetensors(_head(path)):
            return {}
        with safetensors.safe_open(path, "np") as file:
            return file.metadata() or {}


def _read(path: Path) -> dict[str, np.ndarray]:
    head = _head(path)
    if head.startswith(b"PK\x03\x04"):
        return read_torch_zip(path)
    if _is_safetensors(head):
        return _read_safetensors(path)
    raise CheckpointError(f"{path} is {_what_else(head)}")


def _head(path: Path) -> bytes:
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}; check the path")
    if not path.is_file():
        raise CheckpointError(f"{path} is no file; give a .safetensors or a .pth file")
    with path.open("rb") as file:
        return file.read(64)


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{"  # after eight bytes that give the length of this JSON


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    with safetensors.safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; give a SAM checkpoint")
    return tensors


def _what_else(head: bytes) -> str:
    """Names the usual other things that end up under a checkpoint's name, each with the fix."""
    if not head:
        return "an empty file; copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the checkpoint; run `git lfs pull`"
    if head.lstrip()[:1] == b"<":
        return "a web page, not a checkpoint; download the file itself"
    if head[:1] == b"\x80" and head[1] <= 5:
        return (
            "in torch's format before version 1.6 or a bare pickle; where you trust it, run "
            "torch.save(torch.load(path, weights_only=True), path) once"
        )
    return "neither safetensors nor a torch archive; give a .safetensors or a .pth file"


def _without_prefix(path: Path, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if not all(name.startswith(_PREFIX) for name in tensors):
        return tensors
    _LOG.warning("%s: dropping %r before every name", path, _PREFIX)
    return {name.removeprefix(_PREFIX): array for name, array in tensors.items()}
