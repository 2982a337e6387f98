"""The laws that every PEFT method obeys; a new method is one more entry of METHODS."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax import peft
from samjax.hashes import params_sha256
from samjax.models import Prompts, Sam
from samjax.peft import MethodConfig
from samjax.training.step import (
    OptimizerConfig,
    init_state,
    make_optimizer,
    make_train_step,
    trained_labels,
)

METHODS = {
    "lora": MethodConfig(),
    "lora_qkv_encoder_only": MethodConfig(
        targets=("q", "k", "v"), rank=2, alpha=8.0, decoder="none"
    ),
    "decoder": MethodConfig(method="decoder"),
}
RNG = np.random.default_rng(0)
SIDE = 128


@pytest.fixture(scope="module", params=METHODS)
def case(request, small_model, small_params):
    """(spec, variables with records that do something)."""
    spec = METHODS[request.param].spec()
    tree = peft.attach(spec, small_model, small_params, jax.random.key(0))
    return spec, {"params": small_params, "peft": tree}


def batch(size: int = 2) -> dict[str, np.ndarray]:
    image = np.random.default_rng(3).integers(0, 255, (size, SIDE, SIDE, 3), np.uint8)
    mask = np.zeros((size, SIDE, SIDE), bool)
    mask[:, 30:90, 40:110] = True
    image[mask] //= 3
    return {
        "image": image,
        "input_size": np.full((size, 2), SIDE, np.int32),
        "mask": mask,
        "coords": np.zeros((size, 0, 2), np.float32),
        "labels": np.zeros((size, 0), np.int32),
    }


def forward(model: Sam, variables) -> np.ndarray:
    inputs = batch()
    apply = jax.jit(model.apply)
    logits, _ = apply(variables, inputs["image"], inputs["input_size"], Prompts.none(2))
    return np.asarray(logits)


def disturb(variables):
    """Moves every array of every record, as training would."""
    moved = jax.tree.map(
        lambda x: x + 0.05 * jnp.asarray(RNG.normal(size=x.shape), x.dtype), variables["peft"]
    )
    return {**variables, "peft": moved}


def start(model: Sam, spec, variables, steps: int = 10):
    mask = peft.trainable(spec, model, variables)
    train, frozen = peft.partition(variables, mask)
    labels = trained_labels(peft.groups(spec, model, variables))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-3), steps, labels)
    # Copied, since the step donates its state.
    return init_state(jax.tree.map(jnp.array, train), optimizer), frozen, optimizer


def test_identity_at_init(case, small_model, small_params):
    _, variables = case
    base = forward(small_model, {"params": small_params})
    assert np.abs(forward(small_model, variables) - base).max() <= 1e-5 * base.std()


def test_merge_equals_the_activation_path(case, small_model, small_params):
    _, variables = case
    moved = disturb(variables)
    adapted = forward(small_model, moved)
    merged = peft.merge(small_model, moved["params"], moved["peft"])
    np.testing.assert_allclose(
        forward(small_model, {"params": merged}), adapted, atol=1e-4 * adapted.std()
    )
    if jax.tree.leaves(moved["peft"]):
        base = forward(small_model, {"params": small_params})
        assert np.abs(adapted - base).max() > 1e-2 * base.std()


def test_frozen_leaves_have_no_gradient_and_no_state(case, small_model):
    spec, variables = case
    state, frozen, optimizer = start(small_model, spec, variables)
    count = sum(x.size for x in jax.tree.leaves(state.train))
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * count  # AdamW's two, and nothing else
    assert count == peft.report(spec, small_model).trainable
    before = jax.tree.map(np.array, frozen)
    step = make_train_step(small_model, optimizer)
    first = jax.tree.map(np.array, state.train)
    for _ in range(3):
        state, logs = step(state, frozen, batch())
    assert all(np.isfinite(value) for value in logs.values())
    assert jax.tree.all(jax.tree.map(np.array_equal, before, frozen))
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), first, state.train)
    assert any(jax.tree.leaves(changed))


def test_loss_falls_and_accumulation_is_the_mean(case, small_model):
    spec, variables = case
    losses = {}
    for accumulate in (1, 2):
        state, frozen, optimizer = start(small_model, spec, variables, steps=40)
        step = make_train_step(small_model, optimizer, accumulate=accumulate)
        losses[accumulate] = []
        for _ in range(8):
            state, logs = step(state, frozen, batch())
            losses[accumulate].append(float(logs["loss"]))
    np.testing.assert_allclose(losses[1], losses[2], rtol=1e-3)
    assert losses[1][-1] < losses[1][0]


def test_save_and_load_are_bit_equal(case, small_model, small_params, tmp_path):
    spec, variables = case
    moved = disturb(variables)
    sha = params_sha256(small_params)
    saved = peft.save(tmp_path / "a.safetensors", spec, small_model, moved, sha, {"method": "x"})
    params, tree = peft.load(tmp_path / "a.safetensors", small_model, small_params)
    assert jax.tree.structure(tree) == jax.tree.structure(moved["peft"])
    assert jax.tree.all(jax.tree.map(np.array_equal, tree, moved["peft"]))
    assert jax.tree.all(jax.tree.map(np.array_equal, params, moved["params"]))
    assert saved.metadata == peft.read(tmp_path / "a.safetensors").metadata

    other = jax.tree.map(lambda x: x, small_params)
    other["mask_decoder"]["iou_token"]["embedding"] = 1 + np.array(
        other["mask_decoder"]["iou_token"]["embedding"]
    )
    with pytest.raises(ValueError, match="trained on other weights"):
        peft.load(tmp_path / "a.safetensors", small_model, other)


def test_gradient_checkpointing_changes_nothing(case, small_model):
    spec, variables = case
    variables = disturb(variables)
    trained, frozen = peft.partition(variables, peft.trainable(spec, small_model, variables))
    inputs = batch()
    outcomes = {}
    for remat in ("none", "blocks"):
        model = small_model.clone(remat=remat)
        assert model.sites() == small_model.sites()

        def loss(trained, frozen, model=model):
            args = jnp.asarray(inputs["image"]), jnp.asarray(inputs["input_size"]), Prompts.none(2)
            logits, iou = model.apply(peft.combine(trained, frozen), *args)
            return jnp.mean(jnp.square(logits)) + iou.sum()

        outcomes[remat] = jax.jit(jax.value_and_grad(loss))(trained, frozen)
    for one, other in zip(*(jax.tree.leaves(o) for o in outcomes.values()), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(np.abs(one).max(), 1e-6))


def test_bfloat16_stays_finite(case, small_model):
    spec, variables = case
    model = Sam(small_model.config, dtype=jnp.bfloat16)
    state, frozen, optimizer = start(model, spec, variables)
    step = make_train_step(model, optimizer)
    for _ in range(2):
        state, logs = step(state, frozen, batch())
    assert all(np.isfinite(value) for value in logs.values())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.train))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.train))


def test_one_trace_over_steps_and_swapped_adapters(case, small_model):
    spec, variables = case
    traces = 0

    @jax.jit
    def apply(variables, image, size):
        nonlocal traces
        traces += 1
        return small_model.apply(variables, image, size, Prompts.none(2))[0]

    inputs = batch()
    for tree in (variables, disturb(variables), disturb(variables)):
        apply(tree, inputs["image"], inputs["input_size"])
    assert traces == 1
    state, frozen, optimizer = start(small_model, spec, variables)
    step = make_train_step(small_model, optimizer)
    for _ in range(3):
        state, _ = step(state, frozen, batch())
    assert step._cache_size() == 1
