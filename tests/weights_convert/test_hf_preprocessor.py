"""What a HuggingFace folder says of its preprocessing: compared with the model's, and refused."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import samjax
from samjax import peft
from samjax.hashes import params_sha256
from samjax.models import MODELS
from samjax.peft import MethodConfig
from samjax.preprocess import normalize, prepare_image
from samjax.weights import read_weights, write_weights
from weights_convert import from_params
from weights_convert.hf_config import OWN_KEY, model_config
from weights_convert.huggingface import from_meta_names

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture
def folder(tmp_path, small_config, small_params):
    """A folder as others write it: it says nothing of samjax, and nothing of preprocessing."""
    path = tmp_path / "hf"
    path.mkdir()
    tensors = from_meta_names(from_params(small_params, small_config))
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    record = model_config(small_config)
    del record[OWN_KEY]
    (path / "config.json").write_text(json.dumps(record))
    return path


@pytest.fixture(autouse=True)
def known(monkeypatch, small_config):
    monkeypatch.setitem(MODELS, "small", small_config)


@pytest.fixture
def twin(monkeypatch, small_config):
    """A model of the same tensors, as MedSAM is one of ViT-B's."""
    kinds = {"resize": "stretch", "normalization": "min_max"}
    own = {"pixel_mean": (0.0,) * 3, "pixel_std": (1.0,) * 3}
    monkeypatch.setitem(
        MODELS, "twin", dataclasses.replace(small_config, name="twin", **kinds, **own)
    )
    return MODELS["twin"]


def preprocessing(**changes):
    """SAM's own, for the small model."""
    return {"size": {"longest_edge": 128}, "pad_size": {"height": 128, "width": 128}, **changes}


def write(folder, **changes):
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing(**changes)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        (
            {"image_mean": MEAN, "image_std": STD, "do_rescale": True, "rescale_factor": 1 / 255},
            None,
        ),
        (
            {
                "do_rescale": False,
                "image_mean": [123.675, 116.28, 103.53],
                "image_std": [58.395, 57.12, 57.375],
            },
            None,
        ),
        ({"image_mean": None, "do_convert_rgb": False}, None),
        (
            {"image_mean": [0.5, 0.5, 0.5]},
            "a mean of 127.5, 127.5, 127.5 where small has 123.675, 116.28, 103.53",
        ),
        ({"image_std": [0.5, 0.5, 0.5]}, "a standard deviation of 127.5, 127.5, 127.5 where"),
        ({"do_normalize": False}, "a mean of 0, 0, 0 where"),
        ({"do_rescale": False}, "a mean of 0.485, 0.456, 0.406 where"),
        ({"rescale_factor": 1 / 127.5}, "a mean of 61.8375, 58.14, 51.765 where"),
        ({"size": {"longest_edge": 64}}, "a longest side of 64 where small has 128"),
        ({"do_resize": False}, "a longest side of 0 where"),
    ],
)
def test_it_is_refused_where_transformers_sees_another_image(folder, small_config, changes, says):
    transformers = pytest.importorskip("transformers")
    image = np.random.default_rng(1).integers(0, 256, (100, 60, 3), np.uint8)
    given = {k: v for k, v in preprocessing(**changes).items() if v is not None}
    processor = transformers.SamImageProcessor(**given)
    theirs = processor(image, return_tensors="np")["pixel_values"][0]
    ours, input_size = prepare_image(image, small_config.frame)
    pixels = normalize(
        jnp.asarray(ours[None]),
        jnp.asarray(input_size[None]),
        small_config.normalization,
        small_config.pixel_mean,
        small_config.pixel_std,
    )
    same = np.allclose(theirs, np.moveaxis(pixels[0], -1, 0), atol=1e-4)
    assert same == (says is None)

    write(folder, **changes)
    if same:
        assert read_weights(folder)[0] == small_config
        return
    with pytest.raises(ValueError) as info:
        read_weights(folder)
    assert str(info.value).startswith(f"{folder}: its preprocessor_config.json says {says}")
    assert str(info.value).endswith("pass --model small if that is meant")


def test_where_the_user_says_which_a_notice_is_enough(folder, small_config, caplog):
    write(folder, do_normalize=False)
    assert read_weights(folder, "small")[0] == small_config
    assert [(r.levelno, r.message) for r in caplog.records] == [
        (
            logging.WARNING,
            f"{folder}/preprocessor_config.json says a mean of 0, 0, 0 where small has 123.675, "
            "116.28, 103.53; images are preprocessed as small does",
        )
    ]


def test_medsams_folders_carry_sams_preprocessing(folder, twin, small_params, tmp_path, caplog):
    write(folder)
    with pytest.raises(ValueError, match="pass --model small or --model twin"):
        read_weights(folder)
    assert read_weights(folder, "small")[0].name == "small"
    assert not caplog.records
    assert read_weights(folder, "twin")[0] == twin
    assert "says a mean of 123.675, 116.28, 103.53 where twin has 0, 0, 0" in caplog.text
    # An adapter that was trained so says so too.
    spec, model = MethodConfig().spec(), samjax.Sam(twin)
    variables = {
        "params": small_params,
        "peft": peft.attach(spec, model, small_params, jax.random.key(0)),
    }
    peft.save(tmp_path / "a", spec, model, variables, params_sha256(small_params))
    assert samjax.load_adapted(folder, tmp_path / "a")[0].config == twin


def test_what_samjax_wrote_agrees_with_itself(twin, small_config, small_params, tmp_path, caplog):
    for config in (small_config, small_config.with_image_size(96), twin):
        path = tmp_path / f"{config.name}{config.image_size}"
        write_weights(path, config, small_params, "hf")
        caplog.clear()
        read = read_weights(path)[0]
        assert (read.name, read.image_size) == (config.name, config.image_size)
        assert not caplog.records
    write(path)  # a processor of SAM's, saved over that of the twin
    with pytest.raises(ValueError, match=r"says a mean of 123.675, .* pass --model twin if"):
        read_weights(path)


def test_the_file_that_transformers_5_writes(folder, small_config):
    write(folder)
    path = folder / "processor_config.json"
    path.write_text(json.dumps({"processor_class": "SamProcessor"}))
    assert read_weights(folder)[0] == small_config
    path.write_text(json.dumps({"image_processor": preprocessing(do_normalize=False)}))
    with pytest.raises(ValueError, match=r"its processor_config.json says a mean of 0, 0, 0"):
        read_weights(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"rescale_factor": 0},
        {"rescale_factor": "a"},
        {"image_mean": [1, 2]},
        {"image_std": {}},
        {"size": {"height": 3}},
        {"size": [1024]},
        {"size": "wide"},
    ],
)
def test_values_that_mean_nothing(folder, changes):
    write(folder, **changes)
    with pytest.raises(ValueError) as info:
        read_weights(folder)
    assert str(folder) in str(info.value) and "\n" not in str(info.value)
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"preprocessor_config\.json cannot be read, it is damaged"
    ):
        read_weights(folder)
