"""NAS-LoRA's cell against torch, in float64, written from DARTS's and PC-DARTS's papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.nn import Context, Segments, Site, SiteInfo
from samjax.peft.collapsed import Collapsed
from samjax.peft.delta import NotMergeable
from samjax.peft.nas_lora import NASLoRA, shuffle
from samjax.peft.operators import OPERATORS

RNG = np.random.default_rng(0)
WIDTH, OUT = 10, 12
PATH = "image_encoder/blocks_0/attn/qkv"


def site(segments: Segments | None = None, path: str = PATH) -> Site:
    kernel = jnp.asarray(RNG.normal(size=(WIDTH, OUT)), jnp.float32)
    info = SiteInfo(path, "dense", (WIDTH, OUT), segments=segments)
    return Site(info, kernel, None, lambda x, kernel, bias: x @ kernel)


def record(settings: NASLoRA, segments: tuple[str, ...] = (), where: Site | None = None):
    """A record with all its numbers moved away from the start."""
    delta = settings.init(jax.random.key(1), where or site(), segments)
    return jax.tree.map(
        lambda leaf: leaf + 0.5 * jnp.asarray(RNG.normal(size=leaf.shape), leaf.dtype), delta
    )


def tokens(height: int = 7, width: int = 6) -> np.ndarray:
    return RNG.normal(size=(2, height, width, WIDTH)).astype(np.float32)


def doubles(array):
    torch = pytest.importorskip("torch")
    return torch.tensor(np.asarray(array), dtype=torch.float64)


def torch_operator(name: str, weights, z, space: str, norm: str):
    """An operator on NCHW, from the papers."""
    F = pytest.importorskip("torch").nn.functional

    def normalized(y):
        return F.instance_norm(y, eps=1e-5) if norm == "instance" and space == "darts" else y

    def separable(y, i, dilation):
        depth = doubles(weights[f"depthwise_{i}"]).permute(3, 2, 0, 1)
        point = doubles(weights[f"pointwise_{i}"]).T[:, :, None, None]
        pad = dilation * (depth.shape[-1] - 1) // 2
        y = F.relu(y) if space == "darts" else y
        y = F.conv2d(y, depth, padding=pad, dilation=dilation, groups=y.shape[1])
        return normalized(F.conv2d(y, point))

    if name == "none":
        return z * 0
    if name == "skip_connect":
        return z
    if name == "avg_pool_3x3":
        return normalized(F.avg_pool2d(z, 3, 1, 1, count_include_pad=space == "linear"))
    if name == "max_pool_3x3":
        return normalized(F.max_pool2d(z, 3, 1, 1))
    dilation = 2 if name.startswith("dil") else 1
    times = 2 if name.startswith("sep") and space == "darts" else 1
    for i in range(times):
        z = separable(z, i, dilation)
    return z


def torch_update(delta, x):
    """scale * C(x A) B of a record, NHWC."""
    torch = pytest.importorskip("torch")
    a, b = doubles(delta.a), doubles(delta.b)
    states, edge = [(doubles(x) @ a).permute(0, 3, 1, 2)], 0
    while edge < len(delta.edges):
        into = range(edge, edge + len(states))
        beta = torch.ones(1) if delta.beta is None else doubles(delta.beta)[list(into)]
        node = 0
        for weight, number, state in zip(torch.softmax(beta, 0), into, states, strict=True):
            shares = torch.softmax(doubles(delta.alpha[number]), 0)
            inside, beside = state[:, : delta.channels], state[:, delta.channels :]
            mixture = 0
            for share, name in zip(shares, delta.edges[number], strict=True):
                cell = delta.cell[number][name]
                y = torch_operator(name, cell, inside, delta.space, delta.norm)
                mixture = mixture + share * y
            whole = torch.cat([mixture, beside], 1)
            if delta.partial > 1:
                whole = torch.nn.functional.channel_shuffle(whole, delta.partial)
            node = node + weight * whole
        edge += len(states)
        states.append(node)
    out = torch.stack(states[1:]).mean(0)
    y = torch.cat([out.permute(0, 2, 3, 1) @ part for part in b], -1)
    return (y * float(delta.scale)).numpy()


@pytest.mark.parametrize("space", ["linear", "darts"])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_torchs(name, space):
    if space == "linear" and not OPERATORS[name].linear:
        pytest.skip("the space has no such operator")
    delta = record(NASLoRA(operators=name, space=space))
    ours = delta.update(site(), jnp.asarray(x := tokens()), Context())
    np.testing.assert_allclose(ours, torch_update(delta, x), atol=2e-5)


@pytest.mark.parametrize("norm", ["instance", "none"])
@pytest.mark.parametrize("space", ["linear", "darts"])
@pytest.mark.parametrize("partial", [1, 2, 4])
@pytest.mark.parametrize("nodes", [1, 3])
def test_cells_are_torchs(space, partial, nodes, norm):
    delta = record(NASLoRA(rank=8, space=space, partial=partial, nodes=nodes, norm=norm))
    assert (delta.beta is None) == (nodes == 1)
    ours = delta.update(site(), jnp.asarray(x := tokens()), Context())
    np.testing.assert_allclose(ours, torch_update(delta, x), rtol=1e-4, atol=1e-4)


def test_skip_alone_is_lora():
    delta = record(NASLoRA(operators="skip_connect"))
    x = tokens()
    factors = np.float64(delta.a) @ np.float64(delta.b)[0]
    expected = float(delta.scale) * x.astype(np.float64) @ factors
    np.testing.assert_allclose(delta.update(site(), jnp.asarray(x), Context()), expected, atol=1e-4)


@pytest.mark.parametrize("partial", [1, 2])
def test_a_linear_cell_collapses_exactly(partial):
    where = site()
    delta = record(NASLoRA(rank=4, partial=partial), where=where)
    small, settings = delta.collapsed()
    assert settings == Collapsed(4, 9, 4 // partial)
    x = jnp.asarray(tokens(14, 14))
    np.testing.assert_allclose(
        small.update(where, x, Context()), torch_update(delta, x), rtol=1e-5, atol=1e-5
    )
    assert small.kernel.shape == (9, 9, 4 // partial, 4 // partial)
    with pytest.raises(NotMergeable, match=r"9 x 9 tokens.*convolution of \d channels stays"):
        delta.merge(where.info, where.kernel, None, Context())


@pytest.mark.parametrize("partial", [1, 2])
def test_what_looks_at_one_token_folds_into_the_kernel(partial):
    segments = Segments(("q", "k", "v"), "thirds", 2)
    where = site(segments)
    settings = NASLoRA(rank=4, alpha=2.0, operators="none+skip_connect", partial=partial)
    delta = record(settings, ("q", "v"), where)
    x = jnp.asarray(tokens())
    kernel, bias = delta.merge(where.info, where.kernel, None, Context())
    assert bias is None
    adapted = delta(where, x, Context())
    np.testing.assert_allclose(x @ kernel, adapted, atol=2e-5)
    # k has no part in it.
    np.testing.assert_array_equal(kernel[:, 4:8], where.kernel[:, 4:8])


def test_reasons_against_merging():
    where = site()
    for settings, reason in (
        (NASLoRA(space="darts"), "operators that are not linear"),
        (NASLoRA(nodes=2), "3 edges, and convolutions after each other"),
    ):
        with pytest.raises(NotMergeable, match=reason):
            record(settings).merge(where.info, where.kernel, None, Context())


def test_strongest_operators_are_kept_with_their_weights():
    delta = record(NASLoRA(space="darts", nodes=2))
    found = delta.strongest()
    for names, kept, alpha in zip(delta.edges, found.edges, delta.alpha, strict=True):
        order = np.argsort(-np.asarray(alpha))
        assert kept == (next(names[i] for i in order if names[i] != "none"),)
    again = NASLoRA(space="darts", nodes=2, operators="|".join(edge[0] for edge in found.edges))
    assert jax.tree.structure(again.init(jax.random.key(0), site(), ())) == jax.tree.structure(
        found
    )
    x = tokens()
    ours = found.update(site(), jnp.asarray(x), Context())
    np.testing.assert_allclose(ours, torch_update(found, x), rtol=1e-4, atol=1e-4)


def test_the_settings_of_a_collapsed_cell_start_as_lora():
    segments = Segments(("q", "k", "v"), "thirds", 2)
    where = site(segments)
    delta = Collapsed(2, 3, 2).init(jax.random.key(0), where, ("q", "v"))
    other = record(NASLoRA(rank=2, operators="avg_pool_3x3"), ("q", "v"), where).collapsed()[0]
    assert jax.tree.structure(delta) == jax.tree.structure(other)
    assert [x.shape for x in jax.tree.leaves(delta)] == [x.shape for x in jax.tree.leaves(other)]
    x = jnp.asarray(tokens())
    np.testing.assert_array_equal(delta(where, x, Context()), where(x))
    with pytest.raises(
        ValueError, match="size must be odd and channels at most the rank 2, not 2 and 1"
    ):
        Collapsed(2, 2, 1)


def test_shuffle_is_pc_darts():
    torch = pytest.importorskip("torch")
    z = RNG.normal(size=(2, 3, 4, 12)).astype(np.float32)
    for groups in (1, 2, 3, 4):
        theirs = torch.nn.functional.channel_shuffle(torch.tensor(z).permute(0, 3, 1, 2), groups)
        np.testing.assert_array_equal(
            shuffle(jnp.asarray(z), groups), theirs.permute(0, 2, 3, 1).numpy()
        )


def test_counts_of_the_darts_space():
    """Weights of all operators together at ranks 3, 4 and 8, whole and by quarters."""
    for rank, partial, expected in ((3, 1, 360), (4, 1, 504), (4, 4, 108), (8, 1, 1200)):
        delta = NASLoRA(rank=rank, partial=partial, space="darts").init(
            jax.random.key(0), site(), ()
        )
        assert sum(leaf.size for leaf in jax.tree.leaves(delta.cell)) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 3, "partial": 2}, "partial 2 does not divide the rank 3; choose one of 1, 3"),
        ({"operators": "skip"}, "operators of the space linear are none, skip_connect.*'skip'"),
        ({"operators": "max_pool_3x3"}, "operators of the space linear"),
        ({"operators": "none|none"}, "1 nodes have 1 edges, and operators names those of 2"),
        ({"operators": "none+none"}, "names 'none' twice for an edge"),
        ({"space": "both"}, "space must be linear or darts"),
        ({"norm": "batch"}, "norm must be instance or none"),
        ({"nodes": 0}, "nodes must be at least 1"),
        ({"partial": 0}, "partial must be at least 1"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"dropout": 1.0}, "dropout must be in"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        NASLoRA(**settings)


def test_bad_sites():
    with pytest.raises(ValueError, match="sees a list of tokens, and a cell needs a map"):
        NASLoRA().init(jax.random.key(0), site(path="mask_decoder/x/q_proj"), ())
    with pytest.raises(ValueError, match="rank 11 is more than"):
        NASLoRA(rank=11).init(jax.random.key(0), site(), ())
