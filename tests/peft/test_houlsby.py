"""The adapter in series against a float64 NumPy version."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax import peft
from samjax.models import MODELS, Sam
from samjax.nn import Context, Site, SiteInfo
from samjax.peft import Houlsby, MethodConfig, PeftSpec, Rule
from samjax.peft.resolve import resolve

RNG = np.random.default_rng(1)
SITE = Site(SiteInfo("b/mlp", "branch", (16,), use_bias=False), None, None, lambda x, *_: 3 * x - 1)


def numpy_adapter(delta, y) -> np.ndarray:
    y = np.asarray(y, np.float64)
    hidden = np.maximum(y @ np.float64(delta.down) + np.float64(delta.down_bias), 0)
    return y + hidden @ np.float64(delta.up) + np.float64(delta.up_bias)


def test_the_branch_then_the_bottleneck(drawn):
    delta = Houlsby(bottleneck=3).init(jax.random.key(0), SITE, ())
    x = jnp.asarray(RNG.normal(size=(2, 5, 7, 16)), jnp.float32)
    np.testing.assert_array_equal(delta(SITE, x, Context()), SITE(x))  # the identity at the start
    assert np.abs(delta.down).max() <= 0.25 and delta.down.any()  # 1 / sqrt(16)
    delta = drawn(delta)
    expected = numpy_adapter(delta, 3 * x - 1)
    np.testing.assert_allclose(delta(SITE, x, Context()), expected, rtol=1e-4, atol=1e-4)
    half = 3 * x - 1 + 0.5 * (expected - (3 * x - 1))
    np.testing.assert_allclose(delta.scaled(0.5)(SITE, x, Context()), half, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("remat", ["none", "blocks"])
@pytest.mark.parametrize("encoder", ["vit", "tiny_vit"])
def test_in_a_block_of_padded_windows(run_block, drawn, encoder, remat):
    records = {
        name: drawn(Houlsby(bottleneck=3).init(jax.random.key(0), SITE, ()))
        for name in ("attn", "mlp")
    }
    tree = {name: {"delta": record} for name, record in records.items()}
    x, attn, mlp, between, out = run_block(encoder, remat, tree)
    stream = between(x + numpy_adapter(records["attn"], attn))
    expected = stream + numpy_adapter(records["mlp"], mlp)
    np.testing.assert_allclose(out, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "model, targets, count",
    [
        ("vit_b", ("attn", "mlp"), 12 * 2 * (2 * 768 * 16 + 16 + 768)),
        ("vit_b", ("attn",), 12 * (2 * 768 * 16 + 16 + 768)),
        ("vit_t", ("attn", "mlp"), sum(n * 2 * (33 * d + 16) for n, d in ((2, 128), (6, 160)))
         + 2 * 2 * (33 * 320 + 16)),
    ],
)  # fmt: skip
def test_counts(model, targets, count):
    spec = MethodConfig(method="adapter", targets=targets).spec()
    assert peft.report(spec, Sam(MODELS[model])).adapter == count


def test_what_it_refuses(small_model):
    with pytest.raises(ValueError, match=r"matches no branch site.*'image_encoder/blocks_\d/attn'"):
        resolve(PeftSpec((Rule("image_encoder/**/attn/qkv", Houlsby()),)), small_model)
    with pytest.raises(ValueError, match="has no segments"):
        resolve(PeftSpec((Rule("image_encoder/**/attn[q]", Houlsby()),)), small_model)
    with pytest.raises(ValueError, match="bottleneck must be at least 1, not 0"):
        Houlsby(bottleneck=0)
    for targets, wrong in ((("q",), "'q'"), ((), "nothing")):
        with pytest.raises(ValueError, match=f"targets must name some of attn, mlp, not {wrong}"):
            MethodConfig(method="adapter", targets=targets)
    with pytest.raises(ValueError, match="not 'attn'"):
        MethodConfig(method="lora", targets=("attn",))
    with pytest.raises(ValueError, match="has no setting rank: it has bottleneck, targets"):
        MethodConfig(method="adapter", rank=4)


def test_two_cannot_share_a_branch(small_model, small_params):
    spec = MethodConfig(method="adapter", targets=("mlp",)).spec()
    tree = peft.attach(spec, small_model, small_params, jax.random.key(0))
    with pytest.raises(peft.NotComposable, match=r"blocks_0/mlp.*in series"):
        peft.stack(tree, tree)
