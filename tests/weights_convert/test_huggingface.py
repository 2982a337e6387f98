"""HuggingFace's `SamModel`: the same outputs, the same bits there and back, and what is refused."""

import dataclasses
import json
import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from samjax.cli import main
from samjax.models import MODELS, Prompts, Sam
from samjax.preprocess import normalize, prepare_image, scale_coords
from samjax.weights import convert, read_weights, save_checkpoint, write_weights
from weights_convert import expected_shapes, from_params, read_tensors
from weights_convert.hf_config import check_model_config, model_config, preprocessor_config
from weights_convert.huggingface import from_meta_names, to_meta_names
from weights_convert.table import from_samjax

# Outputs are compared in standard deviations of transformers' own.
BOUND = 1e-4


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    module = pytest.importorskip("transformers")
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


@pytest.fixture
def known(monkeypatch, small_config):
    """The small model as one that samjax knows by its tensors."""
    monkeypatch.setitem(MODELS, "small", small_config)


@pytest.fixture
def folder(tmp_path, small_config, small_params):
    write_weights(tmp_path / "hf", small_config, small_params, "hf")
    return tmp_path / "hf"


@pytest.fixture
def foreign(transformers, tmp_path, small_config, small_params):
    """A folder that transformers wrote from its own config, and the model in it."""
    import torch

    config = small_config
    encoder = config.image_encoder
    hf = transformers.SamConfig(
        vision_config={
            "hidden_size": encoder.embed_dim,
            "num_hidden_layers": encoder.depth,
            "num_attention_heads": encoder.num_heads,
            "global_attn_indexes": list(encoder.global_attn_indexes),
            "window_size": encoder.window_size,
            "image_size": 128,
            "output_channels": 32,
            "num_pos_feats": 16,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 128},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": config.decoder_mlp_dim},
    )
    model = transformers.SamModel(hf)
    state = from_meta_names(from_params(small_params, config))
    state = {name: torch.from_numpy(array.copy()) for name, array in state.items()}
    model.load_state_dict(state, strict=False)  # the tied name is missing
    model.save_pretrained(tmp_path / "foreign")
    return tmp_path / "foreign"


def assert_same_params(actual, expected):
    actual, expected = flatten_dict(actual, sep="/"), flatten_dict(expected, sep="/")
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        assert actual[path].dtype == leaf.dtype and actual[path].shape == leaf.shape, path
        assert actual[path].tobytes() == leaf.tobytes(), path


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_names_and_shapes_are_those_of_sam_model(transformers, tmp_path, name):
    import torch

    (tmp_path / "config.json").write_text(json.dumps(model_config(MODELS[name])))
    with torch.device("meta"):
        model = transformers.SamModel(transformers.SamConfig.from_pretrained(tmp_path))
    theirs = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    metas = {}
    for path, shape in expected_shapes(MODELS[name]).items():
        key, leaf = from_samjax(path)
        # An array that holds one number, whatever its shape.
        metas[key] = np.broadcast_to(np.float32(0), leaf.torch_shape(shape))
    ours = from_meta_names(metas)
    tied = "prompt_encoder.shared_embedding.positional_embedding"
    assert {key: array.shape for key, array in ours.items()} == {
        key: shape for key, shape in theirs.items() if key != tied
    }
    assert to_meta_names(ours).keys() == metas.keys()


def image_of(height, width):
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)


