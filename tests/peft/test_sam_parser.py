"""SAM-PARSER against the authors' three factors in float64 NumPy, and what its bases depend on."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax import peft
from samjax.hashes import params_sha256
from samjax.models import MODELS, Sam
from samjax.nn import Context, Conv, Dense, Site, SiteInfo
from samjax.peft import RECIPES, LoRA, MethodConfig, PeftSpec, Rule, SAMParser, Stack, sam_parser
from samjax.peft.trees import deltas

RNG = np.random.default_rng(2)
SHAPES = {
    "1x1": (1, 1, 12, 8),
    "3x3": (3, 3, 6, 8),
    "3x3_of_more_outputs": (3, 3, 2, 24),
    "dense": (12, 8),
    "dense_of_more_outputs": (8, 12),
}
TRAINED = ("coefficients", "bases", "both")


def draw(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def make(kernel: np.ndarray, train: str = "coefficients"):
    """A layer, its info and its record."""
    kind = "conv" if kernel.ndim == 4 else "dense"
    info = SiteInfo("layer", kind, kernel.shape)
    layer = Conv(kernel.shape[-1], len(kernel)) if kind == "conv" else Dense(kernel.shape[-1])
    delta = SAMParser(train).init(jax.random.key(0), Site(info, kernel, None, lambda *_: None), ())
    return layer, info, delta


def call(layer, kernel, bias, x, delta=None) -> np.ndarray:
    variables = {"params": {"kernel": kernel, "bias": bias}}
    if delta is not None:
        variables["peft"] = {"delta": delta}
    return np.asarray(layer.apply(*jax.tree.map(jnp.asarray, (variables, x)), Context()))


def move(delta, *names: str):
    return delta.replace(
        **{n: getattr(delta, n) + 0.1 * draw(*getattr(delta, n).shape) for n in names}
    )


def torch_conv(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A convolution of NHWC `x` with torch's (out, in, k, k), as a sum over shifts."""
    k = weight.shape[-1]
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    return sum(
        padded[:, i : i + height, j : j + width] @ weight[:, :, i, j].T
        for i in range(k)
        for j in range(k)
    )


def three_factors(kernel, delta, train: str, bias, x) -> np.ndarray:
    """conv_U(s * conv_V(x)) of the authors' code: V^T (rank, in, k, k), s, U (out, rank, 1, 1)."""
    four = kernel if kernel.ndim == 4 else kernel[None, None]
    weight = np.float64(four).transpose(3, 2, 0, 1)  # torch's layout
    out, width, k, _ = weight.shape
    u, s, vt = np.linalg.svd(weight.reshape(out, -1), full_matrices=False)
    if train != "coefficients":  # the record's own, moved; its rows are in our kernels' order
        u = np.float64(delta.u)
        rows = np.float64(delta.v).reshape(k, k, width, -1)
        vt = rows.transpose(3, 2, 0, 1).reshape(len(s), -1)
    if train != "bases":
        s = s + np.float64(delta.shift)
    x = np.float64(x)
    x = x if kernel.ndim == 4 else x[:, None]
    low = torch_conv(x, vt.reshape(len(s), width, k, k))
    y = torch_conv(s * low, u.reshape(out, len(s), 1, 1)) + bias
    return y if kernel.ndim == 4 else y[:, 0]


@pytest.mark.parametrize("train", TRAINED)
@pytest.mark.parametrize("name", SHAPES)
def test_is_the_authors_three_factors(name, train):
    kernel = draw(*SHAPES[name])
    bias = draw(kernel.shape[-1])
    layer, info, delta = make(kernel, train)
    x = draw(2, 5, 7, kernel.shape[-2]) if kernel.ndim == 4 else draw(2, 9, kernel.shape[-2])
    plain = call(layer, kernel, bias, x)
    if train == "coefficients":
        np.testing.assert_array_equal(call(layer, kernel, bias, x, delta), plain)
    else:
        np.testing.assert_allclose(call(layer, kernel, bias, x, delta), plain, atol=2e-5)
    names = {"coefficients": ("shift",), "bases": ("u", "v"), "both": ("u", "v", "shift")}
    delta = move(delta, *names[train])
    assert {k for k, group in vars(delta.groups()).items() if group == "weights"} == set(
        names[train]
    )
    expected = three_factors(kernel, delta, train, bias, x)
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(call(layer, kernel, bias, x, delta), expected, rtol=1e-4, atol=1e-4)
    merged = delta.merge(info, kernel, bias, Context())
    np.testing.assert_allclose(call(layer, *merged, x), expected, rtol=1e-4, atol=1e-4)


