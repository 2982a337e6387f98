"""SAMed's adapters (Zhang and Liu 2023; hitachinsk/SAMed, `sam_lora_image_encoder.py`).

`save_lora_parameters` writes a `.pth` file: `w_a_000`, `w_b_000` are A (rank, in) and B (out, rank)
of q in the first block, `w_a_001`, `w_b_001` those of v, and so on block by block; the update is
B A x without a scale. The prompt encoder and the mask decoder, which are trained, follow under
Meta's names.

What the file does not tell: SAMed trains at 512 px, on values in [0, 1] from which neither SAM's
mean is taken nor its deviation divided out, and its masks are classes, the first the background.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from samjax.models.configs import VitConfig
from samjax.models.sam import Sam
from samjax.peft.foreign import Adapted, assemble, check_factors, meta_names, trained_leaves
from samjax.peft.lora import LoRA
from samjax.peft.spec import PeftSpec
from weights_convert import read_tensors
from weights_convert.errors import listed

_FACTOR = re.compile(r"w_([ab])_(\d{3,})", re.ASCII)
_TRAINED = ("prompt_encoder", "mask_decoder")
_TOKENS = "mask_decoder.mask_tokens.weight"


def is_samed(names: Any) -> bool:
    """True where tensors are called as in SAMed's files."""
    return "w_a_000" in names


def load(
    path: str | os.PathLike[str], model: Sam, params: Any, *, factors_only: bool = False
) -> tuple[PeftSpec, dict[str, Any]]:
    """The spec and the variables ({"params", "peft"}) of a SAMed file, for the weights `params`.

    `factors_only`: without its prompt encoder and mask decoder. Raises FileNotFoundError, or
    ValueError with one sentence on what does not fit.
    """
    source = str(path)
    tensors = read_tensors(Path(path))
    if not is_samed(tensors):
        raise ValueError(f"{source} is no file of SAMed: it lacks w_a_000, the first factor")
    factors = {name: array for name, array in tensors.items() if _FACTOR.fullmatch(name)}
    others = {name: array for name, array in tensors.items() if name not in factors}
    sites = _sites(source, model, factors)
    names = meta_names(model)
    wanted = {name for name in names if name.startswith(_TRAINED)}
    if factors_only:
        others = {name: array for name, array in others.items() if not name.startswith(_TRAINED)}
        wanted = set()
    elif (tokens := others.get(_TOKENS)) is not None and tokens.shape[:1] != (4,):
        raise ValueError(
            f"{source}: its mask decoder has {tokens.shape[0]} mask tokens (classes and the "
            "background) where SAM has 4; take the LoRA factors alone with --without-decoder and "
            "train a decoder"
        )
    if unknown := others.keys() - wanted:
        raise ValueError(
            f"{source} holds {listed(unknown, 'tensors that SAMed does not write')}; its variant "
            "with LoRA in the mask decoder cannot be read"
        )
    if missing := wanted - others.keys():
        raise ValueError(
            f"{source} is not whole: {listed(missing, 'tensors are missing')}; copy it again, or "
            "take the LoRA factors alone with --without-decoder"
        )
    leaves = trained_leaves(source, params, {k: (*names[k], v) for k, v in others.items()})
    return assemble(source, model, params, sites, leaves)


def _sites(source: str, model: Sam, factors: dict[str, np.ndarray]) -> dict[str, Adapted]:
    encoder = model.config.image_encoder
    if not isinstance(encoder, VitConfig):
        raise ValueError(f"{source}: SAMed adapts SAM's ViT, and {model.config.name} has a TinyViT")
    depth, width = encoder.depth, encoder.embed_dim
    expected = {f"w_{x}_{i:03d}" for x in "ab" for i in range(2 * depth)}
    if factors.keys() != expected:
        raise ValueError(
            f"{source} holds {len(factors)} factors, and q and v in each of the {depth} blocks of "
            f"{model.config.name} have {len(expected)}; pass the weights that it was trained on"
        )
    rank = factors["w_a_000"].shape[0] if factors["w_a_000"].ndim else 0
    sites = {}
    for block in range(depth):
        a, b = [], []
        for index in (2 * block, 2 * block + 1):  # q, v
            low, high = factors[f"w_a_{index:03d}"], factors[f"w_b_{index:03d}"]
            check_factors(source, f"w_a_{index:03d}", low, high, rank, (width, width))
            a.append(low.T)
            b.append(high.T)
        arrays = {"a": np.stack(a).astype(np.float32), "b": np.stack(b).astype(np.float32)}
        sites[f"image_encoder/blocks_{block}/attn/qkv"] = Adapted(LoRA(rank), arrays, ("q", "v"))
    return sites
