"""Position tables resampled once, for programs that do not resample them themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from samjax.models.attention import resize_relative
from samjax.models.configs import SamConfig, VitConfig
from samjax.models.image_encoder import resize_positions


def for_own_input(config: SamConfig, params: dict[str, Any]) -> tuple[SamConfig, dict[str, Any]]:
    """The same function with the ViT's position tables made for the grid of the config's input.

    samjax resamples them whenever a model runs at another size than it was trained at; here they
    are stored resampled, each in its own dtype. Others than ViTs come back as they are.
    """
    encoder, grid = config.image_encoder, config.grid
    if not isinstance(encoder, VitConfig) or encoder.position_grid == grid:
        return config, params
    rows, columns = grid
    flat = flatten_dict(params, sep="/")

    def replace(path: str, resampled: Any) -> None:
        flat[path] = np.asarray(resampled).astype(flat[path].dtype)

    path = "image_encoder/pos_embed"
    replace(path, resize_positions(jnp.asarray(flat[path], jnp.float32), rows, columns))
    for block in encoder.global_attn_indexes:
        for axis, size in (("h", rows), ("w", columns)):
            path = f"image_encoder/blocks_{block}/attn/rel_pos_{axis}"
            replace(path, resize_relative(jnp.asarray(flat[path], jnp.float32), size))
    side = rows if rows == columns else grid
    encoder = dataclasses.replace(encoder, pretrain_grid=side)
    return dataclasses.replace(config, image_encoder=encoder), unflatten_dict(flat, sep="/")
