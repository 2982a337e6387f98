"""`samjax plan`."""

import importlib.util
import json
import math
import sys

import jax
import pytest

from samjax import plan
from samjax.models import MODELS, Sam


@pytest.fixture
def small(monkeypatch, small_config):
    monkeypatch.setitem(MODELS, "small", small_config)
    return Sam(small_config)


def test_plan_of_this_device(call, files, small):
    """Neither weights nor data are given, and nothing is written."""
    result = call("plan", files / "tiny.py", "--model", "small", "--json")
    found = result.json
    assert result.out.count("\n") == 1
    assert found["batch_size"] == found["batch_per_chip"] == 1
    assert found["mesh"] == {"data": 1, "fsdp": 1} and found["max_batch_per_chip"] is None
    shapes = jax.tree.leaves(small.init_params_shapes())
    weights = 4 * sum(math.prod(leaf.shape) for leaf in shapes)
    counts = call("params", "--model", "small", "--json").json
    training, evaluation = found["training"], found["evaluation"]
    assert training["trained_bytes"] == 4 * counts["trainable"]
    # Beside weights and LoRA, of which there is more in memory than trains: its scales.
    assert 0 <= training["frozen_bytes"] + 4 * counts["decoder"] - weights < 1000
    assert 2 * training["trained_bytes"] <= training["optimizer_bytes"]
    # An image of 128 x 128 in bytes, its sizes as two int32, and a mask.
    assert training["batch_bytes"] == 128 * 128 * 3 + 8 + 128 * 128
    assert evaluation["images"] == 2 and evaluation["batch_bytes"] == 2 * (128 * 128 * 3 + 8)
    parts = ("frozen", "trained", "optimizer", "batch", "temporary")
    # But for the few leaves that the step does not read, which are not given to it.
    assert training["peak_bytes"] > 0.99 * sum(training[f"{name}_bytes"] for name in parts)
    assert found["peak_bytes_per_chip"] == max(training["peak_bytes"], evaluation["peak_bytes"])
    assert training["flops"] > evaluation["flops"] / 2 > 0  # of one image, and of two
    assert training["collectives"] == [] and training["largest"]
    assert "on each device" in result.err and "GFLOP" in result.err


def test_a_batch_and_dense_tasks(call, files, small):
    dense = ("--tasks", "nyuv2", "--method", "ta_lora", "--tasks-per-step", "2")
    arguments = ("--model", "small", "--batch-size", "3", *dense, "--json")
    found = call("plan", files / "tiny.py", *arguments).json
    assert found["batch_size"] == 3 and found["method"] == "ta_lora"
    # Image, sizes, two int32 of drawn tasks; truths of int32, one float32 and three.
    assert found["training"]["batch_bytes"] == 3 * (128 * 128 * (3 + 4 * (1 + 1 + 3)) + 8 + 8)


def test_memory_that_does_not_do(call, files, small, monkeypatch, assert_refused):
    monkeypatch.setattr(plan, "available_bytes", lambda device: 10**6)
    arguments = ("plan", files / "tiny.py", "--model", "small")
    result = call(*arguments, "--batch-size", "2")
    assert "a training step of 2 images needs " in result.err.splitlines()[-1]
    assert "--remat blocks" in result.err.splitlines()[-1] and not result.out
    result = call(*arguments, "--max-batch")
    assert "not even the smallest batch, 1 image a device, fits" in result.err
    assert_refused(call(*arguments, "--max-batch", "--batch-size", "2"), "leave out --batch-size")


def test_the_largest_batch_is_found():
    for most in range(12):
        tried = []

        def fits(n, most=most, tried=tried):
            tried.append(n)
            return n <= most

        assert plan.largest_that(fits) == most
        assert len(tried) == len(set(tried)) <= 8


def test_a_refusal_of_the_compiler_is_a_sentence():
    error = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 20.10G of 15.75G hbm. Exceeded hbm capacity by 4.36G."
    )
    found = plan._refusal("a training step of 32 images", error)
    assert found.startswith("a training step of 32 images needs 20.10 GiB of the 15.75 GiB of a ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "vit_x"), "unknown model 'vit_x'"),
        ((), "pass --model"),
        (("--model", "vit_b", "--fsdp", "3"), "fsdp 3 does not divide the 1 devices"),
    ],
)
def test_what_cannot_be_planned(call, files, assert_refused, arguments, message):
    assert_refused(call("plan", files / "tiny.py", *arguments), message)


def test_without_libtpu(call, files, assert_refused, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "libtpu", None)
    from samjax.topology import topology_devices

    with pytest.raises(RuntimeError, match=r"pip install 'samjax\[plan\]'"):
        topology_devices("v5e:2x2")


@pytest.mark.parametrize("name", ["v5e:3x3", "v9:2x2", "nonsense"])
def test_a_topology_that_there_is_not(call, files, assert_refused, name):
    pytest.importorskip("libtpu")
    arguments = ("--model", "vit_t", "--topology", name)
    assert_refused(call("plan", files / "tiny.py", *arguments), f"no topology {name!r}")


@pytest.mark.slow
def test_plan_of_a_topology(call, files, small):
    """Gradients are summed over all devices, in one operation or two, and nothing else moves.

    Windows do not divide the map: what stands for their padding is no reason either.
    """
    pytest.importorskip("libtpu")
    arguments = ("--model", "small", "--topology", "v5e:2x2", "--fsdp", "2", "--json")
    arguments += ("--image-size", "160")
    found = json.loads(call("plan", files / "tiny.py", *arguments).out)
    assert found["device"] == "TPU v5 lite" and found["mesh"] == {"data": 2, "fsdp": 2}
    assert found["batch_size"] == 4 and found["batch_per_chip"] == 1
    sums = found["training"]["collectives"]
    assert {(c["kind"], c["group"]) for c in sums} == {("all-reduce", 4)}
    trained = found["training"]["trained_bytes"]
    # Gradients of products in float32; the loss and flags are the little more.
    assert trained / 2 <= sum(c["total_bytes"] for c in sums) < 1.1 * trained
    assert found["evaluation"]["collectives"] == []
