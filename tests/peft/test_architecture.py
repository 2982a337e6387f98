"""What a search found, as a file that another run starts from; and what collapses of an adapter."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax import peft
from samjax.flops import count_flops
from samjax.models import MODELS, Sam
from samjax.peft import MethodConfig, NotMergeable
from samjax.peft.architecture import derive_adapter, left_out
from samjax.peft.collapsed import CollapsedDelta
from samjax.peft.delta import is_delta
from samjax.peft.nas_lora import NASLoRADelta
from samjax.peft.trees import deltas

RNG = np.random.default_rng(0)


def moved(spec, model, params):
    """An adapter all of whose trained numbers are away from the start."""
    records = peft.attach(spec, model, params, jax.random.key(0))
    kinds = peft.groups(spec, model, {"params": params, "peft": records})["peft"]
    return jax.tree.map(
        lambda kind, leaf: (
            leaf
            if kind == "buffer"
            else leaf + 0.3 * RNG.normal(size=leaf.shape).astype(np.float32)
        ),
        kinds,
        records,
    )


@pytest.mark.parametrize("derive", ["mixture", "strongest"])
@pytest.mark.parametrize("settings", [{}, {"space": "darts", "nodes": 2}, {"targets": ("q", "v")}])
def test_a_run_starts_from_what_was_found(small_model, small_params, tmp_path, settings, derive):
    """In a new run each cell has the shares of the old one, or its strongest operator."""
    method = MethodConfig("nas_lora", **settings)
    records = moved(method.spec(), small_model, small_params)
    found = peft.architecture(records, derive)
    (tmp_path / "found.json").write_text(json.dumps(found))
    targets = settings.get("targets")
    file = str(tmp_path / "found.json")
    later = MethodConfig("nas_lora", operators=file, targets=targets)
    assert later.space == found["space"] and later.stages == ("1:weights+decoder",)
    (tmp_path / "found.json").unlink()  # the config knows what was in it
    fresh = peft.attach(later.spec(), small_model, small_params, jax.random.key(1))
    old, new = deltas(records), deltas(fresh)
    assert old.keys() == new.keys()
    for path, delta in new.items():
        assert isinstance(delta, NASLoRADelta) and delta.segments == old[path].segments
        for names, alpha, before in zip(delta.edges, delta.alpha, old[path].shares(), strict=True):
            if derive == "strongest":
                best = max((n for n in before if n != "none"), key=before.__getitem__)
                assert names == (best,)
            else:
                shares = np.exp(alpha) / np.exp(alpha).sum()
                np.testing.assert_allclose(shares, list(before.values()), rtol=1e-5)
        if delta.beta is not None:
            was = [np.exp(b) / np.exp(b).sum() for b in (old[path].beta[:1], old[path].beta[1:])]
            now = [np.exp(b) / np.exp(b).sum() for b in (delta.beta[:1], delta.beta[1:])]
            np.testing.assert_allclose(np.concatenate(now), np.concatenate(was), rtol=1e-5)
    assert MethodConfig("nas_lora").stages[1].startswith("0.4:all")


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"partial": 2}, {}, "found with method nas_pc_lora, not nas_lora"),
        ({}, {"space": "darts"}, "found with space linear, not darts; leave it out"),
        ({}, {"targets": ("q",)}, "names layers of qkv, and targets is q; leave out targets"),
        ({"nodes": "1"}, {}, "holds no architecture"),
        ({"sites": {}}, {}, "holds no architecture"),
        ({"schema": 2}, {}, "holds no architecture"),
        ({"sites": {"x": {}}}, {}, "holds no architecture"),
    ],
)
def test_files_that_cannot_be_started_from(
    small_model, small_params, tmp_path, change, settings, message
):
    records = moved(MethodConfig("nas_lora").spec(), small_model, small_params)
    file = tmp_path / "found.json"
    file.write_text(json.dumps(peft.architecture(records) | change))
    with pytest.raises(ValueError, match=message):
        MethodConfig("nas_lora", operators=str(file), **settings)
    file.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        MethodConfig("nas_lora", operators=str(file))
    with pytest.raises(FileNotFoundError, match="samjax arch RUN"):
        MethodConfig("nas_lora", operators=str(tmp_path / "none.json"))


@pytest.mark.parametrize("derive", ["mixture", "strongest"])
def test_a_trained_adapter_is_derived(small_model, small_params, tmp_path, derive):
    """Its file loads, and holds what the cells' strongest operators, or all of them, were."""
    spec = MethodConfig("nas_pc_lora", space="darts", nodes=2, decoder="none").spec()
    records = moved(spec, small_model, small_params)
    small, cut = derive_adapter(spec, small_model, records, derive)
    variables = {"params": small_params, "peft": cut}
    peft.save(tmp_path / "a.safetensors", small, small_model, variables, "base")
    again = deltas(peft.records(peft.read(tmp_path / "a.safetensors")))
    for path, delta in deltas(records).items():
        expected = delta.strongest() if derive == "strongest" else delta
        assert jax.tree.structure(again[path]) == jax.tree.structure(expected)
        for one, other in zip(*map(jax.tree.leaves, (again[path], expected)), strict=True):
            np.testing.assert_array_equal(one, other)


