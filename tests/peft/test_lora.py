"""LoRA's arithmetic against a float64 NumPy version."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.nn import Context, Segments, Site, SiteInfo
from samjax.peft import LoRA

RNG = np.random.default_rng(1)


def make_site(layout: str | None) -> Site:
    segments = layout and Segments(("q", "k", "v"), layout, 2)
    kernel = jnp.asarray(RNG.normal(size=(16, 24)), jnp.float32)
    bias = jnp.asarray(RNG.normal(size=24), jnp.float32)
    info = SiteInfo("block/attn/qkv", "dense", kernel.shape, segments=segments or None)
    return Site(info, kernel, bias, lambda x, k, b: x @ k + b)


def numpy_lora(site: Site, delta, x) -> np.ndarray:
    x = np.asarray(x, np.float64)
    y = x @ np.float64(site.kernel) + np.float64(site.bias)
    names = delta.segments or ("all",)
    for i, name in enumerate(names):
        update = float(delta.scale) * x @ np.float64(delta.a[i]) @ np.float64(delta.b[i])
        if name == "all":
            y += update
            continue
        index = "qkv".index(name)
        columns = np.arange(24)
        if site.info.segments.layout == "thirds":
            chosen = columns // 8 == index
        else:
            chosen = (columns // 4) % 3 == index  # heads of 12 channels: q 4, k 4, v 4
        y[..., chosen] += update
    return y


@pytest.mark.parametrize(
    "layout, segments",
    [("thirds", ("q", "v")), ("heads", ("q", "v")), ("heads", ("k",)), (None, ())],
)
def test_update_and_merge(layout, segments):
    site = make_site(layout)
    delta = LoRA(rank=3, alpha=6.0).init(jax.random.key(0), site, segments)
    x = jnp.asarray(RNG.normal(size=(2, 5, 16)), jnp.float32)
    np.testing.assert_array_equal(delta(site, x, Context()), site(x))  # the identity at the start
    delta = delta.replace(b=jnp.asarray(RNG.normal(size=delta.b.shape), jnp.float32))
    expected = numpy_lora(site, delta, x)
    np.testing.assert_allclose(delta(site, x, Context()), expected, rtol=1e-4, atol=1e-4)
    kernel, bias = delta.merge(site.info, site.kernel, site.bias, Context())
    np.testing.assert_allclose(x @ kernel + bias, expected, rtol=1e-4, atol=1e-4)


def test_initialisation_is_kaiming_uniform():
    site = make_site(None)
    delta = LoRA(rank=8).init(jax.random.key(0), site, ())
    a = np.asarray(delta.a)
    assert np.abs(a).max() <= 0.25 and np.abs(a).max() > 0.24  # 1 / sqrt(16)
    assert abs(a.std() - 0.25 / np.sqrt(3)) < 0.02
    assert not delta.b.any() and float(delta.scale) == 1.0


def test_dropout_needs_a_key_and_keeps_the_mean():
    site = make_site(None)
    delta = LoRA(rank=2, dropout=0.5).init(jax.random.key(0), site, ())
    delta = delta.replace(b=jnp.ones_like(delta.b))
    x = jnp.ones((4096, 16))
    plain = delta(site, x, Context())
    noisy = delta(site, x, Context(rng=jax.random.key(1)))
    assert not np.allclose(plain, noisy)
    np.testing.assert_allclose((noisy - site(x)).mean(0), (plain - site(x)).mean(0), atol=0.05)


def test_no_full_update_is_formed():
    """Forward and backward cost far less than a second d x 3d product would."""
    site = make_site(None)
    big = SiteInfo("qkv", "dense", (256, 768))
    kernel = jnp.zeros((256, 768))
    site = Site(big, kernel, None, lambda x, k, b: x @ k)
    delta = LoRA(rank=4).init(jax.random.key(0), site, ())
    x = jnp.ones((512, 256))

    def flops(f, *args):
        return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]

    def loss(delta):
        return jnp.sum(jnp.sin(delta(site, x, Context())))

    plain = flops(lambda k: jnp.sum(jnp.sin(x @ k)), kernel)
    assert flops(jax.grad(loss), delta) < 1.3 * plain
