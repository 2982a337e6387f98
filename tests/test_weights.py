"""Samjax checkpoints on disk: bit-equal, atomic, and refused in a sentence when damaged."""

import json
import os
import random
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from samjax import load, weights
from samjax.hashes import params_sha256
from samjax.models import MODELS, Sam, SamConfig, VitConfig
from weights_convert import expected_shapes, from_params, read_tensors
from weights_convert.table import from_samjax

SMALL = SamConfig(name="small", image_encoder=VitConfig(embed_dim=32, depth=1, num_heads=2))


def few_params():
    rng = np.random.default_rng(0)
    return {
        "a": {"kernel": rng.normal(size=(3, 4)).astype(np.float32), "scale": np.float16([1, 2])},
        "b_0": {"kernel": rng.normal(size=(2, 2, 3)).astype(ml_dtypes.bfloat16)},
    }


def assert_same(actual, expected):
    actual, expected = flatten_dict(actual, sep="/"), flatten_dict(expected, sep="/")
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        assert type(actual[path]) is np.ndarray, path
        assert actual[path].dtype == leaf.dtype, path
        assert actual[path].shape == leaf.shape, path
        assert actual[path].tobytes() == np.asarray(leaf).tobytes(), path


def test_save_and_load_are_bit_equal(tmp_path):
    params = few_params()
    weights.save_checkpoint(tmp_path / "ckpt", SMALL, params)
    config, loaded = weights.load_checkpoint(tmp_path / "ckpt")
    assert config == SMALL
    assert_same(loaded, params)
    assert os.listdir(tmp_path) == ["ckpt"]
    record = json.loads((tmp_path / "ckpt/config.json").read_text())
    assert record["format"] == "samjax" and record["schema"] == 1
    assert record["model"] == json.loads(json.dumps(SMALL.to_json()))
    assert record["params_sha256"] == params_sha256(params)


def test_jax_arrays_are_saved_too(tmp_path):
    import jax.numpy as jnp

    weights.save_checkpoint(tmp_path / "ckpt", SMALL, {"a": {"b": jnp.arange(3.0)}})
    assert_same(weights.load_checkpoint(tmp_path / "ckpt")[1], {"a": {"b": np.float32([0, 1, 2])}})


def test_the_hash_tells_every_difference():
    base = params_sha256(few_params())
    assert base == params_sha256(dict(reversed(few_params().items())))
    seen = {base}
    for change in (
        lambda p: p["a"].update(kernel=np.nextafter(p["a"]["kernel"], np.float32(9))),
        lambda p: p["a"].update(kernel=p["a"]["kernel"].reshape(4, 3)),
        lambda p: p["a"].update(kernel=p["a"]["kernel"].view(np.int32)),
        lambda p: p.update(c=p.pop("a")),
        lambda p: p["a"].pop("scale"),
    ):
        params = few_params()
        change(params)
        seen.add(params_sha256(params))
    assert len(seen) == 6
    transposed = {"k": np.arange(6.0).reshape(2, 3).T}
    assert params_sha256(transposed) == params_sha256({"k": transposed["k"].copy()})


def test_nothing_is_left_where_saving_fails(tmp_path, monkeypatch):
    class Broken:
        def save(self, *_):
            raise OSError("disk full")

    monkeypatch.setattr(weights, "_checkpointer", Broken)
    with pytest.raises(OSError, match="disk full"):
        weights.save_checkpoint(tmp_path / "ckpt", SMALL, few_params())
    assert os.listdir(tmp_path) == []


