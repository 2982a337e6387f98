"""Losses on mask logits, in float32, at the truth's resolution.

The truth lies on the model's padded input, in as many pixels as it comes in, and logits go up to
it, bilinearly, as in SAM's post-processing. What `valid` leaves out, the padding, counts nowhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from samjax.preprocess import MASK_THRESHOLD, upsample

# Kirillov et al. 2023, appendix A: focal to Dice is 20 : 1.
_FOCAL_WEIGHT = 20.0
# Lin et al. 2017, who found them best.
_FOCAL_GAMMA, _FOCAL_ALPHA = 2.0, 0.25
# Side of the square over which `boundary_weights` averages, and how much they add at most.
_WINDOW, _GAIN = 31, 5.0


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What training minimises: losses of pixels, one of regions, and the predicted IoU's error.

    Raises ValueError for a setting out of its range.
    """

    # bce_dice; focal_dice, SAM's own; structure: BCE and soft IoU, both weighted at boundaries;
    # balanced_bce: object and background weigh the same; bce_dice_focal, for many instances.
    kind: Literal["bce_dice", "focal_dice", "structure", "balanced_bce", "bce_dice_focal"] = (
        "bce_dice"
    )
    # Weight of the pixels' losses (BCE, focal); left out, 20 for focal_dice, else 1.
    pixel_weight: float | None = None
    # Weight of the regions' loss (Dice or soft IoU); balanced_bce has none.
    region_weight: float = 1.0
    # Weight of the squared error of the predicted IoU.
    iou_weight: float = 1.0
    # Also trains the three masks of multimask output, each image the one that fits best.
    multimask: bool = False

    def __post_init__(self) -> None:
        if self.kind not in _PIXELS:
            raise ValueError(f"kind must be one of {', '.join(_PIXELS)}, not {self.kind!r}")
        given = {
            name: weight
            for name in ("pixel_weight", "region_weight", "iou_weight")
            if (weight := getattr(self, name)) is not None
        }
        if not all(math.isfinite(weight) and weight >= 0 for weight in given.values()):
            raise ValueError(
                "pixel_weight, region_weight and iou_weight must be finite and not negative, but "
                f"are {given}"
            )
        if not _REGIONS[self.kind] and self.region_weight != 1:
            raise ValueError(f"{self.kind} has no loss of regions: leave out region_weight")
        if not any(self.mask_weights.values()):
            raise ValueError("pixel_weight or region_weight must be positive: masks need a loss")

    @property
    def mask_weights(self) -> dict[str, float]:
        """Of each term that a mask is trained with, by its name in logs."""
        own = _FOCAL_WEIGHT if self.kind == "focal_dice" else 1.0
        pixel = own if self.pixel_weight is None else self.pixel_weight
        pixels = dict.fromkeys(_PIXELS[self.kind], pixel)
        return {**pixels, **dict.fromkeys(_REGIONS[self.kind], self.region_weight)}


def bce(
    logits: Float[Array, "b h w"], truth: Bool[Array, "b h w"], valid: Bool[Array, "b h w"]
) -> Float[Array, " b"]:
    """Binary cross-entropy per image, the mean over its `valid` pixels."""
    losses = optax.sigmoid_binary_cross_entropy(logits, truth.astype(jnp.float32))
    return _mean(losses, valid)


def focal(
    logits: Float[Array, "b h w"], truth: Bool[Array, "b h w"], valid: Bool[Array, "b h w"]
) -> Float[Array, " b"]:
    """Focal loss per image, the mean over its `valid` pixels; gamma 2, alpha 0.25.

    Lin et al. 2017, "Focal Loss for Dense Object Detection", equation 5.
    """
    losses = optax.losses.sigmoid_focal_loss(
        logits, truth.astype(jnp.float32), alpha=_FOCAL_ALPHA, gamma=_FOCAL_GAMMA
    )
    return _mean(losses, valid)


