"""`samjax convert-adapter`."""

import jax
import numpy as np
import pytest

from samjax import peft
from samjax.hashes import params_sha256
from samjax.models import Sam
from samjax.peft import LoRA, PeftSpec, Rule, Train, huggingface
from weights_convert import from_params


@pytest.fixture(scope="module")
def own(small_model, small_params, tmp_path_factory):
    """An adapter file of samjax's: LoRA on q and v, and a trained decoder."""
    spec = PeftSpec(
        (
            Rule("image_encoder/**/attn/qkv[q,v]", LoRA(2)),
            Rule("mask_decoder/**", Train("decoder")),
        )
    )
    records = peft.attach(spec, small_model, small_params, jax.random.key(0))
    variables = {"params": small_params, "peft": records}
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x, t: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32) if t else x,
        variables,
        peft.trainable(spec, small_model, variables),
    )
    path = tmp_path_factory.mktemp("own") / "adapter.safetensors"
    peft.save(path, spec, small_model, variables, params_sha256(small_params))
    return path


@pytest.fixture(scope="module")
def folder(call, files, own, tmp_path_factory):
    """The same adapter as a folder of peft's."""
    path = tmp_path_factory.mktemp("converted") / "folder"
    options = ("--weights", files / "small", "--to", "peft", "--json")
    result = call("convert-adapter", own, path, *options).json
    assert result.pop("trained") > 0
    assert result == {
        "model": "small",
        "src": str(own),
        "from": "samjax",
        "dst": str(path),
        "to": "peft",
        "sites": 2,
    }
    return path


def test_there_and_back(call, files, own, folder, tmp_path, small_model, small_params):
    back = tmp_path / "back.safetensors"
    result = call("convert-adapter", folder, back, "--weights", files / "small", "--json")
    assert result.json["from"] == "peft" and result.json["model"] == "small"
    assert "adapts 2 sites of small" in result.err
    adapter = peft.read(back)
    assert adapter.config == small_model.config and adapter.metadata["converted_from"] == "peft"
    # Factors of q and v are now one pair, with zeros.
    merged = (
        peft.merge(small_model, *peft.load(path, small_model, small_params)) for path in (own, back)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), *merged)
    assert [path.name for path in tmp_path.iterdir()] == ["back.safetensors"]

    alone = tmp_path / "alone.safetensors"
    options = ("--weights", files / "small", "--without-decoder", "--image-size", "64")
    assert call("convert-adapter", folder, alone, *options).code == 0
    assert peft.read(alone).model_bytes == 0 and peft.read(alone).config.image_size == 64
    # From another input than the tables of positions.
    options = ("--weights", files / "small", "--to", "peft")
    result = call("convert-adapter", alone, tmp_path / "again", *options)
    assert result.code == 0 and "was trained at 64 px, and transformers" in result.err


def test_samed(call, files, tmp_path, small_config, small_params):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    tensors = {f"w_a_{i:03d}": rng.standard_normal((2, 32), np.float32) for i in range(4)}
    tensors |= {f"w_b_{i:03d}": rng.standard_normal((32, 2), np.float32) for i in range(4)}
    tensors |= {
        name: array
        for name, array in from_params(small_params, small_config).items()
        if name.startswith(("prompt_encoder", "mask_decoder"))
    }
    source = tmp_path / "epoch_159.pth"
    torch.save({name: torch.from_numpy(array.copy()) for name, array in tensors.items()}, source)
    dst = tmp_path / "adapter.safetensors"
    result = call("convert-adapter", source, dst, "--weights", files / "small", "--json")
    assert result.json["from"] == "SAMed" and result.json["sites"] == 2
    assert "[0, 1]" in result.err  # what SAMed was trained on
    params, records = peft.load(dst, Sam(small_config), small_params)
    jax.tree.map(np.testing.assert_array_equal, params, small_params)
    a = records["image_encoder"]["blocks_1"]["attn"]["qkv"]["delta"].a
    assert np.array_equal(a[1], tensors["w_a_003"].T)
    folder = tmp_path / "folder"
    options = ("--weights", files / "small", "--to", "peft", "--without-decoder")
    assert call("convert-adapter", source, folder, *options).code == 0
    assert huggingface.is_peft_folder(folder)


def test_what_is_refused(call, predict, assert_refused, files, own, folder, tmp_path):
    weights = ("--weights", files / "small")
    dst = tmp_path / "dst"

    def refused(match, src, *options, dst=dst):
        assert_refused(call("convert-adapter", src, dst, *weights, *options), match)
        assert list(tmp_path.iterdir()) == []

    refused("exists already", folder, dst=own)
    refused("there is no directory", folder, dst=tmp_path / "none/dst")
    refused("there is no adapter", tmp_path / "none")
    refused("in the form of samjax already; pass --to peft", own)
    refused("in the form of peft already; pass --to samjax", folder, "--to", "peft")
    refused("are for adapters of peft and SAMed", own, "--to", "peft", "--without-decoder")
    refused("is no folder of peft, it lacks", files / "used")
    refused("lacks its adapter_config.json", folder / "adapter_model.safetensors")
    refused("neither safetensors nor a torch archive", files / "none.png")
    assert_refused(
        call("convert-adapter", own, dst, "--weights", files / "other", "--to", "peft"),
        "built differently",
    )
    assert_refused(
        predict(tmp_path / "out", "--adapter", folder), "make an adapter file of it with `samjax "
    )
