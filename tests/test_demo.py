"""The README's main job, whole: minutes long, and it needs the package registry."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_demo_segments_nuclei(tmp_path):
    command = [
        sys.executable,
        "-m",
        "samjax.cli",
        "train",
        str(REPO / "experiments/demo_nuclei.py"),
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run"), "--json"],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["before"]["dice"] < 0.3
    assert summary["after"]["dice"] > 0.85
    assert Path(summary["adapter"]).is_file() and Path(summary["gallery"]).is_file()
