"""Evaluating a finished run again: with other prompts, and after its files moved."""

import dataclasses
import json
import shutil

import pytest
from rich.console import Console

from samjax.cli import main
from samjax.config import load_experiment
from samjax.run import open_data, open_sources


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


def test_other_metrics_and_larger_boxes(run, capsys):
    plain = evaluate(capsys, run, "--metrics", "set_iou", "dice")
    assert set(plain) == {"dice", "set_iou", "images", "csv"}
    lines = (run / "eval_test_box.csv").read_text().splitlines()
    assert lines[0] == "name,dice,set_iou" and lines[-1] == f"(whole set),,{plain['set_iou']:.6f}"
    moved = evaluate(capsys, run, "--metrics", "dice", "--eval-box-outward", "9")
    assert moved["csv"] == str(run / "eval_test_box9.csv") and moved["dice"] != plain["dice"]
    flags = ("--eval-prompt", "point", "--eval-box-outward", "9")
    assert main(["eval", str(run), *flags]) == 1
    assert "eval_box_outward moves boxes, and the evaluation's prompt is point" in (
        capsys.readouterr().err
    )


def test_a_benchmark_that_is_measured_on_its_validation_split(experiment):
    config = load_experiment(experiment).config
    with pytest.raises(ValueError, match="measured on what its validations choose by"):
        dataclasses.replace(config, test_split="validation", validate_every=2)
    once = {"validate_every": None, "keep": "last", "patience": None}
    other = dataclasses.replace(config, test_split="validation", **once)
    quiet = Console(quiet=True)
    first = {
        split: open_data(config, split, quiet).image_file(0) for split in ("validation", "test")
    }
    assert first["validation"] != first["test"]
    assert open_sources(other, quiet)["test"].image_file(0) == first["validation"]


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


def test_images_that_are_not_the_runs(run, experiment, tmp_path, capsys):
    """Told, not refused; and those that were trained on are counted."""

    def said(*flags):
        assert main(["eval", str(run), *flags]) == 0
        return " ".join(capsys.readouterr().err.split())

    assert "not those of the run" not in said()
    data = tmp_path / "data"
    shutil.copytree(experiment.parent / "data", data)
    for kind in ("images", "masks"):  # the test split now is 5 (as in training), 1 and new
        folder = data / "test" / kind
        shutil.copy(data / "train" / kind / "5.png", folder / "5.png")
        (folder / "0.png").rename(folder / "new.png")
    told = said("--data", str(data))
    assert "notice: these test images are not those of the run" in told
    assert f"{data} holds others now" in told
    assert "warning: 2 of these 3 images have names of images that the run was trained on" in told
    inputs = json.loads((run / "inputs.json").read_text())
    assert inputs["train_names"] == [str(i) for i in range(7)]
    (run / "inputs.json").write_text(json.dumps(inputs | {"train_names": []}))
    told = said("--data", str(data))
    assert "notice:" in told and "warning:" not in told
    del inputs["validation"]  # as of a run without validations
    (run / "inputs.json").write_text(json.dumps(inputs))
    assert "notice:" not in said("--split", "validation")
    (run / "inputs.json").write_text(json.dumps(inputs | {"train": "other"}))
    assert "notice: these validation images" in said("--split", "validation")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("config.json", "put a copy of it there, or start a run in another folder"),
        ("inputs.json", "put a copy of it there, or delete it"),
        ("summary.json", "delete it, and --resume writes it anew"),
        ("eval_before.csv", "delete it, and --resume evaluates again"),
    ],
)
def test_damaged_files_of_a_run(run, experiment, command, capsys, name, mend, content):
    if name != "summary.json":
        (run / "summary.json").unlink()
    (run / name).write_bytes(content)
    assert main(command(experiment, run, "--resume")[3:]) == 1
    error = capsys.readouterr().err
    assert f"{run / name} is damaged: {mend}" in " ".join(error.split())
    if name in ("config.json", "inputs.json"):
        assert main(["eval", str(run)]) == 1
        assert f"{run / name} is damaged: {mend}" in " ".join(capsys.readouterr().err.split())


def test_a_list_of_metrics_that_was_cut(run, experiment, command, capsys):
    (run / "summary.json").unlink()
    file = run / "eval_before.csv"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    assert main(command(experiment, run, "--resume")[3:]) == 1
    assert f"{file} is damaged: delete it" in capsys.readouterr().err
