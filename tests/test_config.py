"""The run's dataclass."""

import subprocess
import sys

import pytest

from samjax.config import Config
from samjax.data.prompts import PromptConfig
from samjax.peft.method_config import MethodConfig
from samjax.peft.recipes import RECIPES
from samjax.training.losses import LossConfig
from samjax.training.step import OptimizerConfig


def test_evaluation_takes_the_heaviest_prompt_of_training():
    assert Config().evaluation_prompt == "none"
    boxes = PromptConfig(none=0.0, box=2.0, points=1.0)
    assert Config(prompts=boxes).evaluation_prompt == "box"
    assert Config(prompts=boxes, eval_prompt="point").evaluation_prompt == "point"


def test_survives_json():
    config = Config(
        weights="w",
        prompts=PromptConfig(box=1.0),
        loss=LossConfig("structure", multimask=True),
        fractions=(0.5, 0.25, 0.25),
    )
    assert Config.from_json(config.to_json()) == config
    assert Config.from_json({"weights": "w"}) == Config(weights="w")  # as of an older samjax


OLD_METHOD = {
    "method": "lora",
    "rank": 4,
    "alpha": None,
    "segments": "qv",
    "dropout": 0.0,
    "train_decoder": True,
}


@pytest.mark.parametrize(
    ("old", "method"),
    [
        ({}, MethodConfig(rank=4, targets=("q", "v"), dropout=0.0)),
        ({"segments": "qqk"}, MethodConfig(rank=4, targets=("q", "k"), dropout=0.0)),
        (
            {"rank": 8, "train_decoder": False},
            MethodConfig(rank=8, targets=("q", "v"), dropout=0.0, decoder="none"),
        ),
        ({"method": "decoder"}, MethodConfig("decoder")),
    ],
)
def test_methods_of_an_older_samjax(old, method):
    assert Config.from_json({"method": {**OLD_METHOD, **old}}).method == method


def test_what_an_older_samjax_left_out():
    optimizer = {"learning_rate": 2e-3, "decoder_learning_rate": None}
    old = Config.from_json({"seed": 3, "method": OLD_METHOD, "optimizer": optimizer})
    assert old.optimizer == OptimizerConfig(2e-3, decoder_learning_rate=2e-3)
    assert old.split_seed == 3  # which drew its splits
    assert Config.from_json({"seed": 3, "split_seed": 1}).split_seed == 1
    data = {"method": {"method": "full"}, "optimizer": {"decoder_learning_rate": None}}
    assert Config.from_json(data).optimizer == OptimizerConfig(decoder_learning_rate=1e-4)


def test_the_decoder_trains_alike_beside_every_method():
    configs = (
        Config(method=MethodConfig(name), tasks=("nyuv2",) if recipe.dense else ())
        for name, recipe in RECIPES.items()
    )
    rates = {config.optimizer.decoder_learning_rate for config in configs}
    assert rates == {5e-4} and Config(method=MethodConfig("decoder")).learning_rate == 5e-4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"wieghts": "w"}, "unknown setting wieghts; the nearest is weights"),
        ({"optimizer": {"lr_rate": 1.0}}, "optimizer.lr_rate; the nearest is optimizer.learning_"),
        ({"optimizer": 3}, "optimizer must hold settings by name"),
        ({"steps": "three"}, "not a config of this samjax"),
        ({"method": {"segments": 3}}, "not a config of this samjax"),
    ],
)
def test_json_that_is_no_config(data, message):
    with pytest.raises(ValueError, match=message):
        Config.from_json(data)


WRONG_CHOICES = (
    ({"keep": "Best", "validate_every": 2}, "keep must be one of last, best, not 'Best'"),
    ({"objects": "Each"}, "the nearest is each"),
    ({"attention": "flash"}, "attention must be one of chunked, dense, cudnn, splash"),
    ({"dtype": "bf16"}, "dtype must be one of float32, bfloat16"),
    ({"remat": "block"}, "the nearest is blocks"),
    ({"eval_prompt": "boxes"}, "the nearest is box"),
)


def test_settings_of_an_experiment_file_are_checked_as_flags_are():
    # In a process of its own: here, the tests' type checker is faster.
    program = (
        "from samjax.config import Config\n"
        f"for setting in {[setting for setting, _ in WRONG_CHOICES]!r}:\n"
        "    try:\n        print(Config(**setting))\n"
        "    except ValueError as error:\n        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    for line, (_, message) in zip(done.stdout.splitlines(), WRONG_CHOICES, strict=True):
        assert message in line


def test_steps():
    assert Config(epochs=2.0, batch_size=4).num_steps(10) == 5
    assert Config(steps=7).num_steps(10) == 7
    assert Config(epochs=0.1, batch_size=4).num_steps(1) == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"seed": -1},
        {"epochs": float("inf")},
        {"epochs": 0.0},
        {"steps": 0},
        {"batch_size": 0},
        {"batch_size": 4, "accumulate": 3},
        {"validate_every": 0},
        {"validate_every": 5, "patience": 0},
        {"patience": 2},
        {"keep": "best"},
    ],
)
def test_settings_out_of_range(bad):
    with pytest.raises(ValueError, match=next(reversed(bad))):
        Config(**bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"learning_rate": 0.0},
        {"decoder_learning_rate": 0.0},
        {"weight_decay": float("nan")},
        {"warmup": 1.0},
        {"clip": 0.0},
    ],
)
def test_optimizer_settings_out_of_range(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        OptimizerConfig(**bad)


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ({"batch_size": 16}, 8),
        ({"batch_size": 4}, 4),
        ({"batch_size": 1}, 1),
        ({"batch_size": 12}, 6),
        ({"batch_size": 12, "fsdp": 4}, 4),
        ({"batch_size": 16, "accumulate": 8}, 2),
    ],
)
def test_a_run_takes_the_devices_that_share_its_batches(settings, taken, monkeypatch):
    monkeypatch.setattr("jax.device_count", lambda: 8)
    assert Config(**settings).num_devices() == taken


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"fsdp": 3, "batch_size": 6}, "fsdp 3 does not divide the 8 devices"),
        ({"fsdp": 4, "batch_size": 2}, "choose a multiple of 4"),
    ],
)
def test_devices_that_cannot_share(settings, says, monkeypatch):
    monkeypatch.setattr("jax.device_count", lambda: 8)
    with pytest.raises(ValueError, match=says):
        Config(**settings).num_devices()
