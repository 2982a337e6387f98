"""`samjax table`: a tiny table, its missing cells run, stopped, gone on with and recorded."""

import json
import os
import signal

import pytest

from samjax import compare
from samjax.training import loop

TABLE = '''"""A tiny table."""

from samjax.config import Config
from samjax.tables.table import UNTRAINED, Column, Metric, Row, Table


def table():
    config = Config(
        weights={weights!r}, data={data!r},
        steps=3, batch_size=2, eval_batch_size=2, gallery=2, log_every=1,
    )
    metrics = (Metric("dice", "DSC"),)
    return Table(
        title="Tiny",
        source="nowhere",
        rows=(
            Row("none", UNTRAINED, "50 -"),
            Row("LoRA", "lora:rank=2", "60.0±0.5 -"),
            Row("VPT", unavailable="there is none"),
        ),
        columns=(
            Column("ellipses", "Ellipses", config, metrics, learning_rate=1e-3),
            Column("absent", "Absent", Config(data="tfds:kvasir_seg"), metrics),
        ),
    )
'''


@pytest.fixture
def table(files, tmp_path, monkeypatch):
    """The table, in experiments/ of the current directory; no dataset is prepared."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "datasets"))
    (tmp_path / "experiments").mkdir()
    text = TABLE.format(weights=str(files / "small"), data=str(files / "data"))
    (tmp_path / "experiments/tiny.py").write_text(text)
    return tmp_path


def cells(result):
    return {
        (cell["row"], cell["dataset"]): cell
        for cell in json.loads(result.out.splitlines()[-1])["cells"]
    }


def test_missing_cells_run_and_are_recorded(call, table, monkeypatch):
    out = table / "runs/tiny/ellipses"
    listed = call("table")
    assert listed.code == 0 and listed.out == "tiny: A tiny table.\n"
    shown = call("table", "tiny", "--out", "tiny.md")
    assert shown.code == 0 and "60.0 ± 0.5" in shown.out and shown.out.count("not run") == 4
    assert (table / "tiny.md").read_text() in shown.out and not (table / "runs").exists()

    write = loop.MetricsLog.write

    def write_and_stop(self, step, values):
        write(self, step, values)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    run = ("table", "tiny", "--run", "--json")
    with monkeypatch.context() as patch:
        patch.setattr(loop.MetricsLog, "write", write_and_stop)
        stopped = call(*run)
    assert stopped.code == 130 and "the same command goes on" in stopped.err.splitlines()[-1]
    assert (
        "left out: not prepared: kvasir_seg for absent (run `samjax data prepare kvasir_seg`"
        in stopped.err
    )

    done = call(*run)
    assert done.code == 1  # one dataset was not there
    assert "resuming after step" in done.err
    assert json.loads(done.out)["errors"] == 1
    found = cells(done)
    states = {key: cell["state"] for key, cell in found.items()}
    assert states == {
        ("none", "ellipses"): "own",
        ("LoRA", "ellipses"): "own",
        ("VPT", "ellipses"): "not available",
        ("none", "absent"): "not run",
        ("LoRA", "absent"): "not run",
        ("VPT", "absent"): "not available",
    }
    summary = json.loads((out / "lora_rank=2,learning_rate=0.001/seed_0/summary.json").read_text())
    assert found["LoRA", "ellipses"]["measured"]["dice"]["mean"] == summary["after"]["dice"]
    assert found["none", "ellipses"]["measured"]["dice"]["mean"] == summary["before"]["dice"]
    assert found["LoRA", "ellipses"]["command"] == "samjax table tiny --run --json"
    assert (out / "compare.md").is_file() and not (out / "untrained").exists()

    again = call(*run, "--datasets", "ellipses")
    assert (
        again.code == 0
        and "no cell is missing" in again.err
        and cells(again) == {key: cell for key, cell in found.items() if key[1] == "ellipses"}
    )
    other = call(*run, "--datasets", "ellipses", "--epochs", "1")
    assert other.code == 1 and "another folder is chosen with --runs" in other.err

    recorded = call("table", "tiny", "--record")
    assert recorded.code == 0 and "2 cells are recorded" in recorded.err
    # Without the runs, the record is shown, and is no longer missing.
    (table / "runs").rename(table / "elsewhere")
    shown = call("table", "tiny", "--datasets", "ellipses", "--json")
    assert cells(shown)["LoRA", "ellipses"]["state"] == "recorded"
    assert cells(shown)["LoRA", "ellipses"]["measured"] == found["LoRA", "ellipses"]["measured"]
    assert "no cell is missing" in call(*run, "--datasets", "ellipses").err


def test_a_cell_that_fails_keeps_none_from_its_own(call, table, monkeypatch):
    """And SAM as it is gets an evaluation of its own, where no run has one from before training."""

    def fail(*arguments, **options):
        raise ValueError("the loss is not\nfinite at step 3")

    monkeypatch.setattr(compare, "train", fail)
    result = call("table", "tiny", "--run", "--datasets", "ellipses", "--json")
    assert result.code == 1
    found = cells(result)
    assert found["LoRA", "ellipses"]["state"] == "failed"
    assert found["LoRA", "ellipses"]["error"] == "seed 0: the loss is not finite at step 3"
    cell = found["none", "ellipses"]
    assert cell["state"] == "own" and 0 <= cell["measured"]["dice"]["mean"] <= 1
    assert cell["seeds"] == [] and cell["not_the_protocol"] == {}
    assert (table / "runs/tiny/ellipses/untrained/eval_test.csv").is_file()
    again = call("table", "tiny", "--run", "--datasets", "ellipses", "--methods", "untrained")
    assert again.code == 0 and "no cell is missing" in again.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.py",), "no experiment file at absent.py"),
        (("tinny",), "there is no table 'tinny' in experiments; the nearest is tiny"),
        (("tiny", "--methods", "loar"), "no row 'loar'; the nearest is lora"),
        (("tiny", "--datasets", "ellipse"), "no dataset 'ellipse'; the nearest is ellipses"),
        (("tiny", "--weights", "mobile_sam"), "--weights is for cells that run: add --run"),
        (("tiny", "--seeds", "1"), "--seeds is for cells that run: add --run"),
        (("tiny", "--run", "--data", "elipses=x"), "the nearest is ellipses, chosen"),
        (
            ("tiny", "--run", "--datasets", "absent"),
            "not prepared: kvasir_seg for absent (run `samj",
        ),
        (
            ("tiny", "--run", "--data", "ellipses=nowhere"),
            "ellipses: the data nowhere does not exi",
        ),
        (("tiny", "--run", "--weights", "nowhere", "--datasets", "ellipses"), "nowhere"),
        (("tiny", "--run", "--epochs", "-1"), "steps, epochs and gallery must be positive"),
        (("tiny", "--record"), "nothing to record: runs/tiny holds no finished run"),
        (("tiny", "--out", "nowhere/tiny.md"), "there is no directory nowhere"),
    ],
)
def test_refused_before_any_work(call, table, arguments, message):
    result = call("table", *arguments)
    assert result.code == 1 and not result.out
    assert result.err.startswith("samjax: ") and result.err.count("\n") == 1
    assert message in result.err
    assert not (table / "runs").exists() and not (table / "experiments/measured").exists()


def test_without_tables(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "there are no tables in" in call("table").err
