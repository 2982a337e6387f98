"""TA-LoRA's tensor against NumPy in float64, and its regularisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax import peft
from samjax.models import MODELS, Sam
from samjax.nn import Context, Segments, Site, SiteInfo
from samjax.peft import PeftSpec, Rule
from samjax.peft.ta_lora import TALoRA, orthogonality

RNG = np.random.default_rng(0)
WIDTH, PART = 10, 4


def site(segments=None):
    kernel = jnp.asarray(RNG.normal(size=(WIDTH, 3 * PART)), jnp.float32)
    info = SiteInfo("image_encoder/blocks_0/attn/qkv", "dense", kernel.shape, segments=segments)
    return Site(info, kernel, None, lambda x, kernel, bias: x @ kernel)


def record(settings, segments=(), where=None):
    delta = settings.init(jax.random.key(1), where or site(), segments)
    return jax.tree.map(
        lambda leaf: leaf + 0.5 * jnp.asarray(RNG.normal(size=leaf.shape), leaf.dtype), delta
    )


@pytest.mark.parametrize("segments", [(), ("q", "v")])
def test_updates_are_slices_of_a_tucker_tensor(segments):
    """The tensor (in, out, tasks) in one einsum; what is not adapted stays as it is."""
    where = site(Segments(("q", "k", "v"), "thirds", 2) if segments else None)
    delta = record(TALoRA(3, rank_in=4, rank_out=5, rank_task=2), segments, where)
    u2 = np.concatenate([np.float64(part).T for part in delta.u2])
    tensor = np.einsum(
        "pqv,ip,jq,tv->ijt",
        *(np.float64(x) for x in (delta.core, delta.u1)),
        u2,
        np.float64(delta.u3),
    )
    x = RNG.normal(size=(2, 7, WIDTH)).astype(np.float32)
    for task in range(3):
        dense = float(delta.scale) * tensor[..., task]
        if segments:
            parts = np.split(dense, 2, axis=1)
            dense = np.concatenate([parts[0], np.zeros_like(parts[0]), parts[1]], axis=1)
        expected = x @ (np.float64(where.kernel) + dense)
        ctx = Context(task=jnp.int32(task))
        np.testing.assert_allclose(
            delta(where, jnp.asarray(x), ctx), expected, rtol=1e-4, atol=1e-3
        )
        kernel, _ = delta.merge(where.info, where.kernel, None, ctx)
        np.testing.assert_allclose(kernel, np.float64(where.kernel) + dense, rtol=1e-4, atol=1e-4)


def test_it_starts_as_the_identity():
    where = site()
    x = jnp.asarray(RNG.normal(size=(2, WIDTH)), jnp.float32)
    for start in ("scaled", "normal"):
        delta = TALoRA(2, 4, 4, 2, init_scale=start).init(jax.random.key(0), where, ())
        np.testing.assert_array_equal(delta(where, x, Context(task=1)), where(x))
        assert np.std(delta.u1) == pytest.approx(WIDTH**-0.5 if start == "scaled" else 1, rel=0.4)


def test_orthogonality_is_its_formula():
    segments = ("q", "k", "v")
    where = site(Segments(segments, "thirds", 2))
    delta = record(TALoRA(3, 4, 5, 2), segments, where)
    u1, u2 = np.float64(delta.u1), np.concatenate([np.float64(part).T for part in delta.u2])
    slices = [np.float64(delta.core)[..., v] for v in range(2)]
    expected = [np.linalg.norm(a.T @ a - np.eye(a.shape[1])) for a in (u1, u2, *slices)]
    np.testing.assert_allclose(delta.departures(), expected, rtol=1e-5)
    tree = {"a": {"delta": delta}, "b": {"delta": delta}}
    np.testing.assert_allclose(orthogonality(tree), np.mean(expected), rtol=1e-5)
    assert orthogonality({}) is None
    half = {"a": {"delta": delta.replace(orthogonality=0.5)}}
    np.testing.assert_allclose(orthogonality(half), np.mean(expected) / 2, rtol=1e-5)


def test_its_gradient_is_finite_where_the_core_is_zero():
    delta = TALoRA(2, 4, 4, 2).init(jax.random.key(0), site(), ())
    grads = jax.grad(lambda d: orthogonality({"a": {"delta": d}}))(delta)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    exact = delta.replace(u1=jnp.eye(WIDTH)[:, :4])
    assert np.isfinite(jax.grad(lambda d: orthogonality({"a": {"delta": d}}))(exact).u1).all()


@pytest.mark.parametrize(("tasks", "count"), [(2, 3_244_224), (3, 3_244_320), (4, 3_244_416)])
def test_counts_of_vit_l(tasks, count):
    """The successor's sides, 32, 32 and 4, on the fused projection of 24 layers."""
    spec = PeftSpec((Rule("image_encoder/**/attn/qkv", TALoRA(tasks)),))
    assert peft.report(spec, Sam(MODELS["vit_l"])).adapter == count


def test_without_a_task_it_says_so():
    where = site()
    delta = record(TALoRA(2, 4, 4, 2))
    with pytest.raises(ValueError, match="adapts to a task: give its index"):
        delta(where, jnp.zeros((1, WIDTH)), Context())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": 0}, "tasks must be at least 1"),
        ({"tasks": 2, "rank_task": 0}, "rank_task must be at least 1"),
        ({"tasks": 2, "scale": 0.0}, "scale must be positive"),
        ({"tasks": 2, "init_scale": "x"}, "init_scale must be scaled or normal"),
        ({"tasks": 2, "dropout": 1.0}, "dropout must be in"),
        ({"tasks": 2, "orthogonality": -1.0}, "orthogonality must not be negative"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TALoRA(**settings)


def test_ranks_that_no_layer_has():
    with pytest.raises(ValueError, match="rank 11 is more than"):
        TALoRA(2, rank_in=11, rank_out=4).init(jax.random.key(0), site(), ())
    with pytest.raises(ValueError, match="rank 13 is more than"):
        TALoRA(2, rank_in=4, rank_out=13).init(jax.random.key(0), site(), ())
