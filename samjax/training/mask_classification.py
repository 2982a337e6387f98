"""The loss of a task whose classes are masks, each with a class: Mask2Former's set loss.

MaskFormer (Cheng et al. 2021) and Mask2Former (Cheng et al. 2022), with the weights that AutoGluon
sets for Conv-LoRA's multi-class sets: 10 for the class of each mask, 5 for binary cross-entropy and
5 for Dice of masks whose class is in the image. A mask that no class of the image is assigned to
is to be of the class "nothing", which weighs a tenth, and has no loss of its pixels.

Which mask shows a class: mask k shows class k, or, of a task with `tokens`, each image's classes
are matched with masks so that they cost least, -2 p(class) + 5 cross-entropy + 5 Dice.

Differs from the paper's code (AutoGluon's `Mask2FormerLoss`, which is HuggingFace's):

- Mask k is class k by default, and theirs are always matched. All tokens start as one and the same,
  so that matching draws lots at first, anew in each image; a token that has its class from the
  start need not wait for that to settle, and there are as many as classes, where AutoGluon's
  authors advise about 100 (its issue 4206).
- All pixels count that have a label, in place of 12,544 points that are drawn where masks are
  unsure; pixels without one are no part of any mask's background.
- The weights 10, 5 and 5 do weigh. HuggingFace's loss only keeps them for its own model, which
  applies them later, so that AutoGluon's sum has 1, 1 and 1.
- An image without labels has no part in the loss, and its masks are not asked to show nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from samjax.models.semantic_decoder import ClassifiedMasks
from samjax.tasks import Task
from samjax.training.losses import bce, dice
from samjax.training.task_losses import known_pixels

# AutoGluon's config, optim.mask2former_loss.
_CLASS, _MASK, _DICE = 10.0, 5.0, 5.0
# Mask2Former's: of "nothing" in the cross-entropy, and of classes in the matching.
_NOTHING, _CLASS_COST = 0.1, 2.0
# A cost that is not finite: whatever else there is comes first.
_NEVER = 1e6


def mask_classification_loss(
    task: Task, found: ClassifiedMasks, truth: Int[Array, "b h w"]
) -> Float[Array, ""]:
    """The loss of a batch, without the task's weight, float32.

    `found` has its masks at the truth's resolution. Class: the mean over all masks of the images
    with a label, weighted 1 or 0.1. Masks: the mean over all classes in the images of what
    `samjax.training.losses` has an image have, over known pixels. 0 where nothing is known.
    """
    known = known_pixels(task, truth)
    targets = truth[:, None] == jnp.arange(task.channels)[:, None, None]
    present = jnp.any(targets, axis=(2, 3))
    # The masks of the classes, and what each mask is to show.
    masks, shown = found.masks, jnp.where(present, jnp.arange(task.channels), task.channels)
    if task.tokens:
        token = _matched(found, targets, known)
        masks = jnp.take_along_axis(masks, token[:, :, None, None], axis=1)
        its_own = token[:, None] == jnp.arange(task.tokens)[:, None]
        shown = jnp.min(jnp.where(its_own, shown[:, None], task.channels), axis=2)

    weights = jnp.where(shown == task.channels, _NOTHING, 1.0)
    weights *= jnp.any(known, axis=(1, 2))[:, None]
    wrong = optax.softmax_cross_entropy_with_integer_labels(found.classes, shown)
    of_class = jnp.sum(weights * wrong) / jnp.maximum(jnp.sum(weights), _NOTHING)

    def mean(loss: Float[Array, "b c"]) -> Float[Array, ""]:
        return jnp.sum(jnp.where(present, loss, 0.0)) / jnp.maximum(jnp.sum(present), 1)

    over_classes = {"in_axes": (1, 1, None), "out_axes": 1}
    of_mask, of_dice = (
        mean(jax.vmap(loss, **over_classes)(masks, targets, known)) for loss in (bce, dice)
    )
    return _CLASS * of_class + _MASK * of_mask + _DICE * of_dice


def _matched(
    found: ClassifiedMasks, targets: Bool[Array, "b c h w"], known: Bool[Array, "b h w"]
) -> Int[Array, "b c"]:
    """The mask of each class, each another one; of classes that an image lacks, one that is left.

    These cost nothing wherever they are, so that they change nothing for the others.
    """
    masks, classes = jax.lax.stop_gradient((found.masks, found.classes))
    inside = targets.astype(jnp.float32)
    outside = (known[:, None] & ~targets).astype(jnp.float32)
    pixels = jnp.maximum(jnp.sum(known, axis=(1, 2)), 1)[:, None, None]

    def over_pixels(of_masks: Float[Array, "b n h w"], of_classes: Array) -> Float[Array, "b n c"]:
        return jnp.einsum("bnhw,bchw->bnc", of_masks, of_classes, precision="highest")

    entropy = over_pixels(jax.nn.softplus(-masks), inside)
    entropy = (entropy + over_pixels(jax.nn.softplus(masks), outside)) / pixels
    shares = jax.nn.sigmoid(masks) * known[:, None]
    sums = jnp.sum(shares, axis=(2, 3))[:, :, None] + jnp.sum(inside, axis=(2, 3))[:, None]
    overlap = 1 - (2 * over_pixels(shares, inside) + 1) / (sums + 1)
    right = jax.nn.softmax(classes, axis=-1)[..., :-1]
    cost = _MASK * entropy + _DICE * overlap - _CLASS_COST * right
    cost = jnp.where(jnp.any(targets, axis=(2, 3))[:, None], cost, 0.0)
    # With a NaN among them the algorithm may not end.
    cost = jnp.nan_to_num(cost, nan=_NEVER, posinf=_NEVER, neginf=_NEVER)

    def match(cost: Float[Array, "n c"]) -> Int[Array, " c"]:
        row, column = optax.assignment.hungarian_algorithm(cost.T)
        return jnp.zeros(cost.shape[1], jnp.int32).at[row].set(column.astype(jnp.int32))

    return jax.vmap(match)(cost)
