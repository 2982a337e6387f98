"""The step: corrective points, what it minimises, and what it does with what is not finite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from flax.traverse_util import unflatten_dict

from samjax import peft
from samjax.data.prompts import ABSENT, NEGATIVE, NOT_A_POINT, POSITIVE, encode_prompt
from samjax.models import Prompts, Sam, SamConfig, VitConfig
from samjax.nn import Context
from samjax.peft import DoRA, PeftSpec, Rule, Train
from samjax.peft.delta import Delta, field
from samjax.preprocess import inside, upsample
from samjax.training.corrections import corrective_point, make_room, put_point, sample_pixel
from samjax.training.losses import LossConfig, mask_loss, multimask_loss
from samjax.training.objective import MaskObjective, valid_pixels
from samjax.training.step import (
    OptimizerConfig,
    finite_names,
    first_bad,
    image_keys,
    init_state,
    make_optimizer,
    make_train_step,
    trained_labels,
)

SIDE, ROUNDS = 64, 2
LOSS = LossConfig("focal_dice", multimask=True)
# Little, so that there is little to compile.
SPEC = PeftSpec((Rule("mask_decoder/output_hypernetworks_mlps_*/**", Train()),))


def batch() -> dict[str, np.ndarray]:
    """Three images, of which one is padded and each has another kind of prompt; truth of 32 px."""
    rng = np.random.default_rng(3)
    mask = np.zeros((3, SIDE // 2, SIDE // 2), bool)
    mask[:, 8:22, 10:25] = True
    input_size = np.array([[SIDE, SIDE], [48, SIDE], [SIDE, SIDE]], np.int32)
    coords, labels = np.zeros((3, 2, 2), np.float32), np.full((3, 2), ABSENT, np.int32)
    coords[1], labels[1] = encode_prompt(None, None, [20.0, 15.0, 50.0, 45.0])
    coords[2], labels[2] = encode_prompt([[25.0, 25.0]], [POSITIVE], None)
    return {
        "image": rng.integers(0, 255, (3, SIDE, SIDE, 3), np.uint8),
        "input_size": input_size,
        "mask": mask,
        "coords": coords,
        "labels": labels,
    }


@pytest.fixture(scope="module")
def model() -> Sam:
    """Smaller than `model`: a block in the encoder and a layer in the decoder."""
    encoder = VitConfig(
        embed_dim=16, depth=1, num_heads=2, global_attn_indexes=(0,), pretrain_grid=4
    )
    config = SamConfig(
        "tiny", encoder, image_size=SIDE, prompt_embed_dim=16, decoder_depth=1, decoder_mlp_dim=32
    )
    return Sam(config)


@pytest.fixture(scope="module")
def variables(model, draw_params):
    return {"params": jax.tree.map(jnp.asarray, draw_params(model)), "peft": {}}


def start(model, variables):
    train, frozen = peft.partition(variables, peft.trainable(SPEC, model, variables))
    labels = trained_labels(peft.groups(SPEC, model, variables))
    optimizer = make_optimizer(OptimizerConfig(), 10, labels, 1e-3)
    # Copied, since the step donates its state.
    return init_state(jax.tree.map(jnp.array, train), optimizer), frozen, optimizer


def bits(tree) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same_bits(first, second) -> None:
    for a, b in zip(bits(first), bits(second), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def full_step(model, variables):
    """Every option at once: compiled once for the tests that share it."""
    _, _, optimizer = start(model, variables)
    return make_train_step(
        model, optimizer, objective=MaskObjective(LOSS, ROUNDS), seed=5, accumulate=1
    )


# Points ------------------------------------------------------------------------------------------


def test_every_pixel_of_a_region_is_equally_likely():
    region = np.zeros((5, 7), bool)
    region[0, 2:5] = region[3, 0] = region[3, 6] = region[4] = True
    draws = 12_000
    keys = jax.random.split(jax.random.key(0), draws)
    pixels = jax.jit(jax.vmap(sample_pixel, (0, None)))(keys, jnp.asarray(region))
    counts = np.zeros(region.shape)
    np.add.at(counts, tuple(np.asarray(pixels).T), 1)
    assert (counts[~region] == 0).all()
    expected = draws / region.sum()
    # Chi-squared of 11 degrees of freedom: 31.3 is exceeded once in a thousand times.
    assert ((counts[region] - expected) ** 2 / expected).sum() < 31.3


def test_labels_are_the_truth_where_the_prediction_is_wrong():
    draw = jax.jit(jax.vmap(corrective_point, (0, None, None, None, None)), static_argnums=4)
    keys = jax.random.split(jax.random.key(1), 64)

    def points(predicted, truth, valid, frame=(4, 4)):
        arrays = (jnp.asarray(np.array(a, bool)) for a in (predicted, truth, valid))
        coords, labels = draw(keys, *arrays, frame)
        return {(*map(float, c), int(label)) for c, label in zip(coords, labels, strict=True)}

    truth = np.zeros((4, 4), bool)
    truth[1, 2] = truth[3, 3] = True
    nothing, all_valid = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    missed = {(2.0, 1.0, POSITIVE), (3.0, 3.0, POSITIVE)}
    assert points(nothing, truth, all_valid) == missed
    invented = truth.copy()
    invented[0, 1] = True
    invented[1, 2] = False
    assert points(invented, truth, all_valid) == {(2.0, 1.0, POSITIVE), (1.0, 0.0, NEGATIVE)}
    # Padding is no error; without an error, the object; without an object, no point.
    valid = np.arange(4)[:, None].repeat(4, 1) < 3
    assert points(nothing, truth, valid) == {(2.0, 1.0, POSITIVE)}
    assert points(truth, truth, all_valid) == missed
    assert points(nothing, nothing, all_valid) == {(0.0, 0.0, ABSENT)}
    # The centre of pixel (2, 1) of 4 x 4 in a frame of 8 x 16.
    assert points(nothing, truth, valid, (8, 16)) == {(9.5, 2.5, POSITIVE)}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([ABSENT, ABSENT], NOT_A_POINT),
        ([POSITIVE, NOT_A_POINT], ABSENT),
        ([2, 3], ABSENT),
    ],
)
def test_not_a_point_is_there_exactly_where_points_are_without_a_box(before, after):
    coords, labels = make_room(jnp.ones((1, 2, 2)), jnp.array([before]), 2)
    np.testing.assert_array_equal(labels, [[*before, ABSENT, ABSENT, ABSENT]])
    # A point that does not exist changes nothing.
    absent = put_point(coords, labels, 2, jnp.zeros((1, 2)), jnp.array([ABSENT]))
    np.testing.assert_array_equal(absent[1], labels)
    coords, labels = put_point(coords, labels, 2, jnp.array([[5.0, 6.0]]), jnp.array([NEGATIVE]))
    np.testing.assert_array_equal(labels, [[*before, NEGATIVE, ABSENT, after]])
    coords, labels = put_point(coords, labels, 3, jnp.array([[7.0, 8.0]]), jnp.array([POSITIVE]))
    np.testing.assert_array_equal(labels, [[*before, NEGATIVE, POSITIVE, after]])
    np.testing.assert_array_equal(coords, [[[1, 1], [1, 1], [5, 6], [7, 8], [0, 0]]])


def test_a_pixel_is_valid_where_its_centre_lies_on_the_image():
    sizes = np.array([[100, 128], [128, 37]], np.int32)
    np.testing.assert_array_equal(
        valid_pixels(jnp.asarray(sizes), (128, 128), (128, 128)),
        inside(jnp.asarray(sizes), 128, 128),
    )
    valid = np.asarray(valid_pixels(jnp.asarray(sizes), (128, 128), (48, 256)))
    for i, (height, width) in enumerate(sizes):
        rows = (np.arange(48) + 0.5) * 128 / 48 < height
        columns = (np.arange(256) + 0.5) / 2 < width
        np.testing.assert_array_equal(valid[i], rows[:, None] & columns)


def test_an_images_points_do_not_depend_on_the_batchs_size():
    rng = jax.random.key(0)
    few, many = (jax.random.key_data(image_keys(rng, n)) for n in (2, 5))
    np.testing.assert_array_equal(few, many[:2])
    assert len(np.unique(many, axis=0)) == 5


# Loss --------------------------------------------------------------------------------------------


def scripted_loss(model, variables, inputs, keys) -> float:
    """The rounds one by one and image by image, with prompts in SAM's order and no empty slots."""
    encode = jax.jit(lambda *args: model.apply(variables, *args, method="encode"))
    decode = jax.jit(lambda *args: model.apply(variables, *args, method="decode"))
    one_mask, three_masks = (jax.jit(f, static_argnums=4) for f in (mask_loss, multimask_loss))
    losses = []
    for i in range(3):
        image, size, truth = (inputs[k][i : i + 1] for k in ("image", "input_size", "mask"))
        height, width = size[0] // 2
        valid = np.zeros_like(truth)
        valid[:, :height, :width] = True
        embedding = encode(image, size)
        kinds = inputs["labels"][i]
        given = inputs["coords"][i]
        box = given.reshape(-1) if (kinds >= 2).any() else None
        points, labels = (a[(kinds == 0) | (kinds == 1)] for a in (given, kinds))
        low_res = None
        for r in range(ROUNDS + 1):
            coords, slots = (a[None] for a in encode_prompt(points, labels, box))
            logits, iou = decode(
                embedding, Prompts(jnp.asarray(coords), jnp.asarray(slots), low_res)
            )
            arrays = (jnp.asarray(truth), jnp.asarray(valid), LOSS)
            losses.append(one_mask(logits[:, 0], iou[:, 0], *arrays)[0] / (ROUNDS + 1))
            if r == 0:
                losses.append(three_masks(logits[:, 1:], iou[:, 1:], *arrays))
            low_res = logits[:, 0]
            wrong = ((np.asarray(upsample(low_res, truth.shape[1:])) > 0) != truth) & valid
            pixels = np.argwhere(wrong[0])
            rank = jax.random.randint(jax.random.fold_in(keys[i], r), (), 0, len(pixels))
            row, column = pixels[int(rank)]
            points = np.concatenate([points, [[2 * column + 0.5, 2 * row + 0.5]]])
            labels = np.append(labels, truth[0, row, column])
    return float(np.sum(losses) / 3)