def test_layers_without_an_adapter_are_told_of(small_model):
    whole = MethodConfig("nas_lora").spec()
    assert not left_out(whole, small_model)
    first = "image_encoder/blocks_0/attn/qkv"
    part = MethodConfig("nas_lora", operators=f"{first}: skip_connect").spec()
    assert "1 that are like them, such as image_encoder/blocks_1/attn/qkv" in left_out(
        part, small_model
    )
    assert not left_out(MethodConfig("lora").spec(), small_model)


def test_without_a_cell_there_is_no_architecture(small_model, small_params):
    records = peft.attach(MethodConfig("lora").spec(), small_model, small_params, jax.random.key(0))
    with pytest.raises(ValueError, match="no searchable cell; nas_lora and nas_pc_lora have"):
        peft.architecture(records)


def encode(model, variables):
    image = np.random.default_rng(1).integers(0, 255, (1, 128, 128, 3), np.uint8)
    size = jnp.array([[128, 128]])
    return jax.jit(lambda v: model.apply(v, jnp.asarray(image), size, method="encode"))(variables)


@pytest.mark.parametrize("method", ["nas_lora", "nas_pc_lora"])
def test_collapse_is_exact(small_model, small_params, tiny_model, tiny_params, method, tmp_path):
    """Weights and what stays do as the adapter did, and an adapter file holds what stays."""
    for model, params in ((small_model, small_params), (tiny_model, tiny_params)):
        spec = MethodConfig(method, rank=2, decoder="none").spec()
        records = moved(spec, model, params)
        folded = peft.collapse(spec, model, params, records)
        assert len(folded.reasons) == len(deltas(records))
        assert all(isinstance(d, CollapsedDelta) for d in deltas(folded.peft).values())
        expected = encode(model, {"params": params, "peft": records})
        rest = {"params": folded.params, "peft": folded.peft}
        scale = float(np.std(expected))
        np.testing.assert_allclose(encode(model, rest), expected, atol=1e-5 * scale)
        peft.save(tmp_path / "rest.safetensors", folded.spec, model, rest, "base")
        again = peft.records(peft.read(tmp_path / "rest.safetensors"))
        for one, other in zip(*map(jax.tree.leaves, (again, folded.peft)), strict=True):
            np.testing.assert_array_equal(one, other)
        costs = peft.encoding_flops(model, params, records, folded)
        assert 1 < costs["rest"] <= costs["adapted"]
        with pytest.raises(NotMergeable, match=r"a convolution of \d channels stays"):
            peft.merge(model, params, records)


@pytest.mark.parametrize("method", ["nas_lora", "nas_pc_lora"])
def test_inference_costs_hardly_more_than_lora(method):
    """ViT-B at 1024 pixels, at equal rank; counted from the jaxpr, nothing is computed."""
    model = Sam(MODELS["vit_b"])
    params = model.init_params_shapes()

    def adapted(method):
        spec = MethodConfig(method, targets=("qkv",), decoder="none").spec()
        return jax.eval_shape(lambda p: peft.attach(spec, model, p, jax.random.key(0)), params)

    frame = model.config.frame.shape

    def flops(records):
        def encode(variables, image):
            return model.apply(variables, image, jnp.array([frame]), method="encode")

        image = jax.ShapeDtypeStruct((1, *frame, 3), jnp.uint8)
        return count_flops(encode, {"params": params, "peft": records}, image)

    cell = adapted(method)
    collapsed = jax.eval_shape(
        lambda tree: jax.tree.map(lambda d: d.collapsed()[0], tree, is_leaf=is_delta), cell
    )
    assert flops(collapsed) <= flops(cell) <= 1.01 * flops(adapted("lora"))


def test_skip_connections_fold_and_others_stay(small_model, small_params):
    sites = [site.path for site in small_model.sites() if site.path.endswith("attn/qkv")]
    text = f"{sites[0]}: none=0.2+skip_connect=0.8; {sites[1]}: avg_pool_3x3"
    spec = MethodConfig("nas_lora", rank=2, operators=text).spec()
    records = moved(spec, small_model, small_params)
    folded = peft.collapse(spec, small_model, small_params, records)
    assert list(folded.reasons) == [sites[1]] and "3 x 3 tokens" in folded.reasons[sites[1]]
    expected = encode(small_model, {"params": small_params, "peft": records})
    rest = {"params": folded.params, "peft": folded.peft}
    scale = float(np.std(expected))
    np.testing.assert_allclose(encode(small_model, rest), expected, atol=1e-5 * scale)


def test_what_has_no_smaller_form_stays_as_it_is(small_model, small_params):
    for method in ("conv_lora", "adapter"):
        spec = MethodConfig(method, decoder="none").spec()
        records = moved(spec, small_model, small_params)
        folded = peft.collapse(spec, small_model, small_params, records)
        assert jax.tree.structure(folded.peft) == jax.tree.structure(records)
        assert folded.spec.rules[0].config == spec.rules[0].config
    lora = MethodConfig("lora").spec()
    records = moved(lora, small_model, small_params)
    folded = peft.collapse(lora, small_model, small_params, records)
    assert not folded.reasons and not folded.peft and not folded.spec.rules
    merged = peft.merge(small_model, small_params, records)
    for one, other in zip(*map(jax.tree.leaves, (merged, folded.params)), strict=True):
        np.testing.assert_array_equal(one, other)