def balanced_bce(
    logits: Float[Array, "b h w"], truth: Bool[Array, "b h w"], valid: Bool[Array, "b h w"]
) -> Float[Array, " b"]:
    """Binary cross-entropy per image, in which its object weighs as much as its background.

    The mean over `valid` pixels, in which those of the object are weighted by the background's
    share of them, and the others by the object's: pos / (pos + neg) times BCE whose positive weight
    is neg / pos. So have it AutoGluon's Conv-LoRA for shadows (SBU) and SAM-Adapter
    (`BBCEWithLogitLoss`), over all pixels of a batch, which Conv-LoRA's has one image in. The loss
    of an image that is all background, or all object, is 0, and has no gradient.
    """
    t = truth.astype(jnp.float32)
    share = _mean(t, valid)[:, None, None]
    losses = optax.sigmoid_binary_cross_entropy(logits, t)
    return _mean(losses * jnp.where(truth, 1 - share, share), valid)


def dice(
    logits: Float[Array, "b h w"], truth: Bool[Array, "b h w"], valid: Bool[Array, "b h w"]
) -> Float[Array, " b"]:
    """Dice loss per image: 1 - (2 sum p t + 1) / (sum p + sum t + 1) over `valid` pixels."""
    p = jnp.where(valid, jax.nn.sigmoid(logits), 0.0)
    t = (truth & valid).astype(jnp.float32)
    overlap = jnp.sum(p * t, axis=(1, 2))
    return 1 - (2 * overlap + 1) / (jnp.sum(p, axis=(1, 2)) + jnp.sum(t, axis=(1, 2)) + 1)


def boundary_weights(
    truth: Bool[Array, "b h w"], valid: Bool[Array, "b h w"]
) -> Float[Array, "b h w"]:
    """1 + 5 |mean of the truth over 31 x 31 pixels - truth|, in [1, 6]; 0 where not `valid`.

    Beyond the frame the truth is False and the divisor stays 31 x 31 (torch's `avg_pool2d(truth,
    31, stride=1, padding=15)`). Padding is False too, so that the weights of an image are those
    that it has without padding. Exact: sums of zeros and ones.
    """
    t = (truth & valid).astype(jnp.float32)
    sums = t
    # One axis at a time: 62 additions a pixel instead of 961.
    for window in ((1, _WINDOW, 1), (1, 1, _WINDOW)):
        sums = jax.lax.reduce_window(sums, 0.0, jax.lax.add, window, (1, 1, 1), "SAME")
    return jnp.where(valid, 1 + _GAIN * jnp.abs(sums / _WINDOW**2 - t), 0.0)


def weighted_bce(
    logits: Float[Array, "b h w"], truth: Bool[Array, "b h w"], valid: Bool[Array, "b h w"]
) -> Float[Array, " b"]:
    """Binary cross-entropy per image, the mean weighted by `boundary_weights`.

    One half of the structure loss: the "pixel position aware loss" of F3Net (Wei et al. 2020,
    arXiv 1911.11445), taken over by PraNet (Fan et al. 2020; `structure_loss` in its MyTrain.py),
    Conv-LoRA and NAS-LoRA. The code of the first three passes `reduce="none"`, which torch takes
    for a request of the plain mean, so that their weights cancel out; here they count.
    """
    losses = optax.sigmoid_binary_cross_entropy(logits, truth.astype(jnp.float32))
    return _mean(losses, boundary_weights(truth, valid))


def weighted_iou(
    logits: Float[Array, "b h w"], truth: Bool[Array, "b h w"], valid: Bool[Array, "b h w"]
) -> Float[Array, " b"]:
    """Soft IoU loss per image, 1 - (sum w p t + 1) / (sum w (p + t - p t) + 1).

    w are `boundary_weights`: the other half of the structure loss; see `weighted_bce`.
    """
    weights = boundary_weights(truth, valid)
    p, t = jax.nn.sigmoid(logits), truth.astype(jnp.float32)
    overlap = jnp.sum(weights * p * t, axis=(1, 2))
    both = jnp.sum(weights * (p + t), axis=(1, 2))
    return 1 - (overlap + 1) / (both - overlap + 1)


def iou_error(
    iou_predictions: Float[Array, " b"],
    logits: Float[Array, "b h w"],
    truth: Bool[Array, "b h w"],
    valid: Bool[Array, "b h w"],
) -> Float[Array, " b"]:
    """Squared error of the predicted IoU, whose target is that of the thresholded mask.

    Its gradient reaches the IoU head and, as in SAM's training, what precedes it. Two empty masks
    have IoU 1.
    """
    predicted = (logits > MASK_THRESHOLD) & valid
    union = jnp.sum(predicted | (truth & valid), axis=(1, 2))
    iou = jnp.where(union > 0, jnp.sum(predicted & truth, axis=(1, 2)) / jnp.maximum(union, 1), 1.0)
    return jnp.square(iou_predictions.astype(jnp.float32) - iou)