def test_rounds_are_those_of_a_script(full_step, model, variables):
    inputs = batch()
    state, frozen, _ = start(model, variables)
    keys = image_keys(jax.random.fold_in(jax.random.key(5), 0), 3)
    expected = scripted_loss(model, variables, inputs, keys)
    state, logs = full_step(state, frozen, inputs)
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)
    terms = 20 * logs["focal_loss"] + logs["dice_loss"] + logs["iou_loss"]
    np.testing.assert_allclose(logs["loss"], terms + logs["multimask_loss"], rtol=1e-6)
    assert int(logs["bad_leaf"]) == -1 and int(state.step) == 1
    state, _ = full_step(state, frozen, inputs)
    assert int(state.step) == 2 and full_step._cache_size() == 1


def test_parts_of_a_batch_draw_the_points_of_the_whole(full_step, model, variables):
    inputs = batch()
    state, frozen, optimizer = start(model, variables)
    parts = make_train_step(
        model, optimizer, objective=MaskObjective(LOSS, ROUNDS), seed=5, accumulate=3
    )
    in_parts, logs_in_parts = parts(state, frozen, inputs)
    state, _, _ = start(model, variables)
    whole, logs = full_step(state, frozen, inputs)
    for name, value in logs.items():
        np.testing.assert_allclose(logs_in_parts[name], value, rtol=1e-4, err_msg=name)
    for a, b in zip(bits(in_parts.opt_state), bits(whole.opt_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-5)


def test_a_repeated_step_is_bit_equal(full_step, model, variables):
    results = []
    for _ in range(2):
        state, frozen, _ = start(model, variables)
        results.append(full_step(state, frozen, batch()))
    assert_same_bits(*results)


def test_without_corrections_the_loss_is_that_of_one_forward_pass(model, variables):
    inputs = {key: jnp.asarray(value) for key, value in batch().items()}

    def loss(variables):
        prompts = Prompts(inputs["coords"], inputs["labels"])
        logits, iou = model.apply(
            variables, inputs["image"], inputs["input_size"], prompts, Context()
        )
        valid = inside(inputs["input_size"] // 2, *inputs["mask"].shape[1:])
        return mask_loss(logits[:, 0], iou[:, 0], inputs["mask"], valid, LossConfig())

    expected = jax.jit(loss)(variables)
    ours = jax.jit(lambda v: MaskObjective(LossConfig())(model, v, inputs, None))(variables)
    assert_same_bits(ours, expected)


def test_multimask_trains_the_hypernetwork_of_the_best_mask_only(model, variables):
    inputs = {key: jnp.asarray(value[:1]) for key, value in batch().items()}
    head = variables["params"]["mask_decoder"]

    def loss(hypernetworks):
        params = {**variables["params"], "mask_decoder": {**head, **hypernetworks}}
        return MaskObjective(LossConfig(multimask=True))(model, {"params": params}, inputs, None)

    names = [f"output_hypernetworks_mlps_{i}" for i in range(4)]
    gradients, terms = jax.jit(jax.grad(loss, has_aux=True))({name: head[name] for name in names})
    reached = [max(np.abs(x).max() for x in jax.tree.leaves(gradients[name])) > 0 for name in names]
    assert reached[0] and sum(reached[1:]) == 1 and terms["multimask_loss"] > 0


@struct.dataclass
class Costly(Delta):
    """The site as it is, and a loss."""

    cost: Any = field()  # ()

    def __call__(self, site, x, ctx):
        """The site's output; `cost` once more for a training pass."""
        if ctx.rng is not None:
            site.add_loss(self.cost)
        return site(x)


@pytest.mark.parametrize("rounds", [0, 2])
def test_no_site_loses_what_its_adapter_adds_to_the_loss(model, variables, rounds):
    """Powers of two tell which were added; a round with a mask prompt is two of three."""
    layer = ("mask_decoder", "transformer", "layers_0")
    paths = [
        ("image_encoder", "blocks_0", "attn", "qkv"),
        ("image_encoder", "blocks_0", "attn"),
        ("image_encoder", "blocks_0", "norm1"),
        ("image_encoder", "neck_0"),
        (*layer, "self_attn", "q_proj"),
        (*layer, "norm1"),
        ("prompt_encoder", "mask_downscaling_0"),
    ]
    records = {(*path, "delta"): Costly(cost=jnp.float32(2**i)) for i, path in enumerate(paths)}
    inputs = {key: jnp.asarray(value) for key, value in batch().items()}
    inputs["key"] = image_keys(jax.random.key(1), 3)

    @jax.jit
    def terms(tree):
        both = {"params": variables["params"], "peft": tree}
        return MaskObjective(LOSS, rounds)(model, both, inputs, jax.random.key(0))

    loss, parts = terms(unflatten_dict(records))
    plain, without = terms({})
    expected = 2**6 - 1 + 2**6 * rounds / (rounds + 1)
    np.testing.assert_allclose(parts["adapter_loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(loss - plain, expected, rtol=1e-5)
    assert parts.keys() - without.keys() == {"adapter_loss"}
    grads = jax.grad(lambda tree: terms(tree)[0])(unflatten_dict(records))
    every = np.array(jax.tree.leaves(grads))
    np.testing.assert_allclose(np.sort(every)[1:], 1, rtol=1e-6)
    np.testing.assert_allclose(every.sum(), 6 + rounds / (rounds + 1), rtol=1e-6)


# What is not finite ------------------------------------------------------------------------------


def test_a_frozen_nan_stops_the_update(full_step, model, variables):
    state, frozen, _ = start(model, variables)
    state, _ = full_step(state, frozen, batch())  # moments that are not zero
    before = bits(state)
    names = finite_names(state.train)
    bad = jax.tree.map(lambda x: x, frozen)
    scale = bad["params"]["image_encoder"]["neck_1"]["scale"]
    bad["params"]["image_encoder"]["neck_1"]["scale"] = scale * np.float32(np.nan)
    state, logs = full_step(state, bad, batch())
    assert names[int(logs["bad_leaf"])] == "the loss" and np.isnan(logs["loss"])
    assert_same_bits(before, state)
    # A good batch goes on from there.
    state, logs = full_step(state, frozen, batch())
    assert int(logs["bad_leaf"]) == -1 and int(state.step) == 2


@struct.dataclass
class Spike:
    """Leaves the output as it is, with a gradient that is not finite: that of sqrt at 0."""

    weight: object = field()

    def __call__(self, site, x, ctx):
        return site(x) + 0.0 * jnp.sqrt(self.weight)

    def merge(self, info, kernel, bias, ctx):
        return kernel, bias


def test_a_bad_gradient_is_named(model, variables):
    layers = {
        name: {"delta": Spike(jnp.full((), value))}
        for name, value in (("layers_0", 1.0), ("layers_1", 0.0), ("layers_2", 0.0))
    }
    train = {"params": None, "peft": {"mask_decoder": {"iou_prediction_head": layers}}}
    frozen = {"params": variables["params"], "peft": jax.tree.map(lambda _: None, train["peft"])}
    train["params"] = jax.tree.map(lambda _: None, variables["params"])
    optimizer = optax.adam(1e-3)
    state = init_state(train, optimizer)
    before, names = bits(state), finite_names(state.train)
    state, logs = make_train_step(model, optimizer)(state, frozen, batch())
    assert np.isfinite(logs["loss"])
    name = names[int(logs["bad_leaf"])]
    assert name.startswith("the gradient of peft/mask_decoder/iou_prediction_head/layers_1/delta")
    assert_same_bits(before, state)


def test_the_first_bad_array_is_found():
    good, bad = jnp.ones((2, 3)), jnp.ones((2, 3)).at[1, 1].set(jnp.inf)
    assert int(first_bad([good, good])) == -1
    assert int(first_bad([good, bad, good, bad])) == 1


def test_names_are_the_order_of_the_checks():
    train = {"params": {"b": np.ones(2), "frozen": None}, "peft": {"a": np.ones(2)}}
    names = ["the gradient of params/b", "the gradient of peft/a"]
    assert finite_names(train) == ["the loss", *names, "the gradient's norm"]


def test_weight_decay_acts_on_matrices_alone(small_model, small_params):
    """Not on norms and biases, and not on what a record exempts: DoRA's magnitudes, here 2-D."""
    spec = PeftSpec((Rule("image_encoder/**/attn/qkv[q,v]", DoRA(2)), Rule("**/neck_1/*", Train())))
    tree = peft.attach(spec, small_model, small_params, jax.random.key(0))
    variables = {"params": small_params, "peft": tree}
    train, _ = peft.partition(variables, peft.trainable(spec, small_model, variables))
    labels = trained_labels(peft.groups(spec, small_model, variables))
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5, warmup=0.0), 10, labels, 0.1)
    zero = jax.tree.map(jnp.zeros_like, train)
    updates, _ = optimizer.update(zero, optimizer.init(train), train)
    delta, change = (
        t["peft"]["image_encoder"]["blocks_0"]["attn"]["qkv"]["delta"] for t in (train, updates)
    )
    np.testing.assert_allclose(change.lora.a, -0.05 * delta.lora.a, rtol=1e-5)
    assert not change.magnitude.any()
    assert not any(u.any() for u in jax.tree.leaves(updates["params"]))
