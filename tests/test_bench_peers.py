"""The comparison with other libraries, at a size of no interest."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
TINY = ("--image-size", "64", "--depth", "1", "--rounds", "2")


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "experiments/bench_peers.py"), *args]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def result_of(*args: str) -> dict:
    done = bench(*args, "--json")
    assert done.returncode == 0, done.stderr  # else they compute something else than samjax
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def flops(tokens: int, width: int, out: int) -> int:
    """Of ViT-B's encoder with one block, of windows larger than the map: written out by hand."""
    padded, side = 14**2, 14
    # Queries, keys and values of the padding are one token's.
    linear = 2 * tokens * width * 12 * width + 2 * width * 3 * width
    block = linear + 2 * padded * width * (2 * padded) + 2 * padded * width * 2 * side
    return block + 2 * tokens * (16 * 16 * 3) * width + 2 * tokens * out * (width + 9 * out)


def test_samjax_alone():
    result = result_of("encoder", *TINY, "--peers")
    assert result["facts"]["samjax"]["flops"] == flops(tokens=16, width=768, out=256)
    rows = {row["call"]: row for row in result["rows"]}
    assert list(rows) == ["encode", "decode", "product"]
    assert {row["library"] for row in result["rows"]} == {"samjax"}
    encode = rows["encode"]
    assert len(encode["all_seconds"]) == 2 and min(encode["all_seconds"]) > 0
    assert encode["times_samjax"] == 1 and encode["difference"] == 0
    assert encode["peak_bytes"] is None or encode["peak_bytes"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_encoders_compute_the_same(dtype):
    if not all(map(importlib.util.find_spec, ("torch", "segment_anything", "transformers"))):
        pytest.skip("the original SAM or HuggingFace transformers is not installed")
    peers = ("--peers", "segment-anything", "transformers")
    result = result_of("encoder", *TINY, *peers, "--dtype", dtype, "--batch-size", "2")
    found = {row["library"]: row for row in result["rows"] if row["call"] == "encode"}
    assert list(found) == ["samjax", "segment-anything", "transformers"]
    bound = 1e-4 if dtype == "float32" else 0.2
    assert all(row["difference"] < bound for row in found.values())
    if dtype == "float32":
        assert found["transformers"]["difference"] > 0


@pytest.mark.slow
def test_training_elsewhere_has_the_same_losses():
    if not all(map(importlib.util.find_spec, ("torch", "transformers", "peft"))):
        pytest.skip("HuggingFace transformers and peft are not installed")
    methods = ("--methods", "decoder", "lora:rank=2", "conv_lora:targets=qkv")
    rows = {(r["library"], r["call"]): r for r in result_of("train", *TINY, *methods)["rows"]}
    assert [name for name, _ in rows] == ["samjax"] * 3 + ["peft"] * 2 + ["dispatch"] * 2
    for library in ("peft", "dispatch"):
        assert rows[library, "lora:rank=2"]["difference"] < 1e-3
        assert rows[library, "lora:rank=2"]["times_samjax"] > 0
    assert rows["dispatch", "lora:rank=2"]["within"]["ratio"] == 1  # its first method
    assert rows["peft", "decoder"]["within"]["ratio"] == 1
    assert rows["dispatch", "conv_lora:targets=qkv"]["difference"] is None


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("encode",), "no 'encode'; the nearest is encoder"),
        (("encoder", "--peers", "scenic"), "scenic is left out; to compare with it: git clone"),
        (("encoder", "--scenic", "nowhere"), "nowhere is no checkout of google-research/scenic"),
        (("encoder", "--image-size", "100"), "not a positive multiple of 16"),
        (("encoder", "--cores", "0"), "this process may use"),
        (("encoder", "--rounds", "0"), "rounds must be at least 1"),
        (("encoder", "--batch-size", "0"), "batch_size must be at least 1"),
        (("train", "--methods", "loar"), "unknown method 'loar'; the nearest is lora"),
        (("train", "--methods", "dora", "--peers", "peft"), "pass one of its methods, decoder or"),
    ],
)
def test_bad_input(args, says):
    what, *rest = args
    done = bench(what, *TINY, *rest)
    assert done.returncode == 1 and says in done.stderr
    assert len(done.stderr.splitlines()) == 1
