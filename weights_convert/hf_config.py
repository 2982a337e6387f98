"""The JSON files beside the weights of a HuggingFace `SamModel`: its config, its preprocessing."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np

from samjax.models.configs import MODELS, SamConfig, VitConfig
from weights_convert.errors import CheckpointError, shown, told

_LOG = logging.getLogger("samjax")
# Where samjax leaves its own config; transformers carries keys along that it does not know.
OWN_KEY = "samjax_model"
_PARTS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
# Written, but not checked: some versions leave the types of parts empty, and of the decoder's
# epsilon see below.
_FREE = {(part, "model_type") for part in _PARTS} | {("mask_decoder_config", "layer_norm_eps")}


def check_supported(config: SamConfig) -> None:
    """Raises ValueError, one sentence, for a model that transformers has no class for."""
    if not isinstance(config.image_encoder, VitConfig):
        raise CheckpointError(
            f"transformers has no class for {config.name}, whose image encoder is a TinyViT; write "
            "it with --to samjax or --to meta"
        )
    if config.frame.height != config.frame.width:
        raise CheckpointError(
            f"transformers' SamModel takes square inputs only, and {config.name} is at "
            f"{config.frame} px; write it with --to samjax or --to meta"
        )


def model_config(config: SamConfig) -> dict[str, Any]:
    """`config.json` of the `SamModel` that computes what `config`'s model computes.

    Raises ValueError, one sentence, where transformers has no such model, also where the position
    tables are of another grid than the input's (see `weights_convert.positions`).
    """
    check_supported(config)
    encoder, size = config.image_encoder, config.frame.height
    if not isinstance(encoder, VitConfig) or encoder.position_grid != config.grid:
        raise CheckpointError(
            f"transformers' SamModel does not resample position tables, and those of {config.name} "
            f"are not made for its input of {size} px; resample them first"
        )
    dim, patch = config.prompt_embed_dim, encoder.patch_size
    return {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "vision_config": {
            "model_type": "sam_vision_model",
            "hidden_size": encoder.embed_dim,
            "output_channels": dim,
            "num_hidden_layers": encoder.depth,
            "num_attention_heads": encoder.num_heads,
            "num_channels": 3,
            "image_size": size,
            "patch_size": patch,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "qkv_bias": True,
            "use_abs_pos": True,
            "use_rel_pos": True,
            "window_size": encoder.window_size,
            "global_attn_indexes": list(encoder.global_attn_indexes),
            "num_pos_feats": dim // 2,
            "mlp_dim": 4 * encoder.embed_dim,
        },
        "prompt_encoder_config": {
            "model_type": "sam_prompt_encoder",
            "hidden_size": dim,
            "image_size": size,
            "patch_size": patch,
            "mask_input_channels": 16,
            "num_point_embeddings": 4,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
        },
        "mask_decoder_config": {
            "model_type": "sam_mask_decoder",
            "hidden_size": dim,
            "hidden_act": "relu",
            "mlp_dim": config.decoder_mlp_dim,
            "num_hidden_layers": config.decoder_depth,
            "num_attention_heads": config.decoder_num_heads,
            "attention_downsample_rate": 2,
            "num_multimask_outputs": 3,
            "iou_head_depth": 3,
            "iou_head_hidden_dim": 256,
            # As in the original; transformers' own conversions say 1e-6, which is another model by
            # less than rounding shows.
            "layer_norm_eps": 1e-5,
        },
        OWN_KEY: json.loads(json.dumps(config.to_json())),
    }


def check_model_config(record: dict[str, Any], config: SamConfig) -> None:
    """Raises ValueError, one sentence, where `config.json` describes another model than `config`.

    Tensors show most of it, but neither the number of heads nor which blocks are global. A key or a
    part that is left out has transformers' default, which is ViT-B's value.
    """
    expected, defaults = model_config(config), model_config(MODELS["vit_b"])
    # The one default that is made of another value; tensors show the width of an MLP.
    defaults["vision_config"]["mlp_dim"] = expected["vision_config"]["mlp_dim"]
    for part in _PARTS:
        theirs = record.get(part)
        theirs = theirs if isinstance(theirs, dict) else {}
        for key, ours in expected[part].items():
            value = theirs.get(key, defaults[part][key])
            if value != ours and (part, key) not in _FREE:
                says = "says" if key in theirs else "leaves out, for transformers' default,"
                raise CheckpointError(
                    f"its config.json {says} {part}.{key} = {shown(value)} where {config.name} has "
                    f"{ours}; samjax reads SAM's own architectures"
                )


def preprocessor_config(config: SamConfig) -> dict[str, Any]:
    """`preprocessor_config.json` for transformers' `SamProcessor`.

    It always keeps the aspect, and it cannot scale by an image's own least and largest value; a
    notice says so where the model was made for that.
    """
    if config.resize != "longest_side" or config.normalization != "pixel":
        _LOG.warning(
            "transformers' SamProcessor cannot preprocess as %s does (%s, %s): resize images to "
            "%s px and scale their values to 0 ... 255 before you pass them to it",
            config.name,
            config.resize,
            config.normalization,
            config.frame,
        )
    return _preprocessor(config)


def preprocessor_difference(record: dict[str, Any], config: SamConfig) -> str | None:
    """What `preprocessor_config.json` says where `config`'s own would say otherwise; None if it is.

    Compared is what becomes of an image: its longest side, and mean and standard deviation on RGB
    values in [0, 255], however they are written. Raises ValueError, one sentence, for values that
    mean nothing.
    """
    defaults = _preprocessor(MODELS["vit_b"])  # those of transformers
    given = {key: value for key, value in record.items() if value is not None}
    with told("its preprocessor config"), np.errstate(all="raise"):
        theirs, ours = _effect({**defaults, **given}), _effect(_preprocessor(config))
    for what, value in theirs.items():
        if not np.allclose(value, ours[what], rtol=1e-4, atol=1e-3):
            return f"{what} {_listed(value)} where {config.name} has {_listed(ours[what])}"
    return None


def _effect(record: dict[str, Any]) -> dict[str, np.ndarray]:
    """What a complete `preprocessor_config.json` does to an image; a side of 0: it stays."""
    size = record["size"] if record["do_resize"] else 0
    side = size["longest_edge"] if isinstance(size, dict) else size
    factor = record["rescale_factor"] if record["do_rescale"] else 1.0
    mean, std = record["image_mean"], record["image_std"]
    if not record["do_normalize"]:
        mean, std = 0.0, 1.0
    return {
        "a longest side of": np.array(side, float),
        "a mean of": np.broadcast_to(np.array(mean, float), 3) / float(factor),
        "a standard deviation of": np.broadcast_to(np.array(std, float), 3) / float(factor),
    }


def _listed(values: np.ndarray) -> str:
    return ", ".join(f"{value:.6g}" for value in np.ravel(values))


def _preprocessor(config: SamConfig) -> dict[str, Any]:
    size = config.frame.height
    low = 4 * config.grid[0]
    # Values are in [0, 255] where `pixel` normalises them, in [0, 1] where `min_max` does.
    unit = 255.0 if config.normalization == "pixel" else 1.0
    return {
        "image_processor_type": "SamImageProcessor",
        "processor_class": "SamProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": size},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / unit for value in config.pixel_mean],
        "image_std": [value / unit for value in config.pixel_std],
        "do_pad": True,
        "pad_size": {"height": size, "width": size},
        "mask_size": {"longest_edge": low},
        "mask_pad_size": {"height": low, "width": low},
    }
