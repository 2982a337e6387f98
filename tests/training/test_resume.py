"""A run that is killed and resumed ends bit-equal to one that was not."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from samjax.cli import main
from samjax.training.checkpoint import Checkpoints
from samjax.training.log import MetricsLog
from samjax.training.step import TrainState
from samjax.weights import save_checkpoint

EXPERIMENT = """
from samjax.config import Config
from samjax.data.prompts import PromptConfig
from samjax.peft.recipes import MethodConfig

def config():
    return Config(
        weights={weights!r}, data={data!r}, steps=24, batch_size=2, eval_batch_size=2,
        checkpoint_every=5, log_every=1, gallery=1, method=MethodConfig(dropout=0.1),
        prompts=PromptConfig(none=1.0, box=1.0, points=1.0),
    )
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, small_model, small_params):
    folder = tmp_path_factory.mktemp("resume")
    save_checkpoint(folder / "weights", small_model.config, small_params)
    rng = np.random.default_rng(0)
    for split, count in (("train", 7), ("test", 2)):
        for kind in ("images", "masks"):
            (folder / "data" / split / kind).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(0, 255, (96, 128, 3), np.uint8)
            mask = np.zeros((96, 128), np.uint8)
            mask[20:60, 10 * i : 10 * i + 40] = 255
            image[mask > 0] //= 3
            Image.fromarray(image).save(folder / "data" / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(folder / "data" / split / "masks" / f"{i}.png")
    path = folder / "experiment.py"
    path.write_text(EXPERIMENT.format(weights=str(folder / "weights"), data=str(folder / "data")))
    return path


def command(experiment, out, *extra: str) -> list[str]:
    return [sys.executable, "-m", "samjax.cli", "train", str(experiment), "--out", str(out), *extra]


def steps_done(out) -> int:
    log = out / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.is_file() else 0


def test_sigkill_in_mid_epoch(experiment, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(experiment, whole), check=True, capture_output=True, timeout=300)

    process = subprocess.Popen(
        command(experiment, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 300
    while steps_done(killed) < 13 and process.poll() is None:
        assert time.time() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (killed / "summary.json").exists()

    done = subprocess.run(
        command(experiment, killed, "--resume", "--json"),
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "resuming after step" in done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    ours, theirs = (load_file(out / "adapter.safetensors") for out in (killed, whole))
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)
    for name in ("eval_before.csv", "eval_after.csv", "gallery.png"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert summary["after"] == json.loads((whole / "summary.json").read_text())["after"]
    logs = [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (killed, whole)
    ]
    for log in logs:
        assert [line["step"] for line in log] == list(range(1, 25))
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]


def test_ctrl_c_saves_and_goes_on(experiment, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(experiment, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.time() + 300
    while steps_done(out) < 7 and process.poll() is None:
        assert time.time() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130
    last = messages.strip().splitlines()[-1]
    assert last.startswith("samjax: stopped after step ") and "--resume" in last
    step = int(last.split("step ")[1].split()[0])
    assert step % 5 or step < 24  # not only where a checkpoint was due anyway
    done = subprocess.run(
        command(experiment, out, "--resume"), check=True, capture_output=True, text=True
    )
    assert f"resuming after step {step}" in done.stderr


def test_resume_refuses_other_images(experiment, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(experiment, out)[3:]) == 0
    (out / "summary.json").unlink()
    inputs = json.loads((out / "inputs.json").read_text())
    (out / "inputs.json").write_text(json.dumps(inputs | {"train": "other"}))
    assert main(command(experiment, out, "--resume")[3:]) == 1
    assert "the train images changed since it started" in capsys.readouterr().err
    (out / "inputs.json").write_text(json.dumps(inputs | {"weights": "other"}))
    assert main(command(experiment, out, "--resume")[3:]) == 1
    assert "weights changed since it started" in capsys.readouterr().err


def test_a_cut_log_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    log = MetricsLog(path, start=2)
    log.write(3, {"loss": 1.5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert MetricsLog(path, start=1).seconds_per_step() is None


def make_state(step: int, width: int = 3) -> TrainState:
    train = {"a": np.full(width, step, np.float32), "frozen": None}
    return TrainState(np.int32(step), train, (np.ones((2, width), np.float32),))


def test_checkpoints_keep_the_newest_and_refuse_another_run(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.restore(make_state(0)) is None
    for step in (5, 10, 15):
        checkpoints.save(make_state(step))
    checkpoints.close()
    again = Checkpoints(tmp_path / "c")
    state = again.restore(make_state(0))
    assert int(state.step) == 15 and state.train["frozen"] is None
    np.testing.assert_array_equal(state.train["a"], np.full(3, 15))
    with pytest.raises(ValueError, match="other trained leaves"):
        again.restore(make_state(0, width=4))
    again.close()