def compare(transformers, folder, config, params):
    """The largest differences between samjax and transformers, in standard deviations."""
    import torch

    hf, info = transformers.SamModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    model = Sam(config)
    side = config.image_size
    image, input_size = prepare_image(image_of(side, side * 3 // 4), config.frame)
    args = jnp.asarray(image[None]), jnp.asarray(input_size[None])
    pixels = normalize(*args, config.normalization, config.pixel_mean, config.pixel_std)
    pixels = torch.from_numpy(np.asarray(pixels).transpose(0, 3, 1, 2).copy())
    encode, decode = (
        jax.jit(lambda p, *a, m=name: model.apply({"params": p}, *a, method=m))
        for name in ("encode", "decode")
    )
    embedding = encode(params, *args)
    point, box = [[side * 0.3, side * 0.4]], [[side * 0.2, side * 0.3], [side * 0.6, side * 0.7]]
    given = {
        "point": ((*point, [0.0, 0.0]), (1, -1), {"input_points": [[point]], "labels": [[[1]]]}),
        "box": (box, (2, 3), {"input_boxes": [[np.ravel(box)]]}),
        "none": (np.zeros((0, 2)), (), {}),
    }
    differences = {}

    def add(name, ours, theirs):
        theirs = theirs.numpy()
        assert ours.shape == theirs.shape
        differences[name] = float(np.abs(ours - theirs).max() / theirs.std())

    for name, (coords, labels, theirs) in given.items():
        prompts = Prompts(
            jnp.asarray(np.reshape(coords, (1, -1, 2)), jnp.float32),
            jnp.asarray(labels, jnp.int32).reshape(1, -1),
        )
        logits, iou = decode(params, embedding, prompts)
        tensors = {k: torch.tensor(np.array(v), dtype=torch.float32) for k, v in theirs.items()}
        if "labels" in tensors:
            tensors["input_labels"] = tensors.pop("labels").int()
        with torch.no_grad():
            embeddings = hf.get_image_embeddings(pixels)
            out = hf(image_embeddings=embeddings, multimask_output=True, **tensors)
        add("embedding", np.asarray(embedding).transpose(0, 3, 1, 2), embeddings)
        add(f"{name}: logits", np.asarray(logits)[None, :, 1:], out.pred_masks)
        add(f"{name}: IoU", np.asarray(iou)[None, :, 1:], out.iou_scores)
    return differences


def test_transformers_computes_the_same(transformers, folder, small_config, small_params):
    differences = compare(transformers, folder, small_config, small_params)
    assert max(differences.values()) < BOUND, differences


def test_at_another_input_size(transformers, tmp_path, small_config, small_params):
    """The position tables are resampled when they are written: transformers does not do it."""
    config = small_config.with_image_size(96)
    write_weights(tmp_path / "hf", config, small_params, "hf")
    differences = compare(transformers, tmp_path / "hf", config, small_params)
    assert max(differences.values()) < BOUND, differences
    again, params = read_weights(tmp_path / "hf")
    assert (again.image_size, again.image_encoder.pretrain_grid) == (96, 6)
    assert params["image_encoder"]["pos_embed"].shape == (1, 6, 6, 32)


@pytest.mark.parametrize("name", ["small", "medsam"])
def test_the_processor_preprocesses_the_same(transformers, tmp_path, small_config, caplog, name):
    config = dataclasses.replace(MODELS.get(name, small_config), image_size=128)
    with caplog.at_level(logging.WARNING, "samjax"):
        record = preprocessor_config(config)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(record))
    processor = transformers.SamProcessor.from_pretrained(tmp_path)
    # For the small model any image; MedSAM's preprocessing is theirs only on what it has done.
    image = image_of(100, 60) if name == "small" else image_of(128, 128)
    box = [10, 20, 50, 90]
    theirs = processor(image, input_boxes=[[box]], return_tensors="pt")
    ours, input_size = prepare_image(image, config.frame)
    args = jnp.asarray(ours[None]), jnp.asarray(input_size[None])
    pixels = normalize(*args, config.normalization, config.pixel_mean, config.pixel_std)
    assert theirs["pixel_values"].shape == (1, 3, 128, 128)
    assert theirs["reshaped_input_sizes"].tolist() == [list(input_size)]
    corners = scale_coords(np.reshape(box, (2, 2)), image.shape[:2], config.frame)
    assert np.allclose(theirs["input_boxes"].numpy().reshape(2, 2), corners)
    assert np.abs(theirs["pixel_values"].numpy()[0] - np.moveaxis(pixels[0], -1, 0)).max() < 1e-5
    assert ("cannot preprocess as medsam does" in caplog.text) == (name == "medsam")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_there_and_back_is_bit_equal(transformers, tmp_path, small_config, small_params, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), small_params)
    write_weights(tmp_path / "hf", small_config, params, "hf")
    config, again = read_weights(tmp_path / "hf")
    assert config == small_config
    assert_same_params(again, params)
    model = transformers.SamModel.from_pretrained(tmp_path / "hf", dtype="auto")
    assert str(model.dtype) == f"torch.{dtype}"
    assert sorted(os.listdir(tmp_path)) == ["hf"]
    assert sorted(os.listdir(tmp_path / "hf")) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


def test_what_transformers_saves_again_is_still_known(transformers, tmp_path, folder, small_config):
    model = transformers.SamModel.from_pretrained(folder)
    model.mask_decoder.iou_token.weight.data += 1
    model.save_pretrained(tmp_path / "tuned")
    config, params = read_weights(tmp_path / "tuned")
    assert config == small_config
    expected = model.mask_decoder.iou_token.weight.detach().numpy()
    assert np.array_equal(params["mask_decoder"]["iou_token"]["embedding"], expected)


def test_reads_what_transformers_wrote(known, foreign, small_config, small_params):
    config, params = read_weights(foreign)
    assert config == small_config
    assert_same_params(params, small_params)
    bare = foreign.rename(foreign.with_name("bare")) / "model.safetensors"
    (bare.parent / "config.json").unlink()
    assert_same_params(read_weights(bare)[1], small_params)
    with pytest.raises(FileNotFoundError, match=r"lacks its config\.json"):
        read_weights(bare.parent)


def test_reads_shards_and_pickles(
    known, transformers, tmp_path, foreign, small_config, small_params
):
    import torch

    model = transformers.SamModel.from_pretrained(foreign)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_same_params(read_weights(tmp_path / "shards")[1], small_params)

    (foreign / "model.safetensors").unlink()
    state = model.state_dict()
    assert "prompt_encoder.shared_embedding.positional_embedding" in state  # both names
    torch.save(state, foreign / "pytorch_model.bin")
    assert_same_params(read_weights(foreign)[1], small_params)


