"""Losses on mask logits, in float32, at the truth's resolution.

The truth lies on the model's padded input, and logits go up to it, bilinearly, as in SAM's
post-processing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from samjax.preprocess import MASK_THRESHOLD, upsample


def bce(
    logits: Float[Array, "b h w"], truth: Bool[Array, "b h w"], valid: Bool[Array, "b h w"]
) -> Float[Array, " b"]:
    """Binary cross-entropy per image, the mean over its `valid` pixels."""
    losses = optax.sigmoid_binary_cross_entropy(logits, truth.astype(jnp.float32))
    return jnp.sum(losses * valid, axis=(1, 2)) / jnp.maximum(jnp.sum(valid, axis=(1, 2)), 1)


def dice(
    logits: Float[Array, "b h w"], truth: Bool[Array, "b h w"], valid: Bool[Array, "b h w"]
) -> Float[Array, " b"]:
    """Dice loss per image: 1 - (2 sum p t + 1) / (sum p + sum t + 1) over `valid` pixels."""
    p = jnp.where(valid, jax.nn.sigmoid(logits), 0.0)
    t = (truth & valid).astype(jnp.float32)
    overlap = jnp.sum(p * t, axis=(1, 2))
    return 1 - (2 * overlap + 1) / (jnp.sum(p, axis=(1, 2)) + jnp.sum(t, axis=(1, 2)) + 1)


def mask_loss(
    low_res_logits: Float[Array, "b h w"],
    iou_predictions: Float[Array, " b"],
    truth: Bool[Array, "b s s"],
    valid: Bool[Array, "b s s"],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """BCE + Dice of one mask per image, plus the squared error of its predicted IoU.

    `truth` lies on the model's padded input, `valid` is False on the padding. The target
    of the IoU term is the actual IoU of the thresholded mask; its gradient reaches the IoU head
    and, as in SAM's training, what precedes it. Returns the mean over the batch and each term.
    """
    logits = upsample(low_res_logits, truth.shape[1:])
    predicted = (logits > MASK_THRESHOLD) & valid
    union = jnp.sum(predicted | (truth & valid), axis=(1, 2))
    iou = jnp.where(union > 0, jnp.sum(predicted & truth, axis=(1, 2)) / jnp.maximum(union, 1), 1.0)
    terms = {
        "bce": bce(logits, truth, valid).mean(),
        "dice_loss": dice(logits, truth, valid).mean(),
        "iou_loss": jnp.square(iou_predictions.astype(jnp.float32) - iou).mean(),
    }
    return sum(terms.values(), start=jnp.float32(0)), terms
