"""Torch tensors to samjax parameters and back: strict, bit-equal, in the checkpoint's own dtype."""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from samjax.models import Sam
from samjax.models.configs import SamConfig
from weights_convert.errors import CheckpointError, listed, shown
from weights_convert.recognise import recognise
from weights_convert.table import from_samjax, from_torch

Params = dict[str, Any]  # nested; the leaves are arrays

_LOG = logging.getLogger("samjax")
_DTYPES = frozenset(map(np.dtype, ("float16", ml_dtypes.bfloat16, "float32", "float64")))


@functools.lru_cache(maxsize=16)
def expected_shapes(config: SamConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of `config`'s model by samjax path. Do not modify the dict."""
    shapes = flatten_dict(Sam(config).init_params_shapes(), sep="/")
    return {path: tuple(leaf.shape) for path, leaf in shapes.items()}


def to_params(tensors: Mapping[str, np.ndarray], config: SamConfig | None = None) -> Params:
    """Samjax parameters, a nested dict of numpy arrays, of tensors with the original's names.

    `config` None: recognised from the tensors. Every tensor of the model must be there in its shape
    and finite, and none besides (but BatchNorm's counters and MobileSAM's unused head, which are
    left out). dtypes are kept. Raises ValueError, one sentence that names what does not fit.
    """
    # Models that the tensors do not tell apart have the same parameters.
    config = config or recognise(tensors)[0]
    _check(tensors, config)
    flat: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        path, leaf = from_torch(name) or (None, None)
        if path is None or leaf is None:
            _LOG.debug("%s takes no part in the model and is left out", name)
            continue
        flat[path] = leaf.to_samjax(array)
        if not np.isfinite(flat[path]).all():
            raise CheckpointError(
                f"{name} holds numbers that are not finite: the checkpoint is damaged or its "
                "training diverged; give another one"
            )
    return unflatten_dict(flat, sep="/")


def from_params(params: Params, config: SamConfig | None = None) -> dict[str, np.ndarray]:
    """The tensors with the original's names of samjax parameters: the inverse of `to_params`.

    With `config`, they are checked to be all that its model has. Raises ValueError, one sentence,
    for a path that SAM does not have (merge adapters first) or a leaf that does not fit.
    """
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    rows = {path: from_samjax(path) for path in flat}
    if unknown := [path for path, row in rows.items() if row is None]:
        raise CheckpointError(
            f"{listed(unknown, 'of the parameters are none of SAM')}; merge adapters into the "
            "weights first and give the parameters alone"
        )
    tensors: dict[str, np.ndarray] = {}
    for path, row in rows.items():
        if row is not None:
            name, leaf = row
            if leaf.axes is not None and flat[path].ndim != len(leaf.axes):
                raise CheckpointError(
                    f"{path} has shape {flat[path].shape} where {len(leaf.axes)} axes are "
                    "expected; give the parameters of one model, not a stack of them"
                )
            tensors[name] = leaf.to_torch(flat[path])
    if config is not None:
        _check(tensors, config)
    return tensors


def _check(tensors: Mapping[str, np.ndarray], config: SamConfig) -> None:
    """Collects all that does not fit `config`'s model into one sentence."""
    wanted: dict[str, tuple[int, ...]] = {}
    for path, shape in expected_shapes(config).items():
        row = from_samjax(path)
        if row is None:
            raise CheckpointError(f"{path} of {config.name} has no row in weights_convert/table.py")
        wanted[row[0]] = row[1].torch_shape(shape)
    missing = wanted.keys() - tensors.keys()
    extra = [name for name in tensors.keys() - wanted.keys() if not _is_left_out(name)]
    shared = wanted.keys() & tensors.keys()
    misshaped = [name for name in shared if tensors[name].shape != wanted[name]]
    mistyped = [name for name in shared if tensors[name].dtype not in _DTYPES]

    def nearest(name: str) -> str:
        near = difflib.get_close_matches(name[:200], sorted(missing or wanted), 1)
        return f"{shown(name)}, nearest: {near[0]}" if near else shown(name)

    problems = [
        listed(missing, "missing"),
        listed(extra, "unexpected", nearest),
        listed(
            misshaped,
            "mis-shaped",
            lambda name: f"{name} is {tensors[name].shape}, not {wanted[name]}",
        ),
        listed(
            mistyped, "not floating-point", lambda name: f"{name} is {tensors[name].dtype.name}"
        ),
    ]
    if any(problems):
        raise CheckpointError(
            f"the tensors do not fit {shown(config.name)}: {'; '.join(filter(None, problems))}; "
            f"{_fix(missing, extra)}"
        )


def _is_left_out(name: str) -> bool:
    row = from_torch(name)
    return row is not None and row[0] is None


def _fix(missing: Collection[str], extra: list[str]) -> str:
    for name in extra:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            if ".".join(parts[cut:]) in missing:
                prefix = ".".join(parts[:cut]) + "."
                return f"save it again without {shown(prefix)!r} before the names"
    return "give a whole, unmodified checkpoint with Meta's names, or the config it was made with"
