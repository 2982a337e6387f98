"""The laws that every PEFT method obeys; a new method is one more entry of METHODS.

Each holds in a small ViT and in a small TinyViT. What the laws cost is compilation, so that they
share compiled functions where they can.
"""

import dataclasses
import functools
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax import peft
from samjax.hashes import params_sha256
from samjax.models import MSam, Prompts, Sam
from samjax.models.msam import msam_params
from samjax.nn import Context
from samjax.peft import RECIPES, MethodConfig
from samjax.peft.delta import UNTRAINED
from samjax.peft.trees import deltas
from samjax.tasks import parse
from samjax.training.objective import MaskObjective
from samjax.training.step import (
    OptimizerConfig,
    init_state,
    make_optimizer,
    make_train_step,
    trained_labels,
)
from samjax.training.task_objective import TaskObjective

METHODS = {
    "decoder": MethodConfig(method="decoder"),
    "bitfit": MethodConfig(method="bitfit"),
    "norm": MethodConfig(method="norm"),
    "last_k": MethodConfig(method="last_k", blocks=1),
    "full": MethodConfig(method="full", decoder="mask"),
    "lora": MethodConfig(),
    "lora_everywhere": MethodConfig(
        targets=("q", "k", "v", "proj", "mlp", "decoder", "conv"),
        rank=2,
        alpha=8.0,
        decoder="none",
    ),
    "rslora": MethodConfig(method="rslora", alpha=4.0),
    "dora": MethodConfig(method="dora", rank=2, targets=("q", "v", "proj", "mlp")),
    "lora_conv": MethodConfig(method="lora_conv", rank=2),
    "fact_tt": MethodConfig(method="fact_tt", rank=4, targets=("q", "k", "v", "proj", "mlp")),
    "fact_tk": MethodConfig(method="fact_tk", rank=4),
    "adapter": MethodConfig(method="adapter", bottleneck=4),
    "adaptformer": MethodConfig(method="adaptformer", bottleneck=4, dropout=0.0),
    "ssf": MethodConfig(method="ssf"),
    "conv_lora": MethodConfig(method="conv_lora", experts=4),
    "nas_lora": MethodConfig(method="nas_lora"),
    "nas_lora_darts": MethodConfig(method="nas_lora", space="darts", nodes=2),
    "nas_pc_lora": MethodConfig(method="nas_pc_lora"),
    "nas_pc_lora_darts": MethodConfig(method="nas_pc_lora", space="darts"),
    "nas_lora_pointwise": MethodConfig(method="nas_lora", operators="none+skip_connect"),
    "sam_parser": MethodConfig(method="sam_parser"),
    "sam_parser_everywhere": MethodConfig(method="sam_parser", targets=("neck", "transformer")),
    "sam_parser_bases": MethodConfig(method="sam_parser", train="bases"),
    "sam_parser_code": MethodConfig(method="sam_parser", recipe="code"),
    "ta_lora": MethodConfig(method="ta_lora", rank=4, rank_task=2, dropout=0.0),
    "ta_lora_late": MethodConfig(method="ta_lora", rank=4, targets=("q", "v"), first_block=1),
    "lora_stl": MethodConfig(method="lora_stl", rank=2),
}
TASKS = parse(["segmentation:3:cross_entropy", "depth:1:masked_l1", "normals:3:cosine"])
# Their records have no form as a kernel and a bias.
NOT_MERGEABLE = {
    "adapter",
    "adaptformer",
    "conv_lora",
    "nas_lora",
    "nas_lora_darts",
    "nas_pc_lora",
    "nas_pc_lora_darts",
}

# Largest change at the start, in deviations of the logits; a kernel that is put together again from
# its singular vectors is not the kernel to the bit.
IDENTITY = {"sam_parser_bases": 1e-4, "sam_parser_code": 1e-4}
SIDE = 128


