"""Runs of dense tasks, from data in a folder to an adapter: what they write, how they resume."""

import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from samjax import cli, peft
from samjax.config import Config
from samjax.models import MSam, Sam
from samjax.peft import MethodConfig
from samjax.problems import problem_of
from samjax.run import train
from samjax.tasks import NYUV2
from samjax.terminal import Interrupted
from samjax.training import loop
from samjax.weights import save_checkpoint

SIZE = (96, 128)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def config(tmp_path_factory, small_config, draw_params):
    """Six images of a slope before a wall, in NYUv2's layout, and a run of eight steps.

    Of each decoder one layer, since what a step compiles has three of them.
    """
    root = tmp_path_factory.mktemp("dense")
    shallow = dataclasses.replace(small_config, decoder_depth=1)
    save_checkpoint(root / "weights", shallow, draw_params(Sam(shallow)))
    for split, count in (("train", 6), ("val", 3)):
        for name in ("image", "label", "depth", "normal"):
            (root / "data" / split / name).mkdir(parents=True)
        for i in range(count):
            edge = 20 + 8 * i
            wall = np.arange(SIZE[0])[:, None] < edge + np.zeros(SIZE[1], int)
            normals = np.where(wall[..., None], [0, 0, 1], [0, 1, 0]).astype(np.float32)
            depth = np.where(wall, 4.0, 1.5).astype(np.float32)
            depth[:3] = 0
            labels = np.where(wall, 7, 2).astype(np.int8)
            labels[:, :4] = -1
            noise = RNG.random((*SIZE, 3), np.float32)
            arrays = {
                "image": (0.3 + 0.4 * wall[..., None] + 0.2 * noise).astype(np.float32),
                "label": labels,
                "depth": depth[..., None],
                "normal": normals,
            }
            for name, array in arrays.items():
                np.save(root / "data" / split / name / f"{i}.npy", array)
    return Config(
        weights=str(root / "weights"),
        data=str(root / "data"),
        tasks=("nyuv2",),
        method=MethodConfig("ta_lora", rank=4, rank_task=2),
        steps=8,
        batch_size=2,
        eval_batch_size=2,
        checkpoint_every=3,
        log_every=1,
        gallery=2,
    )


def run(config, out, **options):
    console = Console(file=io.StringIO(), width=400)
    return train(config, out, resume=out.exists(), console=console, **options)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, run(config, out)


