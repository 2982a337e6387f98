"""Single layers against definitions that are not ours: torch, lax, loops."""

import collections
import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.models import (
    MODELS,
    Prompts,
    Sam,
    SamConfig,
    TinyVitConfig,
    VitConfig,
    image_encoder,
    tiny_vit,
    windows,
)
from samjax.models.attention import attend_map, chunk_sizes, relative_table
from samjax.models.flash import flash
from samjax.models.image_encoder import resize_positions
from samjax.models.tiny_vit import offset_indices
from samjax.nn import (
    BatchNorm,
    Context,
    Conv,
    ConvTranspose2x2,
    DepthwiseConv,
    LayerNorm,
    Segments,
    Site,
    SiteInfo,
)
from samjax.ops import gelu
from samjax.peft import ConvLoRA

RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def torch_nhwc(function, *arrays: jax.Array) -> np.ndarray:
    """Applies a torch function to NHWC arrays as NCHW tensors and back."""
    torch = pytest.importorskip("torch")
    first, *rest = (np.array(array) for array in arrays)
    out = function(
        torch.tensor(first.transpose(0, 3, 1, 2)), *(torch.tensor(array) for array in rest)
    )
    return out.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("kernel, stride", [(1, 1), (3, 1), (3, 2), (2, 2), (16, 16)])
def test_conv_is_torch_conv(kernel, stride):
    F = pytest.importorskip("torch").nn.functional
    x, w, b = normal(2, 32, 48, 5), normal(kernel, kernel, 5, 7), normal(7)
    layer = Conv(7, kernel, stride)
    ours = layer.apply({"params": {"kernel": w, "bias": b}}, x, Context())
    pad = 0 if kernel == stride else (kernel - 1) // 2
    theirs = torch_nhwc(
        lambda x, w, b: F.conv2d(x, w, b, stride, pad), x, w.transpose(3, 2, 0, 1), b
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-3 if kernel == 16 else 1e-4)


