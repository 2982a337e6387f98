"""Losses against torch and float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.preprocess import upsample
from samjax.training.losses import (
    LossConfig,
    balanced_bce,
    bce,
    boundary_weights,
    dice,
    focal,
    mask_loss,
    multimask_loss,
    weighted_bce,
    weighted_iou,
)

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


def focal_reference(logits, truth) -> float:
    """Lin et al. 2017, equation 5, in float64."""
    p = 1 / (1 + np.exp(-logits))
    p_t, alpha_t = np.where(truth, p, 1 - p), np.where(truth, 0.25, 0.75)
    return np.mean(-alpha_t * (1 - p_t) ** 2 * np.log(p_t))


def structure_reference(logits, truth) -> tuple[float, float]:
    """The published formula in torch and float64, with the weights that its papers state."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    x, mask = (torch.from_numpy(np.asarray(a, np.float64)[None, None]) for a in (logits, truth))
    weights = 1 + 5 * (functional.avg_pool2d(mask, 31, stride=1, padding=15) - mask).abs()
    losses = functional.binary_cross_entropy_with_logits(x, mask, reduction="none")
    p = x.sigmoid()
    overlap, both = (weights * p * mask).sum(), (weights * (p + mask)).sum()
    wbce = (weights * losses).sum() / weights.sum()
    return float(wbce), float(1 - (overlap + 1) / (both - overlap + 1))


def test_focal_is_its_formula_in_float64():
    logits, truth, valid = map(np.asarray, make())
    for i in range(3):
        inside = valid[i]
        expected = focal_reference(logits[i][inside].astype(np.float64), truth[i][inside])
        np.testing.assert_allclose(
            focal(*map(jnp.asarray, (logits, truth, valid)))[i], expected, rtol=1e-5
        )


