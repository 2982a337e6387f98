"""`samjax merge`."""

import numpy as np

from samjax.weights import read_weights
from weights_convert import from_params, read_tensors


def test_merged_weights_predict_as_the_adapter(
    call, predict, assert_refused, files, trained, tmp_path
):
    adapter = ("--adapter", files / "run/adapter.safetensors")
    merged = ("--weights", files / "small", *adapter)
    result = call("merge", tmp_path / "merged", *merged, "--json")
    written = {"model": "small", "dst": str(tmp_path / "merged"), "to": "samjax"}
    difference = result.json["max_difference"]
    assert result.json == {**written, "max_difference": difference}
    assert difference.keys() == {"embedding", "logits"}
    assert all(0 <= value <= 1e-4 for value in difference.values())
    assert "merged and adapted model differ at most by" in result.err
    prompt = ("--box", "10,8,30,25", "--save-logits")
    separate = predict(tmp_path / "a", *adapter, *prompt)
    one = predict(tmp_path / "b", *prompt, weights=tmp_path / "merged")
    base = predict(tmp_path / "c", *prompt)
    assert np.array_equal(one.masks, separate.masks)
    logits = [result.logits["low_res_logits"] for result in (separate, one, base)]
    assert np.abs(logits[1] - logits[0]).max() <= 1e-3 * logits[0].std()
    assert np.abs(logits[2] - logits[0]).max() > 1e-3 * logits[0].std()
    assert_refused(call("merge", tmp_path / "merged", *merged), "exists already")
    twice = ("merge", tmp_path / "twice", "--weights", tmp_path / "merged", *adapter)
    assert_refused(call(*twice), "pass the weights that it was trained on, before any merge")

    meta = tmp_path / "merged.safetensors"
    result = call("merge", meta, *merged, "--to", "meta", "--no-verify", "--json")
    assert result.json == {"model": "small", "dst": str(meta), "to": "meta"}
    config, params = read_weights(tmp_path / "merged")
    expected, tensors = from_params(params, config), read_tensors(meta)
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[key], expected[key]) for key in expected)
    assert read_weights(meta)[0] == config
    assert call("merge", tmp_path / "hf", *merged, "--to", "hf", "--no-verify").code == 0
    assert read_weights(tmp_path / "hf")[0].image_size == config.image_size
