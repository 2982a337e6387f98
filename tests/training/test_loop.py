"""The loop around the step: validations, what is kept, and what ends training early.

A toy takes the step's place: it counts steps in one number and mixes the batch into another, so
that every state tells which batches made it.
"""

import io
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from samjax.config import Config
from samjax.data.augment import NO_AUGMENTATION
from samjax.data.sources import Sample
from samjax.peft import PeftSpec, Rule, Train
from samjax.terminal import Interrupted
from samjax.training import loop
from samjax.training.step import TrainState, finite_names

LEAF = "mask_decoder", "iou_token", "embedding"
SPEC = PeftSpec((Rule("/".join(LEAF), Train()),))
STEPS = 12


class Killed(BaseException):
    """What nothing catches."""


class Images:
    """Eight images of one grey each; those in `broken` cannot be read, those in `bad` are white."""

    def __init__(self, broken=(), bad=()):
        self.names = tuple(f"image{i}" for i in range(8))
        self.broken, self.bad = broken, bad

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index in self.broken:
            raise ValueError(f"/data/{index}.png cannot be decoded")
        image = np.full((128, 128, 3), 255 if index in self.bad else 20 * index, np.uint8)
        return Sample(self.names[index], image, image[..., 0] > 0)

    def check_sizes(self):
        pass

    def image_file(self, index):
        raise NotImplementedError


def toy_step(model, optimizer, **options):
    def step(state, frozen, batch):
        bad = (batch["image"] == 255).any()
        mean = batch["image"].mean() / 255

        def update(leaf):
            row = leaf[0].at[0].add(1.0).at[1].set(0.9 * leaf[0, 1] + mean * (1 + leaf[0, 0]))
            return leaf.at[0].set(row)

        new = TrainState(state.step + 1, jax.tree.map(update, state.train), state.opt_state)
        kept = jax.tree.map(lambda a, b: jnp.where(bad, b, a), new, state)
        return kept, {"loss": mean, "bad_leaf": jnp.where(bad, 1, -1)}

    return jax.jit(step, donate_argnums=0)


@pytest.fixture
def fit(monkeypatch, small_model, small_params, tmp_path):
    """`fit(name, dice, images, **settings)` trains in the folder `name`; `.said` is the console's.

    `dice[step]` is what the validation of a step measures. `at[step]()` is called in that step.
    """
    monkeypatch.setattr(loop, "make_train_step", toy_step)
    params = jax.tree.map(np.copy, small_params)
    leaf = params[LEAF[0]][LEAF[1]][LEAF[2]]
    leaf[:] = 0

    def run(name, dice=None, images=None, at=None, **settings):
        defaults = {"steps": STEPS, "batch_size": 2, "log_every": 1, "checkpoint_every": 5}
        config = Config(augment=NO_AUGMENTATION, **{**defaults, **settings})
        console = Console(file=io.StringIO(), width=500)

        def validate(variables):
            step = int(value_of(variables)[0])
            (at or {}).get(step, lambda: None)()
            return {"dice": dice[step], "iou": dice[step] / 2}

        out = tmp_path / name
        out.mkdir(exist_ok=True)
        base = {"params": params, "peft": {}}
        try:
            return loop.fit(
                config,
                small_model,
                SPEC,
                base,
                images or Images(),
                out,
                console,
                validate if dice else None,
            )
        finally:
            run.said = console.file.getvalue()

    return run


def value_of(variables):
    """Steps that made a state, and the mixture of their batches."""
    leaf = variables["params"]
    for name in LEAF:
        leaf = leaf[name]
    return np.asarray(leaf)[0, :2].tolist()


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds_per_step"} for line in lines]


DICE = dict(
    zip(
        range(1, STEPS + 1),
        (0.3, 0.5, 0.5, 0.1, 0.2, 0.4, 0.4, 0.6, 0.1, 0.0, 0.2, 0.3),
        strict=True,
    )
)


