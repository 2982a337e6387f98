"""The table in both directions: bit-equal round trips, and what is refused."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from samjax.models import MODELS, SamConfig, TinyVitConfig, VitConfig
from weights_convert import expected_shapes, from_params, read_tensors, recognise, to_params
from weights_convert.table import from_samjax, from_torch

SMALL = SamConfig(
    name="small",
    image_encoder=VitConfig(embed_dim=32, depth=2, num_heads=2, global_attn_indexes=(1,)),
    decoder_mlp_dim=64,
)
SMALL_TINY = SamConfig(
    name="small_tiny",
    image_encoder=TinyVitConfig(embed_dims=(8, 16, 20, 40), depths=(1, 1, 1, 1)),
    decoder_mlp_dim=64,
)


def make_tensors(config, dtype=np.float32):
    """Random tensors with the original's names and shapes."""
    rng = np.random.default_rng(0)
    tensors = {}
    for path, shape in expected_shapes(config).items():
        name, leaf = from_samjax(path)
        tensors[name] = rng.normal(size=leaf.torch_shape(shape)).astype(dtype)
    return tensors


def assert_equal_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        assert actual[name].shape == array.shape, name
        assert actual[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("name", MODELS)
def test_the_table_is_a_bijection_on_every_model(name):
    paths = expected_shapes(MODELS[name])
    keys = {}
    for path in paths:
        row = from_samjax(path)
        assert row is not None, path
        assert from_torch(row[0]) == (path, row[1])
        keys[row[0]] = path
    assert len(keys) == len(paths)


@pytest.mark.parametrize("config", [SMALL, SMALL_TINY], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_round_trip_keeps_bits_and_dtype(config, dtype):
    tensors = make_tensors(config, dtype)
    params = to_params(tensors, config)
    shapes = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
    assert shapes == expected_shapes(config)
    assert_equal_bits(from_params(params, config), tensors)


def test_axes_agree_with_torch():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    def leaf(key):
        return from_torch(key)[1]

    x, w = draw(5, 3), draw(4, 3)
    kernel = leaf("image_encoder.blocks.0.attn.qkv.weight").to_samjax(w)
    np.testing.assert_allclose(
        x @ kernel, functional.linear(torch.tensor(x), torch.tensor(w)).numpy(), atol=1e-5
    )

    x, w = draw(1, 6, 6, 3), draw(4, 3, 2, 2)
    kernel = leaf("prompt_encoder.mask_downscaling.0.weight").to_samjax(w)
    patches = x.reshape(1, 3, 2, 3, 2, 3)
    ours = np.einsum("nipjqc,pqco->nijo", patches, kernel)
    theirs = functional.conv2d(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(w), stride=2)
    np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-5)

    x, w = draw(1, 3, 3, 5), draw(5, 2, 2, 2)
    kernel = leaf("mask_decoder.output_upscaling.0.weight").to_samjax(w)
    ours = np.einsum("bijc,pqco->bipjqo", x, kernel).reshape(1, 6, 6, 2)
    theirs = functional.conv_transpose2d(
        torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(w), stride=2
    )
    np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def test_the_original_vit_b(segment_anything, tmp_path):
    import torch

    model = segment_anything.sam_model_registry["vit_b"]()
    torch.save(model.state_dict(), tmp_path / "vit_b.pth")
    tensors = read_tensors(tmp_path / "vit_b.pth")
    assert recognise(tensors) == (MODELS["vit_b"], MODELS["medsam"])
    back = from_params(to_params(tensors), MODELS["vit_b"])
    assert_equal_bits(back, {name: t.numpy() for name, t in model.state_dict().items()})
    model.load_state_dict({name: torch.tensor(a) for name, a in back.items()}, strict=True)


def test_torch_does_not_need_the_counter_that_is_left_out():
    torch = pytest.importorskip("torch")
    norm = torch.nn.BatchNorm2d(3)
    state = {k: v for k, v in norm.state_dict().items() if k != "num_batches_tracked"}
    norm.load_state_dict(state, strict=True)


def test_mobile_sam(asset):
    tensors = read_tensors(asset("weights/mobile_sam.safetensors"))
    assert recognise(tensors) == (MODELS["vit_t"],)
    assert_equal_bits(from_params(to_params(tensors), MODELS["vit_t"]), tensors)


def test_what_the_model_does_not_use_is_left_out():
    tensors = make_tensors(SMALL_TINY)
    more = {
        "image_encoder.patch_embed.seq.0.bn.num_batches_tracked": np.array(3),
        "image_encoder.norm_head.weight": np.zeros(8),
        "image_encoder.norm_head.bias": np.zeros(8),
        "image_encoder.head.weight": np.zeros((5, 8)),
        "image_encoder.head.bias": np.zeros(5),
    }
    assert_equal_bits(from_params(to_params(tensors | more, SMALL_TINY)), tensors)


def zeros(config):
    """Tensors with the original's names and shapes that take no memory."""
    rows = ((from_samjax(path), shape) for path, shape in expected_shapes(config).items())
    zero = np.float32(0)
    return {name: np.broadcast_to(zero, leaf.torch_shape(s)) for (name, leaf), s in rows}


@pytest.mark.parametrize("name", MODELS)
def test_recognise(name):
    alike = {"vit_b": ("vit_b", "medsam"), "medsam": ("vit_b", "medsam")}.get(name, (name,))
    assert recognise(zeros(MODELS[name])) == tuple(MODELS[one] for one in alike)


@pytest.mark.parametrize(
    ("grid", "size"), [(32, 512), (16, 256), ((32, 48), (512, 768)), (64, 1024)]
)
def test_recognises_position_tables_of_another_grid(grid, size):
    encoder = dataclasses.replace(MODELS["vit_b"].image_encoder, pretrain_grid=grid)
    config = dataclasses.replace(MODELS["vit_b"], image_encoder=encoder, image_size=size)
    rows, columns = config.grid
    tensors = zeros(config)
    assert tensors["image_encoder.pos_embed"].shape == (1, rows, columns, 768)
    assert tensors["image_encoder.blocks.2.attn.rel_pos_h"].shape == (2 * rows - 1, 64)
    assert tensors["image_encoder.blocks.2.attn.rel_pos_w"].shape == (2 * columns - 1, 64)
    assert tensors["image_encoder.blocks.3.attn.rel_pos_w"].shape == (27, 64)
    assert recognise(tensors)[0] == config
    assert_equal_bits(from_params(to_params(tensors), config), tensors)


def no_token(tensors):
    return {k: v for k, v in tensors.items() if "iou_token" not in k}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: {}, "no SAM checkpoint: its 0 tensors"),
        (lambda t: {"a\nb": np.zeros(1)}, r"no SAM checkpoint: its 1 tensors \(a\\nb"),
        (lambda t: {f"sam.{k}": v for k, v in t.items()}, r"begin with 'sam\.'"),
        (lambda t: {"peft/a/delta/b": np.zeros(1)}, "it is an adapter; pass it with --adapter"),
        (lambda t: {"image_encoder.trunk.x": np.zeros(1)}, "SAM 2"),
        (lambda t: t, "width 32 and 2 blocks"),
        (lambda t: {k: v for k, v in t.items() if "pos_embed" not in k}, "no image encoder"),
        (lambda t: t | {"image_encoder.pos_embed": np.zeros(())}, "no image encoder"),
        (lambda t: t | {"image_encoder.pos_embed": np.zeros((1, 0, 9, 768))}, "rows and columns"),
        (lambda t: t | {"image_encoder.pos_embed": np.zeros((1, 1, 4096, 768))}, "1024 at most"),
    ],
)
def test_recognise_refuses(change, match):
    with pytest.raises(ValueError, match=match) as info:
        recognise(change(make_tensors(SMALL)))
    assert "\n" not in str(info.value)


