"""The one call on a GPU, with a tiny model on a CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"


@pytest.fixture
def rows_module(monkeypatch):
    """`bench_gpu_rows`, whose neighbours are scripts as well."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import bench_gpu_rows

    return bench_gpu_rows


@pytest.fixture
def gpu_module(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import bench_gpu

    return bench_gpu


def call(out: Path, stubs: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs the script where what a folder stands in for cannot be imported."""
    command = [sys.executable, str(EXPERIMENTS / "bench_gpu.py"), "--tiny", "--out", str(out)]
    paths = os.pathsep.join((str(stubs), str(EXPERIMENTS.parent)))
    environment = {**os.environ, "PYTHONPATH": paths}
    options = {"capture_output": True, "text": True, "timeout": 600, "env": environment}
    return subprocess.run([*command, *args], **options)


def missing(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / f"{name}.py").write_text(f"raise ImportError('No module named {name}')\n")
    return folder


def test_samjax_alone_without_loader_and_command_line(tmp_path):
    stubs = missing(tmp_path, "grain", "tyro", "tensorflow_datasets", "torch")
    out = tmp_path / "gpu.json"
    done = call(out, stubs, "--methods", "decoder", "--batches", "1", "--seconds", "500")
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    rows = {(row["task"], row["method"], row["with"]): row for row in result["rows"]}
    assert {("encoder", None, "dense"), ("encoder", None, "chunked")} < set(rows)
    step = rows["train", "decoder", "chunked"]
    assert step["memory_bytes"] > step["temporary_bytes"] > 0 and step["compile_seconds"] > 0
    rate = step["needed_flops"] * step["images_per_second"]
    assert step["flop_per_second"] == pytest.approx(rate) and step["share_of_peak"] is None
    assert {row["library"] for row in result["rows"]} == {"samjax"}
    assert [note.partition(" ")[0] for note in result["notes"]] == ["torch:encoder", "torch:train"]
    assert "No module named torch" in result["notes"][0]
    assert "| samjax | chunked | train | decoder | 1 |" in done.stdout


@pytest.mark.slow
def test_torch_beside_it(tmp_path):
    if not all(map(importlib.util.find_spec, ("torch", "transformers", "peft"))):
        pytest.skip("HuggingFace transformers and peft are not installed")
    out = tmp_path / "gpu.json"
    options = ("--methods", "lora", "--batches", "1", "2", "--most", "3", "--seconds", "500")
    done = call(out, missing(tmp_path, "segment_anything"), *options)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    trained = [r for r in result["rows"] if r["task"] == "train"]
    ours = [row["batch_size"] for row in trained if row["library"] == "samjax"]
    assert ours == [1, 2, 3]  # the last as the largest that fits and may be tried
    theirs = [r["batch_size"] for r in trained if r["with"] == "peft"]
    assert theirs == [1, 2]
    assert all(row["flop_per_second"] > 0 for row in trained)
    assert any(note.startswith("segment-anything is left out") for note in result["notes"])


def test_a_part_that_takes_too_long_is_stopped(tmp_path):
    out = tmp_path / "gpu.json"
    done = call(out, tmp_path, "--seconds", "1")
    assert done.returncode == 1
    notes = json.loads(out.read_text())["notes"]
    assert len(notes) == 4 and all("was stopped after its" in note for note in notes)


def test_the_largest_batch_is_where_need_in_a_line_meets_memory(rows_module):
    needs = {1: 3_000, 8: 10_000}  # 1000 an image and 2000 beside them
    assert rows_module.largest_batch(needs, 100_000, 0.9, 512) == 88
    assert rows_module.largest_batch(needs, 100_000, 0.9, 64) == 64
    assert rows_module.largest_batch(needs, 14_000, 1.0, 512) == 12
    assert rows_module.largest_batch({1: 3_000}, 100_000, 0.9, 512) == 0
    assert rows_module.largest_batch(needs, None, 0.9, 512) == 0


@pytest.mark.parametrize(
    ("device", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("a CPU", None)],
)
def test_rows_of_torch_have_the_work_that_samjax_counts(gpu_module, device, peak):
    counted = {"task": "train", "method": "lora", "batch_size": 2, "needed_flops": 4e12}
    rows = [{**counted, "images_per_second": 50.0}]
    rows.append({"task": "train", "method": "lora", "batch_size": 8, "images_per_second": 10.0})
    rows.append({"task": "train", "method": "dora", "batch_size": 8, "images_per_second": 10.0})
    result = {"facts": {"samjax": {"device": device}}, "rows": rows}
    gpu_module._share_peak(result)
    assert [row.get("flop_per_second") for row in rows] == [1e14, 2e13, None]
    share = None if peak is None else 2e13 / peak
    assert rows[1]["share_of_peak"] == share and "share_of_peak" not in rows[2]


def test_a_missing_folder_is_told_at_once(tmp_path):
    done = call(tmp_path / "nowhere" / "gpu.json", tmp_path)
    assert done.returncode == 1 and "there is no directory" in done.stderr
    assert len(done.stderr.splitlines()) == 1
