"""The encoder's unchanging part: where it ends, and that its two parts are the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from samjax import peft
from samjax.models import MSam
from samjax.models.msam import msam_params
from samjax.peft import MethodConfig, PeftSpec, Rule, Train
from samjax.peft.cut import find_cut, params_before
from samjax.tasks import parse

ENCODER = "image_encoder"


@pytest.fixture(params=["small", "tiny"])
def any_model(request):
    """A ViT and a TinyViT, with their parameters."""
    return tuple(request.getfixturevalue(f"{request.param}_{what}") for what in ("model", "params"))


@pytest.mark.parametrize(
    ("method", "settings", "vit", "tiny_vit"),
    [
        ("decoder", {}, "embedding", "embedding"),
        ("lora", {"targets": ("decoder",)}, "embedding", "embedding"),
        ("sam_parser", {}, "neck", "neck"),
        ("sam_parser", {"recipe": "code"}, "neck", "neck"),
        ("last_k", {"blocks": 1}, "blocks_1", "layers_3/blocks_0"),
        ("last_k", {"blocks": 2}, "blocks_0", "layers_2/blocks_0"),
        ("lora", {}, "blocks_0", "layers_1/blocks_0"),
        ("adaptformer", {}, "blocks_0", "layers_1/blocks_0"),
        ("norm", {}, "blocks_0", "patch_embed"),
        ("full", {}, "patch_embed", "patch_embed"),
        ("lora_conv", {}, "patch_embed", "patch_embed"),
    ],
)
def test_the_cut_is_before_what_can_change(
    method, settings, vit, tiny_vit, small_model, tiny_model
):
    spec = MethodConfig(method, **settings).spec()
    for model, point in ((small_model, vit), (tiny_model, tiny_vit)):
        cut = find_cut(spec, model)
        points = model.make_encoder(parent=None).points
        assert (cut.point, cut.before, cut.parts) == (point, points.index(point), len(points) - 1)
        assert (cut.because == "") == (point == "embedding")
        assert cut.because.startswith(f"{ENCODER}/{point}" if cut.because else "")


@pytest.mark.parametrize(("norms", "vit", "tiny_vit"), [(False, 1, 1), (True, 1, 0)])
def test_norms_that_train_move_the_cut(norms, vit, tiny_vit, small_model, tiny_model):
    """TinyViT's norms outside of blocks train whatever the first block is."""
    tasks = parse(["a:2:cross_entropy", "b:1:masked_l1"])
    spec = MethodConfig("ta_lora", rank=4, rank_task=2, first_block=1, norms=norms).spec(tasks=2)
    found = [
        find_cut(spec, MSam(model.config, tasks=tasks)).point for model in (small_model, tiny_model)
    ]
    assert found == [f"blocks_{vit}", "layers_1/blocks_0" if tiny_vit else "patch_embed"]


def test_positions_are_of_the_first_part(small_model):
    spec = PeftSpec((Rule(f"{ENCODER}/pos_embed", Train()),))
    cut = find_cut(spec, small_model)
    assert (cut.point, cut.because) == ("patch_embed", f"{ENCODER}/pos_embed")


def test_two_parts_are_the_whole(any_model):
    """To the bit, and neither reads a leaf of the other."""
    model, params = any_model
    params = jax.tree.map(jnp.asarray, params)
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.integers(0, 255, (2, *model.config.frame.shape, 3), np.uint8))
    size = jnp.array([[128, 96], [64, 128]], jnp.int32)
    whole = model.apply({"params": params}, image, size, method="encode")
    points = model.make_encoder(parent=None).points
    for point in points[1:]:
        before = params_before(model, params, point)
        features = model.apply({"params": before}, image, size, point, method="encode_to")
        flat, used = (flatten_dict(tree) for tree in (params, before))
        after = unflatten_dict({path: leaf for path, leaf in flat.items() if path not in used})
        rest = model.clone(start=point).apply({"params": after}, features, size, method="encode")
        np.testing.assert_array_equal(rest, whole, err_msg=point)


def test_two_parts_are_the_whole_of_all_tasks(small_config, small_params):
    """Adapters that differ by task come after the cut."""
    model = MSam(small_config, tasks=parse(["a:2:cross_entropy", "b:1:masked_l1"]))
    settings = {"rank": 4, "rank_task": 2, "first_block": 1, "norms": False}
    spec = MethodConfig("ta_lora", **settings).spec(tasks=2)
    params = jax.tree.map(jnp.asarray, msam_params(small_params, model))
    adapters = peft.attach(spec, model, params, jax.random.key(0))
    variables = {"params": params, "peft": jax.tree.map(lambda leaf: leaf + 0.1, adapters)}
    image = jnp.asarray(np.random.default_rng(0).integers(0, 255, (1, 128, 128, 3), np.uint8))
    size = jnp.array([[128, 128]], jnp.int32)
    point = find_cut(spec, model).point
    before = params_before(model, params, point)
    features = model.apply({"params": before}, image, size, point, method="encode_to")
    rest = model.clone(start=point)
    for tasks in ([0, 1], [1]):
        arguments = size, jnp.array(tasks)
        whole = model.apply(variables, image, *arguments, method="encode_tasks")
        found = rest.apply(variables, features, *arguments, method="encode_tasks")
        np.testing.assert_array_equal(found, whole)
        assert len(tasks) == 1 or not np.array_equal(whole[0], whole[1])