def test_a_run_measures_every_task(whole, config):
    out, summary = whole
    names = [f"{task.name}/{metric}" for task in NYUV2 for metric in task.metrics]
    assert list(summary["before"]) == list(summary["after"]) == names
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for task in NYUV2:
        assert all(np.isfinite(line[f"loss_{task.name}"]) for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    terms = sum(task.weight * lines[0][f"loss_{task.name}"] for task in NYUV2)
    assert lines[0]["loss"] == pytest.approx(terms + lines[0]["orthogonality"], rel=1e-5)
    rows = (out / "eval_after.csv").read_text().splitlines()
    assert rows[0].split(",") == ["name", *names]
    assert [row.split(",")[0] for row in rows[1:]] == ["0", "1", "2", "(whole set)"]
    # A row for each of two images and three tasks: image, truth, before, after.
    with Image.open(out / "gallery.png") as picture:
        assert picture.size == (4 * 262 + 6, 6 * (192 + 6) + 6 + 26)


def test_the_adapter_is_the_trained_model(whole, config, capsys):
    """`samjax eval` measures what the run has measured."""
    out, summary = whole
    adapter = peft.read(out / "adapter.safetensors")
    assert isinstance(adapter.model, MSam) and adapter.tasks == NYUV2
    assert cli.main(["eval", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.pop("images") == 3 and result.pop("csv") == str(out / "eval_test.csv")
    assert result == pytest.approx(summary["after"], abs=2e-6)
    assert (out / "eval_test.csv").read_text().splitlines()[-1].startswith("(whole set),")
    assert cli.main(["eval", str(out), "--eval-prompt", "box"]) == 1
    assert "dense tasks take no prompt: leave out eval_prompt" in capsys.readouterr().err
    assert cli.main(["arch", str(out)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


class Stopped(contextlib.nullcontext):
    """A user who wants to stop after the first step."""

    requested = True

    def __enter__(self):
        return self


def test_a_killed_run_goes_on_to_the_bit(whole, config, tmp_path, monkeypatch):
    out, summary = whole
    monkeypatch.setattr(loop, "StopRequest", Stopped)
    with pytest.raises(Interrupted):
        run(config, tmp_path / "run")
    monkeypatch.undo()
    resumed = run(config, tmp_path / "run")
    for file in ("adapter.safetensors", "eval_after.csv", "gallery.png"):
        assert (tmp_path / "run" / file).read_bytes() == (out / file).read_bytes()
    assert resumed["after"] == summary["after"]


DEPTH, NORMALS = "depth:1:masked_l1", "normals:3:cosine"


@pytest.mark.parametrize(
    "changes",
    [
        {"method": MethodConfig("lora_stl", rank=2), "tasks": (DEPTH, NORMALS)},
        {"method": MethodConfig("lora_hps", rank=2, first_block=1), "accumulate": 2},
        {"method": MethodConfig("decoder"), "task_weighting": "uncertainty"},
        {"method": MethodConfig("full"), "image_size": (64, 96)},
    ],
    ids=lambda changes: changes["method"].method,
)
def test_the_baselines_run(config, tmp_path, changes):
    config = dataclasses.replace(config, **{"steps": 2, "tasks": (DEPTH,), **changes})
    summary = run(config, tmp_path / "run")
    assert summary["after"].keys() == problem_of(config).titles.keys()
    assert all(np.isfinite(value) for value in summary["after"].values())
    assert summary["after"]["depth/absolute_error"] != summary["before"]["depth/absolute_error"]
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    adapter = peft.read(tmp_path / "run/adapter.safetensors")
    learnt = adapter.tensors.get("params/log_variance/depth")
    if config.task_weighting == "fixed":
        assert learnt is None and "weight_depth" not in line
    else:  # exp(-s) / 2, whose s begins at 0
        assert learnt != 0 and line["weight_depth"] == 0.5
    # What is adapted trains in the encoder.
    encoder = any("image_encoder" in name for name in adapter.tensors)
    assert encoder == (config.method.method != "decoder")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("nyuv",)}, "no set of tasks 'nyuv'; the nearest is nyuv2"),
        ({"tasks": ()}, "method 'ta_lora' is for dense tasks: name them, such as --tasks nyuv2"),
        ({"objects": "each"}, "dense tasks have no objects: leave out objects and classes"),
        (
            {
                "tasks": ("segmentation:3:mask_classification",),
                "method": MethodConfig("lora_hps", decoder="none"),
            },
            "task segmentation: with decoder none its semantic head does not train",
        ),
        ({"classes": ("cat",)}, "dense tasks have no objects: leave out objects and classes"),
        ({"eval_prompt": "box"}, "dense tasks take no prompt: leave out eval_prompt"),
        ({"best_metric": "depth/miou"}, "best_metric must be one of .* the nearest is"),
        ({"tasks": (), "task_weighting": "uncertainty"}, "task_weighting weighs dense tasks"),
    ],
)
def test_configs_that_cannot_be(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("nyuv2", "edges:1:balanced_bce")}, "task edges: .* has no folder edges, only"),
        ({"tasks": ("segmentation:7:cross_entropy",)}, "has the value .*, and task segmentation"),
        ({"method": MethodConfig("ta_lora", first_block=99)}, "first_block is 99, and small has"),
        ({"method": MethodConfig("ta_lora", rank=999)}, "rank 999 is more than"),
        ({"validate_every": 2}, "the splits train and test, and no validation"),
    ],
)
def test_runs_that_cannot_be_are_told_before_anything_is_written(
    config, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(config, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
