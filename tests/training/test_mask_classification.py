"""The set loss against NumPy in float64 and SciPy's matching."""

import functools

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from samjax.models.semantic_decoder import ClassifiedMasks
from samjax.tasks import Task
from samjax.training.mask_classification import mask_classification_loss

RNG = np.random.default_rng(0)
FIXED = Task("segmentation", 4, "mask_classification")
MATCHED = Task("segmentation", 4, "mask_classification", tokens=7)
TASKS = pytest.mark.parametrize("task", [FIXED, MATCHED], ids=["fixed", "matched"])
SHAPE = (3, 9, 11)


def case(task, scale=2.0):
    """Image 0 lacks class 2 and has pixels without a label, 1 has class 0 alone, 2 has no label."""
    truth = RNG.integers(0, 4, SHAPE)
    truth[0][truth[0] == 2] = 3
    truth[0][RNG.random(SHAPE[1:]) < 0.3] = -1
    truth[1], truth[2] = 0, -1
    masks = scale * RNG.normal(size=(SHAPE[0], task.masks, *SHAPE[1:]))
    classes = scale * RNG.normal(size=(SHAPE[0], task.masks, 5))
    return ClassifiedMasks(np.float32(masks), np.float32(classes)), truth.astype(np.int32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def pixel_losses(mask, target):
    """Cross-entropy and Dice of one mask over pixels that count."""
    p = sigmoid(mask)
    entropy = -np.where(target, np.log(p), np.log(1 - p)).mean()
    return entropy, 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)


def expected(task, found, truth):
    masks, classes = found.masks.astype(np.float64), found.classes.astype(np.float64)
    shares = np.exp(classes) / np.exp(classes).sum(-1, keepdims=True)
    entropies, dices, weighted, weights = [], [], [], []
    for i in range(len(truth)):
        known = truth[i] != -1
        if not known.any():
            continue
        present = [c for c in range(task.channels) if (truth[i] == c).any()]
        pairs = {
            (k, c): pixel_losses(masks[i, k][known], truth[i][known] == c)
            for k in range(task.masks)
            for c in present
        }
        shown = {c: c for c in present}
        if task.tokens:
            cost = [
                [5 * sum(pairs[k, c]) - 2 * shares[i, k, c] for c in present]
                for k in range(task.masks)
            ]
            shown = {present[j]: k for k, j in zip(*linear_sum_assignment(cost), strict=True)}
        targets = np.full(task.masks, task.channels)
        for c, k in shown.items():
            entropies.append(pairs[k, c][0])
            dices.append(pairs[k, c][1])
            targets[k] = c
        for k, target in enumerate(targets):
            weights.append(0.1 if target == task.channels else 1.0)
            weighted.append(-weights[-1] * np.log(shares[i, k, target]))
    if not weights:
        return 0.0
    return 10 * sum(weighted) / sum(weights) + 5 * np.mean(entropies) + 5 * np.mean(dices)


@functools.partial(jax.jit, static_argnums=0)
def differentiated(task, found, truth):
    return jax.value_and_grad(lambda found: mask_classification_loss(task, found, truth))(found)


@TASKS
def test_the_loss_is_its_formula(task):
    for _ in range(4):
        found, truth = case(task)
        loss, _ = differentiated(task, found, truth)
        np.testing.assert_allclose(loss, expected(task, found, truth), rtol=1e-5)


@TASKS
def test_the_gradient_is_that_of_differences(task):
    """Where the matching stays as it is: along a random direction, by NumPy."""
    found, truth = case(task)
    _, gradient = differentiated(task, found, truth)
    step = jax.tree.map(lambda x: RNG.normal(size=x.shape), found)
    wide = jax.tree.map(lambda x: x.astype(np.float64), found)
    ends = (
        expected(task, jax.tree.map(lambda x, d, s=s: x + s * d, wide, step), truth)
        for s in (1e-6, -1e-6)
    )
    slope = np.subtract(*ends) / 2e-6
    along = sum(np.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (gradient, step)), strict=True))
    assert along == pytest.approx(slope, rel=1e-4)


@TASKS
def test_what_has_no_label_has_no_gradient(task):
    found, truth = case(task)
    _, gradient = differentiated(task, found, truth)
    assert not np.any(gradient.masks[:, :, truth[0] == -1][0])
    assert not np.any(gradient.masks[2]) and not np.any(gradient.classes[2])
    # Image 1 shows one class: one mask is that class's, the others are asked to show nothing.
    trained = np.abs(gradient.masks[1]).max(axis=(1, 2)) > 0
    assert trained.sum() == 1 and np.abs(gradient.classes[1]).min() > 0
    if not task.tokens:
        assert trained[0]
    loss, gradient = differentiated(task, found, np.full_like(truth, -1))
    assert loss == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_the_order_of_matched_tokens_does_not_matter():
    found, truth = case(MATCHED)
    order = RNG.permutation(MATCHED.masks)
    turned = ClassifiedMasks(found.masks[:, order], found.classes[:, order])
    loss, gradient = differentiated(MATCHED, found, truth)
    other, moved = differentiated(MATCHED, turned, truth)
    assert other == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(moved.masks, gradient.masks[:, order], atol=1e-6)


@TASKS
def test_numbers_that_are_not_finite_end(task):
    """The step then says what is wrong; a matching prefers masks that are."""
    found, truth = case(task)
    found.masks[0, 1] = np.nan
    assert np.isfinite(differentiated(task, found, truth)[0]) == bool(task.tokens)
    found.masks[0], found.classes[1] = np.nan, np.inf
    assert not np.isfinite(differentiated(task, found, truth)[0])


def test_scores_are_shares_of_masks():
    found, _ = case(MATCHED)
    scores = jax.jit(ClassifiedMasks.scores)(found)
    shares = np.exp(found.classes) / np.exp(found.classes).sum(-1, keepdims=True)
    wanted = np.zeros((3, 4, *SHAPE[1:]))
    for k in range(MATCHED.masks):
        wanted += shares[:, k, :-1, None, None] * sigmoid(found.masks[:, k, None])
    np.testing.assert_allclose(scores, wanted, rtol=1e-5)
