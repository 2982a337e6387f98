"""Adapter files: what is refused, and that nothing half-written is left."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from samjax import peft
from samjax.hashes import params_sha256, sealed
from samjax.models import MODELS, Sam
from samjax.peft import MethodConfig, PeftSpec, Rule, SAMParser
from samjax.peft import io as peft_io
from samjax.peft.lora import LoRADelta


@pytest.fixture
def saved(tmp_path, small_model, small_params):
    spec = MethodConfig().spec()
    tree = peft.attach(spec, small_model, small_params, jax.random.key(0))
    path = tmp_path / "adapter.safetensors"
    variables = {"params": small_params, "peft": tree}
    peft.save(path, spec, small_model, variables, params_sha256(small_params))
    return path


def rewrite(path, change_header=None, change_tensors=None) -> None:
    """Forges a file whose hash fits its tensors."""
    with safe_open(path, "numpy") as file:
        record = json.loads(file.metadata()["samjax"])
    tensors = load_file(path)
    if change_tensors:
        change_tensors(tensors)
        record["tensors_sha256"] = params_sha256(tensors)
    if change_header:
        change_header(record)
    del record["sha256"]
    save_file(tensors, path, {"samjax": json.dumps(sealed(record))})


def test_holds_every_trained_leaf_and_the_sizes_apart(saved, small_model):
    adapter = peft.read(saved)
    counts = peft.report(adapter.spec, small_model)
    assert adapter.model_bytes == 4 * counts.decoder
    buffers = 4 * 2  # one scale for each of the two blocks
    assert adapter.adapter_bytes == 4 * counts.adapter + buffers
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_flipped_byte_is_caught(saved):
    content = bytearray(saved.read_bytes())
    content[-5] ^= 0x40
    saved.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        peft.read(saved)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04nonsense", b"\xff" * 64, b'{"a": 1}'],
    ids=["empty", "zip", "ff", "json"],
)
def test_a_file_that_is_no_adapter(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged or no adapter file"):
        peft.read(path)


def test_other_headers_are_refused(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter file at"):
        peft.read(tmp_path / "absent")
    plain = tmp_path / "plain.safetensors"
    save_file({"a": np.zeros(3, np.float32)}, plain)
    with pytest.raises(ValueError, match="no samjax adapter"):
        peft.read(plain)
    rewrite(saved, lambda record: record.update(schema=peft_io.SCHEMA + 1))
    with pytest.raises(ValueError, match="install a newer samjax"):
        peft.read(saved)


@pytest.mark.parametrize("key", ["spec", "model", "base_sha256", "metadata", "tensors_sha256"])
def test_missing_header_fields(saved, key):
    rewrite(saved, lambda record: record.pop(key))
    with pytest.raises(ValueError, match=r"header of .* cannot be read"):
        peft.read(saved)


def test_tensors_must_be_those_of_the_spec(saved, small_model, small_params):
    first = next(iter(load_file(saved)))
    rewrite(saved, change_tensors=lambda t: t.pop(first))
    with pytest.raises(ValueError, match=f"lacks {first}"):
        peft.load(saved, small_model, small_params)
    rewrite(saved, change_tensors=lambda t: t.update({first: np.zeros((3, 3), np.float32)}))
    with pytest.raises(ValueError, match=rf"{first} is float32\[3, 3\], expected"):
        peft.load(saved, small_model, small_params)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"name": "other", "decoder_mlp_dim": 32}, "are other, which is built differently"),
        ({"name": "other"}, "same layers but another preprocessing; .* with --model small"),
    ],
)
def test_another_model_is_refused(saved, small_model, change, match):
    config = dataclasses.replace(small_model.config, **change)
    with pytest.raises(ValueError, match=f"was trained in small, and .*{match}") as info:
        peft.load(saved, Sam(config), {})
    assert str(saved) in str(info.value)


@pytest.mark.parametrize(
    "change", [{"pixel_mean": (0.0, 0.0, 0.0)}, {"resize": "stretch"}, {"normalization": "min_max"}]
)
def test_an_earlier_preprocessing_of_the_same_model(saved, small_model, monkeypatch, change):
    """Which of the two is of before tells what is to be done again."""
    own = small_model.config
    other = dataclasses.replace(own, **change)
    for today, match in (
        (other, f"{saved} was trained with an earlier samjax, .* for small .*; train it again"),
        (own, "these weights, which an earlier samjax converted: .*; convert the original weights"),
    ):
        monkeypatch.setitem(MODELS, "small", today)
        with pytest.raises(ValueError, match=match):
            peft.load(saved, Sam(other), {})


def test_other_weights_are_refused(saved, small_model, small_params):
    other = jax.tree.map(lambda x: x + 1, small_params)
    with pytest.raises(ValueError, match="was trained on other weights") as info:
        peft.load(saved, small_model, other)
    assert str(saved) in str(info.value)


def test_a_changed_header_is_caught(saved):
    with safe_open(saved, "numpy") as file:
        header = file.metadata()["samjax"]
    changed = header.replace('"image_size": 128', '"image_size": 192')
    assert changed != header
    save_file(load_file(saved), saved, {"samjax": changed})
    with pytest.raises(ValueError, match="its header differs from the hash in it"):
        peft.read(saved)


def test_an_adapter_of_before_needs_no_hash_of_its_header(saved):
    with safe_open(saved, "numpy") as file:
        record = json.loads(file.metadata()["samjax"])
    del record["sha256"]
    tensors = load_file(saved)
    save_file(tensors, saved, {"samjax": json.dumps(record)})
    assert peft.read(saved).tensors.keys() == tensors.keys()


def test_says_in_one_line_what_it_adapts(tmp_path, small_model, small_params):
    spec = MethodConfig(rank=2).spec()
    tree = peft.attach(spec, small_model, small_params, jax.random.key(0))
    path = tmp_path / "a.safetensors"
    variables = {"params": small_params, "peft": tree}
    for metadata, end in (
        ({}, "adapter at 2 sites, {} trained numbers, for small, trained at 128 px"),
        (
            {"method": "lora", "trained_prompts": {"none": 0.5, "box": 1.0, "points": 0}},
            "lora at 2 sites, {} trained numbers, for small, trained at 128 px with no prompt and "
            "boxes",
        ),
    ):
        sha = params_sha256(small_params)
        adapter = peft.save(path, spec, small_model, variables, sha, metadata)
        trained = sum(tensor.size for tensor in adapter.tensors.values()) - 2  # two scales
        assert peft.describe(adapter, small_model) == end.format(f"{trained:,}")


def test_save_then_load(saved, small_model, small_params):
    params, tree = peft.load(saved, small_model, small_params)
    expected = peft.attach(MethodConfig().spec(), small_model, small_params, jax.random.key(0))
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, tree, expected))
    assert jax.tree.all(jax.tree.map(np.array_equal, params, small_params))


def test_numbers_that_are_not_finite_are_not_written(tmp_path, small_model, small_params):
    tree = peft.attach(MethodConfig().spec(), small_model, small_params, jax.random.key(0))
    tree = jax.tree.map(lambda x: x + np.nan, tree)
    with pytest.raises(ValueError, match="is not finite"):
        variables = {"params": small_params, "peft": tree}
        spec = MethodConfig().spec()
        peft.save(tmp_path / "a.safetensors", spec, small_model, variables, "0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda tree: peft.pad_rank(tree, 6),
            r"delta/a is float32\[2, 32, 6\], and float32\[2, 32, 4\]",
        ),
        (lambda tree: peft.stack(tree, tree), r"attn/qkv/delta/a is missing"),
        (lambda tree: peft.side_by_side([tree, tree]), r"delta/a is float32\[2, 2, 32, 4\]"),
        (lambda tree: {}, "delta/a is missing"),
        (
            lambda tree: {
                **tree,
                "shared": {"x": tree["image_encoder"]["blocks_0"]["attn"]["qkv"]["delta"]},
            },
            "shared/x/a is not in its spec",
        ),
        (
            lambda tree: jax.tree.map(
                lambda d: d.replace(dropout=0.5), tree, is_leaf=lambda x: isinstance(x, LoRADelta)
            ),
            "image_encoder/blocks_0/attn/qkv has other settings",
        ),
        (lambda tree: jax.tree.map(lambda x: np.float16(x), tree), "is float16"),
    ],
    ids=["padded", "stacked", "side by side", "none", "another", "settings", "dtype"],
)
def test_what_does_not_fit_its_spec_is_not_written(
    tmp_path, small_model, small_params, change, match
):
    spec = MethodConfig().spec()
    tree = peft.attach(spec, small_model, small_params, jax.random.key(0))
    variables = {"params": small_params, "peft": change(tree)}
    with pytest.raises(ValueError, match=f"not written.*{match}.*merge it into the weights, or"):
        peft.save(tmp_path / "a.safetensors", spec, small_model, variables, "0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"spec": None},
        {"spec": [{"pattern": 1, "kind": "lora"}]},
        {"spec": [{"pattern": "**", "kind": "lora", "rank": "4"}]},
        {"metadata": 3},
        {"fingerprints": {"x": [10**400]}},
        {"fingerprints": {"x": ["y"]}},
        {"fingerprints": [1]},
    ],
)
def test_a_header_by_hand(saved, change):
    rewrite(saved, lambda record: record.update(change))
    with pytest.raises(ValueError, match=r"header of .* cannot be read"):
        peft.read(saved)


def test_a_fingerprint_that_is_no_number(tmp_path, small_model, small_params):
    spec = PeftSpec((Rule("image_encoder/neck_0", SAMParser()),))
    tree = peft.attach(spec, small_model, small_params, jax.random.key(0))
    path = tmp_path / "a.safetensors"
    variables = {"params": small_params, "peft": tree}
    peft.save(path, spec, small_model, variables, params_sha256(small_params))
    peft.load(path, small_model, small_params)
    rewrite(path, lambda r: r.update(fingerprints={"image_encoder/neck_0": [float("nan")] * 8}))
    with pytest.raises(ValueError, match="what this machine derives"):
        peft.load(path, small_model, small_params)


def test_no_folder_no_file(tmp_path, small_model, small_params):
    variables = {"params": small_params, "peft": {}}
    with pytest.raises(FileNotFoundError, match="does not exist"):
        spec = MethodConfig(method="decoder").spec()
        peft.save(tmp_path / "no" / "a.safetensors", spec, small_model, variables, "0")
