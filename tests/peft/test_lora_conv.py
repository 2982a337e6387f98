"""LoRA on convolutions against a float64 NumPy version, and against HuggingFace's peft."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax import peft
from samjax.models import MODELS, Sam
from samjax.nn import Context, Conv, Site, SiteInfo
from samjax.peft import LoRA, LoRAConv, MethodConfig
from samjax.peft.resolve import resolve

RNG = np.random.default_rng(3)
# Kernel size and stride: TinyViT's 1x1 and 3x3 of stride 1 and 2, and a patch embedding.
WINDOWS = [(1, 1), (3, 1), (3, 2), (4, 4)]


def normal(*shape) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


class OneConv(nn.Module):
    """A model of a single convolution, under the name conv."""

    kernel_size: int
    stride: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        conv = Conv(7, self.kernel_size, self.stride, self.use_bias, name="conv")
        return conv(x, Context())


def make(kernel_size: int, **settings):
    """(site as `init` sees it, a record whose arrays are all away from their start)."""
    info = SiteInfo("conv", "conv", (kernel_size, kernel_size, 5, 7))
    site = Site(info, normal(*info.kernel_shape), normal(7), lambda *_: None)
    delta = LoRAConv(rank=3, alpha=6.0, **settings).init(jax.random.key(0), site, ())
    return site, delta.replace(b=normal(3, 7))


def run(site: Site, stride: int, x, delta=None) -> jax.Array:
    variables = {"params": {"conv": {"kernel": site.kernel, "bias": site.bias}}}
    if delta is not None:
        variables["peft"] = {"conv": {"delta": delta}}
    return OneConv(site.kernel.shape[0], stride).apply(variables, x)


def numpy_conv(x, kernel, stride: int) -> np.ndarray:
    """A convolution, one window after another, as torch's Conv2d has it."""
    size = kernel.shape[0]
    pad = 0 if size == stride else (size - 1) // 2
    x = np.pad(np.float64(x), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
    y = np.zeros((x.shape[0], rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
            y[:, i, j] = np.einsum("bhwi,hwio->bo", window, np.float64(kernel))
    return y


@pytest.mark.parametrize("size, stride", WINDOWS)
def test_formula_and_merge(size, stride):
    site, delta = make(size)
    x = normal(2, 8, 12, 5)
    plain = numpy_conv(x, site.kernel, stride) + np.float64(site.bias)
    np.testing.assert_allclose(run(site, stride, x), plain, rtol=1e-4, atol=1e-4)
    # Two convolutions, with alpha / rank = 2.
    expected = plain + 2 * numpy_conv(numpy_conv(x, delta.a, stride), delta.b[None, None], 1)
    np.testing.assert_allclose(run(site, stride, x, delta), expected, rtol=1e-4, atol=1e-4)
    kernel, bias = delta.merge(site.info, site.kernel, site.bias, Context())
    np.testing.assert_allclose(
        kernel,
        np.float64(site.kernel)
        + 2 * np.einsum("hwir,ro->hwio", np.float64(delta.a), np.float64(delta.b)),
        atol=1e-5,
    )
    assert bias is site.bias
    merged = run(Site(site.info, kernel, bias, site.apply), stride, x)
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size, stride", WINDOWS)
def test_the_start_is_the_identity(size, stride):
    site, _ = make(size)
    delta = LoRAConv(rank=3).init(jax.random.key(0), site, ())
    x = normal(2, 8, 12, 5)
    np.testing.assert_array_equal(run(site, stride, x, delta), run(site, stride, x))
    bound = (size * size * 5) ** -0.5  # torch counts the whole window as inputs
    a = np.abs(delta.a)
    assert a.max() <= bound and a.max() > 0.8 * bound
    assert not delta.b.any() and float(delta.scale) == 1.0


def test_scales():
    _, delta = make(3)
    _, stabilized = make(3, rank_stabilized=True)
    assert float(delta.scale) == 2.0 and float(delta.scaled(0.5).scale) == 1.0
    np.testing.assert_allclose(float(stabilized.scale), 6 / np.sqrt(3), rtol=1e-6)


def test_dropout_needs_a_key():
    site, delta = make(1, dropout=0.5)
    x = normal(2, 4, 4, 5)
    made = Site(site.info, site.kernel, site.bias, lambda x, k, b: x @ k[0, 0])
    plain = delta.update(made, x, Context())
    noisy = delta.update(made, x, Context(rng=jax.random.key(1)))
    np.testing.assert_allclose(plain, 2 * x @ delta.a[0, 0] @ delta.b, rtol=1e-4, atol=1e-4)
    assert not np.allclose(plain, noisy)


def test_a_layer_without_bias_stays_without():
    info = SiteInfo("conv", "conv", (3, 3, 5, 7), use_bias=False)
    site = Site(info, normal(3, 3, 5, 7), None, lambda *_: None)
    delta = LoRAConv(rank=2).init(jax.random.key(0), site, ())
    variables = {"params": {"conv": {"kernel": site.kernel}}, "peft": {"conv": {"delta": delta}}}
    assert OneConv(3, 1, use_bias=False).apply(variables, normal(1, 4, 4, 5)).shape == (1, 4, 4, 7)
    assert delta.merge(info, site.kernel, None, Context())[1] is None


def convolutions(name: str, **settings) -> dict[str, tuple[int, ...]]:
    """The shapes of the encoder's convolutions that a method adapts."""
    sites = resolve(MethodConfig(**settings).spec(), Sam(MODELS[name])).sites
    return {path: info.kernel_shape for path, (info, *_) in sites.items() if info.kind == "conv"}


@pytest.mark.parametrize("name, sites", [("vit_b", 3), ("vit_h", 3), ("vit_t", 14)])
def test_every_convolution_of_the_encoder_and_no_other(name, sites):
    found = convolutions(name, method="lora_conv")
    assert len(found) == sites and all(path.startswith("image_encoder/") for path in found)
    assert {"image_encoder/neck_0", "image_encoder/neck_2"} <= set(found)
    counts = peft.report(MethodConfig(method="lora_conv").spec(), Sam(MODELS[name]))
    assert counts.adapter == sum(4 * (k * k * i + o) for k, _, i, o in found.values())


def test_count_on_vit_b():
    counts = peft.report(MethodConfig(method="lora_conv").spec(), Sam(MODELS["vit_b"]))
    patch_embed, neck_0, neck_2 = 4 * (768 + 768), 4 * (768 + 256), 4 * (9 * 256 + 256)
    assert counts.adapter == patch_embed + neck_0 + neck_2 == 20_480


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_lora_reaches_convolutions_by_a_target(method):
    targets = ("q", "v", "conv")
    assert convolutions("vit_t", method=method, targets=targets) == convolutions(
        "vit_t", method="lora_conv"
    )
    rules = MethodConfig(method=method, targets=targets, rank=2, alpha=3.0, dropout=0.1).spec()
    settings = (2, 3.0, 0.1, method == "rslora")
    assert [rule.config for rule in rules.rules[:2]] == [LoRA(*settings), LoRAConv(*settings)]
    assert not convolutions("vit_t", method=method)


def test_bad_input():
    site, _ = make(1)
    with pytest.raises(ValueError, match=r"^LoRAConv: rank 6 is more than conv can have, 5"):
        LoRAConv(rank=6).init(jax.random.key(0), site, ())
    with pytest.raises(ValueError, match=r"^LoRAConv: alpha must be positive and finite, not -1"):
        LoRAConv(alpha=-1.0)


@pytest.mark.parametrize("size, stride", WINDOWS)
def test_huggingface_computes_the_same(size, stride):
    torch = pytest.importorskip("torch")
    huggingface = pytest.importorskip("peft")
    site, delta = make(size)
    pad = 0 if size == stride else (size - 1) // 2
    module = torch.nn.ModuleDict({"layer": torch.nn.Conv2d(5, 7, size, stride, pad)})

    def tensor(kernel):
        return torch.from_numpy(np.array(kernel).transpose(3, 2, 0, 1))

    with torch.no_grad():
        module["layer"].weight.copy_(tensor(site.kernel))
        module["layer"].bias.copy_(torch.from_numpy(np.array(site.bias)))
    config = huggingface.LoraConfig(r=3, lora_alpha=6, target_modules=["layer"])
    layer = huggingface.inject_adapter_in_model(config, module)["layer"]
    x = normal(2, 8, 12, 5)
    images = torch.from_numpy(np.array(x).transpose(0, 3, 1, 2))
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(tensor(delta.a))
        layer.lora_B["default"].weight.copy_(tensor(delta.b[None, None]))
        y = layer(images).numpy().transpose(0, 2, 3, 1)
        update = layer.get_delta_weight("default").numpy().transpose(2, 3, 1, 0)
    np.testing.assert_allclose(run(site, stride, x, delta), y, rtol=1e-4, atol=1e-4)
    ours = delta.kernel_update(site.info, site.kernel, Context())
    np.testing.assert_allclose(ours, update, rtol=1e-4, atol=1e-5)