@pytest.mark.parametrize(
    ("settings", "steps", "best"),
    [
        ({"validate_every": 1}, 12, 8),
        ({"validate_every": 1, "patience": 6}, 12, 8),
        ({"validate_every": 1, "patience": 5}, 7, 2),  # not 3, which is as good as 2
        ({"validate_every": 1, "patience": 1}, 3, 2),
        ({"validate_every": 5, "patience": 1}, 10, 5),
        ({"validate_every": 7}, 12, 7),  # and at the end
        ({"validate_every": 100}, 12, 12),
    ],
)
def test_what_validations_decide(fit, tmp_path, settings, steps, best):
    fitted = fit("run", DICE, keep="best", **settings)
    assert (fitted.steps, fitted.kept_step, fitted.best.step) == (steps, best, best)
    assert fitted.best.metrics == {"dice": DICE[best], "iou": DICE[best] / 2}
    assert value_of(fitted.variables)[0] == best
    assert ("ended after step" in fit.said) == (steps < STEPS)
    measured = {
        line["step"]: line["val_dice"] for line in log_of(tmp_path / "run") if "val_dice" in line
    }
    every = settings["validate_every"]
    assert measured == {s: DICE[s] for s in range(1, steps + 1) if s % every == 0 or s == STEPS}
    last = fit("last", DICE, keep="last", **settings)
    assert (last.steps, last.kept_step, last.best.step) == (steps, steps, best)
    assert value_of(last.variables)[0] == steps


@pytest.mark.parametrize("killed_at", [1, 4, 5, 9])  # 4 is the best, 9 the end
def test_resumed_from_anywhere(fit, tmp_path, killed_at):
    """Killed in a validation, once and again: the same end, best state and log."""
    settings = {"validate_every": 1, "patience": 5, "keep": "best", "checkpoint_every": 3}
    dice = {**DICE, 4: 0.6, 8: 0.1}

    def kill():
        raise Killed

    whole = fit("whole", dice, **settings)
    assert (whole.steps, whole.kept_step) == (9, 4)
    for step in sorted({killed_at, 8}):
        with pytest.raises(Killed):
            fit("killed", dice, at={step: kill}, **settings)
    resumed = fit("killed", dice, **settings)
    assert (resumed.steps, resumed.kept_step, resumed.best) == (9, 4, whole.best)
    assert value_of(resumed.variables) == value_of(whole.variables)
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
    again = fit("killed", dice, **settings)  # killed after training, in the evaluation
    assert value_of(again.variables) == value_of(whole.variables) and again.steps == 9


def test_ctrl_c_between_checkpoints(fit):
    whole = fit("whole", DICE, validate_every=4)
    with pytest.raises(Interrupted, match="stopped after step 8 of 12; the same command with --re"):
        fit("run", DICE, at={8: lambda: os.kill(os.getpid(), signal.SIGINT)}, validate_every=4)
    resumed = fit("run", DICE, validate_every=4)
    assert "resuming after step 8" in fit.said
    assert value_of(resumed.variables) == value_of(whole.variables)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("came_in", "stops_after"), [(3, 4), (5, 5), (STEPS, STEPS)])
def test_a_signal_when_a_step_has_been_decided_on(fit, monkeypatch, number, came_in, stops_after):
    """Whenever it comes, the step that the run is said to have stopped after is on disk."""
    whole = fit("whole")
    write = loop.MetricsLog.write

    def write_and_signal(self, step, values):
        write(self, step, values)
        if step == came_in:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(loop.MetricsLog, "write", write_and_signal)
        with pytest.raises(Interrupted, match=f"stopped after step {stops_after} of {STEPS};"):
            fit("run")
    resumed = fit("run")
    assert f"resuming after step {stops_after}" in fit.said
    assert value_of(resumed.variables) == value_of(whole.variables)


def test_a_gradient_that_is_not_finite(fit, tmp_path, small_params):
    """It names what and where, keeps the state before it, and goes on once the image is mended."""
    whole = fit("whole")
    with pytest.raises(ValueError, match="is not finite at step") as caught:
        fit("run", images=Images(bad=(3,)))
    message = str(caught.value)
    leaf = small_params[LEAF[0]][LEAF[1]][LEAF[2]]
    names = finite_names({"params": {LEAF[0]: {LEAF[1]: {LEAF[2]: leaf}}}})
    assert names[1] in message and "/".join(LEAF) in message
    assert "image3" in message and "lower learning_rate" in message
    step = int(message.split("at step ")[1].split()[0])
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(1, step))
    resumed = fit("run")
    assert (f"resuming after step {step - 1}" in fit.said) == (step > 1)
    assert value_of(resumed.variables) == value_of(whole.variables)


def test_an_image_that_cannot_be_read(fit):
    whole = fit("whole")
    with pytest.raises(ValueError, match=r"/data/3\.png cannot be decoded; training is saved"):
        fit("run", images=Images(broken=(3,)))
    resumed = fit("run")
    assert value_of(resumed.variables) == value_of(whole.variables)
    assert value_of(resumed.variables)[0] == STEPS
