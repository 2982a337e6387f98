"""SSF against a float64 NumPy version, at each kind of layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax import peft
from samjax.models import MODELS, Sam, tiny_vit
from samjax.nn import BatchNorm, Context, Conv, Dense, LayerNorm, Segments, Site, record_sites
from samjax.peft import SSF, LoRA, MethodConfig, PeftSpec, Rule
from samjax.peft.trees import deltas

RNG = np.random.default_rng(1)
HEADS = Segments(("q", "k", "v"), "heads", 2)


def numpy_dense(p, x):
    return x @ p["kernel"] + p["bias"]


def numpy_conv(p, x):
    """3 x 3 with padding 1."""
    k, (height, width) = p["kernel"], x.shape[1:3]
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = (x[:, i : i + height, j : j + width] @ k[i, j] for i in range(3) for j in range(3))
    return sum(windows) + p.get("bias", 0)


def numpy_layer_norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def numpy_batch_norm(p, x):
    return (x - p["mean"]) / np.sqrt(p["var"] + 1e-5) * p["scale"] + p["bias"]


@pytest.mark.parametrize(
    "layer, reference",
    [
        (Dense(12), numpy_dense),
        (Dense(12, segments=HEADS), numpy_dense),
        (Conv(12, 3), numpy_conv),
        (Conv(12, 3, use_bias=False), numpy_conv),
        (Conv(12, 3, stride=2), lambda p, x: numpy_conv(p, x)[:, ::2, ::2]),
        (LayerNorm(), numpy_layer_norm),
        (BatchNorm(), numpy_batch_norm),
    ],
)
def test_scale_shift_and_merge(drawn, layer, reference):
    x = jnp.asarray(RNG.normal(size=(2, 5, 6, 12)), jnp.float32)
    with record_sites() as sites:
        shapes = jax.eval_shape(layer.init, jax.random.key(0), x, Context())["params"]
    params = {
        name: jnp.asarray(RNG.uniform(0.5, 2, leaf.shape), jnp.float32)
        for name, leaf in shapes.items()
    }
    (info,) = sites
    weights = params[info.kernel_name], params.get("bias")
    plain = layer.apply({"params": params}, x, Context())
    delta = SSF().init(jax.random.key(0), Site(info, *weights, lambda *_: None), ())
    assert not any(leaf.any() for leaf in jax.tree.leaves(delta))
    at_first = layer.apply({"params": params, "peft": {"delta": delta}}, x, Context())
    np.testing.assert_array_equal(at_first, plain)

    delta = drawn(delta)
    wide = {name: np.float64(value) for name, value in params.items()}
    gamma = 1 + np.float64(delta.scale[0])
    beta = 0.0 if delta.shift is None else np.float64(delta.shift[0])
    expected = gamma * reference(wide, np.float64(x)) + beta
    adapted = layer.apply({"params": params, "peft": {"delta": delta}}, x, Context())
    np.testing.assert_allclose(adapted, expected, rtol=1e-4, atol=1e-4)

    assert (delta.shift is None) == (info.use_bias is False)
    kernel, bias = delta.merge(info, *weights, Context())
    merged = params | {info.kernel_name: kernel} | ({} if bias is None else {"bias": bias})
    actual = layer.apply({"params": merged}, x, Context())
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)

    half = layer.apply({"params": params, "peft": {"delta": delta.scaled(0.5)}}, x, Context())
    np.testing.assert_allclose(half - plain, 0.5 * (adapted - plain), rtol=1e-3, atol=1e-4)


def test_a_convolution_and_its_batch_norm(drawn):
    """TinyViT's ConvBN: gamma of the convolution, gamma and beta of the norm."""
    layer = tiny_vit.ConvBN(8, 3)
    x = jnp.asarray(RNG.normal(size=(2, 5, 6, 4)), jnp.float32)
    with record_sites() as sites:
        shapes = jax.eval_shape(layer.init, jax.random.key(0), x, Context())["params"]
    params = jax.tree.map(
        lambda leaf: jnp.asarray(RNG.uniform(0.5, 2, leaf.shape), jnp.float32), shapes
    )
    records = {
        info.path: drawn(SSF().init(None, Site(info, None, None, lambda *_: None), ()))
        for info in sites
    }
    assert records["c"].shift is None
    tree = {path: {"delta": record} for path, record in records.items()}
    adapted = layer.apply({"params": params, "peft": tree}, x, Context())
    wide = jax.tree.map(np.float64, params)
    conv = numpy_conv(wide["c"], np.float64(x)) * (1 + np.float64(records["c"].scale[0]))
    expected = numpy_batch_norm(wide["bn"], conv) * (1 + np.float64(records["bn"].scale[0]))
    expected += np.float64(records["bn"].shift[0])
    np.testing.assert_allclose(adapted, expected, rtol=1e-4, atol=1e-4)


def test_segments_leave_the_others_alone(drawn):
    layer = Dense(12, segments=HEADS)
    x = jnp.asarray(RNG.normal(size=(5, 12)), jnp.float32)
    with record_sites() as sites:
        params = layer.init(jax.random.key(0), x, Context())["params"]
    delta = drawn(SSF().init(None, Site(sites[0], None, None, lambda *_: None), ("q", "v")))
    assert delta.scale.shape == delta.shift.shape == (2, 4)
    plain = layer.apply({"params": params}, x, Context())
    adapted = layer.apply({"params": params, "peft": {"delta": delta}}, x, Context())
    # Two heads of q 2, k 2, v 2 channels.
    part = np.arange(12) // 2 % 3
    gamma, beta = np.ones(12), np.zeros(12)
    for i, name in ((0, 0), (1, 2)):
        gamma[part == name] += np.float64(delta.scale[i])
        beta[part == name] += np.float64(delta.shift[i])
    np.testing.assert_allclose(adapted, gamma * np.float64(plain) + beta, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(adapted[:, part == 1], plain[:, part == 1])


@pytest.mark.parametrize(
    "model, count",
    [
        # Blocks, patch embedding, and the neck, whose convolutions have no bias.
        ("vit_b", 12 * 2 * (768 + 2304 + 768 + 768 + 3072 + 768) + 2 * 768 + 3 * 256 + 3 * 256),
        # Patch embedding, MBConvs, mergings, blocks and the neck.
        (
            "vit_t",
            3 * (32 + 64)
            + 2 * (3 * 256 + 2 * 256 + 3 * 64)
            + 8 * (128 + 160 + 320)
            + 24 * (2 * 128 + 6 * 160 + 2 * 320)
            + 6 * 256,
        ),
    ],
)
def test_counts(model, count):
    assert peft.report(MethodConfig(method="ssf").spec(), Sam(MODELS[model])).adapter == count


def test_every_layer_of_the_encoder(small_model, small_params):
    tree = peft.attach(
        MethodConfig(method="ssf").spec(), small_model, small_params, jax.random.key(0)
    )
    adapted = [s.path for s in small_model.sites() if s.kind != "branch"]
    assert sorted(deltas(tree)) == sorted(p for p in adapted if p.startswith("image_encoder/"))


def test_it_has_no_settings_and_shares_no_site(small_model, small_params):
    with pytest.raises(ValueError, match="method 'ssf' has no setting rank: it has no settings"):
        MethodConfig(method="ssf", rank=4)
    pattern = "image_encoder/blocks_0/attn/proj"
    first, second = (
        peft.attach(PeftSpec((Rule(pattern, m),)), small_model, small_params, jax.random.key(0))
        for m in (LoRA(), SSF())
    )
    with pytest.raises(peft.NotComposable, match="attn/proj: SSFDelta cannot share it: it resc"):
        peft.stack(first, second)
