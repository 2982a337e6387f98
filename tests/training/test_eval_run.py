"""Evaluating a finished run again: with other prompts, and after its files moved."""

import json
import shutil

import pytest

from samjax.cli import main


@pytest.fixture
def run(whole, tmp_path):
    """A copy of a finished run, whose config says where weights and data were."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def evaluate(capsys, run, *flags):
    code = main(["eval", str(run), "--json", *flags])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def test_each_prompt_has_a_file_of_its_own(run, capsys):
    after = json.loads((run / "summary.json").read_text())["after"]
    own = evaluate(capsys, run)
    assert own["csv"] == str(run / "eval_test_box.csv")
    assert own["dice"] == pytest.approx(after["dice"], abs=1e-5)
    none = evaluate(capsys, run, "--eval-prompt", "none")
    assert none["csv"] == str(run / "eval_test_none.csv")
    validation = evaluate(capsys, run, "--split", "validation")
    best = json.loads((run / "summary.json").read_text())["best_validation"]
    assert validation["csv"] == str(run / "eval_validation_box.csv")
    assert validation["dice"] == pytest.approx(best["dice"], abs=1e-5)
    boxes = (run / "eval_test_box.csv").read_text()
    assert boxes != (run / "eval_test_none.csv").read_text()


def test_weights_and_data_that_moved(run, experiment, tmp_path, capsys):
    expected = evaluate(capsys, run)
    for name in ("weights", "data"):
        shutil.copytree(experiment.parent / name, tmp_path / f"new_{name}")
    config = json.loads((run / "config.json").read_text())
    gone = {"weights": str(tmp_path / "gone"), "data": str(tmp_path / "gone")}
    (run / "config.json").write_text(json.dumps(config | gone))
    assert main(["eval", str(run)]) == 1
    assert "gone" in capsys.readouterr().err
    places = ("--weights", str(tmp_path / "new_weights"), "--data", str(tmp_path / "new_data"))
    assert evaluate(capsys, run, *places) == expected


def test_a_run_that_is_not_finished(run, capsys):
    (run / "adapter.safetensors").unlink()
    assert main(["eval", str(run)]) == 1
    assert "is not finished; go on with `samjax train` and --resume" in capsys.readouterr().err
