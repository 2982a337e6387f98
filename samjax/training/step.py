"""The training step: a pure function of the trained leaves, differentiated in them alone.

Frozen leaves are arguments of the compiled step, never closures, and no gradient and no optimiser
state exists for them.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Int

from samjax.models import Sam
from samjax.peft.delta import ARCH, UNTRAINED, is_record
from samjax.peft.recipes import DECODER_LEARNING_RATE
from samjax.peft.trees import combine
from samjax.training.objective import MaskObjective, Objective
from samjax.training.sharding import StepShardings
from samjax.training.stages import Stage

_BCE_DICE = MaskObjective()


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to zero, after a clip of the global norm."""

    # Peak learning rate of adapters and of what trains in the encoder; left out, the one that suits
    # the method.
    learning_rate: float | None = None
    # Peak learning rate of the mask decoder, whatever the method is.
    decoder_learning_rate: float = DECODER_LEARNING_RATE
    # Learning rate of architecture parameters (Adam, constant), where a method searches for one.
    arch_learning_rate: float = 1e-2
    # Adam's weight decay of architecture parameters.
    arch_weight_decay: float = 1e-3
    # AdamW's decoupled weight decay, of matrices: biases, norms and other vectors have none.
    weight_decay: float = 1e-4
    # Share of all steps over which the learning rate rises from zero.
    warmup: float = 0.05
    # Largest global norm of the gradient of all trained leaves together.
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "decoder_learning_rate", "arch_learning_rate"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, not {value}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of all steps in [0, 1), not {self.warmup}")
        decays = self.weight_decay, self.arch_weight_decay
        if not self.clip > 0 or not all(0 <= decay < math.inf for decay in decays):
            raise ValueError(
                "clip must be positive, weight_decay and arch_weight_decay not negative"
            )


def make_optimizer(
    config: OptimizerConfig,
    steps: int | Mapping[str, int],
    labels: Any,
    learning_rate: float,
    active: Collection[str] | None = None,
) -> optax.GradientTransformation:
    """The optimiser of the trained leaves; `labels` is their tree of group names.

    `steps`: how many there are, or for each group how many in which it trains. `learning_rate` is
    the peak of what is neither mask decoder nor architecture (`Config.learning_rate`, which knows
    the method's own where the config has none). Groups that are not `active` stay as they are, and
    so does what the optimiser knows of them; its state has one form for all stages of a run.
    """

    def of_group(name: str) -> optax.GradientTransformation:
        if name == ARCH:
            # DARTS's: the decay is part of the gradient, and there is no schedule.
            decay = optax.add_decayed_weights(config.arch_weight_decay)
            return optax.chain(decay, optax.adam(config.arch_learning_rate, b1=0.5, b2=0.999))
        peak = config.decoder_learning_rate if name == "decoder" else learning_rate
        return adamw(peak, steps if isinstance(steps, int) else steps[name])

    def adamw(peak: float, steps: int) -> optax.GradientTransformation:
        warmup = min(steps - 1, max(1, round(config.warmup * steps))) if config.warmup else 0
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0 if warmup else peak,
            peak_value=peak,
            warmup_steps=warmup,
            decay_steps=max(steps, 1),
        )
        return optax.adamw(schedule, weight_decay=config.weight_decay, mask=_decays)

    by_group = {}
    for name in sorted(set(jax.tree.leaves(labels))):
        optimizer = of_group(name)
        by_group[name] = optimizer if active is None or name in active else _held(optimizer)
    return optax.chain(optax.clip_by_global_norm(config.clip), optax.partition(by_group, labels))


def _held(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Changes nothing, and keeps the state that `optimizer` would have."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(jnp.zeros_like, updates), state

    return optax.GradientTransformation(optimizer.init, update)


def _decays(train: Any) -> Any:
    """What weight decay acts on: matrices, but those that a record exempts."""
    return jax.tree.map(
        lambda node: node.decays() if is_record(node) else node.ndim > 1, train, is_leaf=is_record
    )


def trained_labels(groups: Any) -> Any:
    """Group names of the trained leaves, with None where a leaf is frozen or a buffer."""
    return jax.tree.map(lambda g: None if g in UNTRAINED else g, groups)


@struct.dataclass
class TrainState:
    """What a step changes: all of it is saved in a checkpoint."""

    step: Any  # () int32, steps done
    train: Any  # trained leaves of {"params", "peft"}; None elsewhere
    opt_state: Any


def init_state(train: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), train, optimizer.init(train))


def finite_names(train: Any) -> list[str]:
    """What a step checks, in its order: `logs["bad_leaf"]` is an index into this list.

    `train` is the state's tree of trained leaves, whose gradients are checked one by one.
    """
    leaves = jax.tree_util.tree_leaves_with_path(train)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return ["the loss", *(f"the gradient of {path}" for path in paths), "the gradient's norm"]