@dataclasses.dataclass(frozen=True)
class Case:
    """A method in a model; `moved` is what training might make of its `variables`."""

    name: str
    model: Sam
    base: Any  # SAM's parameters
    spec: peft.PeftSpec
    variables: Any
    moved: Any
    moved_again: Any
    # What several laws look at, computed once.
    known: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def objective(self):
        return TaskObjective() if isinstance(self.model, MSam) else MaskObjective()


def cases():
    """Each method in each encoder; of a method's other settings, those in TinyViT are slow."""
    for encoder in ("vit", "tiny_vit"):
        for name in METHODS:
            slow = encoder == "tiny_vit" and name not in RECIPES
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param((encoder, name), id=f"{encoder}-{name}", marks=marks)


@pytest.fixture(scope="module", params=cases())
def case(request) -> Case:
    """Methods of dense tasks are in a model of three."""
    encoder, name = request.param
    fixture = {"vit": "small", "tiny_vit": "tiny"}[encoder]
    model = request.getfixturevalue(f"{fixture}_model")
    base = jax.tree.map(jnp.asarray, request.getfixturevalue(f"{fixture}_params"))
    params, method = base, METHODS[name]
    dense = RECIPES[method.method].dense
    if dense:
        model = MSam(model.config, tasks=TASKS)
        params = msam_params(base, model)
    spec = method.spec(len(TASKS) if dense else 0)
    tree = peft.attach(spec, model, params, jax.random.key(0))
    variables = {"params": params, "peft": tree}
    moved, again = (disturb(spec, model, variables, seed) for seed in (1, 2))
    return Case(name, model, base, spec, variables, moved, again)


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
        "truth": {
            "segmentation": np.where(mask, 2, 1).astype(np.int32),
            "depth": np.where(mask, 2.0, 3.0).astype(np.float32)[:, None],
            "normals": np.tile(np.float32([0, 0, 1])[:, None, None], (size, 1, SIDE, SIDE)),
        },
    }


@functools.cache
def compiled(model: Sam):
    """The forward pass of a model: the laws of one model share what it compiles."""

    def maps(variables, *inputs):
        if isinstance(model, MSam):
            return jnp.concatenate(list(model.apply(variables, *inputs).values()), axis=1)
        return model.apply(variables, *inputs, Prompts.none(2))[0]

    return jax.jit(maps)


def forward(model: Sam, variables) -> np.ndarray:
    """Maps (b, channels, h, w): a mask's, or those of all tasks, one after another."""
    inputs = batch()
    args = jnp.asarray(inputs["image"]), jnp.asarray(inputs["input_size"])
    return np.asarray(compiled(model)(variables, *args))


def of_task(maps: np.ndarray, name: str) -> np.ndarray:
    """What `forward` gave of one task."""
    place = 0
    for task in TASKS:
        if task.name == name:
            return maps[:, place : place + task.channels]
        place += task.channels
    raise ValueError(name)


def disturb(spec, model, variables, seed: int):
    """Moves every trained leaf, and a record's numbers that are not derived from the base."""
    rng = np.random.default_rng(seed)

    def move(group: str, leaf):
        stays = group in UNTRAINED and group != "buffer"
        return leaf if stays else leaf + 0.05 * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(move, peft.groups(spec, model, variables), variables)


def start(case: Case, model: Sam, steps: int):
    mask = peft.trainable(case.spec, case.model, case.variables)
    train, frozen = peft.partition(case.variables, mask)
    labels = trained_labels(peft.groups(case.spec, case.model, case.variables))
    peak = METHODS[case.name].learning_rate
    optimizer = make_optimizer(OptimizerConfig(decoder_learning_rate=1e-4), steps, labels, peak)
    # Copied, since the step donates its state.
    return init_state(jax.tree.map(jnp.array, train), optimizer), frozen, optimizer


def test_identity_at_init(case):
    base = forward(case.model, {"params": case.variables["params"]})
    change = np.abs(forward(case.model, case.variables) - base).max()
    assert change <= IDENTITY.get(case.name, 1e-5) * base.std()


