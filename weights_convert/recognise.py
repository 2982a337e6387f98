"""Which SAM a checkpoint holds, told from names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from samjax.models.configs import MODELS, SamConfig, VitConfig
from weights_convert.errors import CheckpointError, shown

_TOKEN = "mask_decoder.iou_token.weight"
_TINY_PATCH = "image_encoder.patch_embed.seq.0.c.weight"
_HINTS = (
    (
        ("vision_encoder.", "shared_image_embedding."),
        "it has HuggingFace's names, and Meta's are needed for now; give the original .pth",
    ),
    (
        ("image_encoder.trunk.", "sam_mask_decoder.", "sam_prompt_encoder."),
        "it is a SAM 2, and samjax reads SAM 1, MobileSAM and LiteMedSAM",
    ),
)


def recognise(tensors: Mapping[str, np.ndarray]) -> SamConfig:
    """The config of the SAM with these tensors, one of `samjax.models.configs.MODELS`.

    Raises ValueError, one sentence, where they are no SAM or one of another size.
    """
    if _TOKEN in tensors:
        pos_embed = _shape(tensors, "image_encoder.pos_embed")
        if len(pos_embed) == 4:
            return _vit(tensors, pos_embed[-1])
        patch = _shape(tensors, _TINY_PATCH)
        if len(patch) == 4:
            return _tiny(patch[-1])
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


def _vit(tensors: Mapping[str, np.ndarray], embed_dim: int) -> SamConfig:
    blocks = (re.match(r"image_encoder\.blocks\.(\d{1,4})\.", name) for name in tensors)
    depth = len({match[1] for match in blocks if match})
    for config in MODELS.values():
        encoder = config.image_encoder
        if isinstance(encoder, VitConfig) and encoder.embed_dim == embed_dim:
            # The depth is left to `to_params`, which names the blocks that are missing.
            return config
    raise CheckpointError(
        f"this is a SAM of a size that samjax does not know, width {embed_dim} and {depth} blocks; "
        "pass its config, or give one of vit_b, vit_l, vit_h"
    )


def _tiny(kernel: int) -> SamConfig:
    by_kernel = {3: MODELS["vit_t"], 1: MODELS["lite_medsam"]}
    if kernel not in by_kernel:
        raise CheckpointError(
            f"this is a TinyViT SAM that samjax does not know, its patch embedding is {kernel} "
            "pixels wide; pass its config, or give one of vit_t (3 pixels), lite_medsam (1 pixel)"
        )
    return by_kernel[kernel]
