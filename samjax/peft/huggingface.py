"""LoRA and DoRA as HuggingFace's peft keeps them: a folder with a config and a safetensors file.

    adapter_config.json          r, lora_alpha, rank_pattern, modules_to_save, ...
    adapter_model.safetensors    base_model.model.vision_encoder.layers.0.attn.qkv.lora_A.weight ...

Names are those of transformers' `SamModel`, or Meta's where peft adapted that model. The update of
a kernel is B A times lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA; a fused qkv has one pair
of factors. Nothing in a folder is run, and what peft may say but samjax does not compute is
refused.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from samjax.files import check_parent, write_beside
from samjax.models.configs import VitConfig
from samjax.models.sam import Sam
from samjax.nn import BUFFERS, SiteInfo
from samjax.peft.compose import StackDelta
from samjax.peft.delta import Delta, join_segments
from samjax.peft.dora import DoRA, DoRADelta
from samjax.peft.foreign import Adapted, assemble, check_factors, meta_names, trained_leaves
from samjax.peft.lora import LoRA, LoRADelta, LowRank
from samjax.peft.lora_conv import LoRAConv, LoRAConvDelta
from samjax.peft.spec import PeftSpec
from samjax.peft.trees import deltas, merge, trainable
from weights_convert import CheckpointError, read_tensors
from weights_convert.errors import listed, shown, told
from weights_convert.huggingface import TIED, from_meta_names, to_meta_names
from weights_convert.table import Leaf, from_samjax

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_A, _B, _MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"
_FACTOR = re.compile(r"(.+)\.(lora_[A-Za-z_]+)((?:\.[^.]+)*)")
# Keys of the config that do not change what the saved tensors compute.
_SILENT = frozenset(
    "auto_mapping base_model_name_or_path ensure_weight_tying eva_config exclude_modules "
    "inference_mode layers_pattern layers_to_transform megatron_core peft_version "
    "qalora_group_size revision runtime_config target_modules task_type".split()
)
# Ways to draw the first factors that leave the weights as they are; PiSSA and others change them.
_DRAWN = ("gaussian", "orthogonal", "eva")
# Parts of the model that are written whole when some of their leaves are trained.
_WHOLE = ("mask_decoder", "prompt_encoder")
_EMPTY = np.zeros(0, np.float32)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What an `adapter_config.json` says of the update."""

    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    dropout: float
    rank_stabilized: bool
    dora: bool
    modules_to_save: tuple[str, ...]

    def of(self, module: str) -> tuple[int, float]:
        """Rank and alpha of a module: of the first pattern that ends its name, as peft does it."""
        return (
            _matching(self.rank_pattern, module, self.rank),
            _matching(self.alpha_pattern, module, self.alpha),
        )

    def saves(self, name: str) -> bool:
        """True for a tensor of a module that is trained as a whole."""
        parts = name.split(".")
        modules = (".".join(parts[:i]) for i in range(1, len(parts)))
        return any(module.endswith(self.modules_to_save) for module in modules)


def is_peft_folder(path: Path) -> bool:
    """True for a folder with one of the files that peft writes."""
    return any((path / name).is_file() for name in (CONFIG, *_WEIGHTS))


def load(
    folder: str | os.PathLike[str], model: Sam, params: Any, *, factors_only: bool = False
) -> tuple[PeftSpec, dict[str, Any]]:
    """The spec and the variables ({"params", "peft"}) of a folder, for the weights `params`.

    `factors_only`: without the modules that are trained as a whole. Raises FileNotFoundError, or
    ValueError with one sentence on what cannot be read or does not fit.
    """
    folder = Path(folder)
    settings = _read_settings(folder)
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


