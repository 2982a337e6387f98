"""The comparison of encoders, at a size of no interest."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
TINY = ("--image-size", "64", "--depth", "3", "--rounds", "2")


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "experiments/bench_encoder.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def flops(tokens: int, width: int, depth: int, out: int, window: int = 14) -> int:
    """Of an encoder without a windowed map larger than its window: written out by hand."""
    padded, heads = window**2, 12
    side = int(tokens**0.5)

    def block(tokens_in: int, side: int) -> int:
        linear = 2 * tokens_in * width * 4 * width + 2 * tokens * width * 8 * width
        return linear + 2 * tokens_in * width * (2 * tokens_in) + 2 * tokens_in * width * 2 * side

    assert heads * 64 == width
    blocks = (depth - 1) * block(padded, window) + block(tokens, side)
    neck = 2 * tokens * out * (width + 9 * out)
    return blocks + 2 * tokens * (16 * 16 * 3) * width + neck


def test_samjax_alone():
    done = bench(*TINY, "--peers", "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["flops"] == flops(tokens=16, width=768, depth=3, out=256)
    assert list(result["encoders"]) == ["samjax"]
    ours = result["encoders"]["samjax"]
    assert len(ours["all_seconds"]) == 2 and min(ours["all_seconds"]) > 0
    assert ours["times_samjax"] == 1 and ours["difference"] == 0
    assert ours["share_of_product_rate"] > 0 and ours["xla_temporary_bytes"] > 0


@pytest.mark.slow
def test_the_original_computes_the_same():
    if not all(map(importlib.util.find_spec, ("torch", "segment_anything"))):
        pytest.skip("the original SAM is not installed")
    done = bench(*TINY, "--peers", "segment-anything", "--json")
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)["encoders"]["segment-anything"]
    assert theirs["difference"] < 1e-4 and theirs["peak_bytes"] != 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--peers", "scenic"), "scenic is left out; to compare with it: git clone"),
        (("--scenic", "nowhere"), "nowhere is no checkout of google-research/scenic"),
        (("--image-size", "100"), "not a positive multiple of 16"),
        (("--cores", "0"), "this process may use"),
        (("--rounds", "0"), "--rounds and --depth are 1 or more"),
    ],
)
def test_bad_input(args, says):
    done = bench(*TINY, *args)
    assert done.returncode == 1 and says in done.stderr
    assert len(done.stderr.splitlines()) == 1
