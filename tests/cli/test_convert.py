"""`samjax convert`."""

import jax
import numpy as np

from samjax.weights import read_weights
from weights_convert import from_params, read_tensors


def test_convert_a_checkpoint_to_meta_and_to_another(
    call, files, tmp_path, small_config, small_params
):
    result = call("convert", files / "small", tmp_path / "copy", "--json")
    assert result.json == {"model": "small", "dst": str(tmp_path / "copy"), "to": "samjax"}
    assert result.out.count("\n") == 1
    config, params = read_weights(tmp_path / "copy")
    assert config == small_config
    jax.tree.map(np.testing.assert_array_equal, params, small_params)

    meta = tmp_path / "small.safetensors"
    assert call("convert", files / "small", meta, "--to", "meta").code == 0
    expected, tensors = from_params(small_params, small_config), read_tensors(meta)
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[key], expected[key]) for key in expected)


def test_convert_there_and_back(call, asset, tmp_path):
    source, back = asset("weights/mobile_sam.safetensors"), tmp_path / "back.safetensors"
    assert call("convert", source, tmp_path / "there", "--json").json["model"] == "vit_t"
    assert call("convert", tmp_path / "there", back, "--to", "meta").code == 0
    expected, tensors = read_tensors(source), read_tensors(back)
    dropped = expected.keys() - tensors.keys()
    assert all("num_batches_tracked" in key or "head" in key for key in dropped)
    assert all(np.array_equal(tensors[key], expected[key]) for key in tensors)