def blob(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (rows - 0.4 * height) ** 2 + (columns - 0.6 * width) ** 2 < (0.3 * height) ** 2


def test_boundary_weights_are_torchs_pooling():
    torch = pytest.importorskip("torch")
    truth = np.stack([blob(70, 90), ~blob(70, 90), RNG.random((70, 90)) > 0.5])
    mask = torch.from_numpy(truth.astype(np.float64))
    pooled = torch.nn.functional.avg_pool2d(mask, 31, stride=1, padding=15)
    weights = boundary_weights(jnp.asarray(truth), jnp.ones(truth.shape, bool))
    np.testing.assert_allclose(weights, 1 + 5 * (pooled - mask).abs(), rtol=1e-6)


def test_structure_loss_is_its_formula_on_the_image_without_padding():
    height, width = 50, 64
    logits = np.zeros((2, 80, 80), np.float32)
    logits[:] = RNG.normal(size=logits.shape) * 3
    truth, valid = np.ones((2, 80, 80), bool), np.zeros((2, 80, 80), bool)
    valid[:, :height, :width] = True
    truth[0, :height, :width] = blob(height, width)
    truth[1, :height, :width] = False  # an empty truth
    arrays = tuple(map(jnp.asarray, (logits, truth, valid)))
    for i in range(2):
        wbce, wiou = structure_reference(logits[i, :height, :width], truth[i, :height, :width])
        np.testing.assert_allclose(weighted_bce(*arrays)[i], wbce, rtol=1e-5)
        np.testing.assert_allclose(weighted_iou(*arrays)[i], wiou, rtol=1e-5)


def balanced_reference(logits, truth) -> float:
    """AutoGluon's and SAM-Adapter's formula in torch and float64, with their guard."""
    torch = pytest.importorskip("torch")
    x, mask = (torch.from_numpy(np.asarray(a, np.float64)) for a in (logits, truth))
    positive, negative = mask.sum() + 1e-10, (1 - mask).sum()
    weighted = torch.nn.BCEWithLogitsLoss(pos_weight=negative / positive)(x, mask)
    return float(positive / (positive + negative) * weighted)


def test_balanced_bce_is_its_formula_on_the_image_without_padding():
    logits, _, valid = make()
    truth = jnp.asarray(np.stack([blob(16, 16), RNG.random((16, 16)) > 0.9, blob(16, 16)]))
    got = balanced_bce(logits, truth, valid)
    for i in range(3):
        inside = np.asarray(valid[i])
        want = balanced_reference(np.asarray(logits[i])[inside], np.asarray(truth[i])[inside])
        np.testing.assert_allclose(got[i], want, rtol=1e-5)


def test_an_image_of_one_class_is_no_matter_to_balanced_bce():
    logits, _, valid = make()
    both = jax.jit(jax.value_and_grad(lambda x, t: balanced_bce(x, t, valid).sum()))
    for truth in (jnp.zeros(valid.shape, bool), jnp.ones(valid.shape, bool)):
        loss, gradient = both(logits, truth)
        assert loss == 0 and not gradient.any()
        for i in range(3):
            want = balanced_reference(logits[i][valid[i]], truth[i][valid[i]])
            assert want == pytest.approx(0, abs=1e-8)


def test_bce_dice_focal_is_torchs_sum():
    """At the truth's size, so that nothing is resized."""
    torch = pytest.importorskip("torch")
    logits = np.asarray(RNG.normal(size=(2, 16, 16)) * 3, np.float32)
    truth = np.stack([blob(16, 16), np.zeros((16, 16), bool)])
    valid = jnp.ones(truth.shape, bool)
    config = LossConfig("bce_dice_focal", pixel_weight=0.5, region_weight=2.0, iou_weight=0.0)
    arrays = jnp.asarray(logits), jnp.ones(2), jnp.asarray(truth), valid
    loss, terms = mask_loss(*arrays, config)
    assert list(terms) == ["bce", "focal_loss", "dice_loss", "iou_loss"]
    x, mask = (torch.from_numpy(a.astype(np.float64)) for a in (logits, truth))
    p = x.sigmoid()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(x, mask, reduction="none")
    missed = p * (1 - mask) + (1 - p) * mask
    focal_loss = (0.25 * mask + 0.75 * (1 - mask)) * missed**2 * entropy
    sums = [a.sum((1, 2)) for a in (p * mask, p, mask)]
    regions = (1 - (2 * sums[0] + 1) / (sums[1] + sums[2] + 1)).mean()
    want = 0.5 * (entropy.mean() + focal_loss.mean()) + 2 * regions
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert LossConfig("bce_dice_focal").mask_weights == dict.fromkeys(list(terms)[:3], 1.0)
    one_mask = multimask_loss(arrays[0][:, None], jnp.ones((2, 1)), *arrays[2:], config)
    np.testing.assert_allclose(one_mask, loss, rtol=1e-6)


def test_gradients_are_finite_differences_of_the_references():
    logits = RNG.normal(size=(40, 40)) * 2
    truth = blob(40, 40)
    valid = jnp.ones((1, 40, 40), bool)
    references = {
        focal: focal_reference,
        balanced_bce: balanced_reference,
        weighted_bce: lambda *arrays: structure_reference(*arrays)[0],
        weighted_iou: lambda *arrays: structure_reference(*arrays)[1],
    }
    for loss, reference in references.items():
        gradient = jax.jit(jax.grad(lambda x, f=loss: f(x, jnp.asarray(truth[None]), valid).sum()))(
            jnp.asarray(logits[None], jnp.float32)
        )[0]
        for row, column in ((0, 0), (16, 24), (16, 12), (5, 24), (39, 20)):
            step = np.zeros_like(logits)
            step[row, column] = 1e-4
            slope = (reference(logits + step, truth) - reference(logits - step, truth)) / 2e-4
            np.testing.assert_allclose(gradient[row, column], slope, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("loss", [bce, balanced_bce, focal, dice, weighted_bce, weighted_iou])
def test_extreme_logits_have_finite_losses_and_gradients(loss):
    truth = jnp.ones((1, 4, 4), bool)
    both = jax.jit(jax.value_and_grad(lambda logits: loss(logits, truth, truth).sum()))
    for value in (-1e4, 1e4):
        out, grad = both(jnp.full((1, 4, 4), value, jnp.float32))
        assert np.isfinite(out) and np.isfinite(grad).all()


@pytest.mark.parametrize(
    ("kind", "losses", "pixel_weight"),
    [
        ("bce_dice", {"bce": bce, "dice_loss": dice}, 1.0),
        ("focal_dice", {"focal_loss": focal, "dice_loss": dice}, 20.0),
        ("structure", {"weighted_bce": weighted_bce, "weighted_iou_loss": weighted_iou}, 1.0),
    ],
)
def test_truth_keeps_its_size_and_padding_does_not_count(kind, losses, pixel_weight):
    logits, _, _ = make(8)
    truth = jnp.asarray(RNG.random((3, 32, 48)) > 0.5)
    valid = jnp.broadcast_to(jnp.arange(32)[:, None] < 20, truth.shape)
    iou = jnp.array([0.5, 0.6, 0.7])
    config = LossConfig(kind, region_weight=2.0, iou_weight=0.5)
    loss, terms = mask_loss(logits, iou, truth, valid, config)
    full = upsample(logits, (32, 48))
    for name, function in losses.items():
        np.testing.assert_allclose(terms[name], function(full, truth, valid).mean(), rtol=1e-6)
    weights = (pixel_weight, 2.0, 0.5)
    assert list(terms) == [*losses, "iou_loss"]
    np.testing.assert_allclose(loss, np.dot(weights, list(terms.values())), rtol=1e-6)
    changed = jnp.where(valid, truth, ~truth)
    np.testing.assert_allclose(mask_loss(logits, iou, changed, valid, config)[0], loss, rtol=1e-6)
    predicted = (np.asarray(full) > 0) & valid
    union = (predicted | (truth & valid)).sum((1, 2))
    actual = (predicted & truth & valid).sum((1, 2)) / union
    np.testing.assert_allclose(terms["iou_loss"], np.mean((iou - actual) ** 2), rtol=1e-5)


def test_of_several_masks_the_best_is_trained_and_every_predicted_iou():
    config = LossConfig("focal_dice", iou_weight=0.5)
    truth = jnp.asarray(np.stack([blob(32, 32), ~blob(32, 32)]))
    valid = jnp.ones(truth.shape, bool)
    logits = jnp.asarray(RNG.normal(size=(2, 3, 8, 8)), jnp.float32)
    # The best masks: 2 of the first image, 0 of the second.
    fit = jnp.where(truth[:, ::4, ::4], 3.0, -3.0)
    logits = logits.at[0, 2].set(fit[0]).at[1, 0].set(fit[1])
    iou = jnp.asarray(RNG.random((2, 3)), jnp.float32)
    both = jax.jit(jax.value_and_grad(multimask_loss, (0, 1)), static_argnums=4)
    loss, (to_logits, to_iou) = both(logits, iou, truth, valid, config)
    single = jax.jit(mask_loss, static_argnums=4)
    alone = LossConfig("focal_dice", iou_weight=0.0)
    best = [
        single(logits[i, k][None], iou[i, k][None], truth[i][None], valid[i][None], alone)[0]
        for i, k in ((0, 2), (1, 0))
    ]
    errors = [single(logits[:, k], iou[:, k], truth, valid, alone)[1]["iou_loss"] for k in range(3)]
    np.testing.assert_allclose(loss, np.mean(best) + 0.5 * np.mean(errors), rtol=1e-6)

    reached = np.abs(to_logits).max(axis=(2, 3)) > 0
    np.testing.assert_array_equal(reached, [[False, False, True], [True, False, False]])
    assert (to_iou != 0).all()


def test_masks_that_tie_do_not_share_a_gradient():
    logits = jnp.ones((1, 3, 4, 4))
    truth = jnp.ones((1, 4, 4), bool)
    gradient = jax.jit(jax.grad(multimask_loss), static_argnums=4)(
        logits, jnp.ones((1, 3)), truth, truth, LossConfig()
    )
    assert (np.abs(gradient).max(axis=(0, 2, 3)) > 0).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"pixel_weight": -1.0}, "must be finite and not negative"),
        ({"iou_weight": float("nan")}, "must be finite and not negative"),
        ({"pixel_weight": 0.0, "region_weight": 0.0}, "masks need a loss"),
        ({"kind": "balanced_bce", "pixel_weight": 0.0}, "masks need a loss"),
        ({"kind": "balanced_bce", "region_weight": 2.0}, "balanced_bce has no loss of regions"),
    ],
)
def test_settings_out_of_range(bad, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**bad)


def test_unknown_kinds():
    config = LossConfig()
    object.__setattr__(config, "kind", "hinge")  # else the annotation is checked first, in tests
    with pytest.raises(ValueError, match=r"kind must be one of bce_dice, .*, not 'hinge'"):
        config.__post_init__()


def test_two_empty_masks_agree():
    logits = jnp.full((1, 8, 8), -9.0)
    nothing, valid = jnp.zeros((1, 8, 8), bool), jnp.ones((1, 8, 8), bool)
    _, terms = mask_loss(logits, jnp.ones(1), nothing, valid, LossConfig())
    assert terms["iou_loss"] == 0