def test_a_tiny_vit_of_another_patch_is_refused():
    tensors = make_tensors(SMALL_TINY)
    tensors["image_encoder.patch_embed.seq.0.c.weight"] = np.zeros((4, 3, 5, 5))
    with pytest.raises(ValueError, match="5 pixels wide"):
        recognise(tensors)


def test_all_that_does_not_fit_is_in_one_sentence():
    tensors = make_tensors(SMALL)
    tensors["image_encoder.neck.0.wieght"] = tensors.pop("image_encoder.neck.0.weight")
    tensors["image_encoder.neck.1.bias"] = np.zeros((7,), np.float32)
    tensors["image_encoder.neck.3.bias"] = np.zeros((256,), np.int32)
    for i in range(4):
        del tensors[f"prompt_encoder.point_embeddings.{i}.weight"]
    with pytest.raises(ValueError) as info:
        to_params(tensors, SMALL)
    message = str(info.value)
    assert "do not fit small: 5 missing (image_encoder.neck.0.weight, " in message
    assert "point_embeddings.1.weight, ...)" in message
    assert (
        "1 unexpected (image_encoder.neck.0.wieght, nearest: image_encoder.neck.0.weight)"
        in message
    )
    assert "1 mis-shaped (image_encoder.neck.1.bias is (7,), not (256,))" in message
    assert "1 not floating-point (image_encoder.neck.3.bias is int32)" in message
    assert "\n" not in message


def test_a_foreign_prefix_is_named():
    tensors = {f"model.sam.{k}": v for k, v in make_tensors(SMALL).items()}
    with pytest.raises(ValueError, match=r"save it again without 'model\.sam\.' before the names"):
        to_params(tensors, SMALL)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    tensors = make_tensors(SMALL)
    tensors["mask_decoder.iou_token.weight"][0, 3] = bad
    with pytest.raises(ValueError, match=r"mask_decoder\.iou_token\.weight .* not finite"):
        to_params(tensors, SMALL)


def test_from_params_refuses_what_sam_does_not_have():
    params = to_params(make_tensors(SMALL), SMALL)
    with pytest.raises(ValueError, match=r"1 of the parameters .*image_encoder/lora_a\)"):
        from_params(params | {"image_encoder": {**params["image_encoder"], "lora_a": np.zeros(3)}})
    stacked = {"image_encoder": {"neck_0": {"kernel": np.zeros((2, 1, 1, 32, 256))}}}
    with pytest.raises(ValueError, match=r"neck_0/kernel has shape .* 4 axes"):
        from_params(stacked)
    with pytest.raises(ValueError, match="do not fit small"):
        from_params({"prompt_encoder": params["prompt_encoder"]}, SMALL)
    other = dataclasses.replace(SMALL, decoder_mlp_dim=65)
    with pytest.raises(ValueError, match=r"6 mis-shaped"):
        from_params(params, other)
