"""AdaptFormer against a float64 NumPy version."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax import peft
from samjax.models import MODELS, Sam
from samjax.nn import Context, Site, SiteInfo
from samjax.peft import AdaptFormer, MethodConfig, PeftSpec, Rule
from samjax.peft.resolve import resolve

RNG = np.random.default_rng(1)
SITE = Site(SiteInfo("b/mlp", "branch", (16,), use_bias=False), None, None, lambda x, *_: 3 * x - 1)


def numpy_update(delta, x) -> np.ndarray:
    d = {f.name: np.asarray(getattr(delta, f.name), np.float64) for f in dataclasses.fields(delta)}
    x = np.asarray(x, np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * d["norm_scale"] + d["norm_bias"]
    hidden = np.maximum(x @ d["down"] + d["down_bias"], 0)
    return d["scale"] * (hidden @ d["up"] + d["up_bias"])


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_beside_the_branch(drawn, scale):
    delta = AdaptFormer(bottleneck=3, scale=scale).init(jax.random.key(0), SITE, ())
    # Far from zero, as some channels of SAM's residual stream are.
    x = jnp.asarray(100 + RNG.normal(size=(2, 5, 7, 16)), jnp.float32)
    np.testing.assert_array_equal(delta(SITE, x, Context()), SITE(x))  # the identity at the start
    assert np.abs(delta.down).max() <= 0.25 and delta.down.any()  # 1 / sqrt(16)
    delta = drawn(delta)
    expected = 3 * np.float64(x) - 1 + numpy_update(delta, x)
    np.testing.assert_allclose(delta(SITE, x, Context()), expected, rtol=1e-5, atol=1e-3)
    expected = 3 * np.float64(x) - 1 - 2 * numpy_update(delta, x)
    np.testing.assert_allclose(delta.scaled(-2)(SITE, x, Context()), expected, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("remat", ["none", "blocks"])
@pytest.mark.parametrize("encoder", ["vit", "tiny_vit"])
def test_in_a_block_of_padded_windows(run_block, drawn, encoder, remat):
    delta = drawn(AdaptFormer(bottleneck=3).init(jax.random.key(0), SITE, ()))
    x, attn, mlp, between, out = run_block(encoder, remat, {"mlp": {"delta": delta}})
    stream = between(np.float64(x) + attn)
    expected = stream + mlp + numpy_update(delta, stream)
    np.testing.assert_allclose(out, expected, atol=2e-5 * np.abs(expected).max())


def test_dropout_needs_a_key_and_keeps_the_mean(drawn):
    delta = drawn(AdaptFormer(dropout=0.5).init(jax.random.key(0), SITE, ()))
    x = jnp.tile(jnp.asarray(RNG.normal(size=16), jnp.float32), (8192, 1))
    plain, noisy = (delta.update(SITE, x, c) for c in (Context(), Context(jax.random.key(1))))
    assert not np.allclose(plain, noisy)
    np.testing.assert_allclose(noisy.mean(0), plain[0], atol=0.05 * np.abs(plain).max())
    np.testing.assert_array_equal(plain, delta.replace(dropout=0.0).update(SITE, x, Context()))


def test_two_beside_one_branch(small_model, small_params):
    spec = MethodConfig(method="adaptformer", bottleneck=2).spec()
    tree = peft.attach(spec, small_model, small_params, jax.random.key(0))
    both = peft.stack(tree, tree)
    peft.check_sites(small_model, small_params, both)
    with pytest.raises(peft.NotMergeable, match="blocks_0/mlp: AdaptFormer has a norm and a ReLU"):
        peft.merge(small_model, small_params, both)


@pytest.mark.parametrize(
    "model, count",
    [
        ("vit_b", 322_752),  # SAM-COBOT's 322.7 K
        ("vit_t", sum(n * (35 * d + 16) for n, d in ((2, 128), (6, 160), (2, 320)))),
    ],
)
def test_counts(model, count):
    spec = MethodConfig(method="adaptformer").spec()
    assert peft.report(spec, Sam(MODELS[model])).adapter == count


def test_what_it_refuses(small_model):
    with pytest.raises(ValueError, match="matches no branch site"):
        resolve(PeftSpec((Rule("image_encoder/**/mlp/lin1", AdaptFormer()),)), small_model)
    for bad in ({"bottleneck": 0}, {"scale": 0.0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match=f"AdaptFormer: {next(iter(bad))} must be"):
            AdaptFormer(**bad)
    with pytest.raises(ValueError, match="has no setting targets: it has bottleneck, scale"):
        MethodConfig(method="adaptformer", targets=("mlp",))
