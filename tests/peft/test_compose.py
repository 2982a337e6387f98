"""Adapters together: what two of them compute is the sum of what each adds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from samjax import peft
from samjax.hashes import params_sha256
from samjax.models import Prompts
from samjax.nn import Context, Site, SiteInfo
from samjax.peft import (
    DoRA,
    FacT,
    LoRA,
    LoRAConv,
    NotComposable,
    PeftSpec,
    Rule,
    Stack,
)
from samjax.peft.delta import Delta

QV = "image_encoder/**/attn/qkv[q,v]"
PROJ = "image_encoder/**/attn/proj"


def trained(model, params, rules, seed):
    """An adapter whose every array moved, as training moves it."""
    tree = peft.attach(PeftSpec(rules), model, params, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + 0.05 * jnp.asarray(rng.normal(size=x.shape), x.dtype) if x.ndim else x, tree
    )


@pytest.fixture(scope="module")
def small_params(small_params):
    return jax.tree.map(jnp.asarray, small_params)


@pytest.fixture(scope="module")
def adapters(small_model, small_params):
    """One on q and v, the other on q and v and on proj."""
    first = trained(small_model, small_params, (Rule(QV, LoRA(2)),), 1)
    second = trained(small_model, small_params, (Rule(QV, LoRA(3)), Rule(PROJ, LoRA(2))), 2)
    return first, second


@pytest.fixture(scope="module")
def encode(small_model, small_params):
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), np.uint8))
    size = jnp.full((2, 2), 128, jnp.int32)

    def run(tree, params=small_params):
        variables = {"params": params} if tree is None else {"params": params, "peft": tree}
        apply = jax.jit(lambda v: small_model.apply(v, images, size, method="encode"))
        return np.asarray(apply(variables))

    return run


def site_of(kernel) -> Site:
    info = SiteInfo("somewhere", "dense", kernel.shape)
    return Site(info, kernel, None, lambda x, k, b: x @ k)


def test_a_stack_adds_updates():
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(size=(8, 6)), rng.normal(size=(5, 8))
    site = site_of(jnp.asarray(kernel, jnp.float32))
    record = Stack((LoRA(2, alpha=6.0), LoRA(3))).init(jax.random.key(0), site, ())
    moved = tuple(
        d.replace(b=jnp.asarray(rng.normal(size=d.b.shape), jnp.float32)) for d in record.deltas
    )
    record = record.replace(deltas=moved)
    low_rank = sum(
        scale * np.float64(d.a[0]) @ np.float64(d.b[0])
        for scale, d in zip((3.0, 1.0), moved, strict=True)
    )
    for factor in (1.0, -0.5):
        scaled = record.scaled(factor)
        expected = x @ (kernel + factor * low_rank)
        np.testing.assert_allclose(scaled(site, jnp.float32(x), Context()), expected, atol=1e-5)
        merged, bias = scaled.merge(site.info, site.kernel, None, Context())
        np.testing.assert_allclose(merged, kernel + factor * low_rank, atol=1e-6)
        assert bias is None


def test_stacked_deltas_drop_apart():
    """Two equal deltas with dropout must not zero the same inputs."""
    site = site_of(jnp.eye(64))
    record = Stack((LoRA(2, dropout=0.5), LoRA(2, dropout=0.5))).init(jax.random.key(0), site, ())
    same = record.deltas[0].replace(b=jnp.ones((1, 2, 64)))
    record = record.replace(deltas=(same, same))
    ctx = Context(rng=jax.random.key(1))
    x = jnp.ones((3, 64))
    assert not np.allclose(record.update(site, x, ctx), 2 * same.update(site, x, ctx))


def test_order_does_not_matter_and_merging_agrees(adapters, encode, small_model, small_params):
    first, second = adapters
    one = encode(peft.stack(first, second))
    other = encode(peft.stack(second, first))
    base = encode(None)
    assert np.abs(one - base).max() > 0.05 * base.std()
    np.testing.assert_allclose(one, other, atol=1e-5 * base.std())
    merged = peft.merge(small_model, small_params, peft.stack(first, second))
    np.testing.assert_allclose(encode(None, merged), one, atol=1e-4 * base.std())
    twice = peft.merge(small_model, peft.merge(small_model, small_params, first), second)
    np.testing.assert_allclose(encode(None, twice), one, atol=1e-4 * base.std())


def test_scale_and_interpolate(adapters, encode, small_model, small_params):
    first, second = adapters
    tolerance = 1e-5 * encode(None).std()
    np.testing.assert_allclose(encode(peft.scale(first, 0.0)), encode(None), atol=tolerance)
    np.testing.assert_allclose(
        encode(peft.scale(first, 2.0)), encode(peft.stack(first, first)), atol=tolerance
    )
    np.testing.assert_allclose(
        encode(peft.interpolate(first, second, 1.0)), encode(second), atol=tolerance
    )

    def change(tree):
        merged = peft.merge(small_model, small_params, tree)
        kernels = (
            np.float64(p["image_encoder"]["blocks_0"]["attn"]["qkv"]["kernel"])
            for p in (merged, small_params)
        )
        return next(kernels) - next(kernels)

    np.testing.assert_allclose(
        change(peft.interpolate(first, second, 0.25)),
        0.75 * change(first) + 0.25 * change(second),
        atol=1e-6,
    )


def test_padded_ranks_change_nothing_and_swap_without_a_trace(
    small_model, small_params, adapters, encode
):
    first = adapters[0]
    other = trained(small_model, small_params, (Rule(QV, LoRA(5)),), 7)
    padded = peft.pad_rank(first, 5)
    np.testing.assert_allclose(encode(padded), encode(first), atol=1e-6)
    assert jax.tree.map(jnp.shape, padded) == jax.tree.map(jnp.shape, other)
    with pytest.raises(ValueError, match=r"attn/qkv has rank 2; pad to that or more"):
        peft.pad_rank(first, 1)


def test_several_adapters_serve_one_batch(small_model, small_params, encode):
    trees = [trained(small_model, small_params, (Rule(QV, LoRA(2)),), seed) for seed in (1, 2, 3)]
    adapters = peft.side_by_side(trees)
    traces = 0

    @jax.jit
    def serve(adapters, which, images, sizes):
        nonlocal traces
        traces += 1

        def one(tree, image, size):
            variables = {"params": small_params, "peft": tree}
            return small_model.apply(variables, image[None], size[None], Prompts.none(1))[0][0]

        return jax.vmap(one)(peft.pick(adapters, which), images, sizes)

    images = np.random.default_rng(5).integers(0, 256, (4, 128, 128, 3), np.uint8)
    sizes = np.full((4, 2), 128, np.int32)
    alone = jax.jit(
        lambda tree, *args: small_model.apply({"params": small_params, "peft": tree}, *args)[0]
    )
    for which in ([0, 2, 1, 2], [1, 1, 0, 0]):
        logits = np.asarray(serve(adapters, jnp.array(which), images, sizes))
        for i, index in enumerate(which):
            expected = alone(trees[index], images[i : i + 1], sizes[:1], Prompts.none(1))[0]
            np.testing.assert_allclose(logits[i], expected, atol=1e-4 * expected.std())
    assert traces == 1
    with pytest.raises(ValueError, match="adapter 1 differs from adapter 0"):
        peft.side_by_side([trees[0], peft.pad_rank(trees[1], 4)])


def test_a_stack_in_a_spec_is_saved_and_loaded(small_model, small_params, tmp_path):
    rules = (Rule(QV, Stack((LoRA(2), LoRA(3, rank_stabilized=True)))),)
    spec = PeftSpec(rules)
    assert PeftSpec.from_json(spec.to_json()) == spec
    tree = trained(small_model, small_params, rules, 3)
    file = tmp_path / "a.safetensors"
    variables = {"params": small_params, "peft": tree}
    peft.save(file, spec, small_model, variables, params_sha256(small_params))
    _, loaded = peft.load(file, small_model, small_params)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, tree))
    counts = peft.report(spec, small_model)
    assert counts.trainable == 2 * 2 * (2 + 3) * (32 + 32)


def test_what_cannot_be_composed_is_refused():
    class Lonely(Delta):
        alone = "it wants the site to itself"

    with pytest.raises(NotComposable, match="blocks_0/attn: Lonely: it wants the site to itself"):
        peft.scale({"blocks_0": {"attn": {"delta": Lonely()}}}, 2.0)
    tree = {"blocks_0": {"attn": {"delta": Lonely()}}}
    with pytest.raises(NotComposable, match="blocks_0/attn: Lonely cannot share it"):
        peft.stack(tree, tree)
    with pytest.raises(ValueError, match="two methods or more"):
        Stack((LoRA(),))
    with pytest.raises(ValueError, match="LoRA adapts dense, LoRAConv adapts conv; give each"):
        Stack((LoRA(), LoRAConv()))
    with pytest.raises(ValueError, match="a Stack holds methods such as LoRA, not Stack"):
        Stack((LoRA(), Stack((LoRA(), LoRA()))))


def kernels(model, params, tree):
    """What an adapter adds to each kernel."""
    before, after = flatten_dict(params), flatten_dict(peft.merge(model, params, tree))
    return {k: np.float64(after[k]) - np.float64(v) for k, v in before.items()}


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_shared_records_keep_apart_however_stacks_nest(small_model, small_params, form):
    a, b, c = (
        trained(small_model, small_params, (Rule(QV, FacT(2, form)),), seed) for seed in (1, 2, 3)
    )
    changes = [kernels(small_model, small_params, tree) for tree in (a, b, c)]
    blend = peft.interpolate(peft.interpolate(a, b, 0.5), peft.interpolate(c, a, 0.5), 0.5)
    for tree, weights in (
        (peft.stack(c, peft.stack(a, b)), (1, 1, 1)),
        (peft.stack(peft.stack(a, b), c), (1, 1, 1)),
        (peft.stack(peft.stack(a, b), peft.stack(b, c)), (1, 2, 1)),
        (blend, (0.5, 0.25, 0.25)),
    ):
        peft.check_sites(small_model, small_params, tree)
        for path, change in kernels(small_model, small_params, tree).items():
            parts = (w * each[path] for w, each in zip(weights, changes, strict=True))
            np.testing.assert_allclose(change, sum(parts), atol=1e-6)


def test_factors_are_padded_wherever_they_lie(small_model, small_params):
    rules = (
        Rule("image_encoder/**/qkv[q,v]", Stack((LoRA(2), FacT(2), LoRA(3)))),
        Rule("image_encoder/**/proj", DoRA(2)),
        Rule("image_encoder/neck_*", LoRAConv(3)),
    )
    tree = trained(small_model, small_params, rules, 1)
    padded = peft.pad_rank(tree, 4)
    block = padded["image_encoder"]["blocks_0"]["attn"]
    first, fact, last = block["qkv"]["delta"].deltas
    assert first.a.shape[-1] == first.b.shape[1] == last.a.shape[-1] == last.b.shape[1] == 4
    assert fact.slots.shape[-1] == 2
    assert block["proj"]["delta"].lora.a.shape[-1] == 4
    conv = padded["image_encoder"]["neck_2"]["delta"]
    assert (conv.a.shape[-1], conv.b.shape[0]) == (4, 4)
    changes = kernels(small_model, small_params, tree)
    for path, change in kernels(small_model, small_params, padded).items():
        np.testing.assert_allclose(change, changes[path], atol=1e-6)
    with pytest.raises(ValueError, match=r"attn/qkv has rank 3; pad to that or more"):
        peft.pad_rank(tree, 2)
