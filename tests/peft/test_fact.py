"""FacT's arithmetic against a float64 NumPy version, and what layers share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from samjax import peft
from samjax.hashes import params_sha256
from samjax.models import MODELS, Prompts, Sam
from samjax.nn import Context, Segments, Site, SiteInfo
from samjax.peft import FacT, PeftSpec, Rule

RNG = np.random.default_rng(1)
WIDTH, RANK = 8, 3
# (path, channels in, channels out, layout of q, k and v, chosen segments)
LAYERS = (
    ("vit/qkv", WIDTH, 3 * WIDTH, "thirds", ("q", "k", "v")),
    ("vit/q_and_v", WIDTH, 3 * WIDTH, "thirds", ("q", "v")),
    ("tiny/qkv", WIDTH, 3 * WIDTH, "heads", ("v", "q")),
    ("proj", WIDTH, WIDTH, None, ()),
    ("mlp/fc1", WIDTH, 4 * WIDTH, None, ()),
    ("mlp/fc2", 4 * WIDTH, WIDTH, None, ()),
)


def make_site(path: str, wide_in: int, wide_out: int, layout: str | None) -> Site:
    segments = Segments(("q", "k", "v"), layout, 2) if layout else None
    kernel = jnp.asarray(RNG.normal(size=(wide_in, wide_out)), jnp.float32)
    bias = jnp.asarray(RNG.normal(size=wide_out), jnp.float32)
    info = SiteInfo(path, "dense", kernel.shape, segments=segments)
    return Site(info, kernel, bias, lambda x, k, b: x @ k + b)


def make(config: FacT, moved: bool = True):
    """Sites, their records, and the context with what they share; V is not zero when `moved`."""
    sites = [(make_site(*layer[:4]), layer[4]) for layer in LAYERS]
    deltas = [config.init(jax.random.key(i), *site) for i, site in enumerate(sites)]
    shared = config.init_shared(jax.random.key(9), [(site.info, names) for site, names in sites])
    (name,) = shared
    if moved:
        v = jnp.asarray(RNG.normal(size=(RANK, WIDTH)), jnp.float32)
        shared[name] = shared[name].replace(v=v)
    return [site for site, _ in sites], deltas, Context(shared=shared)


def numpy_sigmas(delta, shared) -> list[np.ndarray]:
    """The Sigma of each slot, those of the input's pieces outermost."""
    slots = np.float64(delta.slots)
    if hasattr(shared, "core"):
        core = np.float64(shared.core)
        return [sum(p[c] * core[:, :, c] for c in range(RANK)) for p in slots.reshape(-1, RANK)]
    return list(slots.reshape(-1, RANK, RANK))