def test_scales_and_stacks_where_coefficients_train():
    kernel, bias, x = draw(12, 8), draw(8), draw(2, 5, 12)
    layer, info, delta = make(kernel)
    delta = move(delta, "shift")
    plain, moved = (call(layer, kernel, bias, x, d) for d in (None, delta))
    twice = call(layer, kernel, bias, x, delta.scaled(2.0))
    np.testing.assert_allclose(twice - plain, 2 * (moved - plain), atol=1e-4)

    stack = Stack((SAMParser(), LoRA(rank=2)))
    site = Site(info, kernel, bias, lambda *_: None)
    both = stack.init(jax.random.key(0), site, ())
    lora = move(both.deltas[1], "b")
    both = both.replace(deltas=(delta, lora))
    sum_of_both = moved + call(layer, kernel, bias, x, lora) - plain
    np.testing.assert_allclose(call(layer, kernel, bias, x, both), sum_of_both, atol=1e-4)
    merged = both.merge(info, kernel, bias, Context())
    np.testing.assert_allclose(call(layer, *merged, x), sum_of_both, atol=1e-4)

    with pytest.raises(peft.NotComposable, match=r"its bases are trained"):
        Stack((SAMParser("bases"), LoRA(rank=2))).init(jax.random.key(0), site, ())
    with pytest.raises(peft.NotComposable, match=r"its bases are trained"):
        make(kernel, "both")[2].scaled(2.0)


@pytest.mark.parametrize("name", ["zeros", "rank one", "orthogonal", "one output"])
def test_degenerate_kernels_have_finite_bases_and_gradients(name):
    kernel = {
        "zeros": np.zeros((12, 8), np.float32),
        "rank one": np.outer(draw(12), draw(8)),
        "orthogonal": np.eye(12, 8, dtype=np.float32),
        "one output": draw(12, 1),
    }[name]
    layer, _, delta = make(kernel)
    x = jnp.asarray(draw(3, 12))

    def loss(shift):
        params = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(kernel.shape[-1])}
        variables = {"params": params, "peft": {"delta": delta.replace(shift=shift)}}
        return jnp.square(layer.apply(variables, x, Context()) - 1).sum()

    assert np.isfinite(jax.grad(loss)(delta.shift)).all()
    for bases in (np.asarray(delta.u), np.asarray(delta.v)):
        np.testing.assert_allclose(bases.T @ bases, np.eye(bases.shape[1]), atol=1e-6)


def test_bases_have_a_sign_and_are_the_same_in_a_trace():
    kernel = draw(3, 3, 4, 8)
    info = SiteInfo("layer", "conv", kernel.shape)

    def init(kernel):
        return SAMParser("both").init(jax.random.key(0), Site(info, kernel, None, jnp.dot), ())

    record = init(kernel)
    u = np.asarray(record.u)
    assert (u[np.abs(u).argmax(axis=0), np.arange(8)] > 0).all()
    assert (np.diff(np.asarray(record.s)) <= 0).all()
    assert jax.tree.all(jax.tree.map(np.array_equal, record, jax.jit(init)(kernel)))
    shapes = jax.eval_shape(init, kernel)
    assert jax.tree.map(jnp.shape, record) == jax.tree.map(lambda a: a.shape, shapes)


def rotated(delta, i: int, j: int, angle: float):
    """The bases i and j, turned together in the plane of both."""
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    bases = {}
    for name in ("u", "v"):
        bases[name] = np.array(getattr(delta, name))
        bases[name][:, [i, j]] = np.float64(bases[name][:, [i, j]]) @ turn
    return delta.replace(**bases)


def change(delta, other) -> float:
    return np.abs(np.subtract(delta.fingerprint(), other.fingerprint())).max()


ON_ONE_CORE = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, numpy as np
from samjax.nn import Site, SiteInfo
from samjax.peft import SAMParser
kernel = np.random.default_rng(0).normal(size=(3, 3, 256, 256)).astype(np.float32)
site = Site(SiteInfo("image_encoder/neck_2", "conv", kernel.shape), kernel, None, None)
for _ in range(3):
    jax.block_until_ready(SAMParser().init(jax.random.key(0), site, ()))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
def test_one_core_is_enough():
    """A callback of JAX that computes the bases waited for the thread that it ran on."""
    subprocess.run([sys.executable, "-c", ON_ONE_CORE], check=True, timeout=120)


def test_fingerprints_ignore_rounding_and_see_rotations():
    delta = make(draw(3, 3, 64, 64))[2]
    assert 0.1 < np.abs(delta.fingerprint()).max() < 100
    rounding = {
        n: getattr(delta, n) * (1 + 1e-6 * draw(*getattr(delta, n).shape)) for n in ("u", "v")
    }
    assert change(delta, delta.replace(**rounding)) < 1e-4
    signs = np.where(np.arange(64) % 3, 1.0, -1.0)
    assert change(delta, delta.replace(u=delta.u * signs, v=delta.v * signs)) < 1e-9
    # As another machine might choose among vectors of singular values that are nearly equal.
    for distance in (1, 2, 3):
        for i in range(64 - distance):
            assert change(delta, rotated(delta, i, i + distance, 0.05)) > 1e-3


@pytest.fixture
def trained(small_model, small_params):
    """A spec that trains coefficients alone, and variables with some."""
    spec = MethodConfig(method="sam_parser", decoder="none").spec()
    tree = peft.attach(spec, small_model, small_params, jax.random.key(0))
    for layer in ("neck_0", "neck_2"):
        tree["image_encoder"][layer]["delta"] = move(tree["image_encoder"][layer]["delta"], "shift")
    return spec, {"params": small_params, "peft": tree}


