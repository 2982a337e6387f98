"""report.md against numbers worked out by hand."""

import json

import numpy as np
import pytest

from samjax.config import Config
from samjax.data.prompts import PromptConfig
from samjax.evaluation.evaluate import Evaluation
from samjax.report import write_report

SUMMARY = {
    "input_size": [352, 352],
    "trainable": 4_205_796,
    "beside_decoder": 147_456,
    "steps": 1000,
    "kept_step": 800,
    "seconds_per_step": 1.234,
    "adapter": "/somewhere/adapter.safetensors",
    "file_bytes": 16_400_000,
    "device": "cpu",
    "date": "2026-11-28",
}


def report(out, config, before, after, titles):
    before.write_csv(out / "eval_before.csv")
    after.write_csv(out / "eval_after.csv")
    write_report(out, config, SUMMARY, {"train": 80, "test": 3}, titles, "prompt: none")
    return (out / "report.md").read_text()


def test_means_changes_and_the_worst_images(tmp_path):
    names = ("a", "b", "c")
    before = Evaluation(names, {"dice": np.array([0.1, 0.2, 0.3])})
    after = Evaluation(names, {"dice": np.array([0.9, 0.4, 0.8])})
    text = report(tmp_path, Config(weights="mobile_sam"), before, after, {"dice": "Dice"})
    # Changes 0.8, 0.2, 0.5: mean 0.5, standard error sqrt(0.09 / 3).
    assert "| Dice | 0.2000 | 0.7000 | +0.5000 ± 0.1732 |" in text
    worst = [line for line in text.splitlines() if line[:4] in ("| a ", "| b ", "| c ")]
    assert worst == ["| b | 0.200 | 0.400 |", "| c | 0.300 | 0.800 |", "| a | 0.100 | 0.900 |"]
    for fact in ("4,205,796", "147,456", "352 x 352", "1.23 s", "step 800", "80 train, 3 test"):
        assert fact in text
    assert "prompt: none" in text and "(gallery.png)" in text


def test_objects_of_one_image_are_one_draw(tmp_path):
    prompts = PromptConfig(none=0.0, box=1.0)
    config = Config(objects="each", prompts=prompts)
    names = ("a#1", "a#2", "b#1", "b#2")
    before = Evaluation(names, {"dice": np.zeros(4)})
    after = Evaluation(names, {"dice": np.array([0.2, 0.2, 0.6, 0.6])})
    # As the two images' means of 0.2 and 0.6: sqrt(0.08 / 2).
    text = report(tmp_path, config, before, after, {"dice": "Dice"})
    assert "+0.4000 ± 0.2000 |" in text


def test_metrics_of_a_set_have_no_standard_error(tmp_path):
    name = "depth/absolute_error"
    config = Config(tasks=("depth:1:masked_l1",))

    def of(values, of_set):
        return Evaluation(("a", "b"), {name: np.array(values)}, {name: of_set})

    text = report(tmp_path, config, of([1.0, 2.0], 1.4), of([0.5, np.nan], 0.6), {})
    assert f"| {name} | 1.4000 | 0.6000 | -0.8000 |" in text
    # Less is better; an image without a truth is not the worst.
    assert "| a | 1.000 | 0.500 |" in text and "| b |" not in text


def test_a_finished_run_has_one(whole):
    text = (whole / "report.md").read_text()
    summary = json.loads((whole / "summary.json").read_text())
    row = next(line for line in text.splitlines() if line.startswith("| Dice |"))
    _, _, before, after, change, _ = (cell.strip() for cell in row.split("|"))
    assert float(before) == pytest.approx(summary["before"]["dice"], abs=1e-4)
    assert float(after) == pytest.approx(summary["after"]["dice"], abs=1e-4)
    assert float(change.split()[0]) == pytest.approx(float(after) - float(before), abs=2e-4)
