"""Losses of dense tasks, and what a step minimises, against NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.tasks import NYUV2, PASCAL_CONTEXT, Task, find, parse
from samjax.training.task_losses import task_loss
from samjax.training.task_objective import TaskObjective

RNG = np.random.default_rng(0)
TASKS = (*NYUV2, find(PASCAL_CONTEXT, "edges"))
SHAPE = (2, 9, 11)


def case(task, known=0.7, shape=SHAPE):
    """Maps and a truth in which some pixels do not count."""
    maps = RNG.normal(size=(shape[0], task.channels, *shape[1:])).astype(np.float32)
    counts = RNG.random(shape) < known
    if task.loss == "cross_entropy":
        return maps, np.where(counts, RNG.integers(0, task.channels, shape), -1).astype(np.int32)
    if task.loss == "balanced_bce":
        return maps, np.where(counts, RNG.random(shape) < 0.2, -1).astype(np.int32)
    truth = RNG.normal(size=maps.shape)
    if task.loss == "cosine":
        truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    else:
        truth = np.abs(truth) + 0.1
    return maps, np.where(counts[:, None], truth, 0).astype(np.float32)


def expected(task, maps, truth):
    """The mean over pixels that count."""
    maps = np.moveaxis(maps.astype(np.float64), 1, -1)
    if task.loss in ("cross_entropy", "balanced_bce"):
        maps, truth = maps[truth != -1], truth[truth != -1]
    else:
        truth = np.moveaxis(truth.astype(np.float64), 1, -1)
        maps, truth = maps[truth.any(-1)], truth[truth.any(-1)]
    if task.loss == "cross_entropy":
        shares = np.exp(maps) / np.exp(maps).sum(-1, keepdims=True)
        return -np.log(shares[np.arange(len(truth)), truth]).mean()
    if task.loss == "balanced_bce":
        p = 1 / (1 + np.exp(-maps[:, 0]))
        terms = (truth == 0).mean() * truth * np.log(p)
        return -(terms + (truth == 1).mean() * (1 - truth) * np.log(1 - p)).mean()
    if task.loss == "masked_l1":
        return np.abs(maps - truth).mean()
    return (1 - (maps * truth).sum(-1) / np.linalg.norm(maps, axis=-1)).mean()


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


VARIANCES = {"segmentation": 0.5, "depth": -0.3, "normals": 0.1, "edges": 0.8}
WEIGHTS = {"segmentation": 1.0, "depth": 0.25, "normals": 2.0, "edges": 0.5}


@pytest.fixture(scope="module")
def step(dense):
    """`step(batch)`: each task's maps, and `(loss, terms)` by fixed and by learnt weights."""
    _, model, variables = dense
    tasks = (dataclasses.replace(task, weight=WEIGHTS[task.name]) for task in model.tasks)
    model = model.clone(tasks=tuple(tasks))
    variances = {name: jnp.float32(s) for name, s in VARIANCES.items()}
    variables = {**variables, "params": {**variables["params"], "log_variance": variances}}

    @jax.jit
    def run(variables, batch):
        maps = model.apply(variables, batch["image"], batch["input_size"])
        losses = (TaskObjective(learnt)(model, variables, batch, None) for learnt in (False, True))
        return maps, *losses

    return lambda batch: jax.device_get(run(variables, batch))


@pytest.mark.parametrize("unknown", [(), ("depth", "edges"), tuple(VARIANCES)])
def test_a_step_minimises_the_weighted_sum(dense, step, unknown):
    """At the input's resolution, by torch; a task without labels has no part in it."""
    torch = pytest.importorskip("torch")
    tasks = dense[1].tasks
    images = RNG.integers(0, 256, (2, 128, 128, 3), np.uint8)
    batch = {"image": images, "input_size": np.int32([[128, 96], [64, 128]]), "truth": {}}
    for task in tasks:
        truth = case(task, 0.0 if task.name in unknown else 0.5, (2, 128, 128))[1]
        truth[0, ..., 96:] = truth[1, ..., 64:, :] = -1 if truth.ndim == 3 else 0  # padding
        batch["truth"][task.name] = truth
    maps, (fixed, terms), (learnt, learnt_terms) = step(batch)
    fixed_sum = learnt_sum = float(terms["orthogonality"])
    for task in tasks:
        loss, s = 0.0, VARIANCES[task.name]
        if task.name not in unknown:
            low = torch.tensor(maps[task.name])
            full = torch.nn.functional.interpolate(low, (128, 128), mode="bilinear")
            loss = expected(task, full.numpy(), batch["truth"][task.name])
            fixed_sum += WEIGHTS[task.name] * loss
            learnt_sum += (np.exp(-s) * loss + s) / 2
        assert terms[f"loss_{task.name}"] == pytest.approx(loss, rel=1e-4)
        assert learnt_terms[f"weight_{task.name}"] == pytest.approx(np.exp(-s) / 2)
    assert fixed == pytest.approx(fixed_sum, rel=1e-4)
    assert learnt == pytest.approx(learnt_sum, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a b", 2, "cross_entropy"), "a task's name is an identifier"),
        (("all", 2, "cross_entropy"), "a task cannot be named all, which stands for all"),
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
    heads = (Task("a", 3, "mask_classification"), Task("b", 3, "mask_classification", 0.5, 9))
    assert parse(["a:3:mask_classification", "b:3:mask_classification:0.5:9"]) == heads
    assert parse([str(task) for task in heads]) == heads
    assert parse(["nyuv2", "edges:1:balanced_bce"]) == (*NYUV2, Task("edges", 1, "balanced_bce"))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["nyu"], "no set of tasks 'nyu'; the nearest is nyuv2"),
        (["nyuv2", "depth:1:masked_l1"], "two tasks 'depth'"),
        (["depth:one:masked_l1"], "a task is NAME:CHANNELS:LOSS or .*, not 'depth:one:masked_l1'"),
        (["depth:1"], "a task is NAME:CHANNELS:LOSS"),
        (["depth:1:masked_l1:2:3"], "task depth: masked_l1 has no tokens: leave them out"),
        (["depth:1:masked_l1:2:3:4"], "a task is NAME:CHANNELS:LOSS"),
        (["a:4:mask_classification:1:many"], "or NAME:CHANNELS:mask_classification:WEIGHT:TOKENS"),
        (["a:4:mask_classification:1:3"], "task a: 3 tokens cannot show 4 classes at once"),
        (["a:1:mask_classification"], "task a: mask_classification needs two classes or more"),
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
