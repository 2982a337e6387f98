"""Which model a foreign file holds: told by tensors, hash, adapter or user, and never guessed."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from safetensors import safe_open

import samjax
from samjax import catalog, foreign, peft
from samjax.cli import main
from samjax.config import Config
from samjax.hashes import file_sha256, params_sha256
from samjax.models import MODELS
from samjax.peft import MethodConfig
from samjax.run import open_model
from samjax.weights import convert, read_weights, save_checkpoint, write_weights
from weights_convert import from_params
from weights_convert.huggingface import from_meta_names


@pytest.fixture(autouse=True)
def models(monkeypatch, small_config):
    """Two small models of the same tensors, as vit_b and medsam are."""
    other = dataclasses.replace(
        small_config, name="small_stretched", resize="stretch", normalization="min_max"
    )
    monkeypatch.setitem(MODELS, "small", small_config)
    monkeypatch.setitem(MODELS, "small_stretched", other)


@pytest.fixture(params=["meta", "hf"])
def plain(request, tmp_path, small_config, small_params):
    """A file of bare tensors, which says nothing of its model."""
    tensors = from_params(small_params, small_config)
    if request.param == "hf":
        tensors = from_meta_names(tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "plain.safetensors")
    return tmp_path / "plain.safetensors"


def test_an_ambiguous_file_is_not_guessed(plain, tmp_path):
    for read in (read_weights, samjax.load, lambda path: convert(path, tmp_path / "w")):
        with pytest.raises(ValueError) as info:
            read(plain)
        assert str(info.value) == (
            f"{plain}: it has the architecture of small and small_stretched, whose preprocessing "
            "differs; pass --model small or --model small_stretched"
        )
    assert not (tmp_path / "w").exists()


def test_a_run_does_not_guess_either(plain, tmp_path, capsys):
    with pytest.raises(ValueError, match="pass --model small or --model small_stretched"):
        open_model(Config(weights=str(plain)))
    model, _ = open_model(Config(weights=str(plain), model="small_stretched"))
    assert model.config == MODELS["small_stretched"]
    convert_it = ["convert", str(plain), str(tmp_path / "w")]
    assert main(convert_it) == 1
    assert "pass --model small or --model small_stretched" in capsys.readouterr().err
    assert main([*convert_it, "--model", "small"]) == 0
    assert "holds small" in capsys.readouterr().err


def test_the_user_says_which(plain, tmp_path, small_params):
    for name in ("small", "small_stretched"):
        config, params = read_weights(plain, name)
        assert config == MODELS[name]
        assert jax.tree.all(jax.tree.map(np.array_equal, params, small_params))
        assert samjax.load(plain, 96, model=name)[0].config == MODELS[name].with_image_size(96)
        # From then on it is known.
        for to, written in (
            ("samjax", name),
            ("meta", f"{name}.safetensors"),
            ("hf", f"hf_{name}"),
        ):
            assert convert(plain, tmp_path / written, to, name) == MODELS[name]
            assert read_weights(tmp_path / written)[0] == MODELS[name]
            assert read_weights(tmp_path / written, name)[0] == MODELS[name]


def test_the_catalogue_says_which(plain, monkeypatch):
    known = {file_sha256(plain): "small_stretched"}
    monkeypatch.setattr(catalog, "model_by_sha256", known.get)
    for model in (None, "small_stretched"):
        assert read_weights(plain, model)[0] == MODELS["small_stretched"]
    with pytest.raises(ValueError) as info:
        read_weights(plain, "small")
    assert str(info.value) == (
        f"{plain}: it holds small_stretched, not small; pass --model small_stretched or other "
        "weights"
    )
    # An adapter says what the weights are where nothing else does.
    assert read_weights(plain, prefer=MODELS["small"])[0] == MODELS["small_stretched"]
    # A hash that is known for something else decides nothing.
    monkeypatch.setattr(catalog, "model_by_sha256", lambda sha256: "vit_h")
    with pytest.raises(ValueError, match="pass --model small or"):
        read_weights(plain)
    for given in ({"model": "small"}, {"prefer": MODELS["small"]}):
        assert read_weights(plain, **given)[0] == MODELS["small"]


def test_what_is_not_ambiguous_is_not_hashed(plain, monkeypatch, small_config):
    monkeypatch.delitem(MODELS, "small_stretched")
    monkeypatch.setattr(foreign, "file_sha256", None)
    for model in (None, "small"):
        assert read_weights(plain, model)[0] == small_config


def test_models_that_contradict(plain, tmp_path, small_config, small_params):
    save_checkpoint(tmp_path / "w", small_config, small_params)
    write_weights(tmp_path / "w.safetensors", small_config, small_params, "meta")
    write_weights(tmp_path / "hf", small_config, small_params, "hf")
    for path in (tmp_path / "w", tmp_path / "w.safetensors", tmp_path / "hf"):
        with pytest.raises(ValueError, match="it holds small, not small_stretched; pass --model"):
            read_weights(path, "small_stretched")
    with pytest.raises(ValueError, match="it holds small or small_stretched, not vit_h"):
        read_weights(plain, "vit_h")
    for path in (plain, tmp_path / "w"):
        with pytest.raises(ValueError, match="no model is called 'vit_x'; known are vit_b, "):
            read_weights(path, "vit_x")


@pytest.mark.parametrize("to", ["meta", "hf"])
def test_what_samjax_wrote_keeps_its_input_size(tmp_path, small_config, small_params, to):
    path = tmp_path / "w.safetensors"
    config = small_config.with_image_size(96)
    write_weights(path, config, small_params, to)
    again = samjax.load(path)[0].config
    assert (again.name, again.image_size) == ("small", 96)
    if to == "meta":
        assert again == config


def test_position_tables_of_another_grid(tmp_path, small_config, small_params):
    """As SAMed leaves them, whose input of 512 px has 32 x 32 tokens; here 8 x 8 become 6 x 10."""
    rng = np.random.default_rng(0)
    tensors = from_params(small_params, small_config)
    for name, shape in (
        ("pos_embed", (1, 6, 10, 32)),
        ("blocks.1.attn.rel_pos_h", (11, 16)),
        ("blocks.1.attn.rel_pos_w", (19, 16)),
    ):
        tensors[f"image_encoder.{name}"] = rng.normal(size=shape).astype(np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    config, params = read_weights(tmp_path / "a.safetensors", "small")
    assert config.image_encoder.pretrain_grid == (6, 10)
    assert config.image_size == (96, 160) and config.grid == (6, 10)
    for to, name in (("samjax", "b"), ("meta", "b.safetensors")):
        write_weights(tmp_path / name, config, params, to)
        again, copy = read_weights(tmp_path / name)
        assert again == config
        back = from_params(copy, again)
        assert back.keys() == tensors.keys()
        assert all(back[key].tobytes() == tensors[key].tobytes() for key in tensors)
    del tensors["image_encoder.blocks.1.attn.rel_pos_w"]
    tensors["image_encoder.blocks.1.attn.rel_pos_w"] = np.zeros((15, 16), np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"rel_pos_w is \(15, 16\), not \(19, 16\)"):
        read_weights(tmp_path / "a.safetensors", "small")


def rewritten(path, change_tensors=None, change_record=None):
    """Writes a file again with the record that it had."""
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    record = json.loads(metadata["samjax_weights"])
    if change_tensors:
        change_tensors(tensors)
    if change_record:
        change_record(record)
    safetensors.numpy.save_file(tensors, path, {"samjax_weights": json.dumps(record)})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ((lambda t: t["image_encoder.neck.1.bias"].__setitem__(3, 9), None), "was changed after"),
        ((None, lambda r: r["model"].update(image_size=96)), "was changed after"),
        ((None, lambda r: r.pop("sha256")), "was changed after"),
        ((None, lambda r: r.update(schema=2)), "newer samjax .schema 2, .* upgrade"),
        ((None, lambda r: r.clear()), "damaged"),
    ],
)
def test_changes_of_what_samjax_wrote_are_caught(
    tmp_path, small_config, small_params, changes, match
):
    path = tmp_path / "w.safetensors"
    write_weights(path, small_config, small_params, "meta")
    rewritten(path, *changes)
    with pytest.raises(ValueError, match=match) as info:
        read_weights(path)
    assert str(path) in str(info.value)


def saved_adapter(path, name, params):
    model = samjax.Sam(MODELS[name])
    spec = MethodConfig().spec()
    records = peft.attach(spec, model, params, jax.random.key(0))
    variables = {"params": params, "peft": records}
    peft.save(path, spec, model, variables, params_sha256(params))
    return path


def test_an_adapter_knows_which(plain, tmp_path, small_params):
    adapter = saved_adapter(tmp_path / "a", "small_stretched", small_params)
    model, params, _ = samjax.load_adapted(plain, adapter)
    assert model.config == MODELS["small_stretched"]
    assert flatten_dict(params).keys() == flatten_dict(small_params).keys()
    with pytest.raises(ValueError, match="same layers but another preprocessing"):
        samjax.load_adapted(plain, adapter, model="small")
    save_checkpoint(tmp_path / "w", MODELS["small"], small_params)
    with pytest.raises(ValueError, match="same layers but another preprocessing"):
        samjax.load_adapted(tmp_path / "w", adapter)


@pytest.mark.parametrize("name", ["w", "w.safetensors", "hf"])
def test_a_preprocessing_of_before_is_kept_with_a_notice(
    tmp_path, small_config, small_params, monkeypatch, caplog, name
):
    kinds = {"w": "samjax", "w.safetensors": "meta", "hf": "hf"}
    path = tmp_path / name
    write_weights(path, small_config, small_params, kinds[name])
    config = small_config.with_image_size(96)
    write_weights(tmp_path / f"96{name}", config, small_params, kinds[name])
    for today in (small_config, config):  # another input size is not another preprocessing
        monkeypatch.setitem(MODELS, "small", today)
        assert read_weights(path)[0] == small_config
        read_weights(tmp_path / f"96{name}")
    assert not caplog.records
    today = dataclasses.replace(small_config, normalization="min_max")
    monkeypatch.setitem(MODELS, "small", today)
    assert read_weights(path)[0] == small_config
    assert [record.message for record in caplog.records] == [
        f"{path} keeps the preprocessing that small had in the samjax that wrote it; for today's, "
        "convert the original weights again"
    ]
