"""LoRA and DoRA to folders of HuggingFace's peft, as `samjax.peft.huggingface` says they look."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from samjax.files import check_parent, write_beside
from samjax.models.configs import VitConfig
from samjax.models.msam import MSam
from samjax.models.sam import Sam
from samjax.nn import SiteInfo
from samjax.peft.compose import StackDelta
from samjax.peft.delta import Delta, join_segments
from samjax.peft.dora import DoRADelta
from samjax.peft.foreign import meta_names
from samjax.peft.huggingface import FACTOR_A, FACTOR_B, MAGNITUDE, PREFIX, WEIGHTS, their_name
from samjax.peft.huggingface_config import CONFIG
from samjax.peft.lora import LoRADelta
from samjax.peft.lora_conv import LoRAConvDelta
from samjax.peft.spec import PeftSpec
from samjax.peft.trees import deltas, merge, trainable
from weights_convert.errors import listed
from weights_convert.huggingface import TIED
from weights_convert.table import from_samjax

# Parts of the model that are written whole when some of their leaves are trained.
_WHOLE = ("mask_decoder", "prompt_encoder")


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
        tensors |= {f"{PREFIX}{module}.{part}": array for part, array in arrays.items()}
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
            name = TIED[0] if meta == TIED[1] else their_name(meta)
            tensors[f"{PREFIX}{name}"] = leaf.to_torch(np.asarray(params[path], np.float32))
    record = _config(ranks, alphas, records.values(), whole, any(dora.values()))
    with write_beside(folder) as partial:
        partial.mkdir()
        (partial / CONFIG).write_text(json.dumps(record, indent=2) + "\n")
        safetensors.numpy.save_file(tensors, partial / WEIGHTS[0], {"format": "pt"})
    return record


def check_destination(folder: Path, model: Sam) -> None:
    """Raises, before any work, where `save` could not write."""
    if isinstance(model, MSam):
        raise ValueError(
            "transformers' SamModel has one mask decoder, and dense tasks have one each: `samjax "
            "merge --task NAME --to hf` makes weights of one task"
        )
    if not isinstance(model.config.image_encoder, VitConfig):
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
    module = their_name(meta).removesuffix(".weight")
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
    arrays = {f"{FACTOR_A}.weight": leaf.to_torch(a), f"{FACTOR_B}.weight": leaf.to_torch(b)}
    if isinstance(delta, DoRADelta):
        arrays[MAGNITUDE] = _magnitude(info, delta, np.asarray(kernel, np.float32))
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