def _read_settings(folder: Path) -> _Settings:
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{folder} lacks its {CONFIG}; copy the whole folder")
    with told(str(file)):
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it holds no JSON object")
    kind = record.pop("peft_type", None)
    if kind != "LORA":
        raise ValueError(f"{file}: samjax reads LoRA and DoRA of peft, and this is {shown(kind)}")
    if (bias := record.pop("bias", "none")) != "none":
        raise ValueError(
            f"{file}: bias is {shown(bias)}, and samjax reads adapters with bias none; merge it in "
            "peft (merge_and_unload) and convert the weights"
        )
    start = record.pop("init_lora_weights", True)
    if start not in (True, False, None, *_DRAWN):
        raise ValueError(
            f"{file}: init_lora_weights {shown(start)} changes the weights themselves; save it in "
            "peft with path_initial_model_for_weight_conversion"
        )
    with told(str(file)):
        settings = _Settings(
            rank=_number(file, record, "r", 8, int),
            alpha=_number(file, record, "lora_alpha", 8),
            rank_pattern=_patterns(file, record, "rank_pattern", int),
            alpha_pattern=_patterns(file, record, "alpha_pattern"),
            dropout=_number(file, record, "lora_dropout", 0.0),
            rank_stabilized=bool(record.pop("use_rslora", False)),
            dora=bool(record.pop("use_dora", False)),
            modules_to_save=_strings(file, record, "modules_to_save"),
        )
    # What a newer peft adds is null, false or empty where it is not used.
    asks = {k for k, v in record.items() if k not in _SILENT and v not in (None, False, "", [], {})}
    if asks:
        raise ValueError(
            f"{file}: samjax does not compute what {listed(asks, 'of its keys')} asks for; merge "
            "it in peft (merge_and_unload) and convert the weights"
        )
    return settings


def _number(file: Path, record: dict[str, Any], key: str, default: Any, kind: type = float) -> Any:
    return _checked(file, key, record.pop(key, default), kind)


def _checked(file: Path, key: str, value: Any, kind: type) -> Any:
    kinds = (int,) if kind is int else (int, float)
    good = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not good or (kind is int and value < 1):
        what = "a whole number above 0" if kind is int else "a number"
        raise CheckpointError(f"{file}: {key} is {shown(value)}, not {what}; copy the folder again")
    return kind(value)


def _patterns(file: Path, record: dict[str, Any], key: str, kind: type = float) -> dict[str, Any]:
    patterns = record.pop(key, None) or {}
    for pattern, value in patterns.items():
        patterns[pattern] = _checked(file, f"{key} of {shown(pattern)}", value, kind)
        try:
            re.compile(pattern)
        except re.error:
            raise CheckpointError(
                f"{file}: {key} has {shown(pattern)}, which is no regular expression; correct it"
            ) from None
    return patterns


def _strings(file: Path, record: dict[str, Any], key: str) -> tuple[str, ...]:
    values = record.pop(key, None) or []
    if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
        raise CheckpointError(f"{file}: {key} is {shown(values)}, not a list of names; correct it")
    return tuple(values)


