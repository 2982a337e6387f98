"""Overlap of binary masks, from counts: exact, and the same for padded and unpadded arrays."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# How the measures of `overlap` and of `samjax.evaluation.saliency` are written in tables.
TITLES = {
    "dice": "Dice",
    "iou": "IoU",
    "s_measure": "S-measure",
    "mean_e_measure": "mean E",
    "weighted_f_measure": "weighted F",
    "mae": "MAE",
}


def overlap(
    predicted: Bool[Array, "b h w"], truth: Bool[Array, "b h w"]
) -> dict[str, Float[Array, " b"]]:
    """Dice and IoU of each pair of masks, in [0, 1]; two empty masks agree: 1."""
    both = jnp.sum(predicted & truth, axis=(1, 2)).astype(jnp.float32)
    sizes = (jnp.sum(predicted, axis=(1, 2)) + jnp.sum(truth, axis=(1, 2))).astype(jnp.float32)
    empty = sizes == 0
    return {
        "dice": jnp.where(empty, 1.0, 2 * both / jnp.where(empty, 1.0, sizes)),
        "iou": jnp.where(empty, 1.0, both / jnp.where(empty, 1.0, sizes - both)),
    }
