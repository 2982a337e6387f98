"""Conv-LoRA against PyTorch's own operators and against a float64 NumPy version."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.flops import count_flops
from samjax.models import MODELS, Sam
from samjax.nn import Context, Segments, Site, SiteInfo
from samjax.peft import ConvLoRA, MethodConfig, NotMergeable, PeftSpec, Rule, attach, report
from samjax.peft.conv_lora import convolved, imbalance
from samjax.peft.report import Report

RNG = np.random.default_rng(4)
PATH = "image_encoder/blocks_0/attn/qkv"
# Maps of windowed and of global blocks, maps that are not square, maps smaller than the taps reach.
SHAPES = [(6, 7, 7), (2, 16, 16), (3, 5, 9), (3, 1, 2)]


def make_site(width: int = 12) -> Site:
    info = SiteInfo(PATH, "dense", (width, 24), segments=Segments(("q", "k", "v"), "thirds", 2))
    kernel = jnp.asarray(RNG.normal(size=info.kernel_shape), jnp.float32)
    bias = jnp.asarray(RNG.normal(size=24), jnp.float32)
    return Site(info, kernel, bias, lambda x, k, b: x @ k + b)


SITE = make_site()


@jax.jit
def call(delta, x, rng=None):
    """The output of `SITE`, and what was added to the loss."""
    losses = []
    site = dataclasses.replace(SITE, add_loss=losses.append)
    return delta(site, x, Context(rng=rng)), losses


def make_delta(segments=(), **settings):
    """A record none of whose arrays is zero."""
    delta = ConvLoRA(**settings).init(jax.random.key(0), SITE, segments)
    names = ("b", "bias", "w_gate", "w_noise")
    drawn = {name: RNG.normal(size=getattr(delta, name).shape) for name in names}
    return delta.replace(**{k: jnp.asarray(v, jnp.float32) for k, v in drawn.items()})


def draw_map(batch, height, width, channels=12):
    return jnp.asarray(RNG.normal(size=(batch, height, width, channels)), jnp.float32)


# The formula in float64 NumPy, a pixel at a time where that is plainest.


def cubic(t: float) -> float:
    """The cubic convolution kernel with a = -3/4 (Keys 1981)."""
    t = abs(t)
    if t <= 1:
        return 1.25 * t**3 - 2.25 * t**2 + 1
    return -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def resize_axis(z: np.ndarray, size: int) -> np.ndarray:
    """Bicubic along axis 0: half-pixel centres, the border repeated, no antialiasing."""
    rows = []
    for out in range(size):
        source = (out + 0.5) * len(z) / size - 0.5
        taps = range(math.floor(source) - 1, math.floor(source) + 3)
        rows.append(sum(cubic(source - tap) * z[min(max(tap, 0), len(z) - 1)] for tap in taps))
    return np.stack(rows)


def resize(z: np.ndarray, height: int, width: int) -> np.ndarray:
    return resize_axis(resize_axis(z, height).swapaxes(0, 1), width).swapaxes(0, 1)


def numpy_expert(z: np.ndarray, scale: int, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    height, width = z.shape[:2]
    u = resize(z, scale * height, scale * width)
    padded = np.pad(u, ((1, 1), (1, 1), (0, 0)))
    u = bias + sum(
        padded[i : i + u.shape[0], j : j + u.shape[1]] @ kernel[i, j]
        for i in range(3)
        for j in range(3)
    )
    u = u * 0.5 * (1 + np.vectorize(math.erf)(u / math.sqrt(2)))
    return resize(u, height, width)


def numpy_conv_lora(delta, x, chosen=None) -> np.ndarray:
    x = np.asarray(x, np.float64)
    z = x @ np.float64(delta.a)
    if chosen is None:
        chosen = (z.mean((1, 2)) @ np.float64(delta.w_gate)).argmax(1)
    kernel, bias = np.float64(delta.kernel), np.float64(delta.bias)
    z = z + np.stack(
        [numpy_expert(m, e + 1, kernel[e], bias[e]) for m, e in zip(z, chosen, strict=True)]
    )
    update = float(delta.scale) * np.stack([z @ np.float64(part) for part in delta.b])
    y = x @ np.float64(SITE.kernel) + np.float64(SITE.bias)
    if not delta.segments:
        return y + update[0]
    thirds = np.split(y, 3, axis=-1)
    for name, part in zip(delta.segments, update, strict=True):
        thirds["qkv".index(name)] += part
    return np.concatenate(thirds, axis=-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("experts", [1, 2, 8])
def test_output(shape, experts):
    delta, x = make_delta(experts=experts), draw_map(*shape)
    expected = numpy_conv_lora(delta, x)
    np.testing.assert_allclose(call(delta, x)[0], expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("segments", [("q", "v"), ("k",)])
def test_segments_share_one_first_factor(segments):
    delta = make_delta(segments, experts=3, rank=2)
    assert delta.a.shape == (12, 2) and delta.b.shape == (len(segments), 2, 8)
    x = draw_map(2, 4, 6)
    expected = numpy_conv_lora(delta, x)
    np.testing.assert_allclose(call(delta, x)[0], expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_expert_and_its_gradient_are_those_of_torch(shape):
    torch = pytest.importorskip("torch")
    from torch.nn import functional as F

    experts, rank = 8, 3
    z = draw_map(*shape, channels=rank)
    weight = draw_map(shape[0], *shape[1:], channels=rank)  # of the outputs, in the loss
    kernel = jnp.asarray(0.3 * RNG.normal(size=(experts, 3, 3, rank, rank)), jnp.float32)
    bias = jnp.asarray(RNG.normal(size=(experts, rank)), jnp.float32)

    @jax.jit
    def run(z, chosen, kernel, bias):
        def loss(z, kernel, bias):
            out = convolved(z, chosen, kernel, bias)
            return jnp.sum(out * weight), out

        return jax.grad(loss, (0, 1, 2), has_aux=True)(z, kernel, bias)

    for i in range(experts):
        scale, size = i + 1, shape[1:]
        conv = torch.nn.Conv2d(rank, rank, 3, padding=1).double()
        kernel_t = np.array(kernel[i], np.float64).transpose(3, 2, 0, 1)
        conv.weight.data = torch.tensor(np.ascontiguousarray(kernel_t))
        conv.bias.data = torch.tensor(np.array(bias[i], np.float64))
        z_t = torch.tensor(np.array(z, np.float64).transpose(0, 3, 1, 2), requires_grad=True)
        u = F.interpolate(z_t, scale_factor=scale, mode="bicubic") if scale > 1 else z_t
        u = F.gelu(conv(u))
        u = F.interpolate(u, size=size, mode="bicubic") if scale > 1 else u
        (u * torch.tensor(np.array(weight, np.float64).transpose(0, 3, 1, 2))).sum().backward()

        (dz, dkernel, dbias), out = run(z, jnp.full(shape[0], i), kernel, bias)
        tolerance = {"rtol": 1e-4, "atol": 1e-4}
        np.testing.assert_allclose(out, u.detach().numpy().transpose(0, 2, 3, 1), **tolerance)
        np.testing.assert_allclose(dz, z_t.grad.numpy().transpose(0, 2, 3, 1), **tolerance)
        expected = conv.weight.grad.numpy().transpose(2, 3, 1, 0)
        np.testing.assert_allclose(dkernel[i], expected, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(dbias[i], conv.bias.grad.numpy(), rtol=1e-4, atol=1e-3)
        others = np.arange(experts) != i
        assert not dkernel[others].any() and not dbias[others].any()


def test_start():
    site = make_site(width=48)
    delta = ConvLoRA().init(jax.random.key(0), site, ())
    assert not any(x.any() for x in (delta.b, delta.bias, delta.w_gate, delta.w_noise))
    assert float(delta.scale) == pytest.approx(32 / 3)
    for drawn, fan_in in ((delta.a, 48), (delta.kernel, 27)):  # both Kaiming-uniform, a = sqrt 5
        bound = fan_in**-0.5
        assert 0.95 * bound < np.abs(drawn).max() <= bound
        assert abs(float(drawn.std()) * math.sqrt(3) / bound - 1) < 0.15
    x = draw_map(2, 4, 4, 48)
    np.testing.assert_array_equal(delta(site, x, Context()), site(x))


def test_noise_chooses_evenly_at_first_and_its_deviation_is_learnt():
    site = make_site(width=2)
    delta = ConvLoRA(rank=2, experts=4).init(jax.random.key(0), site, ())
    delta = delta.replace(a=jnp.eye(2))
    count = 4000
    maps = jnp.ones((count, 1, 1, 2))

    @jax.jit
    def choose_with(delta, rng):
        return delta._choose(maps, site, Context(rng=rng))

    def choose(delta, seed):
        return np.asarray(choose_with(delta, jax.random.key(seed)))

    even = np.bincount(choose(delta, 0), minlength=4) / count
    assert np.abs(even - 0.25).max() < 0.03
    assert not np.array_equal(choose(delta, 0), choose(delta, 1))
    # Logits 1, 0, 0, 0, noise of deviation log(1 + e^w) + 0.01: for w = -20 the first wins always.
    gate = jnp.zeros((2, 4)).at[:, 0].set(0.5)
    quiet = delta.replace(w_gate=gate, w_noise=jnp.full((2, 4), -10.0))
    assert not choose(quiet, 0).any()
    loud = delta.replace(w_gate=gate, w_noise=jnp.zeros((2, 4)))
    spread = math.log(2) + 0.01
    draws = np.random.default_rng(0).normal(size=(200_000, 4)) * spread + [1, 0, 0, 0]
    expected = np.bincount(draws.argmax(1), minlength=4) / len(draws)
    assert np.abs(np.bincount(choose(loud, 0), minlength=4) / count - expected).max() < 0.03
    # Without a key there is no noise: the largest logit.
    assert not choose_with(loud, None).any()


def numpy_imbalance(clean, noisy, spread) -> float:
    """Shazeer et al. 2017, equations 6 to 11, for k = 1."""
    importance, load = np.zeros(clean.shape[1]), np.zeros(clean.shape[1])
    for h, noisy_h, deviation in zip(clean, noisy, spread, strict=True):
        importance[noisy_h.argmax()] += 1
        for expert in range(len(h)):
            rest = np.delete(noisy_h, expert).max()
            load[expert] += 0.5 * (1 + math.erf((h[expert] - rest) / deviation[expert] / 2**0.5))
    return sum(x.var(ddof=1) / (x.mean() ** 2 + 1e-10) for x in (importance, load))


@pytest.mark.parametrize("items, experts", [(25, 8), (1, 8), (6, 2)])
def test_imbalance(items, experts):
    clean = RNG.normal(size=(items, experts))
    spread = RNG.uniform(0.5, 1.5, size=(items, experts))
    noisy = clean + spread * RNG.normal(size=(items, experts))
    value = imbalance(*(jnp.asarray(x, jnp.float32) for x in (clean, noisy, spread)))
    assert float(value) == pytest.approx(numpy_imbalance(clean, noisy, spread), rel=1e-4)


def test_imbalance_at_its_extremes():
    one = jnp.asarray(RNG.normal(size=(5, 1)), jnp.float32)
    assert float(imbalance(one, one, jnp.ones((5, 1)))) == 0  # a single expert needs no balance
    even = 9.0 * jnp.eye(4)
    assert float(imbalance(even, even, 0.1 * jnp.ones((4, 4)))) == pytest.approx(0, abs=1e-5)
    all_first = jnp.tile(even[:1], (4, 1))
    assert float(imbalance(all_first, all_first, 0.1 * jnp.ones((4, 4)))) == pytest.approx(8)


@jax.jit
def gradients(delta, x, of_task: float, of_balance: float):
    def loss(delta):
        y, losses = call(delta, x, jax.random.key(5))
        return of_task * jnp.sum(jnp.square(y)) + of_balance * losses[0]

    return jax.grad(loss)(delta)


def test_the_gate_learns_from_the_balance_loss_alone():
    delta, x = make_delta(experts=4), draw_map(6, 4, 4)
    of_task = gradients(delta, x, 1.0, 0.0)
    assert not of_task.w_gate.any() and not of_task.w_noise.any()
    assert all(g.any() for g in (of_task.a, of_task.b, of_task.kernel, of_task.bias))
    of_balance = gradients(delta, x, 0.0, 1.0)
    assert of_balance.w_gate.any() and of_balance.w_noise.any()
    assert of_balance.a.any()  # through the mean of z, as in the authors' code
    assert not any(g.any() for g in (of_balance.b, of_balance.kernel, of_balance.bias))


def test_the_balance_loss_is_there_while_training_only():
    delta, x, key = make_delta(experts=4, balance=0.5), draw_map(6, 4, 4), jax.random.key(0)
    plain, losses = call(delta, x)
    assert not losses
    np.testing.assert_array_equal(plain, call(delta, x)[0])
    noisy, (loss,) = call(delta, x, key)
    assert not np.allclose(plain, noisy) and loss > 0
    _, (twice,) = call(delta.replace(balance=jnp.float32(1.0)), x, key)
    assert float(twice) == pytest.approx(2 * float(loss))


def test_training_computes_the_chosen_expert():
    """What training with noise gives is the formula's for some choice of expert of each map."""
    delta, x = make_delta(experts=4), draw_map(6, 4, 4)
    y = np.asarray(call(delta, x, jax.random.key(3))[0])
    outputs = [numpy_conv_lora(delta, x, chosen=[e] * 6) for e in range(4)]
    for i in range(6):
        assert sum(np.allclose(y[i], out[i], rtol=1e-3, atol=1e-3) for out in outputs) == 1


