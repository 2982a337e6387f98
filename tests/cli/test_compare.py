"""`samjax compare`: real runs, of which one method fails, stopped once and gone on with."""

import json
import os
import signal

import pytest

from samjax.training import loop

FAILS = "lora:learning_rate=1e30"


@pytest.fixture
def arguments(files, tmp_path):
    data = ("--weights", files / "small", "--data", files / "data", "--out", tmp_path / "out")
    return ("compare", files / "tiny.py", *data, "--json")


def test_two_methods_of_which_one_fails(call, arguments, tmp_path, monkeypatch):
    out, write = tmp_path / "out", loop.MetricsLog.write
    arguments = (*arguments, "--methods", "decoder", FAILS, "--seeds", "0", "1")

    def write_and_stop(self, step, values):
        write(self, step, values)
        if step == 2 and (out / "decoder/seed_1/config.json").is_file():
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop.MetricsLog, "write", write_and_stop)
        stopped = call(*arguments)
    assert stopped.code == 130 and "the same command goes on" in stopped.err.splitlines()[-1]
    assert stopped.err.count("evaluating before") == 2  # once a seed
    assert json.loads((out / "compare.json").read_text())["runs"][0]["state"] == "finished"

    done = call(*arguments)
    assert done.code == 1 and done.out.count("\n") == 1
    assert "resuming after step" in done.err and "evaluating before" not in done.err
    record = json.loads(done.out)
    assert record == json.loads((out / "compare.json").read_text()) and record["errors"] == 2
    for row in record["runs"]:
        if row["method"] == FAILS:
            assert row["state"] == "failed" and "is not finite at step 3" in row["error"]
            continue
        assert row["state"] == "finished" and row["steps"] == 3 and row["steps_per_second"] > 0
        assert row["step_bytes"] > 1e5 and row["step_bytes_from"] == "compiler"
        summary = json.loads((out / row["run"] / "summary.json").read_text())
        assert row["dice"] == summary["after"]["dice"]
    evaluated = call("eval", out / "decoder/seed_1", "--json").json
    assert evaluated["dice"] == pytest.approx(record["runs"][2]["dice"], abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "no methods: pass --methods"),
        (("--methods", "lora", "lora:rank=10000"), "lora:rank=10000: "),
        (("--methods", "lora", "--data", "absent"), "does not exist"),
        (("--methods", "lora", "--weights", "absent"), "absent"),
        (
            ("--methods", "lora", "--baseline", "lora"),
            "a baseline is what dense tasks are measured",
        ),
        (
            ("--methods", "lora_hps", "decoder", "--tasks", "nyuv2", "--baseline", "decode"),
            "the baseline 'decode' is no method of this comparison; the nearest is decoder, and",
        ),
    ],
)
def test_refused_before_any_training(call, arguments, tmp_path, flags, message):
    result = call(*arguments, *flags)
    assert result.code == 1 and not result.out
    assert result.err.startswith("samjax: ") and result.err.count("\n") == 1
    assert message in result.err
    assert not (tmp_path / "out").exists()