def make_train_step(
    model: Sam,
    optimizer: optax.GradientTransformation,
    *,
    objective: Objective = _BCE_DICE,
    seed: int = 0,
    accumulate: int = 1,
    labels: Any = None,
    stage: Stage | None = None,
    shardings: StepShardings | None = None,
) -> Callable[[TrainState, Any, dict[str, Any]], tuple[TrainState, dict[str, Any]]]:
    """`step(state, frozen, batch) -> (state, logs)`, compiled; the old state's buffers are reused.

    `batch` is that of the `objective`. With `accumulate` k it is cut into k parts, each of every
    k-th row, whose gradients are averaged before one update: the memory of b / k images.
    `shardings` are those of all arguments and results; left out, those that the arguments have.

    In a `stage` the gradient is taken in its groups alone, by the tree of `labels`. Where the stage
    keeps halves of the data apart, rows of the batch come from one and the other in turn: the loss
    of the first, third, ... is differentiated in all groups but the architecture, that of the
    others in the architecture alone, both at the same state (first-order DARTS), and `logs` has
    the latter as arch_loss.

    `logs` are float32 scalars, and the int32 `bad_leaf`: -1, or the first of `finite_names` that is
    NaN or infinite. Then the state stays as it was, to the bit and with its step.
    """

    def gradients(train: Any, frozen: Any, batch: dict[str, Any], rng: Any) -> Any:
        if stage is None or not stage.split:
            return gradients_in(None if stage is None else stage.groups, train, frozen, batch, rng)
        dealt = jax.tree.map(lambda x: _deal(x, 2), batch)
        first, second = (jax.tree.map(lambda x, i=i: x[i], dealt) for i in (0, 1))
        groups = stage.groups - {ARCH}
        (value, terms), grads = gradients_in(groups, train, frozen, first, rng)
        rng = jax.random.fold_in(rng, 1)
        (other, _), arch_grads = gradients_in({ARCH}, train, frozen, second, rng)
        return (value, {**terms, "arch_loss": other}), jax.tree.map(jnp.add, grads, arch_grads)

    def gradients_in(
        groups: Collection[str] | None, train: Any, frozen: Any, batch: dict[str, Any], rng: Any
    ) -> Any:
        """Those in `groups` (None: in all); zeros elsewhere."""

        def loss_fn(train: Any, frozen: Any, batch: dict[str, Any], rng: Any) -> Any:
            if groups is not None:
                train = jax.tree.map(
                    lambda name, x: x if name in groups else jax.lax.stop_gradient(x), labels, train
                )
            return objective(model, combine(train, frozen), batch, rng)

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        if accumulate == 1:
            return grad_fn(train, frozen, batch, rng)
        parts = jax.tree.map(lambda x: _deal(x, accumulate), batch)
        keys = jax.random.split(rng, accumulate)

        def body(total: Any, part: Any) -> tuple[Any, None]:
            out = grad_fn(train, frozen, part[0], part[1])
            return jax.tree.map(jnp.add, total, out), None

        first = jax.tree.map(lambda x: x[0], (parts, keys))
        zero = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype),
            jax.eval_shape(grad_fn, train, frozen, first[0], first[1]),
        )
        total, _ = jax.lax.scan(body, zero, (parts, keys))
        return jax.tree.map(lambda x: x / accumulate, total)

    def step(state: TrainState, frozen: Any, batch: dict[str, Any]) -> tuple[TrainState, Any]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        batch = {**batch, "key": image_keys(rng, jax.tree.leaves(batch)[0].shape[0])}
        (value, terms), grads = gradients(state.train, frozen, batch, rng)
        norm = optax.tree.norm(grads)
        bad_leaf = first_bad([value, *jax.tree.leaves(grads), norm])
        updates, opt_state = optimizer.update(grads, state.opt_state, state.train)
        train = optax.apply_updates(state.train, updates)
        new = TrainState(state.step + 1, train, opt_state)
        kept = jax.tree.map(lambda a, b: jnp.where(bad_leaf < 0, a, b), new, state)
        return kept, {"loss": value, **terms, "grad_norm": norm, "bad_leaf": bad_leaf}

    # On CPU, XLA removes the barriers between a rematerialised block's two computations and then
    # computes the second with the first, which saves nothing: this pass is what removes them.
    platform = jax.default_backend()
    if shardings is not None:  # of devices that are not there, too
        platform = shardings.batch.mesh.devices.flat[0].platform
    keeps = model.remat != "none" and platform == "cpu"
    options = {"xla_disable_hlo_passes": "cse_barrier_expander"} if keeps else None
    placed = {}
    if shardings is not None:
        placed = {
            "in_shardings": (shardings.state, shardings.frozen, shardings.batch),
            "out_shardings": (shardings.state, shardings.logs),
        }
    return jax.jit(step, donate_argnums=0, compiler_options=options, **placed)


def _deal(rows: Array, count: int) -> Array:
    """(b, ...) as (count, b / count, ...): rows are dealt out in turn, so that each device deals
    its own, where to cut a batch that is spread over devices into blocks would move it.
    """
    return jnp.moveaxis(rows.reshape(len(rows) // count, count, *rows.shape[1:]), 1, 0)


def image_keys(rng: Any, batch: int) -> Any:
    """(b,) PRNG keys of a step's images; each depends on its row alone, not on the batch's size."""
    stream = jax.random.fold_in(rng, zlib.crc32(b"images"))
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(stream, jnp.arange(batch))


def first_bad(arrays: list[Any]) -> Int[Array, ""]:
    """The index of the first array that holds NaN or infinity, as int32; -1 where none does."""
    finite = jnp.stack([jnp.isfinite(array).all() for array in arrays])
    return jnp.where(finite.all(), -1, jnp.argmin(finite)).astype(jnp.int32)
