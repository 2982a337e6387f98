"""Losses of dense tasks: means over known pixels.

Cross-entropy, masked L1 and cosine as in MTAN (Liu et al. 2019) and MTSAM (Wang et al. 2025);
balanced cross-entropy as in HED (Xie and Tu 2015): each class weighs as much as the other.

That of `mask_classification` is `samjax.training.mask_classification`.

A batch in which no pixel is known has the loss 0, and no gradient.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from samjax.tasks import CLASSES, IGNORE, Task


def task_loss(task: Task, maps: Float[Array, "b m h w"], truth: Any) -> Float[Array, ""]:
    """The loss of one task, without its weight.

    `maps` are a model's output at the truth's resolution, without activation; `truth` is (b, h, w)
    of int32 for losses of `CLASSES`, else (b, m, h, w) of float32.
    """
    known = known_pixels(task, truth)
    if task.loss == "cross_entropy":
        log_shares = jax.nn.log_softmax(maps, axis=1)
        classes = jnp.clip(truth, 0)[:, None]
        return _mean(-jnp.take_along_axis(log_shares, classes, axis=1)[:, 0], known)
    if task.loss == "balanced_bce":
        share = _mean(jnp.where(truth == 1, 1.0, 0.0), known)
        weight = jnp.where(truth == 1, 1 - share, share)
        logits = jnp.where(truth == 1, maps[:, 0], -maps[:, 0])
        return _mean(-weight * jax.nn.log_sigmoid(logits), known)
    if task.loss == "masked_l1":
        return _mean(jnp.abs(maps - truth)[:, 0], known)
    return _mean(1 - jnp.sum(unit(maps) * truth, axis=1), known)


def known_pixels(task: Task, truth: Any) -> Bool[Array, "b h w"]:
    """Where a truth counts."""
    return truth != IGNORE if task.loss in CLASSES else jnp.any(truth != 0, axis=1)


def unit(maps: Float[Array, "b 3 h w"]) -> Float[Array, "b 3 h w"]:
    """Directions of length 1; finite, with its derivative, where a map is zero."""
    return maps * jax.lax.rsqrt(jnp.sum(jnp.square(maps), axis=1, keepdims=True) + 1e-12)


def _mean(values: Float[Array, "b h w"], known: Bool[Array, "b h w"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(known, values, 0.0)) / jnp.maximum(jnp.sum(known), 1)
