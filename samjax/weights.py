"""Weights on disk: samjax checkpoints, and reading whatever holds a SAM.

A samjax checkpoint is a directory: `config.json` says which model it is and `params/`, written by
Orbax, holds the parameters. `config.json` carries the hashes of all that was written, so that a
damaged checkpoint is refused.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from samjax.catalog import resolve
from samjax.files import check_parent, write_beside
from samjax.foreign import contradiction, read_foreign, write_huggingface, write_meta
from samjax.hashes import file_sha256, is_sealed, params_sha256, sealed
from samjax.models import SamConfig
from samjax.models.configs import is_of_before
from samjax.orbax_saves import clean_save
from weights_convert import CheckpointError
from weights_convert.errors import told
from weights_convert.hf_config import check_supported
from weights_convert.hf_folder import is_hf_folder

_LOG = logging.getLogger("samjax")
Params = dict[str, Any]  # nested; the leaves are arrays
PathLike = str | os.PathLike[str]
FORMATS = ("samjax", "meta", "hf")

SCHEMA = 1
_CONFIG = "config.json"
_PARAMS = "params"


def read_weights(
    path: PathLike, model: str | None = None, *, prefer: SamConfig | None = None
) -> tuple[SamConfig, Params]:
    """Config and parameters (numpy) of whatever holds a SAM.

    That is a samjax checkpoint, a `.pth` or `.safetensors` file with Meta's or HuggingFace's names,
    a folder that transformers wrote, or a name of `samjax.catalog`. `model` says which of
    `samjax.models.MODELS` it is, where several have the same tensors; `prefer`, the config of the
    adapter that they are read for, decides that too, but where the weights know it they are right.
    Raises FileNotFoundError, or ValueError with one sentence on what is wrong.
    """
    path = resolve(path)
    if not path.is_dir() or is_hf_folder(path):
        config, params = read_foreign(path, model, prefer)
    else:
        config, params = load_checkpoint(path)
        if model not in (None, config.name):
            raise CheckpointError(f"{path}: {contradiction(config.name, model)}")
    if is_of_before(config):
        _LOG.warning(
            "%s keeps the preprocessing that %s had in the samjax that wrote it; for today's, "
            "convert the original weights again",
            path,
            config.name,
        )
    return config, params


def convert(
    src: PathLike, dst: PathLike, to: str = "samjax", model: str | None = None
) -> SamConfig:
    """Writes the weights in `src` to `dst` and returns their config.

    `to="samjax"`: a samjax checkpoint, a directory. `to="meta"`: a `.safetensors` file with the
    original's names. `to="hf"`: a folder for transformers' `SamModel`. `dst` must not exist; on an
    error nothing is written. `model` and errors: see `read_weights`.
    """
    check_destination(dst, to)
    config, params = read_weights(src, model)
    write_weights(dst, config, params, to)
    return config


def write_weights(dst: PathLike, config: SamConfig, params: Params, to: str = "samjax") -> None:
    """Writes parameters in one of `convert`'s formats, whole or not at all."""
    check_destination(dst, to, config)
    write = {"samjax": save_checkpoint, "meta": write_meta, "hf": write_huggingface}[to]
    write(Path(dst), config, params)


def check_destination(dst: PathLike, to: str, config: SamConfig | None = None) -> None:
    """Raises, before any work, where `write_weights` could not write.

    ValueError for an unknown format, a wrong suffix or, with `config`, a model that the format
    cannot hold; FileExistsError where `dst` exists; and as `samjax.files.check_parent`.
    """
    dst = Path(dst)
    if to not in FORMATS:
        raise ValueError(f"unknown format {to!r}; choose {' or '.join(FORMATS)}")
    if to == "meta" and dst.suffix != ".safetensors":
        raise ValueError(f"{dst} must end in .safetensors, the format that `meta` is written in")
    if to == "hf" and config is not None:
        check_supported(config)
    _check_free(dst)


def save_checkpoint(path: PathLike, config: SamConfig, params: Params) -> None:
    """Writes a samjax checkpoint, whole or not at all.

    Raises FileExistsError where `path` exists, and as `samjax.files.check_parent`.
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
        with clean_save(lambda: [partial] if partial.exists() else []):
            _checkpointer().save(os.path.abspath(partial / _PARAMS), params)
        files = sorted(file for file in (partial / _PARAMS).rglob("*") if file.is_file())
        record["files"] = {
            file.relative_to(partial).as_posix(): file_sha256(file) for file in files
        }
        (partial / _CONFIG).write_text(json.dumps(sealed(record), indent=2) + "\n")


def load_checkpoint(path: PathLike) -> tuple[SamConfig, Params]:
    """Config and parameters (numpy) that `save_checkpoint` wrote.

    Raises FileNotFoundError, or ValueError where the directory is no samjax checkpoint, a newer
    samjax wrote it, or it is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}; check the path")
    config, files, params_hash = _read_config(path)
    if not (path / _PARAMS).is_dir():
        raise FileNotFoundError(f"{path} lacks its {_PARAMS}/ directory; copy the whole checkpoint")
    # Before Orbax sees them: what it does with damaged files has loose ends (tasks, threads, logs).
    for name, digest in files.items():
        if not (path / name).is_file() or file_sha256(path / name) != digest:
            raise CheckpointError(
                f"{path / name} is not the file that was written: it is damaged, or the "
                "file is missing or another checkpoint's; copy the whole checkpoint again"
            )
    with told(f"{path / _PARAMS}"):
        params = _checkpointer().restore(os.path.abspath(path / _PARAMS))
        restored = params_sha256(params)
    if restored != params_hash:
        raise CheckpointError(
            f"Orbax restored other parameters from {path} than were saved (hash {restored[:12]}); "
            "install the version of orbax-checkpoint that samjax asks for"
        )
    return config, params


def _read_config(path: Path) -> tuple[SamConfig, dict[str, str], str]:
    """Out of `config.json`: the model's config, the hash of each file and of the parameters."""
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
        if not is_sealed(record):
            raise CheckpointError(
                f"{file} was changed after it was written (its hash does not match); copy the "
                "whole checkpoint again"
            )
        config = SamConfig.from_json(record["model"])
        files = {str(name): str(digest) for name, digest in record["files"].items()}
        return config, files, str(record["params_sha256"])


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
    check_parent(path)