def numpy_update(site: Site, delta, shared) -> np.ndarray:
    """dW, slot by slot: scale * U Sigma V at the rows and columns of the slot."""
    update = np.zeros(site.kernel.shape)
    sigmas = iter(numpy_sigmas(delta, shared))
    u, v = np.float64(shared.u), np.float64(shared.v)
    columns = np.arange(update.shape[1])
    for piece_in in range(update.shape[0] // WIDTH):
        rows = slice(piece_in * WIDTH, (piece_in + 1) * WIDTH)
        if site.info.segments is None:
            chosen = np.split(columns, update.shape[1] // WIDTH)
        elif site.info.segments.layout == "thirds":
            chosen = [columns[columns // WIDTH == "qkv".index(s)] for s in delta.segments]
        else:  # two heads of 12 channels: q 4, k 4, v 4
            chosen = [columns[columns // 4 % 3 == "qkv".index(s)] for s in delta.segments]
        for cols in chosen:
            update[rows, cols] = float(delta.scale) * u @ next(sigmas) @ v
    assert next(sigmas, None) is None
    return update


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_update_and_merge(form):
    sites, deltas, ctx = make(FacT(RANK, form, scale=0.5))
    (shared,) = ctx.shared.values()
    for site, delta in zip(sites, deltas, strict=True):
        kernel = np.float64(site.kernel) + numpy_update(site, delta, shared)
        x = jnp.asarray(RNG.normal(size=(2, 5, kernel.shape[0])), jnp.float32)
        expected = np.float64(x) @ kernel + np.float64(site.bias)
        assert np.abs(expected - site(x)).max() > 0.1
        np.testing.assert_allclose(delta(site, x, ctx), expected, rtol=1e-4, atol=1e-4)
        merged, bias = delta.merge(site.info, site.kernel, site.bias, ctx)
        np.testing.assert_allclose(merged, kernel, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(bias, site.bias)
        half = delta.scaled(0.5)
        np.testing.assert_allclose(
            2 * half.kernel_update(site.info, site.kernel, ctx), merged - site.kernel, atol=1e-5
        )


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_the_identity_at_the_start(form):
    sites, deltas, ctx = make(FacT(RANK, form), moved=False)
    for site, delta in zip(sites, deltas, strict=True):
        x = jnp.asarray(RNG.normal(size=(3, site.kernel.shape[0])), jnp.float32)
        np.testing.assert_array_equal(delta(site, x, ctx), site(x))


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_gradients_of_what_is_shared_sum_over_layers(form):
    sites, deltas, ctx = make(FacT(RANK, form))
    inputs = [jnp.asarray(RNG.normal(size=(3, s.kernel.shape[0])), jnp.float32) for s in sites]

    def loss(shared, which):
        outputs = (deltas[i](sites[i], inputs[i], Context(shared=shared)) for i in which)
        return sum(jnp.sum(jnp.sin(y)) for y in outputs)

    layers = range(len(sites))
    together = jax.grad(loss)(ctx.shared, layers)
    alone = [jax.grad(loss)(ctx.shared, [i]) for i in layers]
    total = jax.tree.map(lambda *grads: sum(grads), *alone)
    assert len(jax.tree.leaves(together)) == (2 if form == "tt" else 3)
    for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(total), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
        assert np.abs(one).max() > 0


def test_initialisation():
    config, wide = FacT(16), make_site("fc2", 256, 64, None)
    slots = np.asarray(config.init(jax.random.key(0), wide, ()).slots)
    assert slots.shape == (4, 1, 16, 16)
    assert 0.99 / 8 < np.abs(slots).max() <= 1 / 8  # 1 / sqrt(4 * 16): one linear layer from 64
    (factors,) = config.init_shared(jax.random.key(0), [(wide.info, ())]).values()
    assert factors.u.shape == (64, 16) and 0.99 / 8 < np.abs(factors.u).max() <= 1 / 8
    assert factors.v.shape == (16, 64) and not factors.v.any()

    config = FacT(16, "tk")
    slots = np.asarray(config.init(jax.random.key(0), wide, ()).slots)
    assert slots.shape == (4, 1, 16)
    bound = np.sqrt(6 / (4 + 16))
    assert 0.9 * bound < np.abs(slots).max() <= bound
    (factors,) = config.init_shared(jax.random.key(0), [(wide.info, ())]).values()
    bound = np.sqrt(6 / (2 * 16**2))
    assert factors.core.shape == (16, 16, 16)
    assert 0.99 * bound < np.abs(factors.core).max() <= bound


def test_dropout_needs_a_key_and_keeps_the_mean():
    site = make_site("proj", WIDTH, WIDTH, None)
    config = FacT(2, dropout=0.5)
    delta = config.init(jax.random.key(0), site, ())
    shared = config.init_shared(jax.random.key(0), [(site.info, ())])
    shared = {name: record.replace(v=jnp.ones((2, WIDTH))) for name, record in shared.items()}
    x = jnp.ones((8192, WIDTH))
    plain = delta(site, x, Context(shared=shared))
    noisy = delta(site, x, Context(rng=jax.random.key(1), shared=shared))
    assert not np.allclose(plain, noisy)
    np.testing.assert_allclose(noisy.mean(0), plain.mean(0), atol=0.02)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"form": "cp"}, "form must be tt or tk, not 'cp'"),
        ({"scale": 0.0}, "scale must be positive and finite"),
        ({"scale": float("inf")}, "scale must be positive and finite"),
        ({"dropout": 1.0}, "dropout must be in"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        FacT(**settings)


def test_sites_that_do_not_suit():
    with pytest.raises(ValueError, match="rank 9 is more than mlp/fc1 can have, 8"):
        FacT(9).init(jax.random.key(0), make_site("mlp/fc1", 8, 32, None), ())
    with pytest.raises(ValueError, match="head maps 8 channels to 12, and neither is a multiple"):
        FacT(2).init(jax.random.key(0), make_site("head", 8, 12, None), ())


def shared_sizes(spec: PeftSpec, model: Sam) -> dict[str, tuple[int, ...]]:
    params = model.init_params_shapes()
    tree = jax.eval_shape(lambda p: peft.attach(spec, model, p, jax.random.key(0)), params)
    return {name: record.u.shape for name, record in tree["shared"].items()}


def test_one_record_for_each_width():
    config = FacT(4)
    rules = (Rule("image_encoder/**/qkv[q,v]", config), Rule("image_encoder/**/mlp/*", config))
    assert shared_sizes(PeftSpec(rules), Sam(MODELS["vit_b"])) == {"fact_tt_768": (768, 4)}
    stages = {f"fact_tt_{width}": (width, 4) for width in (128, 160, 320)}
    assert shared_sizes(PeftSpec(rules), Sam(MODELS["vit_t"])) == stages


def test_rules_with_different_settings_do_not_share(small_model, small_params):
    first = Rule("image_encoder/**/qkv[q,v]", FacT(4))
    spec = PeftSpec((first, Rule("image_encoder/**/proj", FacT(2))))
    with pytest.raises(ValueError, match=r"qkv\[q,v\]' and 'image_encoder/\*\*/proj' each .*_32'"):
        peft.attach(spec, small_model, small_params, jax.random.key(0))
    # Equal settings are not enough: a stack has factors of its own.
    beside = Rule("image_encoder/**/proj", peft.Stack((FacT(4), peft.LoRA(2))))
    with pytest.raises(ValueError, match=r"proj' each make .*with the same Stack around them"):
        peft.attach(PeftSpec((first, beside)), small_model, small_params, jax.random.key(0))
    spec = PeftSpec((first, Rule("image_encoder/**/proj", FacT(2, "tk"))))
    tree = peft.attach(spec, small_model, small_params, jax.random.key(0))
    assert set(tree["shared"]) == {"fact_tt_32", "fact_tk_32"}


@pytest.mark.parametrize(
    "form, targets, adapter, shared",
    [
        ("tt", ("q", "k", "v"), 2 * 768 * 8 + 12 * 3 * 8 * 8, 2 * 768 * 8),
        ("tt", ("q", "k", "v", "proj", "mlp"), 1536 * 8 + 144 * 8**2, 2 * 768 * 8),
        ("tk", ("q", "k", "v"), 2 * 768 * 8 + 8**3 + 12 * 3 * 8, 2 * 768 * 8 + 8**3),
        ("tk", ("q", "k", "v", "proj", "mlp"), 1536 * 8 + 8**3 + 144 * 8, 2 * 768 * 8 + 8**3),
    ],
)
def test_counts_are_the_paper_s(form, targets, adapter, shared):
    config = peft.MethodConfig(method=f"fact_{form}", targets=targets)
    counts = peft.report(config.spec(), Sam(MODELS["vit_b"]))
    assert counts.adapter == adapter
    lines = {line.method: line for line in counts.lines if line.pattern == "shared"}
    assert {name: line.trainable for name, line in lines.items()} == {f"fact_{form}_768": shared}
    assert sum(line.trainable for line in counts.lines) == counts.trainable


@pytest.fixture(scope="module")
def adapted(small_model, small_params):
    spec = PeftSpec(
        tuple(
            Rule(pattern, FacT(4, "tk"))
            for pattern in ("image_encoder/**/qkv[q,k,v]", "image_encoder/**/mlp/*")
        )
    )
    tree = peft.attach(spec, small_model, small_params, jax.random.key(0))
    moved = jax.tree.map(lambda x: x + 0.1 * jnp.asarray(RNG.normal(size=x.shape), x.dtype), tree)
    return spec, moved


def test_shared_records_are_checked(adapted, small_model, small_params):
    _, tree = adapted
    peft.check_sites(small_model, small_params, tree)
    without = {key: value for key, value in tree.items() if key != "shared"}
    for check in (peft.check_sites, peft.merge):
        with pytest.raises(ValueError, match="needs the shared record 'fact_tk_32'"):
            check(small_model, small_params, without)
    unread = {**tree, "shared": {**tree["shared"], "fact_tk_64": tree["shared"]["fact_tk_32"]}}
    with pytest.raises(ValueError, match="no site reads the shared record 'fact_tk_64'"):
        peft.check_sites(small_model, small_params, unread)


def test_file_has_what_is_shared_once(adapted, small_model, small_params, tmp_path):
    spec, tree = adapted
    path = tmp_path / "a.safetensors"
    variables = {"params": small_params, "peft": tree}
    saved = peft.save(path, spec, small_model, variables, params_sha256(small_params))
    shared = sorted(key for key in saved.tensors if key.startswith("peft/shared/"))
    assert shared == [f"peft/shared/fact_tk_32/{name}" for name in ("core", "u", "v")]
    _, loaded = peft.load(path, small_model, small_params)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, tree))


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_tiny_vit_merges_at_several_widths(form, tiny_model, tiny_params):
    targets = ("q", "k", "v", "proj", "mlp")
    config = peft.MethodConfig(method=f"fact_{form}", targets=targets, decoder="none")
    tree = peft.attach(config.spec(), tiny_model, tiny_params, jax.random.key(0))
    assert set(tree["shared"]) == {f"fact_{form}_{width}" for width in (16, 32)}
    tree["shared"] = {
        name: record.replace(v=jnp.asarray(RNG.normal(size=record.v.shape), jnp.float32))
        for name, record in tree["shared"].items()
    }
    merged = peft.merge(tiny_model, tiny_params, tree)
    image, size = jnp.zeros((1, 128, 128, 3), jnp.uint8), jnp.full((1, 2), 128)
    image = image.at[:, 30:80, 40:90].set(200)
    apply = jax.jit(lambda variables: tiny_model.apply(variables, image, size, Prompts.none(1))[0])
    base, adapted = apply({"params": tiny_params}), apply({"params": tiny_params, "peft": tree})
    assert np.abs(adapted - base).max() > 1e-2 * base.std()
    np.testing.assert_allclose(apply({"params": merged}), adapted, atol=1e-4 * base.std())
    before = flatten_dict(tiny_params)
    changed = {k[:2] for k, v in flatten_dict(merged).items() if not np.array_equal(v, before[k])}
    assert changed == {("image_encoder", f"layers_{i}") for i in (1, 2, 3)}