def test_merge_equals_the_activation_path_or_says_why_not(case):
    params, tree = case.moved["params"], case.moved["peft"]
    adapted = forward(case.model, case.moved)
    if jax.tree.leaves(tree):
        base = forward(case.model, {"params": params})
        assert np.abs(adapted - base).max() > 1e-3 * base.std()
    if case.name in NOT_MERGEABLE:
        with pytest.raises(peft.NotMergeable, match=r"^image_encoder/.*: "):
            peft.merge(case.model, params, tree)
        return
    if isinstance(case.model, MSam):
        for task in TASKS:
            merged = peft.merge(case.model, params, tree, task=task.name)
            ours = of_task(forward(case.model, {"params": merged}), task.name)
            theirs = of_task(adapted, task.name)
            np.testing.assert_allclose(ours, theirs, atol=1e-4 * theirs.std())
        return
    merged = peft.merge(case.model, params, tree)
    np.testing.assert_allclose(
        forward(case.model, {"params": merged}), adapted, atol=1e-4 * adapted.std()
    )


def test_one_trace_over_swapped_adapters(case):
    forward(case.model, case.variables)
    before = compiled(case.model)._cache_size()
    outputs = [forward(case.model, v) for v in (case.moved, case.moved_again)]
    assert compiled(case.model)._cache_size() == before
    assert not np.array_equal(*outputs)


def test_every_record_is_read_once(case):
    params, tree = case.variables["params"], case.variables["peft"]
    peft.check_sites(case.model, params, tree)
    if not deltas(tree):
        return
    record = next(iter(deltas(tree).values()))
    misplaced = {
        **tree,
        "image_encoder": {**tree.get("image_encoder", {}), "nowhere": {"delta": record}},
    }
    with pytest.raises(ValueError, match="image_encoder/nowhere' is called 0 times"):
        peft.check_sites(case.model, params, misplaced)


def training_moves_what_trains_alone(case: Case) -> None:
    state, frozen, optimizer = start(case, case.model, steps=40)
    count = sum(x.size for x in jax.tree.leaves(state.train))
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * count  # AdamW's two, and nothing else
    assert count == peft.report(case.spec, case.model).trainable
    before = jax.tree.map(np.array, frozen)
    jitted = make_train_step(case.model, optimizer, objective=case.objective)
    step = jitted.lower(state, frozen, batch()).compile()
    first = jax.tree.map(np.array, state.train)
    losses = []
    for _ in range(8):
        state, logs = step(state, frozen, batch())
        assert all(np.isfinite(value) for value in logs.values())
        losses.append(float(logs["loss"]))  # one program for all: it refuses another structure
    assert losses[-1] < losses[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, before, frozen))
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), first, state.train)
    assert any(jax.tree.leaves(changed))


def test_save_and_load_are_bit_equal(case, tmp_path):
    params = case.base
    file, sha = tmp_path / "a.safetensors", params_sha256(params)
    saved = peft.save(file, case.spec, case.model, case.moved, sha, {"method": "x"})
    loaded_params, tree = peft.load(file, case.model, params)
    assert jax.tree.structure(tree) == jax.tree.structure(case.moved["peft"])
    assert jax.tree.all(jax.tree.map(np.array_equal, tree, case.moved["peft"]))
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded_params, case.moved["params"]))
    read = peft.read(file)
    assert saved.metadata == read.metadata and read.spec == case.spec

    other = jax.tree.map(lambda x: x, params)
    other["prompt_encoder"]["no_mask_embed"]["embedding"] += 1
    with pytest.raises(ValueError, match="trained on other weights"):
        peft.load(file, case.model, other)