def test_scaled_and_not_merged():
    delta, x = make_delta(experts=4), draw_map(6, 4, 4)
    change = call(delta, x)[0] - SITE(x)
    half = call(delta.scaled(0.5), x)[0] - SITE(x)
    np.testing.assert_allclose(half, 0.5 * change, atol=1e-4)
    with pytest.raises(NotMergeable, match="neighbouring tokens"):
        delta.merge(SITE.info, SITE.kernel, SITE.bias, Context())


def test_bfloat16_computes_the_experts_in_float32():
    delta, x = make_delta(), draw_map(6, 7, 7).astype(jnp.bfloat16)
    update = jax.jit(lambda delta, x: delta.update(SITE, x, Context()))
    y, exact = update(delta, x), update(delta, x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    error = np.abs(np.asarray(y, np.float32) - exact).max()
    assert error < 0.05 * np.abs(exact).max()


def test_one_trace_for_maps_of_one_size():
    traces = 0

    @jax.jit
    def run(delta, x):
        nonlocal traces
        traces += 1
        return delta(SITE, x, Context())

    for _ in range(3):
        run(make_delta(experts=2), draw_map(2, 4, 4))
    assert traces == 1


@pytest.mark.parametrize("shape", [(25, 14, 14), (1, 64, 64)])
def test_cost(shape):
    """The experts take less than 1 % of the products of the site itself, ViT-B's qkv."""
    info = SiteInfo(PATH, "dense", (768, 2304))
    kernel = jax.ShapeDtypeStruct(info.kernel_shape, jnp.float32)
    delta = jax.eval_shape(
        lambda: ConvLoRA().init(jax.random.key(0), Site(info, None, None, lambda x, k, b: x), ())
    )
    x = jax.ShapeDtypeStruct((*shape, 768), jnp.float32)

    def loss(delta, x, kernel):
        site = Site(info, kernel, None, lambda x, k, b: x @ k)
        return jnp.sum(jnp.square(delta(site, x, Context(rng=jax.random.key(0)))))

    plain = count_flops(jax.grad(lambda x, k: jnp.sum(jnp.square(x @ k))), x, kernel)
    lora = sum(
        6 * math.prod(shape) * n for n in (768 * 3, 3 * 2304)
    )  # both factors, forward and both gradients
    whole = count_flops(jax.grad(loss, (0, 1)), delta, x, kernel)
    assert whole - plain - lora < 0.01 * plain


def counts(method: str, **settings) -> Report:
    config = MethodConfig(method=method, decoder="mask", **settings)
    return report(config.spec(), Sam(MODELS["vit_h"]))


def test_counts_of_the_paper():
    lora, conv_lora = counts("lora", rank=3, targets=("qkv",)), counts("conv_lora")
    assert lora.adapter == 32 * (1280 * 3 + 3 * 3840) == 491_520
    assert conv_lora.adapter - lora.adapter == 32 * (8 * (9 * 9 + 3) + 2 * 3 * 8) == 23_040
    for found, published in ((lora, 4.00), (conv_lora, 4.02)):
        assert found.decoder == 3_506_304
        # The paper's decoder has one mask token in place of four.
        assert round((found.trainable - 3 * 256) / 1e6, 2) == published
        assert round(found.trainable / 1e6, 2) == published


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"experts": 0}, "experts must be at least 1, not 0"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"alpha": math.nan}, "alpha must be positive"),
        ({"balance": -1.0}, "balance must be at least 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        ConvLoRA(**settings)


def test_a_site_that_does_not_suit():
    with pytest.raises(ValueError, match=f"rank 13 is more than {PATH} can have, 12"):
        ConvLoRA(rank=13).init(jax.random.key(0), SITE, ())
    info = dataclasses.replace(SITE.info, path="mask_decoder/transformer/layers_0/mlp/lin1")
    with pytest.raises(ValueError, match="lin1 sees a list of tokens, and a convolution needs a"):
        ConvLoRA().init(jax.random.key(0), dataclasses.replace(SITE, info=info), ())
    with pytest.raises(ValueError, match=r"targets must name some of qkv, q, .* not 'decoder'"):
        MethodConfig(method="conv_lora", targets=("decoder",))
    with pytest.raises(ValueError, match="name it without them"):
        MethodConfig(method="conv_lora", targets=("qkv", "q"))


def test_every_linear_layer_of_both_encoders_has_a_map(small_model):
    spec = PeftSpec((Rule("image_encoder/**", ConvLoRA(experts=2)),))
    for model in (small_model, Sam(MODELS["vit_t"])):
        params = model.init_params_shapes()
        tree = jax.eval_shape(
            lambda p, model=model: attach(spec, model, p, jax.random.key(0)), params
        )
        model.sites({"params": params, "peft": tree})