def test_a_file_holds_the_coefficients_and_gives_the_same_bits(
    trained, small_model, small_params, tmp_path
):
    spec, variables = trained
    path = tmp_path / "a.safetensors"
    saved = peft.save(path, spec, small_model, variables, params_sha256(small_params))
    paths = [f"peft/image_encoder/{layer}/delta/shift" for layer in ("neck_0", "neck_2")]
    assert sorted(saved.tensors) == paths
    assert sum(t.size for t in saved.tensors.values()) == 32 + 32
    assert path.stat().st_size < 5000
    _, tree = peft.load(path, small_model, small_params)
    assert jax.tree.all(jax.tree.map(np.array_equal, tree, variables["peft"]))


def test_a_machine_with_other_bases_refuses_the_file(
    trained, small_model, small_params, tmp_path, monkeypatch
):
    spec, variables = trained
    path = tmp_path / "a.safetensors"
    peft.save(path, spec, small_model, variables, params_sha256(small_params))
    decompose = sam_parser._decompose

    def elsewhere(kernel):
        u, s, v = decompose(kernel)
        turn = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 2)))[0]
        u[:, -2:], v[:, -2:] = u[:, -2:] @ turn, v[:, -2:] @ turn
        return [u, s, v]

    monkeypatch.setattr(sam_parser, "_decompose", elsewhere)
    with pytest.raises(ValueError, match=r"what this machine derives .* image_encoder/neck_"):
        peft.load(path, small_model, small_params)


@pytest.mark.parametrize(
    "model, settings, count",
    [
        ("vit_b", {}, 512),
        ("vit_t", {}, 512),
        ("vit_b", {"train": "bases"}, 2 * 256 * 256 + 256 * 768 + 256 * 9 * 256),
        ("vit_b", {"train": "both"}, 917_504 + 512),
        ("vit_b", {"targets": ("transformer",)}, 12 * 4 * 768),
        ("vit_b", {"targets": ("neck", "transformer")}, 512 + 36_864),
        ("vit_t", {"targets": ("transformer",)}, 4 * (2 * 128 + 6 * 160 + 2 * 320)),
        # Factors, coefficients, and two norms.
        ("vit_b", {"recipe": "code"}, 917_504 + 512 + 2 * 2 * 256),
    ],
)
def test_counts(model, settings, count):
    config = MethodConfig(method="sam_parser", decoder="none", **settings)
    assert peft.report(config.spec(), Sam(MODELS[model])).trainable == count


def test_the_code_trains_the_whole_neck(small_model, small_params):
    spec = MethodConfig(method="sam_parser", recipe="code", decoder="none").spec()
    tree = peft.attach(spec, small_model, small_params, jax.random.key(0))
    assert set(deltas(tree)) == {"image_encoder/neck_0", "image_encoder/neck_2"}
    mask = peft.trainable(spec, small_model, {"params": small_params, "peft": tree})
    encoder = mask["params"]["image_encoder"]
    assert all(jax.tree.leaves([encoder["neck_1"], encoder["neck_3"]]))
    assert not any(jax.tree.leaves([encoder["neck_0"], encoder["blocks_0"]]))


def test_bases_learn_more_slowly_than_coefficients():
    settings = {}, {"train": "bases"}, {"recipe": "code"}, {"targets": ("transformer",)}
    rates = [MethodConfig(method="sam_parser", **s).learning_rate for s in settings]
    assert rates == [1e-3, 1e-4, 1e-4, 1e-3]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"recipe": "code", "train": "bases"}, r"'code' trains the whole neck; leave out train"),
        ({"recipe": "code", "train": "coefficients"}, "trains the whole neck; leave out train"),
        ({"recipe": "code", "targets": ("neck",)}, "trains the whole neck; leave out train"),
        ({"targets": ("q",)}, r"targets must name some of neck, transformer, not 'q'$"),
        ({"targets": ()}, r"targets must name some of neck, transformer, not nothing$"),
        ({"rank": 4}, r"'sam_parser' has no setting rank: it has recipe, train, targets$"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MethodConfig(method="sam_parser", **settings)


def test_bad_names_of_settings():
    with pytest.raises(ValueError, match=r"recipe must be one of paper, code, not 'thesis'$"):
        RECIPES["sam_parser"].rules(recipe="thesis")
    with pytest.raises(ValueError, match=r"one of coefficients, bases, both, not 'all'$"):
        SAMParser("all")


def test_bad_rules_and_weights(small_model, small_params):
    spec = PeftSpec((Rule("image_encoder/**/qkv[q]", SAMParser()),))
    with pytest.raises(ValueError, match=r"whole kernel of .*qkv; leave out the segments \[q\]$"):
        peft.attach(spec, small_model, small_params, jax.random.key(0))
    with pytest.raises(ValueError, match=r"kernel of layer is not finite .* convert"):
        make(np.full((3, 3, 2, 2), np.nan, np.float32))