def _matching(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return read_tensors(folder / name)
    raise FileNotFoundError(f"{folder} lacks its {_WEIGHTS[0]}; copy the whole folder")


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
        name = re.sub(rf"^({re.escape(_PREFIX)})+", "", key)
        if match := _FACTOR.fullmatch(name):
            module, part, rest = match.groups()
            words = [word for word in rest.split(".")[1:] if word != "weight"]
            if part not in (_A, _B, _MAGNITUDE) or len(words) > 1:
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
        theirs = {path: _their_name(meta) for meta, (path, _) in metas.items()}
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


def _their_name(meta: str) -> str:
    return next(iter(from_meta_names({meta: _EMPTY})))


def _adapted(
    folder: Path,
    module: str,
    arrays: Mapping[str, np.ndarray],
    settings: _Settings,
    info: SiteInfo,
    leaf: Leaf,
) -> Adapted:
    """Factors, and DoRA's magnitude, as samjax's method at a site."""
    wanted = {_A, _B, _MAGNITUDE} if settings.dora else {_A, _B}
    if arrays.keys() != wanted:
        wrong = min(arrays.keys() ^ wanted)
        state = "has a" if wrong in arrays else "lacks its"
        raise ValueError(f"{folder}: {shown(module)} {state} {wrong}; copy the whole folder")
    rank, alpha = settings.of(module)
    check_factors(
        str(folder), module, arrays[_A], arrays[_B], rank, leaf.torch_shape(info.kernel_shape)
    )
    a, b = leaf.to_samjax(arrays[_A]), leaf.to_samjax(arrays[_B])
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
        if arrays[_MAGNITUDE].shape != b.shape[-1:]:
            raise ValueError(
                f"{folder}: {_MAGNITUDE} of {shown(module)} is {list(arrays[_MAGNITUDE].shape)}, "
                f"not [{b.shape[-1]}]; pass the weights that the adapter was trained on"
            )
        made["magnitude"] = arrays[_MAGNITUDE][None]
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
    settings: _Settings,
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


def save(
    folder: str | os.PathLike[str], spec: PeftSpec, model: Sam, variables: Any
) -> dict[str, Any]:
    """Writes a folder that peft loads onto transformers' `SamModel`; returns its config.

    LoRA of segments becomes one LoRA of the whole projection, with zeros between them and the sum
    of their ranks; a mask decoder or prompt encoder that trains is written whole, with what adapts
    its layers folded in. Raises FileExistsError, or ValueError for what peft cannot say.
    """
    folder = Path(folder)
    check_destination(folder, model)
    mask = flatten_dict(trainable(spec, model, variables)["params"], sep="/")
    trains = [path for path, train in mask.items() if train]
    if others := [path for path in trains if not path.startswith(_WHOLE)]:
        raise ValueError(
            f"peft keeps modules that train as a whole, and {listed(others, 'leaves')} of the "
            "image encoder would not be; fold the adapter into its weights with `samjax merge`"
        )
    whole = tuple(name for name in _WHOLE if any(path.startswith(f"{name}/") for path in trains))
    inside = {k: v for k, v in variables["peft"].items() if k in (*whole, "shared")}
    params = flatten_dict(merge(model, variables["params"], inside), sep="/")
    records = {
        path: delta
        for path, delta in deltas(variables["peft"]).items()
        if path.partition("/")[0] not in whole
    }
    tensors, ranks, alphas = {}, {}, {}
    infos = {info.path: info for info in model.sites()}
    for path, delta in records.items():
        module, arrays, rank, alpha = _written(infos[path], delta, params.get(f"{path}/kernel"))
        tensors |= {f"{_PREFIX}{module}.{part}": array for part, array in arrays.items()}
        ranks[module], alphas[module] = rank, alpha
    if not records:
        raise ValueError(
            "peft's LoRA needs a layer that it adapts, and this adapter only trains the model's "
            "own leaves; fold it into its weights with `samjax merge`"
        )
    dora = {path: isinstance(delta, DoRADelta) for path, delta in records.items()}
    if len(set(dora.values())) > 1:
        path = next(path for path, is_dora in dora.items() if not is_dora)
        raise ValueError(
            f"peft has DoRA at all sites or at none, and {path} is LoRA; fold the adapter into its "
            "weights with `samjax merge`"
        )
    for meta, (path, leaf) in meta_names(model).items():
        if path.startswith(whole):
            # peft saves the prompt encoder with its own name of the tensor that it shares.
            name = TIED[0] if meta == TIED[1] else _their_name(meta)
            tensors[f"{_PREFIX}{name}"] = leaf.to_torch(np.asarray(params[path], np.float32))
    record = _config(ranks, alphas, records.values(), whole, any(dora.values()))
    with write_beside(folder) as partial:
        partial.mkdir()
        (partial / CONFIG).write_text(json.dumps(record, indent=2) + "\n")
        safetensors.numpy.save_file(tensors, partial / _WEIGHTS[0], {"format": "pt"})
    return record


def check_destination(folder: Path, model: Sam | None = None) -> None:
    """Raises, before any work, where `save` could not write."""
    if model is not None and not isinstance(model.config.image_encoder, VitConfig):
        raise ValueError(
            f"transformers has no class for {model.config.name}, whose image encoder is a TinyViT; "
            "fold the adapter into its weights with `samjax merge --to meta`"
        )
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f"{folder} exists already; delete it or choose another name")
    check_parent(folder)