def mask_loss(
    low_res_logits: Float[Array, "b h w"],
    iou_predictions: Float[Array, " b"],
    truth: Bool[Array, "b th tw"],
    valid: Bool[Array, "b th tw"],
    config: LossConfig,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of one mask an image, mean over the batch, and its terms before their weights.

    `truth` lies on the model's padded input, at any resolution; `valid` is False on the padding.
    """
    terms = _image_terms(low_res_logits, iou_predictions, truth, valid, config)
    means = {name: term.mean() for name, term in terms.items()}
    weights = {**config.mask_weights, _IOU: config.iou_weight}
    return sum((weights[k] * mean for k, mean in means.items()), start=jnp.float32(0)), means


def multimask_loss(
    low_res_logits: Float[Array, "b m h w"],
    iou_predictions: Float[Array, "b m"],
    truth: Bool[Array, "b th tw"],
    valid: Bool[Array, "b th tw"],
    config: LossConfig,
) -> Float[Array, ""]:
    """The loss of m masks for one ambiguous prompt, mean over the batch.

    Of each image's masks only the one whose loss is lowest has a gradient, while the predicted IoU
    of every one is trained: its mean counts (Kirillov et al. 2023, section 3, "Resolving
    ambiguity"; the mean is that of SAM 2's training code, `training/loss_fns.py`).
    """
    per_mask = jax.vmap(
        lambda logits, iou: _image_terms(logits, iou, truth, valid, config), in_axes=1, out_axes=1
    )
    terms = per_mask(low_res_logits, iou_predictions)
    losses = sum(weight * terms[name] for name, weight in config.mask_weights.items())
    # Not min(), which divides the gradient where masks tie.
    best = jnp.argmin(losses, axis=1, keepdims=True)
    lowest = jnp.take_along_axis(losses, best, axis=1)
    return jnp.mean(lowest) + config.iou_weight * jnp.mean(terms[_IOU])


_ImageLoss = Callable[[Any, Any, Any], Any]
_IOU = "iou_loss"
# The pixels' losses and the regions' loss of each kind, under the names that they have in logs.
# bce_dice_focal is SAM-PARSER's for scenes of many instances (Peng et al. 2024, equation 5), in
# which its indicator leaves the focal loss in; where there is one instance, bce_dice is the whole
# of it. Which of the two is chosen for the data (docs/methods.md). No weight and no gamma of its
# focal loss could be found: here, the weight of BCE, and Lin's gamma.
_PIXELS: dict[str, dict[str, _ImageLoss]] = {
    "bce_dice": {"bce": bce},
    "focal_dice": {"focal_loss": focal},
    "structure": {"weighted_bce": weighted_bce},
    "balanced_bce": {"balanced_bce": balanced_bce},
    "bce_dice_focal": {"bce": bce, "focal_loss": focal},
}
_REGIONS: dict[str, dict[str, _ImageLoss]] = {
    "bce_dice": {"dice_loss": dice},
    "focal_dice": {"dice_loss": dice},
    "structure": {"weighted_iou_loss": weighted_iou},
    "balanced_bce": {},
    "bce_dice_focal": {"dice_loss": dice},
}


def _image_terms(
    low_res_logits: Any, iou_predictions: Any, truth: Any, valid: Any, config: LossConfig
) -> dict[str, Any]:
    """Each term per image: pixels, regions, IoU."""
    logits = upsample(low_res_logits, truth.shape[1:])
    losses = _PIXELS[config.kind] | _REGIONS[config.kind]
    terms = {name: loss(logits, truth, valid) for name, loss in losses.items()}
    return {**terms, _IOU: iou_error(iou_predictions, logits, truth, valid)}


def _mean(losses: Any, weights: Any) -> Any:
    """The weighted mean over pixels, 0 where no pixel has a weight."""
    total = jnp.sum(weights, axis=(1, 2))
    return jnp.sum(losses * weights, axis=(1, 2)) / jnp.maximum(total, 1)
