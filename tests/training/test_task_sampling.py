"""Steps that train some of the tasks: which, with what gradient, and how such a run resumes."""

import contextlib
import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from samjax import peft
from samjax.config import Config
from samjax.data.dense_augment import DenseAugmentConfig
from samjax.data.dense_pipeline import dense_train_batches, drawn_tasks
from samjax.models import Sam
from samjax.peft import MethodConfig
from samjax.preprocess import Frame
from samjax.problems import problem_of
from samjax.tasks import parse
from samjax.terminal import Interrupted
from samjax.training import loop

TASKS = ("segmentation:3:cross_entropy:0.5", "depth:1:masked_l1", "normals:3:cosine:2")
NAMES = ("segmentation", "depth", "normals")
WEIGHTS = np.array([0.5, 1, 2])


@pytest.mark.parametrize(("tasks", "per_step"), [(3, 1), (3, 2), (5, 3), (6, 4), (4, 4), (1, 1)])
def test_tasks_are_drawn_equally_often(tasks, per_step):
    steps = 10 * tasks * per_step
    drawn = np.stack([drawn_tasks(tasks, per_step, 7, step) for step in range(steps)])
    assert drawn.shape == (steps, per_step)
    assert all(len(set(row)) == per_step for row in drawn.tolist())
    np.testing.assert_array_equal(np.bincount(drawn.ravel()), np.full(tasks, 10 * per_step**2))
    if 1 < tasks != per_step:  # in no fixed order, which the seed alone decides
        assert len(np.unique(drawn.reshape(-1, tasks * per_step), axis=0)) > 1
        other = [drawn_tasks(tasks, per_step, 8, step) for step in range(steps)]
        assert not np.array_equal(drawn, other)


def test_a_batch_says_which_are_drawn(scenes):
    """In each row, of step i in element i, wherever the stream is entered; images are the same."""
    tasks = parse(TASKS)
    settings = {
        "frame": Frame(64, 64),
        "augment": DenseAugmentConfig(),
        "batch_size": 2,
        "seed": 3,
    }
    batches = dense_train_batches(scenes, tasks, tasks_per_step=2, **settings)
    every = dense_train_batches(scenes, tasks, **settings)
    assert "drawn" not in every[0]
    later = batches[5:9]
    for i in range(4):
        rows = np.tile(drawn_tasks(3, 2, 3, 5 + i), (2, 1))
        np.testing.assert_array_equal(later[i]["drawn"], rows)
        assert later[i]["drawn"].dtype == np.int32
        np.testing.assert_array_equal(later[i]["image"], every[5 + i]["image"])


@pytest.fixture(scope="module")
def config():
    return Config(
        tasks=TASKS,
        tasks_per_step=2,
        method=MethodConfig("ta_lora", rank=4, rank_task=2, dropout=0.1),
        steps=4,
        batch_size=2,
        log_every=1,
    )


@pytest.fixture(scope="module")
def opened(config, small_config, draw_params):
    """Model, spec and variables, of which all that trains is moved."""
    sam = Sam(dataclasses.replace(small_config, decoder_depth=1))
    model, params = problem_of(config).build(sam, draw_params(sam))
    spec = config.spec()
    variables = {"params": params, "peft": peft.attach(spec, model, params, jax.random.key(0))}
    rng = np.random.default_rng(0)

    def move(leaf, trains):
        noise = 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
        return np.asarray(leaf) + noise if trains else np.asarray(leaf)

    return model, spec, jax.tree.map(move, variables, peft.trainable(spec, model, variables))


def test_the_mean_over_draws_is_all_tasks(config, opened, scenes):
    """Of losses and of gradients; a draw has its tasks' losses, and moves no other decoder."""
    model, _, variables = opened
    problem = problem_of(config)
    batch = problem.batches(model, scenes, split=False)[0]
    del batch["index"], batch["drawn"]

    @jax.jit
    def gradient(variables, batch):
        def loss(variables):
            return problem.objective(model, variables, batch, None)

        return jax.value_and_grad(loss, has_aux=True)(variables)

    (loss, terms), grads = gradient(variables, batch)
    found = []
    for drawn in ([0, 1], [2, 0], [1, 2]):
        batch["drawn"] = np.tile(np.int32(drawn), (2, 1))
        (value, of_drawn), grad = jax.device_get(gradient(variables, batch))
        found.append((value, grad))
        for i, name in enumerate(NAMES):
            own = grad["params"][f"mask_decoder_{name}"], grad["params"][f"no_mask_embed_{name}"]
            zero = not any(np.any(leaf) for leaf in jax.tree.leaves(own))
            assert zero == np.isnan(of_drawn[f"loss_{name}"]) == (i not in drawn)
            if i in drawn:
                np.testing.assert_allclose(
                    of_drawn[f"loss_{name}"], terms[f"loss_{name}"], rtol=1e-5
                )
        parts = sum(WEIGHTS[i] * terms[f"loss_{NAMES[i]}"] for i in drawn)
        np.testing.assert_allclose(value, 1.5 * parts + terms["orthogonality"], rtol=1e-5)
    assert gradient._cache_size() == 2  # one program for all tasks, and one for all draws
    np.testing.assert_allclose(np.mean([value for value, _ in found]), loss, rtol=1e-5)
    means = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *[grad for _, grad in found])
    for mean, leaf in zip(jax.tree.leaves(means), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(mean, leaf, atol=1e-5 * max(1, np.abs(leaf).max()))


class Stopped(contextlib.nullcontext):
    """A user who wants to stop after the first step."""

    requested = True

    def __enter__(self):
        return self


def test_a_stopped_run_goes_on_to_the_bit(config, opened, scenes, tmp_path, monkeypatch):
    model, spec, variables = opened

    def fit(out):
        out.mkdir(exist_ok=True)
        console = Console(file=io.StringIO(), width=400)
        return loop.fit(config, model, spec, variables, scenes, out, console)

    whole = fit(tmp_path / "whole")
    lines = (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    for step, line in enumerate(map(json.loads, lines)):
        logged = [i for i, name in enumerate(NAMES) if f"loss_{name}" in line]
        assert logged == sorted(drawn_tasks(3, 2, config.seed, step))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopRequest", Stopped)
        with pytest.raises(Interrupted):
            fit(tmp_path / "run")
    resumed = fit(tmp_path / "run")
    assert resumed.steps == whole.steps == 4
    jax.tree.map(np.testing.assert_array_equal, resumed.variables, whole.variables)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks_per_step": 4}, "tasks_per_step is 4, and there are 3 dense tasks: draw fewer, or"),
        ({"tasks_per_step": -1}, "tasks_per_step must be at least 1, not -1"),
        ({"tasks_per_step": 0}, "tasks_per_step must be at least 1, not 0"),
        (
            {"tasks": (), "method": MethodConfig("lora")},
            "tasks_per_step draws dense tasks: name them with tasks",
        ),
    ],
)
def test_draws_that_cannot_be(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)
