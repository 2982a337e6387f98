"""Rules, the trees they make, and the counts that papers publish."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from samjax import peft
from samjax.models import MODELS, Sam
from samjax.nn import Context, Site
from samjax.peft import (
    RECIPES,
    ConvLoRA,
    DoRA,
    LoRA,
    LoRAConv,
    MethodConfig,
    PeftSpec,
    Rule,
    SAMParser,
    Stack,
    Train,
)
from samjax.peft.per_task import PerTask
from samjax.peft.resolve import resolve
from samjax.peft.spec import Freeze
from samjax.peft.trees import deltas

LORA = MethodConfig().spec()


@pytest.mark.parametrize(
    "name, total, adapter",
    [
        ("vit_b", 93_735_472, 147_456),  # Kirillov et al. 2023; SAMed, Zhang and Liu 2023
        ("vit_l", 312_342_832, 24 * 4 * 4 * 1024),
        ("vit_h", 641_090_608, 32 * 4 * 4 * 1280),
    ],
)
def test_published_counts(name, total, adapter):
    counts = peft.report(LORA, Sam(MODELS[name]))
    assert (counts.total, counts.adapter, counts.decoder) == (total, adapter, 4_058_340)
    assert counts.trainable == adapter + 4_058_340


def test_counts_are_torchs(segment_anything):
    reference = segment_anything.sam_model_registry["vit_b"]()
    counts = peft.report(MethodConfig(method="decoder").spec(), Sam(MODELS["vit_b"]))
    assert counts.total == sum(p.numel() for p in reference.parameters())
    assert counts.decoder == sum(p.numel() for p in reference.mask_decoder.parameters())
    assert counts.adapter == 0


def test_report_says_what_is_adapted(small_model):
    text = str(peft.report(LORA, small_model))
    assert "image_encoder/**/attn/qkv[q,v]" in text and "2 x" in text and "%" in text


def test_unmatched_rule_names_the_closest_site(small_model):
    spec = PeftSpec((Rule("image_encoder/blocks_*/attn/qvk[q,v]", LoRA()),))
    with pytest.raises(ValueError, match=r"matches no dense site.*attn/qkv'"):
        resolve(spec, small_model)
    with pytest.raises(ValueError, match="matches no leaf"):
        resolve(PeftSpec((Rule("mask_decoders/**", Train()),)), small_model)


def test_shadowed_rule_is_an_error(small_model):
    rules = (Rule("mask_decoder/**", Train()), Rule("mask_decoder/iou_token/**", Freeze()))
    with pytest.raises(ValueError, match="claims nothing"):
        resolve(PeftSpec(rules), small_model)


def test_first_match_wins(small_model, small_params):
    rules = (
        Rule("mask_decoder/iou_prediction_head/**", Freeze()),
        Rule("mask_decoder/**", Train()),
    )
    mask = peft.trainable(PeftSpec(rules), small_model, {"params": small_params})["params"]
    assert not any(jax.tree.leaves(mask["mask_decoder"]["iou_prediction_head"]))
    assert all(jax.tree.leaves(mask["mask_decoder"]["transformer"]))
    assert not any(jax.tree.leaves(mask["image_encoder"]))


def test_buffers_never_train():
    model = Sam(MODELS["vit_t"])
    shapes = model.init_params_shapes()
    mask = peft.trainable(PeftSpec((Rule("**", Train()),)), model, {"params": shapes})["params"]
    norm = mask["image_encoder"]["patch_embed"]["seq_0"]["bn"]
    assert norm == {"scale": True, "bias": True, "mean": False, "var": False}
    assert not any(jax.tree.leaves(mask["prompt_encoder"]["pe_layer"]))


def test_unknown_segment_is_an_error(small_model):
    spec = PeftSpec((Rule("image_encoder/**/qkv[q,x]", LoRA()),))
    with pytest.raises(ValueError, match=r"names 'x', but .* has the segments q, k, v"):
        resolve(spec, small_model)
    spec = PeftSpec((Rule("image_encoder/**/proj[q]", LoRA()),))
    with pytest.raises(ValueError, match="has no segments"):
        resolve(spec, small_model)
    spec = PeftSpec((Rule("image_encoder/**/qkv[q,v,q]", LoRA()),))
    with pytest.raises(ValueError, match="names the segment 'q' twice"):
        resolve(spec, small_model)


def test_a_method_without_a_site_in_the_model(small_model):
    class Nowhere(LoRA):
        kinds = ("nothing",)

    with pytest.raises(ValueError, match=r"matches no nothing site of small; it has none"):
        resolve(PeftSpec((Rule("**", Nowhere()),)), small_model)


@pytest.mark.parametrize(
    "method",
    [DoRA(2), SAMParser(), SAMParser("bases"), Stack((SAMParser(), LoRA(2)))],
    ids=["dora", "sam_parser", "bases", "stack"],
)
def test_what_records_are_derived_from_does_not_train(small_model, method):
    site = "image_encoder/blocks_0/attn/qkv"
    adapts, trains = Rule(site, method), Rule("image_encoder/**", Train())
    with pytest.raises(
        ValueError, match=rf"'image_encoder/\*\*' trains {site}/kernel.*Freeze rule"
    ):
        resolve(PeftSpec((adapts, trains)), small_model)
    resolve(PeftSpec((adapts, Rule(f"{site}/kernel", Freeze()), trains)), small_model)
    resolve(PeftSpec((adapts, Rule("image_encoder/**/bias", Train()))), small_model)


@pytest.mark.parametrize("decoder", ["all", "mask", "none"])
def test_dora_in_a_decoder_that_trains(small_model, small_params, decoder):
    config = MethodConfig(method="dora", targets=("q", "decoder"), decoder=decoder)
    spec = config.spec()
    mask = peft.trainable(spec, small_model, {"params": small_params})["params"]["mask_decoder"]
    layer = mask["transformer"]["layers_0"]["self_attn"]["q_proj"]
    assert layer == {"kernel": False, "bias": decoder != "none"}
    assert PeftSpec.from_json(spec.to_json()) == spec


def test_lora_refuses_convolutions_and_odd_settings(small_model, small_params):
    spec = PeftSpec((Rule("image_encoder/neck_0", LoRA()),))
    with pytest.raises(ValueError, match="matches no dense site"):
        peft.attach(spec, small_model, small_params, jax.random.key(0))
    for bad in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match="LoRA"):
            LoRA(**bad)
    for bad in (
        {"method": "loar"},
        {"method": "decoder", "decoder": "none"},
        {"method": "decoder", "rank": 4},
    ):
        with pytest.raises(ValueError):
            MethodConfig(**bad).spec()
    with pytest.raises(ValueError, match="targets must name some of qkv, q, k, v, proj, mlp"):
        RECIPES["lora"].rules(targets=("x",))


def test_keys_depend_on_the_path_alone(small_model, small_params):
    key = jax.random.key(0)
    both = deltas(peft.attach(LORA, small_model, small_params, key))
    one = PeftSpec((Rule("image_encoder/blocks_1/attn/qkv[q,v]", LoRA()),))
    (path,) = alone = deltas(peft.attach(one, small_model, small_params, key))
    np.testing.assert_array_equal(alone[path].a, both[path].a)
    other = next(p for p in both if p != path)
    assert not np.array_equal(both[other].a, both[path].a)


def test_a_record_that_no_site_reads_is_an_error(small_model, small_params):
    tree = peft.attach(LORA, small_model, small_params, jax.random.key(0))
    peft.check_sites(small_model, small_params, tree)
    tree["image_encoder"]["blocks_0"]["attn"]["qvk"] = tree["image_encoder"]["blocks_0"][
        "attn"
    ].pop("qkv")
    for check in (peft.check_sites, peft.merge):
        with pytest.raises(ValueError, match=r"attn/qvk' is called 0 times.*attn/qkv"):
            check(small_model, small_params, tree)


def test_every_site_is_called_once(small_model):
    for model in (small_model, Sam(MODELS["vit_t"])):
        paths = [info.path for info in model.sites()]
        assert len(paths) == len(set(paths))


def test_spec_survives_json():
    assert PeftSpec.from_json(LORA.to_json()) == LORA
    with pytest.raises(ValueError, match=r"unknown PEFT method 'dora2'.*lora"):
        PeftSpec.from_json([{"pattern": "x", "kind": "dora2"}])
    with pytest.raises(ValueError, match="not a PEFT spec"):
        PeftSpec.from_json([{"pattern": "x", "kind": "lora", "ranks": 3}])


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (None, "NoneType where a list of rules"),
        ({"pattern": "x", "kind": "lora"}, "dict where a list of rules"),
        (["x"], "a rule is str"),
        ([{"kind": "lora"}], "'pattern'"),
        ([{"pattern": "x"}], "'kind'"),
        ([{"pattern": 3, "kind": "lora"}], "pattern is 3, not str"),
        ([{"pattern": "x", "kind": ["lora"]}], r"kind is \['lora'\], not str"),
        ([{"pattern": "x", "kind": "lora", "rank": "4"}], "rank of lora is '4', not int"),
        ([{"pattern": "x", "kind": "lora", "rank": 4.0}], "rank of lora is 4.0, not int"),
        ([{"pattern": "x", "kind": "lora", "rank": True}], "rank of lora is True, not int"),
        ([{"pattern": "x", "kind": "lora", "rank": None}], "rank of lora is None, not int"),
        ([{"pattern": "x", "kind": "lora", "rank": [4]}], r"rank of lora is \[4\], not int"),
        ([{"pattern": "x", "kind": "lora", "alpha": "1"}], "alpha of lora is '1', not .*or null"),
        ([{"pattern": "x", "kind": "lora", "alpha": False}], "alpha of lora is False"),
        ([{"pattern": "x", "kind": "lora", "alpha": float("inf")}], "not a finite number"),
        ([{"pattern": "x", "kind": "lora", "alpha": 10**400}], "too large"),
        ([{"pattern": "x", "kind": "lora", "rank_stabilized": 1}], "rank_stabilized of lora is 1"),
        ([{"pattern": "x", "kind": "lora", "kinds": ["conv"]}], "kinds"),
        ([{"pattern": "x", "kind": "train", "group": None}], "group of train is None, not str"),
        ([{"pattern": "x", "kind": "train", "last": "2"}], "last of train is '2', not int or null"),
        ([{"pattern": "x", "kind": "stack"}], "methods"),
        ([{"pattern": "x", "kind": "stack", "methods": 3}], "methods of stack is int"),
        ([{"pattern": "x", "kind": "stack", "methods": ["lora"]}], "stack holds str, not a method"),
        ([{"pattern": "x", "kind": "stack", "methods": [{"kind": "lora"}]}], "two methods"),
        (
            [{"pattern": "x", "kind": "stack", "methods": [{"kind": "lora"}, {"kind": "train"}]}],
            "a stack holds train",
        ),
        (
            [{"pattern": "x", "kind": "stack", "methods": [{"kind": "stack", "methods": []}] * 2}],
            "a stack holds stack",
        ),
    ],
)
def test_a_spec_by_hand(data, match):
    with pytest.raises(ValueError, match=match):
        PeftSpec.from_json(data)


def test_whole_numbers_serve_as_floats():
    (rule,) = PeftSpec.from_json([{"pattern": "x", "kind": "lora", "alpha": 8}]).rules
    assert rule.config == LoRA(alpha=8.0)


@pytest.mark.parametrize(
    "spec, reads",
    [
        (MethodConfig("lora").spec(), False),
        (MethodConfig("nas_lora").spec(), False),
        (MethodConfig("full").spec(), False),
        (MethodConfig("dora").spec(), True),
        (MethodConfig("sam_parser").spec(), True),
        (PeftSpec((Rule("image_encoder/**/qkv", PerTask(DoRA(), 2)),)), True),
        (PeftSpec((Rule("image_encoder/neck_*", Stack((SAMParser(), LoRAConv()))),)), True),
    ],
)
def test_frozen_kernels_are_kept_as_they_are_computed_with(small_model, small_params, spec, reads):
    records = peft.attach(spec, small_model, small_params, jax.random.key(0))
    variables = {"params": jax.tree.map(jnp.asarray, small_params), "peft": records}
    trains = peft.trainable(spec, small_model, variables)
    kept = peft.as_computed(variables, jnp.bfloat16, trains)
    trained = flatten_dict(trains["params"])
    readers = deltas(records) if reads else ()  # deltas that compute with their layers' kernels
    for path, leaf in flatten_dict(kept["params"]).items():
        is_read = "/".join(path[:-1]) in readers
        halved = path[-1] == "kernel" and not trained[path] and not is_read
        assert leaf.dtype == (jnp.bfloat16 if halved else np.float32), path
    model, ctx = small_model.clone(dtype=jnp.bfloat16), Context(task=1)
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 128, 128, 3), np.uint8))
    # Compiled as one, a CPU may skip the rounding of the kernels that the layers ask for.
    ours, theirs = (
        model.apply(v, image, jnp.array([[128, 128]]), method="encode", ctx=ctx)
        for v in (kept, variables)
    )
    np.testing.assert_array_equal(ours, theirs)


def at_qkv(method) -> PeftSpec:
    return PeftSpec((Rule("image_encoder/**/qkv", method),))


@pytest.mark.parametrize(
    "spec",
    [
        *(
            MethodConfig(name).spec()
            for name in ("lora", "dora", "fact_tt", "fact_tk", "ssf", "conv_lora", "nas_lora")
        ),
        at_qkv(PerTask(LoRA(), 2)),
        at_qkv(PerTask(ConvLoRA(), 2)),
        at_qkv(Stack((LoRA(), LoRA()))),
        at_qkv(Stack((LoRA(), ConvLoRA()))),
    ],
)
def test_adapters_say_whether_they_look_at_other_tokens(small_model, small_params, spec):
    """Those that do are given windows, and others whole maps (`samjax.models.windows.within`)."""
    path, rng = "image_encoder/blocks_0/attn/qkv", np.random.default_rng(0)
    records = jax.tree.map(
        lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32),
        peft.attach(spec, small_model, small_params, jax.random.key(0)),
    )
    delta = deltas(records)[path]
    info = next(info for info in small_model.sites() if info.path == path)
    layer = small_params["image_encoder"]["blocks_0"]["attn"]["qkv"]
    kernel, bias = jnp.asarray(layer["kernel"]), jnp.asarray(layer["bias"])
    site = Site(info, kernel, bias, lambda x, k, b: x @ k + (0 if b is None else b))
    ctx = Context(task=1, shared=records.get("shared"))
    x = jnp.asarray(rng.normal(size=(1, 4, 4, 32)), jnp.float32)
    y, moved = (delta(site, x, ctx) for x in (x, x.at[0, 1, 1].add(1.0)))
    differ = np.abs(y - moved).max(axis=-1)[0] > 1e-5 * np.abs(y).max()
    assert differ[1, 1]
    assert (differ.sum() == 1) == delta.by_token