def test_destinations_that_are_refused(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        weights.save_checkpoint(tmp_path / "there", SMALL, few_params())
    with pytest.raises(FileNotFoundError, match="no directory"):
        weights.save_checkpoint(tmp_path / "none" / "ckpt", SMALL, few_params())
    source = tmp_path / "there"  # never read
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        weights.convert(source, tmp_path / "a.pth", "meta")
    with pytest.raises(ValueError, match="choose samjax or meta or hf"):
        weights.convert(source, tmp_path / "a", "torch")
    with pytest.raises(FileExistsError, match="exists already"):
        weights.convert(source, tmp_path / "there")


def edit(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_damaged_checkpoints_are_refused(tmp_path):
    weights.save_checkpoint(tmp_path / "good", SMALL, few_params())

    def refused(change, match, error=ValueError):
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        change(tmp_path / "bad")
        with pytest.raises(error, match=match) as info:
            load(tmp_path / "bad")
        assert "\n" not in str(info.value) and "bad" in str(info.value)
        shutil.rmtree(tmp_path / "bad")

    def of_config(change):
        return lambda path: edit(path / "config.json", change)

    def other_params(path):
        weights.save_checkpoint(path.parent / "other", SMALL, {"a": np.ones(3)})
        shutil.rmtree(path / "params")
        shutil.move(path.parent / "other" / "params", path / "params")

    refused(lambda p: (p / "config.json").unlink(), "no config.json")
    refused(lambda p: (p / "config.json").write_bytes(b"{\xff"), "damaged")
    refused(lambda p: (p / "config.json").write_text("[" * 100_000), "damaged")
    refused(lambda p: (p / "config.json").write_text("[]"), "another program's")
    refused(of_config(lambda r: r.pop("format")), "another program's")
    refused(of_config(lambda r: r.update(schema=2)), "newer samjax .schema 2")
    refused(of_config(lambda r: r["model"].update(image_size=512)), "changed after")
    refused(of_config(lambda r: r.pop("sha256")), "damaged")
    refused(lambda p: shutil.rmtree(p / "params"), "lacks its params", FileNotFoundError)
    refused(lambda p: shutil.rmtree(p / "params/ocdbt.process_0"), "file is missing or")
    refused(lambda p: (p / "params/_METADATA").write_text("{}"), "_METADATA is not the file that")
    refused(other_params, "is not the file that|file is missing or")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        weights.load_checkpoint(tmp_path / "none")


def test_mutated_checkpoints_are_refused_in_a_sentence(tmp_path):
    params = few_params()
    weights.save_checkpoint(tmp_path / "good", SMALL, params)
    rng = random.Random(0)
    for _ in range(40):
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        files = sorted(p for p in (tmp_path / "bad").rglob("*") if p.is_file())
        file = rng.choice([p for p in files if p.stat().st_size])
        data = bytearray(file.read_bytes())
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(bytes(data))
        try:
            config, loaded = weights.load_checkpoint(tmp_path / "bad")
            assert config == SMALL  # what was hit does not matter
            assert_same(loaded, params)
        except (ValueError, FileNotFoundError) as error:
            assert "bad" in str(error) and "\n" not in str(error)
        shutil.rmtree(tmp_path / "bad")


@pytest.fixture(scope="module")
def vit_t_file(tmp_path_factory):
    """A `.safetensors` file with random weights of MobileSAM's shapes."""
    rng = np.random.default_rng(0)
    tensors = {}
    for path, shape in expected_shapes(MODELS["vit_t"]).items():
        name, leaf = from_samjax(path)
        tensors[name] = rng.normal(size=leaf.torch_shape(shape)).astype(np.float16)
    file = tmp_path_factory.mktemp("weights") / "vit_t.safetensors"
    safetensors.numpy.save_file(tensors, file)
    return file


def test_convert_there_and_back(vit_t_file, tmp_path):
    assert weights.convert(vit_t_file, tmp_path / "ckpt") == MODELS["vit_t"]
    weights.convert(tmp_path / "ckpt", tmp_path / "back.safetensors", "meta")
    before, after = read_tensors(vit_t_file), read_tensors(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert after[name].dtype == array.dtype and after[name].tobytes() == array.tobytes()
    assert sorted(os.listdir(tmp_path)) == ["back.safetensors", "ckpt"]


def test_load_gives_a_model_and_its_params(vit_t_file):
    model, params = load(vit_t_file)
    assert isinstance(model, Sam) and model.config == MODELS["vit_t"]
    shapes = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
    assert shapes == expected_shapes(MODELS["vit_t"])
    model, _ = load(str(vit_t_file), image_size=512)
    assert model.config == MODELS["vit_t"].with_image_size(512)
    with pytest.raises(ValueError, match="image_size 500"):
        load(vit_t_file, image_size=500)


def test_a_bad_source_is_named_and_nothing_is_written(vit_t_file, tmp_path):
    tensors = dict(read_tensors(vit_t_file))
    del tensors["mask_decoder.mask_tokens.weight"]
    (tmp_path / "out").mkdir()
    safetensors.numpy.save_file(tensors, tmp_path / "bad.safetensors")
    for to, name in (("samjax", "ckpt"), ("meta", "b.safetensors")):
        with pytest.raises(ValueError, match=r"bad\.safetensors: .*1 missing .*mask_tokens"):
            weights.convert(tmp_path / "bad.safetensors", tmp_path / "out" / name, to)
    # A samjax checkpoint whose parameters are not those of its model.
    weights.save_checkpoint(tmp_path / "few", SMALL, few_params())
    with pytest.raises(ValueError, match="none of SAM"):
        weights.convert(tmp_path / "few", tmp_path / "out" / "c.safetensors", "meta")
    assert os.listdir(tmp_path / "out") == []


def test_the_original_loads_what_meta_wrote(segment_anything, tmp_path):
    import torch

    config = MODELS["vit_b"]
    model = segment_anything.sam_model_registry["vit_b"]()
    weights.save_checkpoint(tmp_path / "ckpt", config, _params(model, config))
    weights.convert(tmp_path / "ckpt", tmp_path / "meta.safetensors", "meta")
    from safetensors.torch import load_file

    state = load_file(tmp_path / "meta.safetensors")
    model.load_state_dict(state, strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def _params(model, config):
    from weights_convert import to_params

    params = to_params({name: t.numpy() for name, t in model.state_dict().items()}, config)
    assert from_params(params).keys() == model.state_dict().keys()
    return params
