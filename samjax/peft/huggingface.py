"""LoRA and DoRA as HuggingFace's peft keeps them: a folder with a config and a safetensors file.

    adapter_config.json          r, lora_alpha, rank_pattern, modules_to_save, ...
    adapter_model.safetensors    base_model.model.vision_encoder.layers.0.attn.qkv.lora_A.weight ...

Names are those of transformers' `SamModel`, or Meta's where peft adapted that model. The update of
a kernel is B A times lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA; a fused qkv has one pair
of factors. Nothing in a folder is run, and what peft may say but samjax does not compute is
refused. `samjax.peft.to_huggingface` writes such folders.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from samjax.models.configs import VitConfig
from samjax.models.sam import Sam
from samjax.nn import BUFFERS, SiteInfo
from samjax.peft.dora import DoRA
from samjax.peft.foreign import Adapted, assemble, check_factors, meta_names, trained_leaves
from samjax.peft.huggingface_config import CONFIG, Settings, read_settings
from samjax.peft.lora import LoRA, LowRank
from samjax.peft.lora_conv import LoRAConv
from samjax.peft.spec import PeftSpec
from weights_convert import read_tensors
from weights_convert.errors import listed, shown
from weights_convert.huggingface import from_meta_names, to_meta_names
from weights_convert.table import Leaf

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
FACTOR_A, FACTOR_B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"
_FACTOR = re.compile(r"(.+)\.(lora_[A-Za-z_]+)((?:\.[^.]+)*)")
_EMPTY = np.zeros(0, np.float32)


def is_peft_folder(path: Path) -> bool:
    """True for a folder with one of the files that peft writes."""
    return any((path / name).is_file() for name in (CONFIG, *WEIGHTS))


def load(
    folder: str | os.PathLike[str], model: Sam, params: Any, *, factors_only: bool = False
) -> tuple[PeftSpec, dict[str, Any]]:
    """The spec and the variables ({"params", "peft"}) of a folder, for the weights `params`.

    `factors_only`: without the modules that are trained as a whole. Raises FileNotFoundError, or
    ValueError with one sentence on what cannot be read or does not fit.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    factors, trained = _split(folder, _read_tensors(folder))
    if factors_only:
        settings, trained = dataclasses.replace(settings, modules_to_save=()), {}
    names = _names(folder, model, [*(f"{module}.weight" for module in factors), *trained])
    infos = {info.path: info for info in model.sites()}
    sites = {}
    for module, arrays in factors.items():
        path, leaf = names.rows[f"{module}.weight"]
        info = infos.get(path.rpartition("/")[0])
        if info is None or info.kind not in ("dense", "conv"):
            raise ValueError(f"{folder}: {shown(module)} is no layer that samjax adapts with LoRA")
        sites[info.path] = _adapted(folder, module, arrays, settings, info, leaf)
    leaves = _leaves(folder, params, settings, trained, names)
    return assemble(str(folder), model, params, sites, leaves)


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return read_tensors(folder / name)
    raise FileNotFoundError(f"{folder} lacks its {WEIGHTS[0]}; copy the whole folder")