def _written(
    info: SiteInfo, delta: Delta, kernel: Any
) -> tuple[str, dict[str, np.ndarray], int, float]:
    """peft's name of a site, its tensors, rank and alpha. Raises ValueError for other methods."""
    parts = delta.deltas if isinstance(delta, StackDelta) else (delta,)
    loras = [part.lora if isinstance(part, DoRADelta) else part for part in parts]
    if wrong := [x for x in loras if not isinstance(x, LoRADelta | LoRAConvDelta)]:
        raise ValueError(
            f"{info.path}: peft has nothing that computes {type(wrong[0]).__name__}; "
            "fold the adapter into its weights with `samjax merge`"
        )
    row = from_samjax(f"{info.path}/kernel")
    assert row is not None  # every site's kernel has a row
    meta, leaf = row
    module = _their_name(meta).removesuffix(".weight")
    scales = [float(lora.scale) for lora in loras]
    # peft's alpha is a site's, and samjax reads no alpha of 0 or below.
    same = len(set(scales)) == 1 and scales[0] > 0
    columns, rows = [], []
    for lora, scale in zip(loras, scales, strict=True):
        for a, b in _pairs(info, lora):
            columns.append(a)
            rows.append(b if same else b * np.float32(scale))
    a, b = np.concatenate(columns, axis=-1), np.concatenate(rows, axis=0)
    if info.kind == "conv":
        b = b[None, None]
    arrays = {f"{_A}.weight": leaf.to_torch(a), f"{_B}.weight": leaf.to_torch(b)}
    if isinstance(delta, DoRADelta):
        arrays[_MAGNITUDE] = _magnitude(info, delta, np.asarray(kernel, np.float32))
    rank = a.shape[-1]
    return module, arrays, rank, (scales[0] if same else 1.0) * rank


def _pairs(info: SiteInfo, lora: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """A and B of each segment, B with zeros for the others; axes are samjax's."""
    if isinstance(lora, LoRAConvDelta):
        return [(np.asarray(lora.a, np.float32), np.asarray(lora.b, np.float32))]
    segments = lora.segments or ((),)
    return [
        (
            np.asarray(a, np.float32),
            np.asarray(join_segments(info, (name,) if name else (), [jnp.asarray(b)]), np.float32),
        )
        for name, a, b in zip(segments, lora.a, lora.b, strict=True)
    ]


def _magnitude(info: SiteInfo, delta: DoRADelta, kernel: np.ndarray) -> np.ndarray:
    """DoRA's magnitudes; those of segments that are not adapted are the kernel's own."""
    segments, given = delta.lora.segments, [*jnp.asarray(delta.magnitude)]
    full = join_segments(info, segments, given)
    adapted = join_segments(info, segments, [jnp.ones_like(part) for part in given])
    return np.asarray(np.where(adapted > 0, full, np.linalg.norm(kernel, axis=0)), np.float32)


def _dropout(delta: Delta) -> float:
    """The dropout of a site, which peft has one of: where the parts of a stack differ, none."""
    parts = delta.deltas if isinstance(delta, StackDelta) else (delta,)
    rates = {getattr(part, "lora", part).dropout for part in parts}
    return rates.pop() if len(rates) == 1 else 0.0


def _config(
    ranks: dict[str, int],
    alphas: dict[str, float],
    records: Iterable[Delta],
    whole: tuple[str, ...],
    dora: bool,
) -> dict[str, Any]:
    rank, alpha = (collections.Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))
    dropouts = [_dropout(delta) for delta in records]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "lora_dropout": max(dropouts),
        "use_rslora": False,
        "use_dora": dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": [*ranks],
        "modules_to_save": [*whole] or None,
    }
