"""Two processes and one run folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from samjax.lock import check_free, run_lock

HOLD = """
import sys
from pathlib import Path
from samjax.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
EXPERIMENT = "from samjax.config import Config\n\ndef config():\n    return Config(steps=1)\n"

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")


@pytest.fixture
def holder(tmp_path):
    """A process that holds `tmp_path / "run"`."""
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("flags", [(), ("--resume",)])
def test_a_second_process_is_refused(holder, tmp_path, flags):
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    arguments = ["train", str(tmp_path / "experiment.py"), "--out", str(tmp_path / "run"), *flags]
    second = subprocess.run(
        [sys.executable, "-m", "samjax.cli", *arguments], capture_output=True, text=True
    )
    assert second.returncode == 1 and not second.stdout
    assert second.stderr == (
        f"samjax: another samjax, process {holder.pid}, is training in {tmp_path / 'run'}: wait "
        "for it or stop it, or choose another folder with --out\n"
    )


def test_a_killed_process_lets_go(holder, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match=f"process {holder.pid}, is training"):
        check_free(run)
    with pytest.raises(RuntimeError, match=f"process {holder.pid}, is training"), run_lock(run):
        pass
    holder.kill()
    holder.wait()
    check_free(run)
    with run_lock(run):
        assert (run / ".lock").read_text() == str(os.getpid())


def test_a_folder_that_nothing_ever_held(tmp_path):
    check_free(tmp_path)
    check_free(tmp_path / "absent")
    assert not list(tmp_path.iterdir())
    with run_lock(tmp_path):
        pass
    with run_lock(tmp_path):
        pass
    check_free(Path(tmp_path))
