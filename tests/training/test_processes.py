"""Two processes of four devices that train as one, and what becomes of one without the other."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from samjax import cli
from samjax.hosts import Hosts

FLAGS = ("--batch-size", "8", "--steps", "6", "--checkpoint-every", "2", "--validate-every", "3")
HEARTBEAT = 10


def environment(devices: int) -> dict[str, str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


@pytest.fixture
def start(experiment, command, tmp_path):
    """`start(out, *flags)` are two processes of a run, or of the command `line`.

    What they tell is `said(out, process)`.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def run(out, *flags, line=None) -> list[subprocess.Popen]:
        line = line or command(experiment, out, *FLAGS, "--fsdp", "4")
        hosts = ("--coordinator", f"localhost:{port}", "--processes", "2")
        hosts = (*hosts, "--heartbeat", str(HEARTBEAT))
        processes = []
        for i in range(2):
            own = [*line, *hosts, "--process", str(i), *flags]
            with open(out.with_suffix(f".{i}"), "w") as log:
                processes.append(subprocess.Popen(own, env=environment(4), stdout=log, stderr=log))
        return processes

    return run


def said(out, process: int) -> str:
    return out.with_suffix(f".{process}").read_text()


def logged(out) -> list[dict]:
    log = out / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return [json.loads(line) for line in lines]


def wait_for_step(processes, out, step: int) -> None:
    deadline = time.time() + 600
    while len(logged(out)) < step:
        assert time.time() < deadline and all(p.poll() is None for p in processes), said(out, 0)
        time.sleep(0.05)


def assert_same(out, whole) -> None:
    """The files of two runs, up to the order in which sums were taken."""
    ours, theirs = (load_file(run / "adapter.safetensors") for run in (out, whole))
    assert ours.keys() == theirs.keys()
    difference, size = (
        sum(np.sum(np.square(x, dtype=np.float64)) for x in leaves) ** 0.5
        for leaves in ([ours[k] - theirs[k] for k in theirs], theirs.values())
    )
    assert difference < 1e-5 * size
    for mine, other in zip(logged(out), logged(whole), strict=True):
        assert mine["step"] == other["step"]
        np.testing.assert_allclose(mine["loss"], other["loss"], rtol=1e-5)
    for name in ("eval_before.csv", "eval_after.csv"):
        assert_same_metrics(out / name, whole / name)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (out, whole)]
    assert summaries[0]["kept_step"] == summaries[1]["kept_step"]


def assert_same_metrics(*files) -> None:
    rows = [[line.split(",") for line in file.read_text().splitlines()] for file in files]
    assert [row[0] for row in rows[0]] == [row[0] for row in rows[1]] and len(rows[0]) == 3
    values = [np.array([row[1:] for row in part[1:]], float) for part in rows]
    np.testing.assert_allclose(*values, atol=1e-3)


@pytest.fixture(scope="module")
def alone(experiment, command, tmp_path_factory):
    """The same run of one device."""
    out = tmp_path_factory.mktemp("alone") / "run"
    line = command(experiment, out, *FLAGS)
    subprocess.run(line, check=True, capture_output=True, timeout=600, env=environment(1))
    return out


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one_device(start, alone, tmp_path):
    out = tmp_path / "run"
    assert [process.wait(600) for process in start(out)] == [0, 0], said(out, 0)
    assert_same(out, alone)
    assert "trainable:" in said(out, 0) and "trainable:" not in said(out, 1)


@pytest.mark.slow
def test_two_processes_evaluate_a_run_as_one_device(start, alone, tmp_path):
    out = tmp_path / "metrics.csv"
    line = [sys.executable, "-m", "samjax.cli", "eval", str(alone), "--csv", str(out)]
    assert [process.wait(600) for process in start(out, line=line)] == [0, 0], said(out, 0)
    assert_same_metrics(out, alone / "eval_after.csv")
    assert "dice:" in said(out, 0) and "dice:" not in said(out, 1)


@pytest.mark.slow
def test_a_stop_of_one_saves_in_both_and_two_devices_go_on(
    start, alone, experiment, command, tmp_path
):
    out = tmp_path / "run"
    processes = start(out)
    wait_for_step(processes, out, 2)
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait(600) for process in processes] == [130, 130]
    steps = {said(out, i).rpartition("stopped after step ")[2].split(" ")[0] for i in range(2)}
    assert len(steps) == 1 and (out / "checkpoints" / steps.pop()).is_dir()
    line = command(experiment, out, *FLAGS, "--fsdp", "2", "--resume")
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, env=environment(2))
    assert done.returncode == 0 and "resuming after step" in done.stderr, done.stderr
    assert_same(out, alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_is_killed_the_other_says_so_and_both_go_on(start, alone, tmp_path, victim):
    out = tmp_path / "run"
    processes = start(out)
    wait_for_step(processes, out, 3)
    processes[victim].kill()
    began = time.time()
    assert processes[1 - victim].wait(600) == 1
    assert time.time() - began < HEARTBEAT + 30
    last = said(out, 1 - victim).splitlines()[-1]
    assert last.startswith("samjax: ") and "lost" in last and "--resume" in last
    processes[victim].wait()
    assert [process.wait(600) for process in start(out, "--resume")] == [0, 0], said(out, 0)
    assert "resuming after step" in said(out, 0)
    assert_same(out, alone)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"processes": 2}, "processes and process need the address of process 0"),
        ({"coordinator": "a:1", "process": 0}, "coordinator a:1 needs --processes"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "process 2 is none of the 2"),
        ({"coordinator": "a", "processes": 2, "process": 0}, "must be HOST:PORT, or auto"),
        ({"heartbeat": 0}, "heartbeat must be at least 1 second"),
    ],
)
def test_processes_that_could_not_find_each_other(flags, message):
    with pytest.raises(ValueError, match=message):
        Hosts(**flags)


def test_a_batch_that_devices_cannot_share_is_refused_at_once(experiment, tmp_path, capsys):
    arguments = ["train", str(experiment), "--out", str(tmp_path / "run"), "--fsdp", "3"]
    assert cli.main(arguments) == 1
    assert "fsdp 3 does not divide the 1 devices" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
