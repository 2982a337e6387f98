"""Ctrl-C, the log, checkpoints, and what a run refuses to go on with."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from samjax.cli import main
from samjax.training.checkpoint import Best, Checkpoints
from samjax.training.log import MetricsLog
from samjax.training.step import TrainState


def steps_done(out) -> int:
    log = out / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.is_file() else 0


def test_ctrl_c_saves_and_goes_on(experiment, command, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(experiment, out, "--checkpoint-every", "1"),  # which makes steps slow
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
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
    done = subprocess.run(
        command(experiment, out, "--resume"), check=True, capture_output=True, text=True
    )
    assert f"resuming after step {step}" in done.stderr


def test_resume_refuses_other_images(experiment, whole, command, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "summary.json").unlink()
    inputs = json.loads((out / "inputs.json").read_text())
    (out / "inputs.json").write_text(json.dumps(inputs | {"train": "other"}))
    assert main(command(experiment, out, "--resume")[3:]) == 1
    assert "the train images changed since it started" in capsys.readouterr().err
    (out / "inputs.json").write_text(json.dumps(inputs | {"weights": "other"}))
    assert main(command(experiment, out, "--resume")[3:]) == 1
    assert "weights changed since it started" in capsys.readouterr().err


def test_validations_need_a_split(experiment, command, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(experiment.parent / "data", data)
    shutil.rmtree(data / "validation")
    assert main(command(experiment, tmp_path / "run", "--data", str(data))[3:]) == 1
    error = capsys.readouterr().err
    assert "has no split 'validation'" in error and "validate_every needs this split" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_disk_that_fills_in_mid_run(experiment, whole, command, tmp_path):
    """One sentence, nothing half-written, and the same end once there is room."""
    out = tmp_path / "run"
    limit = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    limited = [sys.executable, "-c", limit, *command(experiment, out)]
    full = subprocess.run(limited, capture_output=True, text=True)
    assert full.returncode == 1 and not full.stdout and "Traceback" not in full.stderr
    last = full.stderr.splitlines()[-1]
    assert last.startswith("samjax: the checkpoint of step 4 cannot be written to")
    assert "(File too large): free space there" in last
    assert not list((out / "checkpoints").iterdir())
    subprocess.run(command(experiment, out, "--resume"), check=True, capture_output=True)
    for name in ("adapter.safetensors", "eval_after.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_cut_log_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    log = MetricsLog(path, start=2)
    log.write(3, {"loss": 1.5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert MetricsLog(path, start=1).seconds_per_step() is None


def test_the_log_times_what_lies_between_its_clocks(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, start=0)
    log.start_clock(1)
    time.sleep(0.02)
    log.stop_clock(3)
    time.sleep(0.2)  # as a validation would
    log.write(3, {"loss": 1.0})
    log.write(4, {"loss": 1.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert 0.01 <= lines[0]["seconds_per_step"] < 0.1 and "seconds_per_step" not in lines[1]
    assert log.seconds_per_step() == lines[0]["seconds_per_step"]


def test_a_full_disk_leaves_the_log_whole(tmp_path, files_end_at):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, start=0)
    log.write(1, {"loss": 1.0})
    whole = path.read_bytes()
    message = r"metrics.jsonl cannot be written \(File too large\): free"
    with pytest.raises(OSError, match=message), files_end_at(len(whole) + 10):
        log.write(2, {"loss": 1.0})
    assert path.read_bytes() == whole


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, capfd, files_end_at):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(make_state(1))
    big = make_state(2).replace(opt_state=(np.random.default_rng(0).random(10000),))
    message = r"checkpoint of step 2 cannot be written .*File too large"
    with pytest.raises(OSError, match=message), files_end_at(5000):
        checkpoints.save(big)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"]
    checkpoints.close()
    again = Checkpoints(tmp_path / "c")
    assert int(again.restore(make_state(0)).step) == 1
    again.save(make_state(2))
    again.close()
    assert "Traceback" not in capfd.readouterr().err


def test_the_best_checkpoint_stays(tmp_path):
    """The first of equal ones, however many newer ones there are; a reopened folder knows it."""
    checkpoints = Checkpoints(tmp_path / "c", "iou")
    assert checkpoints.best() is None
    for step, iou in ((1, 0.5), (2, None), (3, 0.75), (4, 0.75), (5, None), (6, 0.6), (7, None)):
        checkpoints.save(make_state(step), None if iou is None else {"dice": -iou, "iou": iou})
    checkpoints.close()
    again = Checkpoints(tmp_path / "c", "iou")
    assert again.best() == Best(3, {"dice": -0.75, "iou": 0.75})
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["3", "6", "7"]
    np.testing.assert_array_equal(again.restore(make_state(0), 3).train["a"], np.full(3, 3))
    assert int(again.restore(make_state(0)).step) == 7
    again.close()


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
