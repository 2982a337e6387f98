"""Folders as transformers' `save_pretrained` writes them: a config and one or more weight files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from weights_convert.errors import CheckpointError, shown, told
from weights_convert.read import read_tensors

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
# Where transformers from 5 on writes the preprocessing, under a key; it is read first.
_PROCESSOR, _PROCESSOR_KEY = "processor_config.json", "image_processor"
WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TORCH = "pytorch_model.bin"


def is_hf_folder(path: Path) -> bool:
    """True for a folder with a weight file of transformers."""
    return any((path / name).is_file() for name in (WEIGHTS, _INDEX, _TORCH))


def read_hf_config(path: Path) -> dict[str, Any]:
    """`config.json` of the folder. Raises ValueError, one sentence, where it is not SAM's."""
    file = path / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{path} lacks its {CONFIG}; copy the whole folder")
    record = _read_json(file)
    if record.get("model_type") != "sam":
        raise CheckpointError(
            f"{path} holds a model of type {shown(record.get('model_type'))}, not sam; give the "
            "folder of a SamModel"
        )
    return record


def read_preprocessor(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The folder's preprocessing of images and the file that holds it; None where none does."""
    for file, key in ((path / _PROCESSOR, _PROCESSOR_KEY), (path / PREPROCESSOR, None)):
        if file.is_file():
            record = _read_json(file)
            record = record if key is None else record.get(key)
            if isinstance(record, dict):
                return file, record
    return None


def weight_files(path: Path) -> list[Path]:
    """The folder's weight files, in order; several where they are sharded.

    safetensors are taken before a `pytorch_model.bin` of the same tensors. Raises
    FileNotFoundError where one is missing, ValueError where the index is damaged.
    """
    for name in (WEIGHTS, _INDEX, _TORCH):
        if (path / name).is_file():
            break
    if name != _INDEX:
        return [path / name]
    index = _read_json(path / _INDEX).get("weight_map")
    with told(str(path / _INDEX)):
        names = sorted(set(index.values()))
        # A name out of a file must not lead out of the folder.
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("its weight_map does not name files of the folder")
    for name in names:
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} lacks {shown(name)}; copy the whole folder")
    return [path / name for name in names]


def read_all(files: list[Path]) -> dict[str, np.ndarray]:
    """The tensors of all files. Raises as `read_tensors`, and where two hold the same name."""
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        more = read_tensors(file)
        if twice := tensors.keys() & more.keys():
            raise CheckpointError(
                f"{file} holds {shown(min(twice))}, which another file of the folder holds too; "
                "copy the folder again"
            )
        tensors |= more
    return tensors


def _read_json(file: Path) -> dict[str, Any]:
    with told(str(file)):
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it holds no JSON object")
    return record
