"""DoRA's arithmetic against a float64 NumPy version, and against HuggingFace's peft."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax import peft
from samjax.models import MODELS, Sam
from samjax.nn import Context, Segments, Site, SiteInfo
from samjax.peft import DoRA, MethodConfig, NotComposable
from samjax.peft.compose import Stack

RNG = np.random.default_rng(2)
COLUMNS = np.arange(24)
# Which output channels are a segment's, in 2 heads of 12.
LAYOUTS = {"thirds": COLUMNS // 8, "heads": (COLUMNS // 4) % 3}


def normal(*shape) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def make_site(layout: str | None, dtype=jnp.float32) -> Site:
    segments = layout and Segments(("q", "k", "v"), layout, 2)
    info = SiteInfo("block/attn/qkv", "dense", (16, 24), segments=segments or None)

    def apply(x, kernel, bias):
        y = x @ kernel.astype(dtype)
        return y if bias is None else y + bias.astype(dtype)

    return Site(info, normal(16, 24), normal(24), apply)


def trained(site: Site, segments=(), **settings):
    """A record whose arrays are all away from their start."""
    delta = DoRA(rank=3, alpha=6.0, **settings).init(jax.random.key(0), site, segments)
    lora = delta.lora.replace(b=normal(*delta.lora.b.shape))
    return delta.replace(lora=lora, magnitude=delta.magnitude * jnp.exp(normal(1)))


def numpy_kernel(site: Site, delta, layout: str | None) -> np.ndarray:
    """m * (W + s A B) / ||W + s A B||, column by column; s = alpha / rank = 2."""
    kernel = np.float64(site.kernel)
    for i, name in enumerate(delta.lora.segments or ("all",)):
        chosen = slice(None) if name == "all" else LAYOUTS[layout] == "qkv".index(name)
        directions = kernel[:, chosen] + 2 * np.float64(delta.lora.a[i]) @ np.float64(
            delta.lora.b[i]
        )
        lengths = np.sqrt((directions**2).sum(0))
        kernel[:, chosen] = np.float64(delta.magnitude[i]) * directions / lengths
    return kernel


@pytest.mark.parametrize(
    "layout, segments",
    [("thirds", ("q", "v")), ("heads", ("q", "v")), ("heads", ("k",)), (None, ())],
)
def test_formula_and_merge(layout, segments):
    site = make_site(layout)
    x = normal(2, 5, 16)
    delta = trained(site, segments)
    kernel = numpy_kernel(site, delta, layout)
    expected = np.float64(x) @ kernel + np.float64(site.bias)
    np.testing.assert_allclose(delta(site, x, Context()), expected, rtol=1e-4, atol=1e-4)
    merged, bias = delta.merge(site.info, site.kernel, site.bias, Context())
    np.testing.assert_allclose(merged, kernel, rtol=1e-5, atol=1e-5)
    assert bias is site.bias
    if segments:
        others = ~np.isin(LAYOUTS[layout], ["qkv".index(name) for name in segments])
        assert others.any()
        plain = site(x)
        np.testing.assert_array_equal(delta(site, x, Context())[..., others], plain[..., others])
        np.testing.assert_array_equal(merged[:, others], site.kernel[:, others])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "layout, segments", [("thirds", ("q", "v")), ("heads", ("k",)), (None, ())]
)
def test_the_start_is_the_identity_to_the_bit(layout, segments, dtype):
    site = make_site(layout, dtype)
    x = normal(4, 16).astype(dtype)
    delta = DoRA(rank=3).init(jax.random.key(0), site, segments)
    np.testing.assert_array_equal(delta.gain(site.info, site.kernel), np.ones(24))
    adapted = jax.jit(lambda d, x: d(site, x, Context()))(delta, x)
    assert adapted.dtype == dtype
    np.testing.assert_array_equal(adapted, jax.jit(lambda x: site(x))(x))
    merged, _ = delta.merge(site.info, site.kernel, site.bias, Context())
    np.testing.assert_array_equal(merged, site.kernel)
    np.testing.assert_allclose(
        np.sort(delta.magnitude, axis=None),
        np.sort(np.linalg.norm(np.float64(site.kernel), axis=0)[_adapted(layout, segments)]),
        rtol=1e-6,
    )


def _adapted(layout: str | None, segments) -> np.ndarray:
    if layout is None:
        return np.ones(24, bool)
    return np.isin(LAYOUTS[layout], ["qkv".index(name) for name in segments])


def test_the_gradient_takes_the_norm_for_a_constant():
    site = make_site(None)
    x, weights = normal(5, 16), normal(5, 24)
    delta = trained(site)

    def loss(delta):
        return jnp.sum(delta(site, x, Context()) * weights)

    grads = jax.grad(loss)(delta)
    a, b = np.float64(delta.lora.a[0]), np.float64(delta.lora.b[0])
    updated = np.float64(site.kernel) + 2 * a @ b
    lengths = np.linalg.norm(updated, axis=0)
    # Of the loss with respect to W + s A B with the lengths held: section 4.3, equation 11.
    upstream = np.float64(x).T @ np.float64(weights) * np.float64(delta.magnitude[0]) / lengths
    close = {"rtol": 2e-3, "atol": 2e-3}
    np.testing.assert_allclose(grads.lora.a[0], 2 * upstream @ b.T, **close)
    np.testing.assert_allclose(grads.lora.b[0], 2 * a.T @ upstream, **close)
    expected = (np.float64(x) @ updated * np.float64(weights)).sum(0) / lengths
    np.testing.assert_allclose(grads.magnitude[0], expected, **close)


def test_a_column_of_zeros_stays():
    site = make_site(None)
    kernel = site.kernel.at[:, 3].set(0)
    site = Site(site.info, kernel, site.bias, site.apply)
    delta = DoRA(rank=3).init(jax.random.key(0), site, ())
    delta = delta.replace(lora=delta.lora.replace(b=normal(*delta.lora.b.shape)))
    x = normal(5, 16)
    y, grads = jax.value_and_grad(lambda d: jnp.sum(jnp.sin(d(site, x, Context()))))(delta)
    assert np.isfinite(y) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    merged, _ = delta.merge(site.info, kernel, site.bias, Context())
    assert not merged[:, 3].any() and np.isfinite(merged).all()


def test_the_product_is_not_computed_twice():
    kernel = jnp.ones((256, 768))
    site = Site(SiteInfo("qkv", "dense", kernel.shape), kernel, None, lambda x, k, b: x @ k)
    delta = DoRA(rank=4).init(jax.random.key(0), site, ())
    x = jnp.ones((512, 256))

    def flops(f, *args):
        return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]

    plain = flops(lambda k: jnp.sum(jnp.sin(x @ k)), kernel)
    grad = jax.grad(lambda d: jnp.sum(jnp.sin(d(site, x, Context()))))
    assert flops(grad, delta) < 1.3 * plain


def test_dropout_leaves_the_product_whole():
    site = make_site(None)
    delta = trained(site, dropout=0.5)
    x = normal(5, 16)
    key = jax.random.key(1)
    noisy = delta(site, x, Context(rng=key))
    assert not np.allclose(noisy, delta(site, x, Context()))
    # Without the update of LoRA, nothing is left that is dropped.
    still = delta.replace(lora=delta.lora.replace(b=jnp.zeros_like(delta.lora.b)))
    np.testing.assert_array_equal(still(site, x, Context(rng=key)), still(site, x, Context()))


def test_counts():
    counts = peft.report(MethodConfig(method="dora").spec(), Sam(MODELS["vit_b"]))
    assert counts.adapter == 147_456 + 12 * 2 * 768 == 165_888


def test_bad_input():
    with pytest.raises(ValueError, match=r"^DoRA: rank 17 is more than block/attn/qkv can have"):
        DoRA(rank=17).init(jax.random.key(0), make_site(None), ())
    with pytest.raises(ValueError, match=r"^DoRA: rank must be at least 1, not 0"):
        DoRA(rank=0)
    with pytest.raises(ValueError, match=r"^DoRA is defined for linear layers alone: .*lora_conv"):
        MethodConfig(method="dora", targets=("q", "conv"))


def test_it_cannot_be_scaled_or_share_its_site():
    site = make_site(None)
    with pytest.raises(NotComposable, match="length of the kernel's columns"):
        trained(site).scaled(0.5)
    with pytest.raises(NotComposable, match=r"block/attn/qkv: DoRADelta cannot share it: DoRA"):
        Stack((peft.LoRA(rank=2), DoRA(rank=2))).init(jax.random.key(0), site, ())


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_huggingface_computes_the_same(rank_stabilized):
    torch = pytest.importorskip("torch")
    huggingface = pytest.importorskip("peft")
    site = make_site(None)
    delta = trained(site, rank_stabilized=rank_stabilized)
    config = huggingface.LoraConfig(
        r=3,
        lora_alpha=6,
        use_dora=True,
        use_rslora=rank_stabilized,
        target_modules=["layer"],
        init_lora_weights=False,
    )
    module = torch.nn.ModuleDict({"layer": torch.nn.Linear(16, 24)})
    tensor = lambda x: torch.from_numpy(np.array(x))  # noqa: E731
    with torch.no_grad():
        module["layer"].weight.copy_(tensor(site.kernel).T)
        module["layer"].bias.copy_(tensor(site.bias))
    layer = huggingface.inject_adapter_in_model(config, module)["layer"]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(tensor(delta.lora.a[0]).T)
        layer.lora_B["default"].weight.copy_(tensor(delta.lora.b[0]).T)
        layer.lora_magnitude_vector["default"].weight.copy_(tensor(delta.magnitude[0]))
    x, weights = normal(5, 16), normal(5, 24)
    y = layer(tensor(x))
    np.testing.assert_allclose(delta(site, x, Context()), y.detach().numpy(), rtol=1e-4, atol=1e-4)
    (y * tensor(weights)).sum().backward()
    grads = jax.grad(lambda d: jnp.sum(d(site, x, Context()) * weights))(delta)
    for ours, theirs in (
        (grads.lora.a[0].T, layer.lora_A["default"].weight),
        (grads.lora.b[0].T, layer.lora_B["default"].weight),
        (grads.magnitude[0], layer.lora_magnitude_vector["default"].weight),
    ):
        np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=1e-3, atol=1e-3)
