"""The names of HuggingFace's `SamModel` and Meta's for the same tensors, used in both directions.

Only names differ: shapes and the order of axes are torch's on either side and stay the business of
`weights_convert.table`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from weights_convert.errors import CheckpointError, shown

_SELF, _TO_IMAGE, _TO_TOKEN, _FINAL = (
    "transformer.layers.*.self_attn",
    "transformer.layers.*.cross_attn_token_to_image",
    "transformer.layers.*.cross_attn_image_to_token",
    "transformer.final_attn_token_to_image",
)
_POSITIONS = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"


def _rows(theirs: str, metas: str, names: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(f"{theirs}.{a}", f"{metas}.{b}") for a, b in names]


def _same(*names: str) -> list[tuple[str, str]]:
    return [(name, name) for name in names]


# (HuggingFace's name, Meta's) of a tensor, or of a layer with `weight` and `bias`; `*` is a number.
TABLE: tuple[tuple[str, str], ...] = (
    ("shared_image_embedding.positional_embedding", _POSITIONS),
    *_rows(
        "vision_encoder",
        "image_encoder",
        [
            ("pos_embed", "pos_embed"),
            ("patch_embed.projection", "patch_embed.proj"),
            ("neck.conv1", "neck.0"),
            ("neck.layer_norm1", "neck.1"),
            ("neck.conv2", "neck.2"),
            ("neck.layer_norm2", "neck.3"),
        ],
    ),
    *_rows(
        "vision_encoder.layers.*",
        "image_encoder.blocks.*",
        [
            ("layer_norm1", "norm1"),
            ("layer_norm2", "norm2"),
            *_same("attn.qkv", "attn.proj", "attn.rel_pos_h", "attn.rel_pos_w"),
            *_same("mlp.lin1", "mlp.lin2"),
        ],
    ),
    *_rows(
        "prompt_encoder",
        "prompt_encoder",
        [
            ("point_embed.*", "point_embeddings.*"),
            *_same("not_a_point_embed", "no_mask_embed"),
            ("mask_embed.conv1", "mask_downscaling.0"),
            ("mask_embed.layer_norm1", "mask_downscaling.1"),
            ("mask_embed.conv2", "mask_downscaling.3"),
            ("mask_embed.layer_norm2", "mask_downscaling.4"),
            ("mask_embed.conv3", "mask_downscaling.6"),
        ],
    ),
    *_rows(
        "mask_decoder",
        "mask_decoder",
        [
            *_same("iou_token", "mask_tokens"),
            *_same(
                *(
                    f"{attention}.{projection}_proj"
                    for attention in (_SELF, _TO_IMAGE, _TO_TOKEN, _FINAL)
                    for projection in ("q", "k", "v", "out")
                )
            ),
            *_same("transformer.layers.*.mlp.lin1", "transformer.layers.*.mlp.lin2"),
            *(
                (f"transformer.layers.*.layer_norm{i}", f"transformer.layers.*.norm{i}")
                for i in "1234"
            ),
            ("transformer.layer_norm_final_attn", "transformer.norm_final_attn"),
            ("upscale_conv1", "output_upscaling.0"),
            ("upscale_layer_norm", "output_upscaling.1"),
            ("upscale_conv2", "output_upscaling.3"),
        ],
    ),
    *(
        row
        for mlp in ("mask_decoder.output_hypernetworks_mlps.*", "mask_decoder.iou_prediction_head")
        for row in _rows(
            mlp,
            mlp,
            [("proj_in", "layers.0"), ("layers.0", "layers.1"), ("proj_out", "layers.2")],
        )
    ),
)
# A second name of the same tensor, which some versions write beside the first one or in its stead.
TIED = ("prompt_encoder.shared_embedding.positional_embedding", _POSITIONS)


def _compiled(rows: Iterable[tuple[str, str]]) -> tuple[tuple[re.Pattern[str], str], ...]:
    """(pattern of a whole name, template of what takes its place)"""

    def pattern(name: str) -> re.Pattern[str]:
        number = re.escape(name).replace(r"\*", r"(\d{1,4})")
        return re.compile(rf"{number}(\.weight|\.bias)?", re.ASCII)

    def template(name: str) -> str:
        numbers = name.count("*")
        return name.replace("*", r"\1") + rf"\{numbers + 1}"

    return tuple((pattern(source), template(target)) for source, target in rows)


_TO_META = _compiled((*TABLE, TIED))
_FROM_META = _compiled((meta, theirs) for theirs, meta in TABLE)


def _renamed(name: str, rows: tuple[tuple[re.Pattern[str], str], ...]) -> str | None:
    for pattern, template in rows:
        if match := pattern.fullmatch(name):
            return match.expand(template)
    return None


def has_their_names(names: Collection[str]) -> bool:
    """True where tensors are called as in HuggingFace's `SamModel`."""
    return any(name.startswith(("vision_encoder.", "shared_image_embedding.")) for name in names)


def to_meta_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a `SamModel` under Meta's names; names that it does not have stay.

    The prompt encoder's positional matrix is tied to the image's: either may be missing, and where
    both are there they must be equal. Raises ValueError, one sentence, where they are not.
    """
    names: dict[str, str] = {}  # theirs by Meta's
    for name, array in tensors.items():
        first = names.setdefault(_renamed(name, _TO_META) or name, name)
        if not _same_array(tensors[first], array):
            raise CheckpointError(
                f"{shown(first)} and {shown(name)} must be the same tensor and differ; save the "
                "model again with transformers' save_pretrained"
            )
    return {meta: tensors[name] for meta, name in names.items()}


def from_meta_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `to_meta_names`; of the tied tensors the image's is written.

    Raises ValueError, one sentence, for a tensor that `SamModel` does not have.
    """
    renamed: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        new = _renamed(name, _FROM_META)
        if new is None:
            raise CheckpointError(
                f"HuggingFace's SamModel has no {shown(name)}: it is SAM with a plain ViT; write "
                "with --to meta instead"
            )
        renamed[new] = array
    return renamed


def _same_array(a: np.ndarray, b: np.ndarray) -> bool:
    if a is b:
        return True
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
