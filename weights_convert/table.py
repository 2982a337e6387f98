"""The one table between the original's tensor names and samjax paths, used in both directions.

A samjax path is the torch key with "/" for ".", and with a number joined to the name before it:
`image_encoder.blocks.3.attn.qkv.weight` is `image_encoder/blocks_3/attn/qkv/kernel`. What the table
adds is the kind of each layer: how its leaves are called and how their axes are ordered. Every
transform is a permutation of axes, so its inverse is one too and the round trip is bit-equal.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor of a layer: its name on either side and the axes that lead to samjax's order."""

    torch: str
    # None: the tensor takes no part in the model and is left out.
    samjax: str | None
    # `samjax_array = torch_array.transpose(axes)`; None: as it is, of any rank.
    axes: tuple[int, ...] | None = None

    def to_samjax(self, array: np.ndarray) -> np.ndarray:
        """The torch tensor in samjax's axis order, contiguous."""
        return np.ascontiguousarray(array if self.axes is None else array.transpose(self.axes))

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_samjax`."""
        inverse = None if self.axes is None else np.argsort(self.axes)
        return np.ascontiguousarray(array if inverse is None else array.transpose(inverse))

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The torch shape of a leaf with samjax's `shape`."""
        if self.axes is None:
            return shape
        return tuple(shape[self.axes.index(axis)] for axis in range(len(shape)))


_BIAS = Leaf("bias", "bias")
LINEAR = (Leaf("weight", "kernel", (1, 0)), _BIAS)  # (out, in) -> (in, out)
CONV = (Leaf("weight", "kernel", (2, 3, 1, 0)), _BIAS)  # OIHW -> HWIO; depthwise: I = 1
# (in, out, kh, kw) -> (kh, kw, in, out), not flipped: see the mask decoder, which applies it so.
CONV_TRANSPOSE = (Leaf("weight", "kernel", (2, 3, 0, 1)), _BIAS)
NORM = (Leaf("weight", "scale"), _BIAS)
BATCH_NORM = (
    *NORM,
    Leaf("running_mean", "mean"),
    Leaf("running_var", "var"),
    # A training counter. torch's strict loading accepts a plain dict without it.
    Leaf("num_batches_tracked", None),
)
EMBEDDING = (Leaf("weight", "embedding"),)
UNUSED = (Leaf("weight", None), Leaf("bias", None))


def _arrays(*names: str) -> tuple[Leaf, ...]:
    return tuple(Leaf(name, name) for name in names)


_VIT_BLOCK = r"image_encoder\.blocks\.\d+"
_TINY = r"image_encoder\.layers\.\d+"
_TINY_BLOCK = _TINY + r"\.blocks\.\d+"
# Every Conv2d_BN of TinyViT: a convolution `c` without bias, then a batch norm `bn`.
_CONV_BN = (
    rf"(image_encoder\.patch_embed\.seq\.[02]|{_TINY_BLOCK}\.(conv[123]|local_conv)"
    rf"|{_TINY}\.downsample\.conv[123])"
)
_TRANSFORMER = r"mask_decoder\.transformer"

# (regex of the layer's torch name, its leaves)
TABLE: tuple[tuple[str, tuple[Leaf, ...]], ...] = (
    (r"image_encoder", _arrays("pos_embed")),
    (r"image_encoder\.patch_embed\.proj", CONV),
    (rf"{_VIT_BLOCK}\.norm[12]", NORM),
    (rf"{_VIT_BLOCK}\.attn", _arrays("rel_pos_h", "rel_pos_w")),
    (rf"{_VIT_BLOCK}\.attn\.(qkv|proj)", LINEAR),
    (rf"{_VIT_BLOCK}\.mlp\.lin[12]", LINEAR),
    (rf"{_CONV_BN}\.c", CONV),
    (rf"{_CONV_BN}\.bn", BATCH_NORM),
    (rf"{_TINY_BLOCK}\.attn", _arrays("attention_biases")),
    (rf"{_TINY_BLOCK}\.(attn|mlp)\.norm", NORM),
    (rf"{_TINY_BLOCK}\.(attn\.(qkv|proj)|mlp\.fc[12])", LINEAR),
    # MobileSAM's classification head, which segmentation never calls.
    (r"image_encoder\.(norm_head|head)", UNUSED),
    (r"image_encoder\.neck\.[02]", CONV),
    (r"image_encoder\.neck\.[13]", NORM),
    (r"prompt_encoder\.pe_layer", _arrays("positional_encoding_gaussian_matrix")),
    (r"prompt_encoder\.(point_embeddings\.[0-3]|not_a_point_embed|no_mask_embed)", EMBEDDING),
    (r"prompt_encoder\.mask_downscaling\.[036]", CONV),
    (r"prompt_encoder\.mask_downscaling\.[14]", NORM),
    (r"mask_decoder\.(iou_token|mask_tokens)", EMBEDDING),
    (
        rf"{_TRANSFORMER}\.(layers\.\d+\.(self_attn|cross_attn_token_to_image"
        r"|cross_attn_image_to_token)|final_attn_token_to_image)\.(q|k|v|out)_proj",
        LINEAR,
    ),
    (rf"{_TRANSFORMER}\.layers\.\d+\.mlp\.lin[12]", LINEAR),
    (rf"{_TRANSFORMER}\.(layers\.\d+\.norm[1-4]|norm_final_attn)", NORM),
    (r"mask_decoder\.output_upscaling\.[03]", CONV_TRANSPOSE),
    (r"mask_decoder\.output_upscaling\.1", NORM),
    (r"mask_decoder\.(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.\d+", LINEAR),
)
_ROWS = tuple((re.compile(layer, re.ASCII), leaves) for layer, leaves in TABLE)


def from_torch(key: str) -> tuple[str | None, Leaf] | None:
    """The samjax path (None: left out) and the leaf of a torch key; None where no row matches."""
    layer, _, name = key.rpartition(".")
    for pattern, leaves in _ROWS:
        if pattern.fullmatch(layer):
            for leaf in leaves:
                if leaf.torch == name:
                    return leaf.samjax and f"{_path(layer)}/{leaf.samjax}", leaf
    return None


def from_samjax(path: str) -> tuple[str, Leaf] | None:
    """The torch key and the leaf of a samjax path; None where no row matches."""
    stem, _, name = path.rpartition("/")
    layer = re.sub(r"_(\d+)(?=/|$)", r".\1", stem).replace("/", ".")
    for pattern, leaves in _ROWS:
        if pattern.fullmatch(layer):
            for leaf in leaves:
                if leaf.samjax == name and _path(layer) == stem:
                    return f"{layer}.{leaf.torch}", leaf
    return None


def _path(layer: str) -> str:
    return re.sub(r"\.(\d+)(?=\.|$)", r"_\1", layer).replace(".", "/")
