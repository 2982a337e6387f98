"""Which SAM a checkpoint holds, told from names and shapes of its tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from samjax.models.configs import MODELS, ImageSize, SamConfig, VitConfig
from weights_convert.errors import CheckpointError, shown

_TOKEN = "mask_decoder.iou_token.weight"
_TINY_PATCH = "image_encoder.patch_embed.seq.0.c.weight"
_MOST_TOKENS = 1024  # a side of the token grid: 16384 pixels
_HINTS = (
    (
        ("image_encoder.trunk.", "sam_mask_decoder.", "sam_prompt_encoder."),
        "it is a SAM 2, and samjax reads SAM 1, MobileSAM and LiteMedSAM",
    ),
    (("peft/", "params/"), "it is an adapter; pass it with --adapter, and its weights with this"),
)


def recognise(tensors: Mapping[str, np.ndarray]) -> tuple[SamConfig, ...]:
    """The configs of `samjax.models.configs.MODELS` that a SAM with these tensors may have.

    Names are Meta's. There are several where models differ in their preprocessing alone, which
    tensors do not show. A ViT whose position tables were made for another grid, as fine-tuning at
    another input size leaves them, has that grid and that input size. Raises ValueError, one
    sentence, where the tensors are no SAM or one of another size.
    """
    if _TOKEN in tensors:
        pos_embed = _shape(tensors, "image_encoder.pos_embed")
        if len(pos_embed) == 4:
            return _vits(tensors, pos_embed)
        patch = _shape(tensors, _TINY_PATCH)
        if len(patch) == 4:
            return _alike(_tiny(patch[-1]))
        raise CheckpointError(
            "this is no SAM checkpoint: it has SAM's mask decoder but no image encoder that samjax "
            f"knows; give the whole checkpoint of one of {', '.join(MODELS)}"
        )
    for prefixes, hint in _HINTS:
        if any(name.startswith(prefixes) for name in tensors):
            raise CheckpointError(f"this is no SAM checkpoint that samjax reads: {hint}")
    for name in tensors:
        if name.endswith("." + _TOKEN):
            prefix = shown(name.removesuffix(_TOKEN))
            raise CheckpointError(
                f"this is no SAM checkpoint with Meta's names: they begin with {prefix!r}; save it "
                "again without that"
            )
    some = ", ".join(shown(name) for name in list(tensors)[:3])
    raise CheckpointError(
        f"this is no SAM checkpoint: its {len(tensors)} tensors ({some}, ...) lack {_TOKEN}; give "
        f"one of {', '.join(MODELS)}"
    )


def _shape(tensors: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
    return tensors[name].shape if name in tensors else ()


def _alike(config: SamConfig) -> tuple[SamConfig, ...]:
    """All models of the config's architecture."""
    return tuple(c for c in MODELS.values() if c.architecture == config.architecture)


def _vits(tensors: Mapping[str, np.ndarray], pos_embed: tuple[int, ...]) -> tuple[SamConfig, ...]:
    rows, columns, embed_dim = pos_embed[1:]
    blocks = (re.match(r"image_encoder\.blocks\.(\d{1,4})\.", name) for name in tensors)
    depth = len({match[1] for match in blocks if match})
    if not (0 < rows <= _MOST_TOKENS and 0 < columns <= _MOST_TOKENS):
        raise CheckpointError(
            f"this is no SAM checkpoint: image_encoder.pos_embed has the shape {pos_embed}, where "
            f"rows and columns of tokens are expected, {_MOST_TOKENS} at most"
        )
    for config in MODELS.values():
        encoder = config.image_encoder
        if isinstance(encoder, VitConfig) and encoder.embed_dim == embed_dim:
            # The depth is left to `to_params`, which names the blocks that are missing.
            return tuple(_at_grid(c, rows, columns) for c in _alike(config))
    raise CheckpointError(
        f"this is a SAM of a size that samjax does not know, width {embed_dim} and {depth} blocks; "
        "pass its config, or give one of vit_b, vit_l, vit_h"
    )


def _at_grid(config: SamConfig, rows: int, columns: int) -> SamConfig:
    """The config of the same model, with position tables and an input of another grid."""
    encoder = config.image_encoder
    if not isinstance(encoder, VitConfig) or encoder.position_grid == (rows, columns):
        return config
    patch = encoder.patch_size
    grid: ImageSize = rows if rows == columns else (rows, columns)
    size: ImageSize = patch * rows if rows == columns else (patch * rows, patch * columns)
    encoder = dataclasses.replace(encoder, pretrain_grid=grid)
    return dataclasses.replace(config, image_encoder=encoder, image_size=size)


def _tiny(kernel: int) -> SamConfig:
    by_kernel = {3: MODELS["vit_t"], 1: MODELS["lite_medsam"]}
    if kernel not in by_kernel:
        raise CheckpointError(
            f"this is a TinyViT SAM that samjax does not know, its patch embedding is {kernel} "
            "pixels wide; pass its config, or give one of vit_t (3 pixels), lite_medsam (1 pixel)"
        )
    return by_kernel[kernel]
