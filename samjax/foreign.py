"""Weights under Meta's or HuggingFace's names: which of samjax's models they are, and writing them.

What samjax writes carries a record in the header of its safetensors file: the model's config, input
size included, and the hash of the tensors. Other files are told by their tensors, and where models
of one architecture differ in their preprocessing, by a known hash of the file or by the user.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from samjax.files import write_beside
from samjax.hashes import file_sha256, is_sealed, params_sha256, sealed
from samjax.models.configs import MODELS, SamConfig
from weights_convert import CheckpointError, expected_shapes, from_params, recognise, to_params
from weights_convert.errors import shown, told
from weights_convert.hf_config import (
    OWN_KEY,
    check_model_config,
    model_config,
    preprocessor_config,
    preprocessor_difference,
)
from weights_convert.hf_folder import (
    CONFIG,
    PREPROCESSOR,
    WEIGHTS,
    is_hf_folder,
    read_all,
    read_hf_config,
    read_preprocessor,
    weight_files,
)
from weights_convert.huggingface import from_meta_names, has_their_names, to_meta_names
from weights_convert.positions import for_own_input
from weights_convert.read import read_metadata

_LOG = logging.getLogger("samjax")
Params = dict[str, Any]  # nested; the leaves are arrays

SCHEMA = 1
_KEY = "samjax_weights"


def read_foreign(
    path: Path, model: str | None, prefer: SamConfig | None
) -> tuple[SamConfig, Params]:
    """Config and parameters of a `.pth` or `.safetensors` file, or of a folder of transformers'.

    `model` and `prefer`: see `samjax.weights.read_weights`. Raises FileNotFoundError, or ValueError
    with one sentence on what is wrong.
    """
    hf_config = read_hf_config(path) if is_hf_folder(path) else None
    preprocessor = None if hf_config is None else read_preprocessor(path)
    files = [path] if hf_config is None else weight_files(path)
    tensors = read_all(files)
    config = _recorded(files, tensors)
    if hf_config is not None and OWN_KEY in hf_config:
        config = _agreeing(path, config, hf_config[OWN_KEY])
    try:
        if has_their_names(tensors):
            tensors = to_meta_names(tensors)
        if config is None:
            config = _choose(files, recognise(tensors), model, prefer)
        elif model not in (None, config.name):
            raise CheckpointError(contradiction(config.name, model))
        if hf_config is not None:
            check_model_config(hf_config, config)
        if preprocessor is not None:
            said = config.name in (model, prefer and prefer.name)
            _check_preprocessor(*preprocessor, config, said)
        return config, to_params(tensors, config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def contradiction(has: str, model: str | None) -> str:
    """The sentence for weights that are another model than the user says."""
    if model not in MODELS:
        return f"no model is called {model!r}; known are {', '.join(MODELS)}"
    return f"it holds {has}, not {model}; pass --model {has} or other weights"


def _choose(
    files: list[Path],
    candidates: tuple[SamConfig, ...],
    model: str | None,
    prefer: SamConfig | None,
) -> SamConfig:
    """The one of several models of the same tensors that is meant. Never guesses."""
    by_name = {config.name: config for config in candidates}
    if model is not None and model not in by_name:
        raise CheckpointError(contradiction(" or ".join(by_name), model))
    if len(by_name) == 1:
        return candidates[0]
    if len(files) == 1:
        from samjax.catalog import model_by_sha256

        known = model_by_sha256(file_sha256(files[0]))
        if known in by_name:
            if model not in (None, known):
                raise CheckpointError(contradiction(known, model))
            return by_name[known]
    if model is not None:
        return by_name[model]
    if prefer is not None and prefer.name in by_name:
        return by_name[prefer.name]
    raise CheckpointError(
        f"it has the architecture of {' and '.join(by_name)}, whose preprocessing differs; pass "
        f"{' or '.join(f'--model {name}' for name in by_name)}"
    )


def _check_preprocessor(file: Path, record: dict[str, Any], config: SamConfig, said: bool) -> None:
    """Raises where a folder's preprocessing is not the model's; a notice where the user said which.

    MedSAM's folders carry SAM's preprocessing, so that what a folder says cannot tell models apart.
    """
    difference = preprocessor_difference(record, config)
    if difference is None:
        return
    if not said:
        raise CheckpointError(
            f"its {file.name} says {difference}; samjax would preprocess images as {config.name} "
            f"does: pass --model {config.name} if that is meant"
        )
    _LOG.warning("%s says %s; images are preprocessed as %s does", file, difference, config.name)


def _recorded(files: list[Path], tensors: dict[str, np.ndarray]) -> SamConfig | None:
    """The config that samjax wrote into the file, whose tensors must be what it wrote."""
    if len(files) != 1 or _KEY not in (metadata := read_metadata(files[0])):
        return None
    with told(str(files[0])):
        record = json.loads(metadata[_KEY])
        if isinstance(schema := record["schema"], int) and schema > SCHEMA:
            raise CheckpointError(
                f"{files[0]} was written by a newer samjax (schema {schema}, this one reads "
                f"{SCHEMA}); upgrade samjax"
            )
        if not is_sealed(record) or record["tensors_sha256"] != params_sha256(tensors):
            raise CheckpointError(
                f"{files[0]} was changed after samjax wrote it (its hash does not match); copy or "
                "convert it again"
            )
        return _config(record["model"])


def _config(data: Any) -> SamConfig:
    """A config of which a model can be built; whatever that raises is the caller's."""
    config = SamConfig.from_json(data)
    expected_shapes(config)
    return config


