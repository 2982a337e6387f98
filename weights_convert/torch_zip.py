"""torch's zip archives (`.pth`, `.pt` since torch 1.6): one pickle and one file per storage."""

from __future__ import annotations

import logging
import math
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from weights_convert.errors import CheckpointError, shown
from weights_convert.unpickle import StorageRef, TensorRef, unpickle

_LOG = logging.getLogger("samjax")
# Where training scripts put the state dict among epoch, optimiser and the like.
WRAPPERS = ("model", "state_dict", "model_state_dict")
_MOST_AXES = 16


def read_torch_zip(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a torch zip archive, read-only; tensors that share a storage share memory.

    Raises CheckpointError; damaged archives also raise what `zipfile` raises.
    """
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        # torch stores without compression. Then no entry can be larger than the file, nor can all
        # of them together: no zip bomb gets past this.
        if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
            raise CheckpointError(
                f"{path} is a compressed zip archive, which torch never writes; unpack it and give "
                "the checkpoint inside"
            )
        if sum(info.file_size for info in archive.infolist()) > os.path.getsize(path):
            raise CheckpointError(f"{path} claims more data than it has; copy or download it again")
        pickles = [n for n in entries if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(
                f"{path} is a zip archive but no torch checkpoint, it has no data.pkl; give the "
                ".pth file itself"
            )
        root = pickles[0].removesuffix("/data.pkl")
        try:
            tree = unpickle(archive.read(pickles[0]))
        except CheckpointError as error:
            raise CheckpointError(f"{path} is no plain checkpoint: {error}") from None
        order = "little"  # what torch wrote before it named the order
        if f"{root}/byteorder" in entries:
            order = archive.read(f"{root}/byteorder").decode("ascii")
            if order not in ("little", "big"):
                raise CheckpointError(f"{path} has no known byte order; copy or download it again")
        storages: dict[str, bytes] = {}

        def read(storage: StorageRef) -> bytes:
            if storage.key not in storages:
                storages[storage.key] = archive.read(f"{root}/data/{storage.key}")
            return storages[storage.key]

        return {
            name: _materialise(f"{path}: the tensor {shown(name)}", ref, read(ref.storage), order)
            for name, ref in _state_dict(path, tree).items()
        }


def _state_dict(path: Path, tree: Any) -> dict[str, TensorRef]:
    """The dict of tensors in what the pickle holds, out of its wrapper where it has one."""
    if isinstance(tree, dict) and not any(isinstance(v, TensorRef) for v in tree.values()):
        wrapped = [key for key in WRAPPERS if isinstance(tree.get(key), dict)]
        if len(wrapped) == 1:
            _LOG.warning("%s: reading the state dict under %r", path, wrapped[0])
            tree = tree[wrapped[0]]
        elif wrapped:
            raise CheckpointError(
                f"{path} holds several state dicts ({', '.join(wrapped)}); save the one you want "
                "by itself"
            )
    if not isinstance(tree, dict) or not tree:
        raise CheckpointError(
            f"{path} holds no state dict but {_kind(tree)}; save model.state_dict()"
        )
    for name, value in tree.items():
        if not isinstance(name, str) or not isinstance(value, TensorRef):
            raise CheckpointError(
                f"{path} holds {_kind(value)} under {shown(name)} where a tensor is expected; save "
                f"model.state_dict(), by itself or under {WRAPPERS[0]!r}"
            )
    return tree


def _kind(value: Any) -> str:
    return "an empty dict" if value == {} else f"a {type(value).__name__}"


def _materialise(what: str, ref: TensorRef, data: bytes, order: str) -> np.ndarray:
    """A read-only view of `data`; refuses to look outside of it."""
    storage, shape, strides = ref.storage, ref.shape, ref.strides
    count = math.prod(shape)
    if storage.count * storage.dtype.itemsize != len(data):
        raise CheckpointError(
            f"{what} should have {storage.count} numbers of type {storage.dtype.name} but its "
            f"storage has {len(data)} bytes; copy or download the file again"
        )
    last = ref.offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if (
        len(shape) > _MOST_AXES
        or min((0, ref.offset, *shape, *strides)) < 0
        # More numbers than the storage has: an expanded view, which could be of any size.
        or count > storage.count
        or (count > 0 and last >= storage.count)
        or ref.offset > storage.count
    ):
        raise CheckpointError(
            f"{what} lies outside of its storage of {storage.count} numbers; copy or download the "
            "file again, or save it with tensor.contiguous()"
        )
    if count == 0:
        return np.zeros(shape, storage.dtype)
    flat = np.frombuffer(data, storage.dtype)
    if order != sys.byteorder:
        flat = flat.byteswap()
    step = storage.dtype.itemsize
    return np.lib.stride_tricks.as_strided(
        flat[ref.offset :], shape, [stride * step for stride in strides], writeable=False
    )