def encoder_gradients(case: Case, sharding: Any = None, **changes: Any):
    """The embedding, a loss of it and the loss's gradient, with dropout and noise.

    Two images; where there are several devices eight, spread by `sharding`.
    """
    changes |= {} if sharding is None else {"sharding": sharding}
    if (known := case.known.get(str(changes))) is not None:
        return known
    model = case.model.clone(**{k: v for k, v in changes.items() if k != "sharding"})
    assert model.sites() == case.model.sites()
    trained, frozen = peft.partition(case.moved, peft.trainable(case.spec, case.model, case.moved))
    inputs = batch(2 if jax.device_count() == 1 else 8)
    images, sizes = (jax.device_put(inputs[name], sharding) for name in ("image", "input_size"))

    def loss(trained, frozen):
        variables = peft.combine(trained, frozen)
        ctx = Context(rng=jax.random.key(7))
        arguments: tuple[Any, ...] = (variables, images, sizes, ctx)
        method = "encode"
        if isinstance(model, MSam):
            arguments = (variables, images, sizes, jnp.arange(len(TASKS)), ctx)
            method = "encode_tasks"
        embedding, added = model.apply(*arguments, method=method, mutable=["losses"])
        total = jnp.mean(jnp.square(embedding)) + sum(map(jnp.sum, jax.tree.leaves(added)))
        return total, embedding

    (value, embedding), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained, frozen)
    case.known[str(changes)] = np.float32(embedding), value, grads
    return case.known[str(changes)]


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(case):
    """Images spread over devices that are not there: processes of their own, one for all cases."""
    if jax.device_count() == 1:
        pytest.skip("run by test_laws_on_eight_devices")
    expected = encoder_gradients(case)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    actual = encoder_gradients(case, sharding=spread)
    for one, other in zip(*map(jax.tree.leaves, (expected, actual)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(np.abs(one).max(), 1e-6))


@pytest.mark.slow
def test_laws_on_eight_devices():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-m", "slow", "-k", "eight_devices_give", __file__]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-3000:]


def gradient_checkpointing_changes_nothing(case: Case) -> None:
    outcomes = encoder_gradients(case), encoder_gradients(case, remat="blocks")
    for one, other in zip(*map(jax.tree.leaves, outcomes), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(np.abs(one).max(), 1e-6))


def bfloat16_stays_finite_and_near(case: Case) -> None:
    embedding, value, grads = encoder_gradients(case, dtype=jnp.bfloat16)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))
    expected = encoder_gradients(case)[0]
    # Without any adapter it is 0.007.
    assert np.sqrt(np.mean((embedding - expected) ** 2)) < 0.03 * expected.std()


# These compile a gradient, and what they are about is the same in both encoders: in TinyViT they
# are slow tests of most methods.
GRADIENT_LAWS = (
    training_moves_what_trains_alone,
    gradient_checkpointing_changes_nothing,
    bfloat16_stays_finite_and_near,
)
IN_BOTH = ("lora", "adapter", "conv_lora")


def is_quick(case: Case) -> bool:
    return case.model.config.name == "small" or case.name in IN_BOTH


@pytest.mark.parametrize("law", GRADIENT_LAWS, ids=lambda law: law.__name__)
def test_gradients(case, law):
    if not is_quick(case):
        pytest.skip("a slow test")
    law(case)


@pytest.mark.slow
@pytest.mark.parametrize("law", GRADIENT_LAWS, ids=lambda law: law.__name__)
def test_gradients_in_tiny_vit(case, law):
    if is_quick(case):
        pytest.skip("not slow")
    law(case)


def test_accumulated_gradients_are_the_mean(small_model, small_params):
    spec = METHODS["lora"].spec()
    tree = peft.attach(spec, small_model, small_params, jax.random.key(0))
    variables = {"params": small_params, "peft": tree}
    case = Case("lora", small_model, small_params, spec, variables, variables, variables)
    losses: dict[int, list[float]] = {1: [], 2: []}
    for accumulate, values in losses.items():
        state, frozen, optimizer = start(case, small_model, steps=40)
        jitted = make_train_step(small_model, optimizer, accumulate=accumulate)
        step = jitted.lower(state, frozen, batch()).compile()
        for _ in range(6):
            state, logs = step(state, frozen, batch())
            values.append(float(logs["loss"]))
    np.testing.assert_allclose(losses[1], losses[2], rtol=1e-3)