def _agreeing(path: Path, config: SamConfig | None, model: Any) -> SamConfig:
    """The config in a folder's `config.json`, equal to that in the header where there is one."""
    with told(str(path / CONFIG)):
        own = _config(model)
    if config is not None and config != own:
        raise CheckpointError(
            f"{path / CONFIG} says that the model is {shown(own.name)} at {own.image_size} px and "
            f"{WEIGHTS} that it is {shown(config.name)} at {config.image_size} px; copy the whole "
            "folder again"
        )
    return own


def write_meta(path: Path, config: SamConfig, params: Params) -> None:
    """Writes a `.safetensors` file with Meta's names, whole or not at all."""
    tensors = from_params(params, config)
    with write_beside(path) as partial:
        _save(partial, config, tensors)


def write_huggingface(path: Path, config: SamConfig, params: Params) -> None:
    """Writes a folder that transformers' `SamModel` and `SamProcessor` load, whole or not at all.

    Raises ValueError, one sentence, where transformers has no such model.
    """
    trained_at = config.image_encoder
    config, params = for_own_input(config, params)
    if config.image_encoder != trained_at:
        _LOG.info(
            "position tables are resampled for an input of %s px: transformers does not do it",
            config.frame,
        )
    record = model_config(config)
    preprocessor = preprocessor_config(config)
    tensors = from_meta_names(from_params(params, config))
    dtypes = {array.dtype.name for array in tensors.values()}
    if len(dtypes) == 1:
        record["dtype"] = dtypes.pop()
    with write_beside(path) as partial:
        partial.mkdir()
        _save(partial / WEIGHTS, config, tensors)
        for name, content in ((CONFIG, record), (PREPROCESSOR, preprocessor)):
            (partial / name).write_text(json.dumps(content, indent=2) + "\n")


def _save(path: Path, config: SamConfig, tensors: dict[str, np.ndarray]) -> None:
    record = sealed(
        {
            "schema": SCHEMA,
            "model": config.to_json(),
            "tensors_sha256": params_sha256(tensors),
        }
    )
    # `format` is what torch's and HuggingFace's readers look for.
    metadata = {"format": "pt", _KEY: json.dumps(record)}
    safetensors.numpy.save_file(tensors, path, metadata=metadata)