@pytest.mark.parametrize("stride, size", [(1, (9, 12)), (2, (9, 12)), (2, (8, 7))])
def test_depthwise_conv_is_torch_conv(stride, size):
    F = pytest.importorskip("torch").nn.functional
    x, w = normal(2, *size, 6), normal(3, 3, 1, 6)
    ours = DepthwiseConv(3, stride).apply({"params": {"kernel": w}}, x)
    theirs = torch_nhwc(
        lambda x, w: F.conv2d(x, w, None, stride, 1, groups=6), x, w.transpose(3, 2, 0, 1)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_conv_transpose_is_torch_conv_transpose():
    F = pytest.importorskip("torch").nn.functional
    x, w, b = normal(2, 5, 6, 4), normal(2, 2, 4, 3), normal(3)
    blocks = ConvTranspose2x2(3).apply({"params": {"kernel": w, "bias": b}}, x)
    ours = np.swapaxes(blocks, 2, 3).reshape(2, 10, 12, 3)
    theirs = torch_nhwc(
        lambda x, w, b: F.conv_transpose2d(x, w, b, 2), x, w.transpose(2, 3, 0, 1), b
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_norms_are_torch_norms():
    torch = pytest.importorskip("torch")
    x, scale, bias, mean = normal(2, 3, 4, 8), normal(8), normal(8), normal(8)
    var = jnp.abs(normal(8))
    tensors = [torch.tensor(np.array(a)) for a in (x, scale, bias, mean, var)]
    params = {"scale": scale, "bias": bias}
    ours = LayerNorm(epsilon=1e-6).apply({"params": params}, x, Context())
    theirs = torch.nn.functional.layer_norm(tensors[0], (8,), tensors[1], tensors[2], 1e-6)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)
    ours = BatchNorm().apply({"params": {**params, "mean": mean, "var": var}}, x, Context())
    theirs = torch_nhwc(
        lambda x, *a: torch.nn.functional.batch_norm(x, a[0], a[1], a[2], a[3]),
        x,
        mean,
        var,
        scale,
        bias,
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_gelu_is_exact():
    from math import erf, sqrt

    x = np.linspace(-4, 4, 41)
    exact = [0.5 * v * (1 + erf(v / sqrt(2))) for v in x]
    np.testing.assert_allclose(gelu(jnp.asarray(x, jnp.float32)), exact, atol=1e-6)


def test_layer_norm_is_float32_under_bfloat16():
    x = jnp.asarray(1000 + normal(4, 64), jnp.bfloat16)
    params = {"scale": np.ones(64, np.float32), "bias": np.zeros(64, np.float32)}
    ours = LayerNorm(dtype=jnp.bfloat16).apply({"params": params}, x, Context())
    exact = LayerNorm().apply({"params": params}, x.astype(jnp.float32), Context())
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, atol=0.02)


@pytest.mark.parametrize("grid", [(32, 32), (22, 22), (40, 60), (96, 70)])
def test_positions_are_torch_bicubic(grid):
    F = pytest.importorskip("torch").nn.functional
    table = normal(1, 64, 64, 4)
    theirs = torch_nhwc(
        lambda t: F.interpolate(t.double(), grid, mode="bicubic", align_corners=False),
        table,
    )
    np.testing.assert_allclose(resize_positions(table, *grid), theirs, atol=2e-6)


@pytest.mark.parametrize("size", [64, 40, 90])
def test_relative_positions_are_the_references(segment_anything, size):
    import torch
    from segment_anything.modeling.image_encoder import get_rel_pos

    table = normal(127, 8)
    theirs = get_rel_pos(size, size, torch.tensor(np.array(table))).numpy()
    np.testing.assert_allclose(relative_table(size, table), theirs, atol=1e-6)


@pytest.mark.parametrize("size", [(12, 20), (7, 14), (9, 5)])
def test_windows_pad_the_right_sides(segment_anything, size):
    import torch
    from segment_anything.modeling.image_encoder import window_partition

    x = normal(2, *size, 3)
    theirs, _ = window_partition(torch.tensor(np.array(x)), 7)
    ours = windows.partition(x, 7)
    np.testing.assert_array_equal(ours, theirs.numpy())
    np.testing.assert_array_equal(windows.unpartition(ours, 2, *size), x)


@pytest.mark.parametrize("size", [(5, 7), (4, 8)])
def test_layers_by_token_are_spared_the_padding(size):
    kernel, bias, out = normal(3, 6), normal(6), normal(6, 2)
    tokens = []

    def before(x, ctx):
        tokens.append(math.prod(x.shape[:3]))
        return x @ kernel + bias

    def attend(y):  # each window's tokens, those of padding too, weighted by their first channel
        weights = jax.nn.softmax(y[..., :1], axis=(1, 2))
        return y + (weights * y).sum(axis=(1, 2), keepdims=True)

    def after(y, ctx):
        tokens.append(math.prod(y.shape[:3]))
        return y @ out

    def loss(x, by_token):
        y = windows.within(x, 4, before, attend, after, Context(), by_token)
        return (y * target).sum(), y

    x, target = normal(2, *size, 3), normal(2, *size, 2)
    pairs = [jax.value_and_grad(loss, has_aux=True)(x, by_token) for by_token in (True, False)]
    for spared, padded in zip(*map(jax.tree.leaves, pairs), strict=True):
        np.testing.assert_allclose(spared, padded, rtol=1e-5, atol=1e-5)
    own, windowed = 2 * math.prod(size), 2 * 4 * 8 * -(-size[0] // 4)
    assert tokens == [own, *([1] if own < windowed else []), own, windowed, windowed]


@pytest.mark.parametrize(
    "size, scores, chunk",
    [
        ((6, 8), 2 * 4 * 48 * 48, (4, 6)),
        ((6, 8), 2 * 2 * 48 * 48, (2, 6)),
        ((16, 16), 2 * 4 * 16 * 256, (1, 4)),
        ((24, 40), 2 * 5 * 40 * 960, (1, 4)),
        ((13, 64), 0, (1, 1)),
    ],
)
def test_attention_and_its_gradients_are_the_references(
    segment_anything, size, scores, chunk, monkeypatch
):
    """All kinds against torch in float64, relative to the largest number of each result."""
    torch = pytest.importorskip("torch")
    from segment_anything.modeling.image_encoder import add_decomposed_rel_pos

    monkeypatch.setattr("samjax.models.attention.SCORES_PER_CHUNK", scores)
    height, width = size
    assert chunk_sizes(2, 4, height, width) == chunk
    arrays = [normal(2, 4, height, width, 8) for _ in range(3)]
    arrays += [normal(2 * height - 1, 8), normal(2 * width - 1, 8)]

    tensors = [torch.tensor(np.float64(array)).requires_grad_() for array in arrays]
    q, k, v = (tensor.reshape(8, height * width, 8) for tensor in tensors[:3])
    weights = add_decomposed_rel_pos(q * 8**-0.5 @ k.mT, q, *tensors[3:], size, size).softmax(-1)
    theirs = (weights @ v).reshape(arrays[0].shape)
    theirs.sin().sum().backward()
    expected = [theirs.detach(), *(tensor.grad for tensor in tensors)]

    # The TPU's kernel, emulated, where it takes so many tokens; elsewhere it is chunked.
    monkeypatch.setattr("samjax.models.attention.flash", partial(flash, interpret=True))
    for kind in ("chunked", "dense", "splash"):

        def loss(*arrays, kind=kind):
            return jnp.sum(jnp.sin(attend_map(*arrays, kind)))

        ours = attend_map(*arrays, kind), *jax.grad(loss, argnums=range(5))(*arrays)
        for name, got, want in zip("oqkvhw", ours, expected, strict=True):
            error = np.abs(got - want.numpy()).max() / want.abs().max().item()
            assert error < 5e-6, (kind, name, error)


def test_chunked_attention_holds_fewer_scores():
    shape = jax.ShapeDtypeStruct((1, 4, 64, 64, 16), jnp.float32)
    table = jax.ShapeDtypeStruct((127, 16), jnp.float32)

    def memory(kind):
        def loss(q, k, v, h, w):
            return jnp.sum(attend_map(q, k, v, h, w, kind))

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*[shape] * 3, table, table)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert memory("chunked") < memory("dense") / 4


def test_tiny_vit_offsets_are_numbered_by_first_appearance():
    size, order, expected = 5, {}, []
    points = [(y, x) for y in range(size) for x in range(size)]
    for p in points:
        for q in points:
            offset = (abs(p[0] - q[0]), abs(p[1] - q[1]))
            expected.append(order.setdefault(offset, len(order)))
    np.testing.assert_array_equal(offset_indices(size).ravel(), expected)


@pytest.mark.parametrize("layout", ["thirds", "heads"])
def test_segments_split_and_join(layout):
    segments = Segments(("q", "k", "v"), layout, num_heads=2)
    y = jnp.arange(24.0)[None]
    parts = segments.split(y)
    heads = np.arange(24.0).reshape((3, 2, 4) if layout == "thirds" else (2, 3, 4))
    v = heads[2] if layout == "thirds" else heads[:, 2]
    np.testing.assert_array_equal(parts["v"][0], v.ravel())
    np.testing.assert_array_equal(segments.join(parts), y)
    only_v = segments.split(segments.join({"v": parts["v"]}))
    assert not only_v["q"].any() and not only_v["k"].any()
    np.testing.assert_array_equal(only_v["v"], parts["v"])


TINY = TinyVitConfig(embed_dims=(8, 16, 16, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4))
SMALL_VIT = VitConfig(
    embed_dim=32, depth=2, num_heads=2, global_attn_indexes=(1,), window_size=4, pretrain_grid=8
)


@pytest.mark.parametrize("encoder", [SMALL_VIT, TINY], ids=["vit", "tiny_vit"])
def test_perturbing_v_leaves_q_and_k(encoder, monkeypatch):
    """The segment named v is what attention uses as v, and nothing else."""
    module = {"vit": "samjax.models.image_encoder", "tiny_vit": "samjax.models.tiny_vit"}
    name = {"vit": "attend_map", "tiny_vit": "attend"}[encoder.kind]
    seen = []
    real = getattr(__import__(module[encoder.kind], fromlist=[name]), name)

    def spy(q, k, v, *rest):
        seen.append((q, k, v))
        return real(q, k, v, *rest)

    monkeypatch.setattr(f"{module[encoder.kind]}.{name}", spy)
    config = SamConfig("small", encoder, 128, prompt_embed_dim=32, decoder_mlp_dim=32)
    model = Sam(config)
    params = model.init_params(jax.random.key(0))
    info = next(site for site in model.sites() if site.path.endswith("attn/qkv"))
    seen.clear()
    image = normal(1, 128, 128, 3)
    model.apply({"params": params}, image, method="encode_normalized")
    before = seen[0]
    node = params
    for part in info.path.split("/"):
        node = node[part]
    width = info.kernel_shape[1] // 3
    node["bias"] = node["bias"] + info.segments.join({"v": jnp.ones(width)})
    seen.clear()
    model.apply({"params": params}, image, method="encode_normalized")
    (q0, k0, v0), (q1, k1, v1) = before, seen[0]
    np.testing.assert_array_equal(q0, q1)
    np.testing.assert_array_equal(k0, k1)
    np.testing.assert_allclose(v1 - v0, np.ones(v0.shape), atol=1e-5)


def test_empty_slots_change_nothing(small_model, small_params):
    decode = jax.jit(lambda p, *a: small_model.apply({"params": p}, *a, method="decode"))
    embeddings = normal(1, 8, 8, small_model.config.prompt_embed_dim)
    coords = np.array([[[30.0, 40.0], [0.0, 0.0]]], np.float32)
    labels = np.array([[1, -1]], np.int32)
    plain = decode(small_params, embeddings, Prompts(coords, labels))
    padded = Prompts(
        np.pad(coords, ((0, 0), (0, 3), (0, 0)), constant_values=7.0),
        np.pad(labels, ((0, 0), (0, 3)), constant_values=-2),
    )
    for a, b in zip(plain, decode(small_params, embeddings, padded), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.std(a))


def test_any_square_size_and_bfloat16(small_model, small_params):
    config = small_model.config.with_image_size(96)
    images = RNG.integers(0, 255, (2, 96, 96, 3), np.uint8)
    for dtype in (jnp.float32, jnp.bfloat16):
        model = Sam(config, dtype=dtype)
        logits, iou = jax.jit(model.apply)(
            {"params": small_params},
            images,
            np.full((2, 2), 96, np.int32),
            Prompts.none(2),
        )
        assert logits.shape == (2, 4, 24, 24) and logits.dtype == iou.dtype == jnp.float32
        assert np.isfinite(logits).all()
        if dtype == jnp.float32:
            exact = logits
    assert np.abs(logits - exact).max() < 0.2 * exact.std()


@pytest.mark.parametrize(
    "encoder, deeper, entering",
    [
        (SMALL_VIT, dataclasses.replace(SMALL_VIT, depth=4), (1, 8, 8, 32)),
        (TINY, dataclasses.replace(TINY, depths=(1, 3, 1, 1)), (1, 16, 16, 16)),
    ],
    ids=["vit", "tiny_vit"],
)
def test_remat_keeps_what_enters_each_block_alone(small_config, encoder, deeper, entering):
    """Of two more blocks the backward pass keeps the two maps that enter them."""

    def kept(encoder, remat):
        """Shapes of the maps that the backward pass of the encoder keeps, and how many of each."""
        config = dataclasses.replace(small_config, image_encoder=encoder)
        model = Sam(config, remat=remat)

        def residuals(params, x):
            encode = lambda p: model.apply({"params": p}, x, method="encode_normalized")  # noqa: E731
            return jax.vjp(encode, params)[1]

        x = jax.ShapeDtypeStruct((1, *config.frame.shape, 3), jnp.float32)
        leaves = jax.tree.leaves(jax.eval_shape(residuals, model.init_params_shapes(), x))
        return collections.Counter(
            leaf.shape for leaf in leaves if leaf.ndim > 3 and leaf.shape[0] == 1
        )

    assert kept(deeper, "blocks") - kept(encoder, "blocks") == {entering: 2}
    every = kept(deeper, "none") - kept(encoder, "none")
    assert sum(count * math.prod(shape) for shape, count in every.items()) > 16 * math.prod(
        entering
    )


def test_image_size_must_fit_the_patch():
    with pytest.raises(ValueError, match=r"350 is not a positive multiple of 16.*352"):
        MODELS["vit_t"].with_image_size(350)
    assert MODELS["lite_medsam"].image_encoder.patch_size == 4
    for config in MODELS.values():
        assert SamConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("encoder", ["vit", "tiny_vit"])
def test_adapters_that_see_windows_get_what_padded_layers_gave(encoder, monkeypatch):
    """The layers compute the map alone; with all of each window's tokens the result is the same."""
    if encoder == "vit":
        config = VitConfig(embed_dim=16, depth=1, num_heads=2, window_size=4, pretrain_grid=8)
        block = image_encoder.Block(config, 4)
    else:
        block = tiny_vit.Block(2, 4)
    x = normal(2, 5, 6, 16)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x, Context())["params"]
    params = jax.tree.map(lambda leaf: normal(*leaf.shape) / 4, shapes)
    records = {}
    for name, out in (("qkv", 48), ("proj", 16)):
        info = SiteInfo(f"image_encoder/{name}", "dense", (16, out))
        site = Site(info, None, None, lambda x, *_: x)
        delta = ConvLoRA(rank=2, experts=2).init(jax.random.key(1), site, ())
        records[name] = {"delta": jax.tree.map(lambda leaf: leaf + normal(*leaf.shape) / 4, delta)}
    variables = {"params": params, "peft": {"attn": records}}
    spared = block.apply(variables, x, Context())
    monkeypatch.setattr(windows, "_spared", lambda shape, apply: apply)
    np.testing.assert_allclose(spared, block.apply(variables, x, Context()), rtol=2e-5, atol=2e-5)