def _split(
    folder: Path, tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """The parts of each adapted module by its name, and the trained tensors by theirs.

    peft leaves the adapter's name out of tensors' names; other programs that save its state do not.
    """
    factors: dict[str, dict[str, np.ndarray]] = {}
    trained: dict[str, np.ndarray] = {}
    adapters = set()
    for key, array in tensors.items():
        name = re.sub(rf"^({re.escape(PREFIX)})+", "", key)
        if match := _FACTOR.fullmatch(name):
            module, part, rest = match.groups()
            words = [word for word in rest.split(".")[1:] if word != "weight"]
            if part not in (FACTOR_A, FACTOR_B, MAGNITUDE) or len(words) > 1:
                raise ValueError(f"{folder}: samjax does not read {shown(key)}")
            adapters |= {*words}
            factors.setdefault(module, {})[part] = np.asarray(array, np.float32)
        elif ".original_module." not in name:
            trained[re.sub(r"\.modules_to_save\.[^.]+(?=\.)", "", name)] = array
    if len(adapters) > 1:
        raise ValueError(
            f"{folder} holds several adapters ({', '.join(map(shown, sorted(adapters)))}); save "
            "one of them with peft's save_pretrained(selected_adapters=[...])"
        )
    if not factors:
        raise ValueError(f"{folder} holds no factors of LoRA; copy the whole folder")
    return factors, trained


@dataclasses.dataclass(frozen=True)
class _Names:
    """Which tensor of the model each of an adapter's names is."""

    # By the adapter's name.
    rows: dict[str, tuple[str, Leaf]]
    # The names of all tensors of the model, in the adapter's way, by path.
    by_path: dict[str, str]


def _names(folder: Path, model: Sam, names: Iterable[str]) -> _Names:
    """Names that are all transformers' or all Meta's. Raises ValueError for one of neither."""
    metas = meta_names(model)
    to_meta = {name: next(iter(to_meta_names({name: _EMPTY}))) for name in names}
    theirs = {}
    if isinstance(model.config.image_encoder, VitConfig):  # transformers has no TinyViT
        theirs = {path: their_name(meta) for meta, (path, _) in metas.items()}
    # What has another name with Meta, and what has the same.
    known = {name for name, meta in to_meta.items() if meta in metas and meta != name}
    known |= to_meta.keys() & set(theirs.values())
    not_theirs = [name for name in to_meta if name not in known]
    not_metas = [name for name in to_meta if name not in metas]
    # Some of the decoder's names are both, and all but those of its MLPs mean the same.
    use_theirs = len(not_theirs) <= len(not_metas)
    if unknown := not_theirs if use_theirs else not_metas:
        raise ValueError(
            f"{folder}: {model.config.name} lacks {listed(unknown, 'of its layers')}; pass the "
            "weights that the adapter was trained on"
        )
    if use_theirs:
        return _Names({name: metas[meta] for name, meta in to_meta.items()}, theirs)
    own = {path: meta for meta, (path, _) in metas.items()}
    return _Names({name: metas[name] for name in to_meta}, own)


def their_name(meta: str) -> str:
    """The name with transformers of Meta's tensor."""
    return next(iter(from_meta_names({meta: _EMPTY})))


def _adapted(
    folder: Path,
    module: str,
    arrays: Mapping[str, np.ndarray],
    settings: Settings,
    info: SiteInfo,
    leaf: Leaf,
) -> Adapted:
    """Factors, and DoRA's magnitude, as samjax's method at a site."""
    wanted = {FACTOR_A, FACTOR_B, MAGNITUDE} if settings.dora else {FACTOR_A, FACTOR_B}
    if arrays.keys() != wanted:
        wrong = min(arrays.keys() ^ wanted)
        state = "has a" if wrong in arrays else "lacks its"
        raise ValueError(f"{folder}: {shown(module)} {state} {wrong}; copy the whole folder")
    rank, alpha = settings.of(module)
    kernel = leaf.torch_shape(info.kernel_shape)
    check_factors(str(folder), module, arrays[FACTOR_A], arrays[FACTOR_B], rank, kernel)
    a, b = leaf.to_samjax(arrays[FACTOR_A]), leaf.to_samjax(arrays[FACTOR_B])
    b = b.reshape(b.shape[-2:])
    scale = alpha / (math.sqrt(rank) if settings.rank_stabilized else rank)
    most = min(math.prod(info.kernel_shape[:-1]), info.kernel_shape[-1])
    if rank > most:  # peft allows it; the product has no more, so that it has such factors too
        a, b = _folded(a, b)
        rank = most
        alpha = scale * (math.sqrt(rank) if settings.rank_stabilized else rank)
    kind: type[LowRank] = LoRAConv if info.kind == "conv" else DoRA if settings.dora else LoRA
    if settings.dora and kind is not DoRA:
        raise ValueError(f"{folder}: samjax has no DoRA on convolutions, such as {shown(module)}")
    try:
        method = kind(rank, alpha, settings.dropout, settings.rank_stabilized)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    if info.kind == "conv":
        return Adapted(method, {"a": a, "b": b})
    made = {"a": a[None], "b": b[None]}
    if settings.dora:
        if arrays[MAGNITUDE].shape != b.shape[-1:]:
            raise ValueError(
                f"{folder}: {MAGNITUDE} of {shown(module)} is {list(arrays[MAGNITUDE].shape)}, "
                f"not [{b.shape[-1]}]; pass the weights that the adapter was trained on"
            )
        made["magnitude"] = arrays[MAGNITUDE][None]
    return Adapted(method, made)


def _folded(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the same product whose rank is the smaller side of it."""
    *window, rank = a.shape
    rows, out = math.prod(window), b.shape[-1]
    product = (a.reshape(rows, rank).astype(np.float64) @ b).astype(np.float32)
    if out <= rows:
        return product.reshape(*window, out), np.eye(out, dtype=np.float32)
    return np.eye(rows, dtype=np.float32).reshape(*window, rows), product


def _leaves(
    folder: Path,
    params: Any,
    settings: Settings,
    trained: Mapping[str, np.ndarray],
    names: _Names,
) -> dict[str, np.ndarray]:
    """The trained leaves by path: all of the modules that are trained as a whole, and no others."""
    if stray := [name for name in trained if not settings.saves(name)]:
        raise ValueError(
            f"{folder} holds {listed(stray, 'tensors of modules that modules_to_save lacks')}; "
            "save the adapter again with peft's save_pretrained"
        )
    have = {names.rows[name][0] for name in trained}
    missing = [
        name
        for path, name in names.by_path.items()
        if settings.saves(name) and path not in have and path.rpartition("/")[2] not in BUFFERS
    ]
    if missing:
        raise ValueError(
            f"{folder} lacks {listed(missing, 'tensors of modules_to_save')}; copy it again, or "
            "take the LoRA factors alone with --without-decoder"
        )
    tensors = {name: (*names.rows[name], array) for name, array in trained.items()}
    return trained_leaves(str(folder), params, tensors)
