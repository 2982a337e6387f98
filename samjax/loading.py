"""Models ready to use: weights, an adapter if there is one, the input size, the dtype."""

from __future__ import annotations

import logging
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samjax import peft as peft_lib
from samjax.models import ImageSize, Sam, SamConfig
from samjax.models.attention import AttentionKind
from samjax.weights import read_weights

_LOG = logging.getLogger("samjax")


def load(
    weights: str | os.PathLike[str],
    image_size: ImageSize | None = None,
    *,
    model: str | None = None,
    attention: AttentionKind = "chunked",
    dtype: Any = jnp.float32,
) -> tuple[Sam, dict[str, Any]]:
    """The model and its parameters from a samjax checkpoint, a `.pth` or a `.safetensors` file.

    Or from a folder of transformers, or from a name that `samjax weights list` shows, such as
    "sam_vit_b", whose file is downloaded once. `image_size`: the model's input in pixels, a side or
    (height, width); None keeps the checkpoint's own. `model`: which of `samjax.MODELS` it is; only
    needed where several have the same tensors and other preprocessing. `dtype` is that of the
    computation. Parameters are float32 numpy arrays, whatever the file holds. Raises
    FileNotFoundError, ValueError, or DownloadError with one sentence on what is wrong.
    """
    config, params = _read(weights, model)
    return Sam(config.with_image_size(image_size), attention, jnp.dtype(dtype)), params


def load_adapted(
    weights: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    image_size: ImageSize | None = None,
    *,
    model: str | None = None,
    attention: AttentionKind = "chunked",
    dtype: Any = jnp.float32,
) -> tuple[Sam, dict[str, Any], dict[str, Any]]:
    """`(model, params, peft)` of weights with an adapter in place; raises as `load`.

    The model's input size is the one that the adapter was trained at, unless one is given. Which
    model the weights are, the adapter knows; of dense tasks it is a `samjax.models.MSam`. What is
    adapted is logged, one line.
    """
    file = peft_lib.read(adapter)
    options: dict[str, Any] = {"model": model, "attention": attention, "dtype": dtype}
    return load_with(weights, file, str(adapter), image_size, **options)


def load_with(
    weights: str | os.PathLike[str],
    file: peft_lib.Adapter,
    name: str,
    image_size: ImageSize | None = None,
    *,
    model: str | None = None,
    attention: AttentionKind = "chunked",
    dtype: Any = jnp.float32,
) -> tuple[Sam, dict[str, Any], dict[str, Any]]:
    """`load_adapted` for an adapter that is read already; messages call it by `name`."""
    config, params = _read(weights, model, file.config)
    config = config.with_image_size(image_size or file.config.image_size)
    sam = file.model.clone(config=config, attention=attention, dtype=jnp.dtype(dtype))
    params, records = peft_lib.apply(file, sam, params, name)
    single = file.metadata.get("multimask") is False and _trains_decoder(file)
    note = "; its three masks (multimask_output) were not trained" if single else ""
    _LOG.info("%s: %s%s", name, peft_lib.describe(file, sam), note)
    return sam, params, records


def _trains_decoder(file: peft_lib.Adapter) -> bool:
    return any(name.startswith("params/mask_decoder/") for name in file.tensors)


def _read(
    weights: str | os.PathLike[str], model: str | None, prefer: SamConfig | None = None
) -> tuple[SamConfig, dict[str, Any]]:
    config, params = read_weights(weights, model, prefer=prefer)
    return config, jax.tree.map(lambda x: np.asarray(x, np.float32), params)
