"""Weights on disk: samjax checkpoints, and reading whatever holds a SAM.

A samjax checkpoint is a directory: `config.json` says which model it is and `params/`, written by
Orbax, holds the parameters. `config.json` carries the hashes of all that was written, so that a
damaged checkpoint is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from samjax.catalog import resolve
from samjax.files import write_beside
from samjax.models import SamConfig
from weights_convert import CheckpointError, from_params, read_tensors, recognise, to_params
from weights_convert.errors import told

Params = dict[str, Any]  # nested; the leaves are arrays
PathLike = str | os.PathLike[str]

SCHEMA = 1
_CONFIG = "config.json"
_PARAMS = "params"


def read_weights(path: PathLike) -> tuple[SamConfig, Params]:
    """Config and parameters (numpy) of a samjax checkpoint or of a file of the original's tensors.

    A name of `samjax.catalog` stands for its file, downloaded when the cache lacks it. Raises
    FileNotFoundError, ValueError, or DownloadError with one sentence on what is wrong.
    """
    path = resolve(path)
    if path.is_dir():
        return load_checkpoint(path)
    tensors = read_tensors(path)
    try:
        config = recognise(tensors)
        return config, to_params(tensors, config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def convert(src: PathLike, dst: PathLike, to: str = "samjax") -> SamConfig:
    """Writes the weights in `src` to `dst` and returns their config.

    `to="samjax"`: a samjax checkpoint, a directory. `to="meta"`: a `.safetensors` file with the
    original's names, for PyTorch users. `dst` must not exist; on an error nothing is written.
    """
    check_destination(dst, to)
    config, params = read_weights(src)
    write_weights(dst, config, params, to)
    return config


def write_weights(dst: PathLike, config: SamConfig, params: Params, to: str = "samjax") -> None:
    """Writes parameters in one of `convert`'s formats, whole or not at all."""
    check_destination(dst, to)
    if to == "samjax":
        save_checkpoint(dst, config, params)
        return
    tensors = from_params(params, config)
    with write_beside(Path(dst)) as partial:
        # The metadata is what torch's and HuggingFace's readers look for.
        safetensors.numpy.save_file(tensors, partial, metadata={"format": "pt"})


def check_destination(dst: PathLike, to: str) -> None:
    """Raises, before any work, where `write_weights` could not write.

    ValueError for an unknown format or a wrong suffix, FileExistsError where `dst` exists,
    FileNotFoundError where its parent does not.
    """
    dst = Path(dst)
    if to not in ("samjax", "meta"):
        raise ValueError(f"unknown format {to!r}; choose samjax or meta")
    if to == "meta" and dst.suffix != ".safetensors":
        raise ValueError(f"{dst} must end in .safetensors, the format that `meta` is written in")
    _check_free(dst)


def save_checkpoint(path: PathLike, config: SamConfig, params: Params) -> None:
    """Writes a samjax checkpoint, whole or not at all.

    Raises FileExistsError where `path` exists, FileNotFoundError where its parent does not.
    """
    path = Path(path)
    _check_free(path)
    # A tree of numpy arrays is restored without devices or shardings.
    params = _map(np.asarray, params)
    record: dict[str, Any] = {
        "format": "samjax",
        "schema": SCHEMA,
        "model": config.to_json(),
        "params_sha256": params_sha256(params),
    }
    with write_beside(path) as partial:
        partial.mkdir()
        _checkpointer().save(os.path.abspath(partial / _PARAMS), params)
        files = sorted(file for file in (partial / _PARAMS).rglob("*") if file.is_file())
        record["files"] = {file.relative_to(partial).as_posix(): _sha256(file) for file in files}
        record["sha256"] = _record_sha256(record)
        (partial / _CONFIG).write_text(json.dumps(record, indent=2) + "\n")


def load_checkpoint(path: PathLike) -> tuple[SamConfig, Params]:
    """Config and parameters (numpy) that `save_checkpoint` wrote.

    Raises FileNotFoundError, or ValueError where the directory is no samjax checkpoint, a newer
    samjax wrote it, or it is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}; check the path")
    config, record = _read_config(path)
    if not (path / _PARAMS).is_dir():
        raise FileNotFoundError(f"{path} lacks its {_PARAMS}/ directory; copy the whole checkpoint")
    # Before Orbax sees them: what it does with damaged files has loose ends (tasks, threads, logs).
    for name, digest in record["files"].items():
        if not (path / name).is_file() or _sha256(path / name) != digest:
            raise CheckpointError(
                f"{path / name} is not the file that was written: it is damaged, or the "
                "file is missing or another checkpoint's; copy the whole checkpoint again"
            )
    with told(f"{path / _PARAMS}"):
        params = _checkpointer().restore(os.path.abspath(path / _PARAMS))
        restored = params_sha256(params)
    if restored != record["params_sha256"]:
        raise CheckpointError(
            f"Orbax restored other parameters from {path} than were saved (hash {restored[:12]}); "
            "install the version of orbax-checkpoint that samjax asks for"
        )
    return config, params


def params_sha256(params: Params) -> str:
    """The hash of a nested dict of arrays: of paths, shapes, dtypes and bytes, in path order.

    It identifies the base weights that an adapter belongs to.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(params, sep="/").items()):
        array = np.asarray(leaf)
        digest.update(f"{path} {array.shape} {array.dtype.name}\n".encode())
        # As bytes, since bfloat16 has no buffer protocol.
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _read_config(path: Path) -> tuple[SamConfig, dict[str, Any]]:
    """The model's config and the whole record of `config.json`, checked against its own hash."""
    file = path / _CONFIG
    if not file.is_file():
        raise CheckpointError(
            f"{path} is no samjax checkpoint, it has no {_CONFIG}; give one that `samjax convert` "
            "wrote, or a .pth or .safetensors file"
        )
    with told(str(file)):
        record = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or record.get("format") != "samjax":
        raise CheckpointError(
            f"{path} is no samjax checkpoint, its {_CONFIG} is another program's; give one that "
            "`samjax convert` wrote, or a .pth or .safetensors file"
        )
    schema = record.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise CheckpointError(
            f"{path} was written by a newer samjax (schema {schema}, this one reads {SCHEMA}); "
            "upgrade samjax"
        )
    with told(str(file)):
        if record.pop("sha256") != _record_sha256(record):
            raise CheckpointError(
                f"{file} was changed after it was written (its hash does not match); copy the "
                "whole checkpoint again"
            )
        return SamConfig.from_json(record["model"]), record


def _record_sha256(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _checkpointer() -> Any:
    # Imported here: it takes seconds, and reading or writing other files does not need it.
    import orbax.checkpoint

    return orbax.checkpoint.PyTreeCheckpointer()


def _map(function: Any, tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _map(function, value) for key, value in tree.items()}
    return function(tree)


def _check_free(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists already; delete it or choose another name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent} to write into; create it")
