"""Losses of dense tasks against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.tasks import NYUV2, PASCAL_CONTEXT, Task, find, parse
from samjax.training.task_losses import task_loss

RNG = np.random.default_rng(0)
TASKS = (*NYUV2, find(PASCAL_CONTEXT, "edges"))
SHAPE = (2, 9, 11)


def case(task, known=0.7):
    """Maps and a truth in which some pixels do not count."""
    maps = RNG.normal(size=(SHAPE[0], task.channels, *SHAPE[1:])).astype(np.float32)
    counts = RNG.random(SHAPE) < known
    if task.loss == "cross_entropy":
        return maps, np.where(counts, RNG.integers(0, task.channels, SHAPE), -1).astype(np.int32)
    if task.loss == "balanced_bce":
        return maps, np.where(counts, RNG.random(SHAPE) < 0.2, -1).astype(np.int32)
    truth = RNG.normal(size=maps.shape)
    if task.loss == "cosine":
        truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    else:
        truth = np.abs(truth) + 0.1
    return maps, np.where(counts[:, None], truth, 0).astype(np.float32)


def expected(task, maps, truth):
    maps = maps.astype(np.float64)
    if task.loss == "balanced_bce":
        p, y = 1 / (1 + np.exp(-maps[:, 0][truth != -1])), truth[truth != -1]
        terms = (y == 0).mean() * y * np.log(p) + (y == 1).mean() * (1 - y) * np.log(1 - p)
        return -terms.mean()
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


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_losses_are_their_formulas(task):
    maps, truth = case(task)
    loss = jax.jit(task_loss, static_argnums=0)(task, jnp.asarray(maps), jnp.asarray(truth))
    np.testing.assert_allclose(loss, expected(task, maps, truth), rtol=1e-5)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
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
        (("a", 3, "masked_l1"), "masked_l1 has 1 channel, not 3"),
        (("a", 3, "cosine", -1.0), "weight must be finite and not negative"),
    ],
)
def test_tasks_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Task(*arguments)


def test_tasks_are_texts():
    assert parse(["nyuv2"]) == NYUV2
    assert parse([str(task) for task in PASCAL_CONTEXT]) == PASCAL_CONTEXT
    assert parse(["nyuv2", "edges:1:balanced_bce"]) == (*NYUV2, Task("edges", 1, "balanced_bce"))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["nyu"], "no set of tasks 'nyu'; the nearest is nyuv2"),
        (["nyuv2", "depth:1:masked_l1"], "two tasks 'depth'"),
        (["depth:one:masked_l1"], "a task is NAME:CHANNELS:LOSS or .*, not 'depth:one:masked_l1'"),
        (["depth:1"], "a task is NAME:CHANNELS:LOSS"),
        (["depth:1:masked_l1:2:3"], "a task is NAME:CHANNELS:LOSS"),
        (["depth:2:masked_l1"], "task depth: masked_l1 has 1 channel, not 2"),
        (["depth:1:masked_l1:inf"], "weight must be finite"),
    ],
)
def test_texts_that_are_no_tasks(texts, message):
    with pytest.raises(ValueError, match=message):
        parse(texts)


def test_a_misspelt_task_is_told_the_nearest():
    with pytest.raises(ValueError, match="no task 'norals'; the nearest is normals, known are seg"):
        find(NYUV2, "norals")
