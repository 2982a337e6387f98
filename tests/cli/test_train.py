"""`samjax train`, and `samjax eval` of what it leaves."""

import json
import os

import numpy as np

from samjax.data.images import read_image


def test_train_leaves_a_run(files, trained):
    run, summary = files / "run", trained.json
    assert trained.out.count("\n") == 1
    for text in (
        "small at 128 px",
        "5 training and 3 test images",
        "training",
        "(prompt: none): dice",
    ):
        assert text in trained.err
    assert {"before", "after", "adapter", "gallery", "seconds_per_step"} <= summary.keys()
    for when in ("before", "after"):
        assert {"dice", "iou"} <= summary[when].keys()
        assert all(0 <= value <= 1 for value in summary[when].values())
        rows = (run / f"eval_{when}.csv").read_text().splitlines()
        assert len(rows) == 4 and rows[0].startswith("name,")
    assert summary["steps"] == 3 and summary["seconds_per_step"] > 0
    assert summary["adapter"] == str(run / "adapter.safetensors")
    assert summary["gallery"] == str(run / "gallery.png")
    picture = read_image(run / "gallery.png")
    assert picture.shape[1] > 4 * 256  # image, truth, before, after
    assert json.loads((run / "summary.json").read_text()) == summary
    config = json.loads((run / "config.json").read_text())
    assert config["steps"] == 3 and config["weights"] == str(files / "small")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert not [name for name in os.listdir(run) if name.endswith(".tmp")]


def test_a_finished_run_is_not_trained_again(call, assert_refused, files, trained):
    data = ("--weights", files / "small", "--data", files / "data", "--out", files / "run")
    again = call("train", files / "tiny.py", *data, "--resume", "--json")
    assert again.json == trained.json
    assert "finished already" in again.err
    assert_refused(call("train", files / "tiny.py", *data), "is not empty; pass --resume")
    other = call("train", files / "tiny.py", *data, "--resume", "--seed", "1")
    assert_refused(other, "seed was 0 and is now 1")


def test_eval_of_a_run(call, files, trained, tmp_path):
    result = call("eval", files / "run", "--json")
    assert result.out.count("\n") == 1
    assert result.json["images"] == 3 and result.json["csv"] == str(
        files / "run/eval_test_none.csv"
    )
    after = (files / "run/eval_after.csv").read_text().splitlines()
    rows = (files / "run/eval_test_none.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == [row.split(",")[0] for row in after]
    for key, value in trained.json["after"].items():
        assert abs(result.json[key] - value) < 1e-4
    elsewhere = call("eval", files / "run", "--csv", tmp_path / "a.csv", "--json")
    assert elsewhere.json["csv"] == str(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().splitlines() == rows


def test_eval_of_an_experiment_is_before_training(call, files, trained):
    data = ("--weights", files / "small", "--data", files / "data")
    result = call("eval", files / "tiny.py", *data, "--split", "test", "--json").json
    assert result["images"] == 3 and result["csv"] is None
    for key, value in trained.json["before"].items():
        assert abs(result[key] - value) < 1e-4
