"""Hashes by which files and parameters are known again, and records that carry their own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def params_sha256(params: dict[str, Any], read: Callable[[Any], np.ndarray] = np.asarray) -> str:
    """The hash of a nested dict of arrays: of paths, shapes, dtypes and bytes, in path order.

    It identifies the base weights that an adapter belongs to. `read` brings a leaf to the host, one
    after another.
    """
    # Here, since flax brings jax, which the hash of a file does not need.
    from flax.traverse_util import flatten_dict

    digest = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(params, sep="/").items()):
        array = read(leaf)
        digest.update(f"{path} {array.shape} {array.dtype.name}\n".encode())
        # As bytes, since bfloat16 has no buffer protocol.
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def file_sha256(file: Path) -> str:
    """The hash of a file's bytes."""
    return file_hash(file, "sha256")


def file_hash(file: Path, algorithm: str) -> str:
    """Another hash of a file's bytes, by the name that Python gives it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """A JSON-able record with its own hash under `sha256`."""
    return {**record, "sha256": _record_sha256(record)}


def is_sealed(record: dict[str, Any]) -> bool:
    """True where a record is what `sealed` gave: nobody changed it since."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return record.get("sha256") == _record_sha256(rest)


def _record_sha256(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
