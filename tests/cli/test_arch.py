"""`samjax arch`, training what was found, and merging what of it folds."""

import json

import numpy as np
import pytest

EXPERIMENT = '''"""A search of six steps."""

from samjax.config import Config
from samjax.peft import MethodConfig


def config():
    return Config(
        steps=6, batch_size=2, eval_batch_size=2, gallery=1, log_every=1,
        method=MethodConfig("nas_lora", rank=2),
    )
'''


@pytest.fixture(scope="module")
def searched(files, call, tmp_path_factory):
    """The folder of a finished search; its experiment lies beside it."""
    folder = tmp_path_factory.mktemp("arch")
    (folder / "search.py").write_text(EXPERIMENT)
    data = ("--weights", files / "small", "--data", files / "data")
    assert call("train", folder / "search.py", *data, "--out", folder / "run").code == 0
    return folder / "run"


def test_what_was_found_is_shown_and_written(call, searched):
    plain = call("arch", searched)
    assert plain.code == 0 and plain.out.startswith("written: ") and plain.out.count("\n") == 1
    result = call("arch", searched, "--json")
    assert result.code == 0
    for said in ("blocks_0/attn/qkv", "sep_conv_5x5", "entropy", "strongest"):
        assert said in result.err
    found = json.loads((searched / "architecture.json").read_text())
    assert {**found, "files": result.json["files"]} == result.json
    last = json.loads((searched / "metrics.jsonl").read_text().splitlines()[-1])
    for site, entry in found["sites"].items():
        for name, share in entry["edges"][0]["shares"].items():
            assert share == pytest.approx(last[f"{site}/edge_0/{name}"], abs=1e-6)
    pytest.importorskip("matplotlib")
    assert (searched / "architecture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("derive", ["mixture", "strongest"])
def test_a_run_starts_from_what_was_found(call, files, searched, tmp_path, derive):
    file = tmp_path / "found.json"
    assert call("arch", searched, "--derive", derive, "--out", file).code == 0
    data = ("--weights", files / "small", "--data", files / "data", "--out", tmp_path / "run")
    options = ("--operators", file, "--steps", "2")
    result = call("train", searched.parent / "search.py", *data, *options)
    assert result.code == 0, result.err
    assert "stage" not in result.err  # nothing is searched for
    file.unlink()  # the run knows what was in it
    assert call("eval", tmp_path / "run").code == 0
    again = call("arch", tmp_path / "run", "--json").json
    found = call("arch", searched, "--json").json
    for site, entry in again["sites"].items():
        shares = found["sites"][site]["edges"][0]["shares"]
        if derive == "strongest":
            best = max((n for n in shares if n != "none"), key=shares.__getitem__)
            shares = {best: 1.0}
        assert entry["edges"][0]["shares"] == pytest.approx(shares, rel=1e-4)


def test_the_trained_adapter_is_derived_and_evaluated(call, searched, tmp_path, assert_refused):
    derived = tmp_path / "strongest.safetensors"
    flags = ("--derive", "strongest", "--adapter", derived, "--out", tmp_path / "a.json")
    assert call("arch", searched, *flags).code == 0
    result = call("eval", searched, "--adapter", derived, "--json")
    own = call("eval", searched, "--json")
    assert result.json["csv"] == str(searched / "eval_test_none_strongest.csv")
    assert result.json["images"] == own.json["images"]
    assert result.json["dice"] != own.json["dice"] or result.json["mae"] != own.json["mae"]
    assert_refused(call("arch", searched, *flags), "exists already; choose another --adapter")


def test_an_adapter_file_will_do(call, searched, tmp_path):
    result = call("arch", searched / "adapter.safetensors", "--out", tmp_path / "a.json", "--json")
    assert result.json["sites"] and (tmp_path / "a.json").is_file()


def test_merge_writes_what_stays(call, files, searched, predict, tmp_path):
    adapter = ("--adapter", searched / "adapter.safetensors")
    weights = ("--weights", files / "small")
    refused = call("merge", tmp_path / "merged", *weights, *adapter)
    assert refused.code and "with --rest FILE" in refused.err.splitlines()[-1]
    assert not (tmp_path / "merged").exists()
    rest = tmp_path / "rest.safetensors"
    result = call("merge", tmp_path / "merged", *weights, *adapter, "--rest", rest, "--json")
    assert result.json["rest"] == str(rest) and result.json["rest_sites"] == 2
    assert max(result.json["max_difference"].values()) <= 1e-4
    costs = result.json["encoding_flops"]
    assert 1 < costs["rest"] < 1.2 and costs["rest"] <= costs["adapted"]
    assert "2 of 2 sites stay" in result.err and "9 x 9 tokens" in result.err
    prompt = ("--box", "10,8,30,25", "--save-logits")
    separate = predict(tmp_path / "a", *adapter, *prompt)
    both = predict(tmp_path / "b", "--adapter", rest, *prompt, weights=tmp_path / "merged")
    one, other = (r.logits["low_res_logits"] for r in (separate, both))
    assert np.abs(one - other).max() <= 1e-3 * one.std()


def test_what_folds_whole_has_no_rest(call, files, trained, tmp_path):
    assert trained.code == 0
    adapter = ("--adapter", files / "run/adapter.safetensors")
    rest = tmp_path / "rest.safetensors"
    flags = ("--weights", files / "small", *adapter, "--rest", rest)
    result = call("merge", tmp_path / "merged", *flags)
    assert result.code == 0 and "there is no rest" in result.err and not rest.exists()


def test_merge_overwrites_no_rest(call, files, searched, tmp_path, assert_refused):
    adapter = searched / "adapter.safetensors"
    before = adapter.read_bytes()
    flags = ("--weights", files / "small", "--adapter", adapter, "--rest", adapter)
    assert_refused(call("merge", tmp_path / "merged", *flags), "exists already; choose another")
    assert adapter.read_bytes() == before


def test_bad_input(call, files, trained, searched, assert_refused, tmp_path):
    assert trained.code == 0
    assert_refused(call("arch", files / "run"), "no searchable cell; nas_lora and nas_pc_lora")
    assert_refused(call("arch", files / "data"), "is no run folder")
    assert_refused(call("arch", tmp_path / "absent"), "no adapter file at")
    assert_refused(call("arch", searched, "--out", tmp_path / "a.txt"), "must end in .json")
    assert_refused(call("arch", searched, "--out", tmp_path / "x/a.json"), "x")
    absent = ("--method", "nas_lora", "--operators", tmp_path / "absent.json")
    assert_refused(call("params", *absent), "no architecture at")
    alone = ("arch", searched / "adapter.safetensors", "--adapter", tmp_path / "b.safetensors")
    assert_refused(call(*alone), "--adapter needs a run's folder")


def test_searches_are_compared(call, files, searched, tmp_path, assert_refused):
    data = ("--weights", files / "small", "--data", files / "data")
    other = tmp_path / "other"
    flags = ("--out", other, "--seed", "1", "--arch-learning-rate", "0.1")
    assert call("train", searched.parent / "search.py", *data, *flags).code == 0
    result = call("arch", searched, "--against", other, searched, "--json")
    assert result.code == 0, result.err
    mine, theirs = (call("arch", run, "--json").json["sites"] for run in (searched, other))
    shares = [[list(s["edges"][0]["shares"].values()) for s in x.values()] for x in (mine, theirs)]
    logs = [np.log(x) - np.log(x).mean(1, keepdims=True) for x in shares]
    alike, itself = result.json["agreement"].values()
    count = len(mine)
    best = [np.array(x)[:, 1:].argmax(1) for x in shares]  # the first is none
    assert alike["same"] == np.sum(best[0] == best[1]) and alike["edges"] == count
    assert alike["chance"] == pytest.approx(count / 6)
    expected = np.corrcoef(logs[0].ravel(), logs[1].ravel())[0, 1]
    assert alike["correlation"] == pytest.approx(expected, abs=1e-6)
    assert itself["same"] == count and itself["correlation"] == pytest.approx(1)
    assert f"of {count} (by chance {count / 6:.1f}), correlation of shares" in result.err

    fewer = tmp_path / "fewer"
    flags = ("--out", fewer, "--operators", "skip_connect+avg_pool_3x3", "--steps", "3")
    assert call("train", searched.parent / "search.py", *data, *flags).code == 0
    refused = call("arch", searched, "--against", fewer)
    assert_refused(refused, f"{fewer}: its layers or operators are others")
