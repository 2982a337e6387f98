"""SIGKILL at any time: the run goes on and ends bit-equal to one that nothing interrupted."""

import json
import os
import random
import signal
import subprocess
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

STEPS = 24


def logged(out) -> int:
    """The steps in metrics.jsonl."""
    log = out / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def saves(out) -> set[str]:
    """The checkpoints that are being written now."""
    folder = out / "checkpoints"
    return {name for name in os.listdir(folder) if "tmp" in name} if folder.is_dir() else set()


def kill(command, out, is_time, delay: float) -> int:
    """Starts or resumes a run, kills it `delay` seconds after `is_time()`; the steps logged."""
    said = out.with_suffix(".err")
    with open(said, "w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
    deadline = time.time() + 600
    while not is_time() and process.poll() is None:
        assert time.time() < deadline
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL, f"ended before it was killed: {said.read_text()}"
    assert not (out / "summary.json").exists()
    return logged(out)


def assert_equal(out, whole) -> None:
    """Everything that a run leaves is that of a run that nothing interrupted."""
    ours, theirs = (load_file(run / "adapter.safetensors") for run in (out, whole))
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)
    for name in ("eval_before.csv", "eval_after.csv", "gallery.png", "inputs.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    summaries = [json.loads((run / "summary.json").read_text()) for run in (out, whole)]
    for key in ("before", "after", "steps", "kept_step", "best_validation"):
        assert summaries[0][key] == summaries[1][key]
    logs = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (out, whole)
    ]
    assert [line["step"] for line in logs[0]] == list(range(1, STEPS + 1))
    for line in (*logs[0], *logs[1]):
        line.pop("seconds_per_step", None)
    assert logs[0] == logs[1]
    assert not saves(out)


def moment(rng: random.Random, out, kind: str):
    """When to kill: a condition, and seconds after it."""
    step = rng.randrange(logged(out), STEPS - 1)
    if kind == "step":
        return lambda: logged(out) > step, rng.uniform(0, 0.05)
    if kind == "save":  # what an earlier kill left of a save is gone when the next one begins
        return lambda: logged(out) > step and bool(saves(out)), rng.uniform(0, 0.03)
    if kind == "end":
        return lambda: logged(out) == STEPS, rng.uniform(0, 0.3)
    start = time.time() + rng.uniform(0, 8)
    return lambda: time.time() > start, 0.0


def finish(command) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    return done.stderr


def test_killed_in_mid_step_and_in_mid_save(experiment, whole, command, tmp_path):
    out, rng = tmp_path / "run", random.Random(0)
    start = command(experiment, out, "--checkpoint-every", "1")
    resume = [*start, "--resume"]
    first = kill(start, out, lambda: logged(out) >= 6, rng.uniform(0, 0.05))
    cut = kill(resume, out, lambda: logged(out) > first + 3 and bool(saves(out)), 0.0)
    assert cut < STEPS
    assert "resuming after step" in finish(resume)
    assert_equal(out, whole)


@pytest.mark.slow
def test_twenty_kills(experiment, whole, command, tmp_path, report_lines):
    kinds = ["step"] * 6 + ["save"] * 8 + ["end"] * 3 + ["time"] * 3
    began, cut_saves = time.time(), 0
    for seed, kind in enumerate(kinds):
        out, rng = tmp_path / str(seed), random.Random(seed)
        start = command(experiment, out, "--checkpoint-every", "1")
        kill(start, out, *moment(rng, out, kind))
        cut_saves += bool(saves(out))
        resumes = (out / "config.json").is_file()
        finish([*start, "--resume"] if resumes else start)
        assert_equal(out, whole)
    assert cut_saves >= 4
    report_lines.append(
        f"{len(kinds)} kills, {cut_saves} of them in mid-save: {len(kinds)} exact finishes in "
        f"{time.time() - began:.0f} s"
    )