def test_shards_that_are_damaged(known, transformers, tmp_path, foreign):
    model = transformers.SamModel.from_pretrained(foreign)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    first = min(record["weight_map"].values())

    def refused(weight_map, match, error=ValueError):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(error, match=match) as info:
            read_weights(tmp_path / "shards")
        assert str(tmp_path / "shards") in str(info.value) and "\n" not in str(info.value)

    refused({"a": "../foreign/model.safetensors"}, "does not name files of the folder")
    refused({"a": 3}, "damaged")
    refused(None, "damaged")
    refused({}, "does not name files")
    refused({"a": "none.safetensors"}, "lacks none.safetensors", FileNotFoundError)
    refused({"a": first}, r"no SAM checkpoint: its \d tensors")
    safetensors.numpy.save_file(
        read_tensors(tmp_path / "shards" / first), tmp_path / "shards" / "b.safetensors"
    )
    refused({"a": first, "b": "b.safetensors"}, "which another file of the folder holds too")


def test_either_name_of_the_tied_tensor(known, tmp_path, small_config, small_params):
    image = "shared_image_embedding.positional_embedding"
    prompt = "prompt_encoder.shared_embedding.positional_embedding"
    tensors = from_meta_names(from_params(small_params, small_config))

    def read(**changes):
        changed = {k: v for k, v in (tensors | changes).items() if v is not None}
        safetensors.numpy.save_file(changed, tmp_path / "a.safetensors")
        return read_weights(tmp_path / "a.safetensors")[1]

    assert_same_params(read(**{prompt: tensors[image]}), small_params)
    assert_same_params(read(**{prompt: tensors[image], image: None}), small_params)
    with pytest.raises(ValueError, match="must be the same tensor and differ"):
        read(**{prompt: tensors[image] + 1})
    with pytest.raises(ValueError, match=r"1 missing .*gaussian_matrix"):
        read(**{image: None})


def without(*path):
    """A change of `config.json`, which then lacks what is at that path."""

    def change(record):
        del record["samjax_model"]  # of that transformers knows nothing
        for key in path[:-1]:
            record = record[key]
        del record[path[-1]]

    return change


def test_what_a_config_leaves_out_is_vit_bs(transformers):
    """As transformers fills it in; it leaves out what is equal to its defaults."""
    record, theirs = model_config(MODELS["vit_b"]), transformers.SamConfig().to_dict()
    for part in ("vision_config", "prompt_encoder_config", "mask_decoder_config"):
        ours = {k: v for k, v in record[part].items() if k != "layer_norm_eps"}
        assert ours == {key: theirs[part][key] for key in ours}
    check_model_config({"model_type": "sam"}, MODELS["vit_b"])
    for name, width in (("vit_l", 1024), ("vit_h", 1280)):
        with pytest.raises(ValueError, match=rf"hidden_size = 768 where {name} has {width}"):
            check_model_config({"model_type": "sam"}, MODELS[name])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without("vision_config", "global_attn_indexes"), r"leaves out.*indexes = \[2, 5, 8, 11\]"),
        (without("vision_config", "window_size"), "leaves out.*window_size = 14 where small has 4"),
        (without("vision_config"), "leaves out.*vision_config.hidden_size = 768 where"),
        (without("mask_decoder_config"), "leaves out.*mask_decoder_config.hidden_size = 256"),
        (lambda r: r.update(model_type="sam2"), "of type sam2, not sam"),
        (lambda r: r.pop("model_type"), "of type None, not sam"),
        (lambda r: r["vision_config"].update(num_attention_heads=4), r"num_attention_heads = 4"),
        (lambda r: r["vision_config"].update(global_attn_indexes=[0]), r"indexes = \[0\]"),
        (lambda r: r["mask_decoder_config"].update(hidden_act="gelu"), "hidden_act = gelu"),
        (lambda r: r.update(samjax_model={}), "damaged"),
        (lambda r: r["samjax_model"].update(image_size=112), "at 112 px and .* at 128 px"),
    ],
)
def test_configs_that_do_not_fit(folder, change, match):
    record = json.loads((folder / "config.json").read_text())
    change(record)
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=match) as info:
        read_weights(folder)
    assert str(folder) in str(info.value) and "\n" not in str(info.value)


def test_models_that_transformers_lacks(tmp_path, small_config, small_params):
    wide = small_config.with_image_size((64, 128))
    save_checkpoint(tmp_path / "wide", wide, small_params)
    with pytest.raises(ValueError, match="square inputs only, and small is at 64x128 px"):
        convert(tmp_path / "wide", tmp_path / "hf", "hf")
    with pytest.raises(ValueError, match="no class for vit_t, whose image encoder is a TinyViT"):
        write_weights(tmp_path / "hf", MODELS["vit_t"], {}, "hf")
    assert os.listdir(tmp_path) == ["wide"]


def test_the_command_line(tmp_path, small_config, small_params, capsys):
    save_checkpoint(tmp_path / "w", small_config, small_params)
    command = ["convert", str(tmp_path / "w"), str(tmp_path / "hf"), "--to", "hf"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "model": "small",
        "dst": str(tmp_path / "hf"),
        "to": "hf",
    }
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    assert_same_params(read_weights(tmp_path / "back")[1], small_params)
    assert main(command) == 1
    assert "exists already" in capsys.readouterr().err
