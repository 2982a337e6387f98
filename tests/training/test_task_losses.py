"""Losses of dense tasks against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.tasks import NYUV2, Task, find
from samjax.training.task_losses import task_loss

RNG = np.random.default_rng(0)
SHAPE = (2, 9, 11)


def case(task, known=0.7):
    """Maps and a truth in which some pixels do not count."""
    maps = RNG.normal(size=(SHAPE[0], task.channels, *SHAPE[1:])).astype(np.float32)
    counts = RNG.random(SHAPE) < known
    if task.loss == "cross_entropy":
        return maps, np.where(counts, RNG.integers(0, task.channels, SHAPE), -1).astype(np.int32)
    truth = RNG.normal(size=maps.shape)
    if task.loss == "cosine":
        truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    else:
        truth = np.abs(truth) + 0.1
    return maps, np.where(counts[:, None], truth, 0).astype(np.float32)


def expected(task, maps, truth):
    maps = maps.astype(np.float64)
    total, pixels = 0.0, 0
    for b, y, x in np.ndindex(SHAPE):
        if task.loss == "cross_entropy":
            if truth[b, y, x] != -1:
                shares = np.exp(maps[b, :, y, x]) / np.exp(maps[b, :, y, x]).sum()
                total -= np.log(shares[truth[b, y, x]])
                pixels += 1
        elif truth[b, :, y, x].any():
            own, right = maps[b, :, y, x], truth[b, :, y, x].astype(np.float64)
            if task.loss == "cosine":
                total += 1 - own @ right / np.linalg.norm(own)
            else:
                total += abs(own[0] - right[0])
            pixels += 1
    return total / pixels


@pytest.mark.parametrize("task", NYUV2, ids=lambda task: task.name)
def test_losses_are_their_formulas(task):
    maps, truth = case(task)
    loss = jax.jit(task_loss, static_argnums=0)(task, jnp.asarray(maps), jnp.asarray(truth))
    np.testing.assert_allclose(loss, expected(task, maps, truth), rtol=1e-5)


@pytest.mark.parametrize("task", NYUV2, ids=lambda task: task.name)
def test_a_batch_of_which_nothing_is_known_has_no_loss(task):
    maps, truth = case(task, known=0.0)
    loss, grad = jax.value_and_grad(lambda m: task_loss(task, m, jnp.asarray(truth)))(
        jnp.asarray(maps)
    )
    assert float(loss) == 0 and not np.any(grad)


def test_a_direction_of_length_zero_has_a_gradient():
    task = find(NYUV2, "normals")
    _, truth = case(task)
    zeros = jnp.zeros((SHAPE[0], 3, *SHAPE[1:]))
    assert np.isfinite(jax.grad(lambda m: task_loss(task, m, jnp.asarray(truth)))(zeros)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a b", 2, "cross_entropy"), "a task's name is an identifier"),
        (("a", 2, "cross_entrpy"), "unknown loss 'cross_entrpy'; the nearest is cross_entropy"),
        (("a", 1, "cross_entropy"), "needs two classes or more"),
        (("a", 2, "cosine"), "cosine has 3 channels, not 2"),
        (("a", 3, "masked_l1"), "masked_l1 has 1 channels, not 3"),
        (("a", 3, "cosine", -1.0), "weight must not be negative"),
    ],
)
def test_tasks_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Task(*arguments)


def test_a_misspelt_task_is_told_the_nearest():
    with pytest.raises(ValueError, match="no task 'norals'; the nearest is normals, known are seg"):
        find(NYUV2, "norals")
