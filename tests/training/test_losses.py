"""Losses against torch and float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.preprocess import upsample
from samjax.training.losses import bce, dice, mask_loss

RNG = np.random.default_rng(0)


def make(size: int = 16):
    logits = RNG.normal(size=(3, size, size)).astype(np.float32) * 3
    truth = RNG.random((3, size, size)) > 0.6
    valid = np.ones_like(truth)
    valid[1, :, 10:] = False
    valid[2, 5:] = False
    return jnp.asarray(logits), jnp.asarray(truth), jnp.asarray(valid)


def test_bce_is_torchs():
    torch = pytest.importorskip("torch")
    logits, truth, valid = make()
    for i in range(3):
        expected = torch.nn.functional.binary_cross_entropy_with_logits(
            torch.tensor(np.array(logits[i][valid[i]])),
            torch.tensor(np.array(truth[i][valid[i]]), dtype=torch.float),
        )
        np.testing.assert_allclose(bce(logits, truth, valid)[i], expected, rtol=1e-5)


def test_dice_is_its_formula_in_float64():
    logits, truth, valid = make()
    p = 1 / (1 + np.exp(-np.asarray(logits, np.float64))) * valid
    t = np.asarray(truth & valid, np.float64)
    sums = [x.sum(axis=(1, 2)) for x in (p * t, p, t)]
    expected = 1 - (2 * sums[0] + 1) / (sums[1] + sums[2] + 1)
    np.testing.assert_allclose(dice(logits, truth, valid), expected, rtol=1e-5)


def test_extreme_logits_have_finite_losses_and_gradients():
    truth, valid = jnp.ones((1, 4, 4), bool), jnp.ones((1, 4, 4), bool)
    for value in (-1e4, 1e4):
        logits = jnp.full((1, 4, 4), value, jnp.float32)
        for loss in (bce, dice):
            out, grad = jax.value_and_grad(lambda x, f=loss: f(x, truth, valid).sum())(logits)
            assert np.isfinite(out) and np.isfinite(grad).all()


def test_truth_keeps_its_size_and_padding_does_not_count():
    logits, _, _ = make(8)
    truth = jnp.asarray(RNG.random((3, 32, 32)) > 0.5)
    valid = jnp.broadcast_to(jnp.arange(32)[:, None] < 20, truth.shape)
    iou = jnp.array([0.5, 0.6, 0.7])
    loss, terms = mask_loss(logits, iou, truth, valid)
    full = upsample(logits, (32, 32))
    np.testing.assert_allclose(terms["bce"], bce(full, truth, valid).mean(), rtol=1e-6)
    np.testing.assert_allclose(loss, sum(terms.values()), rtol=1e-6)
    changed = jnp.where(valid, truth, ~truth)
    np.testing.assert_allclose(mask_loss(logits, iou, changed, valid)[0], loss, rtol=1e-6)
    predicted = (np.asarray(full) > 0) & valid
    union = (predicted | (truth & valid)).sum((1, 2))
    actual = (predicted & truth & valid).sum((1, 2)) / union
    np.testing.assert_allclose(terms["iou_loss"], np.mean((iou - actual) ** 2), rtol=1e-5)


def test_two_empty_masks_agree():
    logits = jnp.full((1, 8, 8), -9.0)
    nothing, valid = jnp.zeros((1, 8, 8), bool), jnp.ones((1, 8, 8), bool)
    _, terms = mask_loss(logits, jnp.ones(1), nothing, valid)
    assert terms["iou_loss"] == 0
