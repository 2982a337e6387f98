"""The training step: a pure function of the trained leaves, differentiated in them alone.

Frozen leaves are arguments of the compiled step, never closures, and no gradient and no optimiser
state exists for them.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Int

from samjax.models import Sam
from samjax.peft.delta import UNTRAINED, is_record
from samjax.peft.recipes import DECODER_LEARNING_RATE
from samjax.peft.trees import combine
from samjax.training.losses import LossConfig
from samjax.training.objective import objective

_BCE_DICE = LossConfig()


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to zero, after a clip of the global norm."""

    # Peak learning rate of adapters and of what trains in the encoder; left out, the one that suits
    # the method.
    learning_rate: float | None = None
    # Peak learning rate of the mask decoder, whatever the method is.
    decoder_learning_rate: float = DECODER_LEARNING_RATE
    # AdamW's decoupled weight decay, of matrices: biases, norms and other vectors have none.
    weight_decay: float = 1e-4
    # Share of all steps over which the learning rate rises from zero.
    warmup: float = 0.05
    # Largest global norm of the gradient of all trained leaves together.
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "decoder_learning_rate"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, not {value}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of all steps in [0, 1), not {self.warmup}")
        if not self.clip > 0 or not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError("clip must be positive and weight_decay not negative")


def make_optimizer(
    config: OptimizerConfig, steps: int, labels: Any, learning_rate: float
) -> optax.GradientTransformation:
    """The optimiser of the trained leaves; `labels` is their tree of group names.

    `learning_rate` is the peak of all but the mask decoder (`Config.learning_rate`, which knows the
    method's own where the config has none).
    """

    def adamw(peak: float) -> optax.GradientTransformation:
        warmup = min(steps - 1, max(1, round(config.warmup * steps))) if config.warmup else 0
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0 if warmup else peak,
            peak_value=peak,
            warmup_steps=warmup,
            decay_steps=max(steps, 1),
        )
        return optax.adamw(schedule, weight_decay=config.weight_decay, mask=_decays)

    present = set(jax.tree.leaves(labels))
    peaks = {"decoder": config.decoder_learning_rate}
    by_group = {name: adamw(peaks.get(name, learning_rate)) for name in present}
    return optax.chain(optax.clip_by_global_norm(config.clip), optax.partition(by_group, labels))


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
    loss: LossConfig = _BCE_DICE,
    corrective_points: int = 0,
    seed: int = 0,
    accumulate: int = 1,
) -> Callable[[TrainState, Any, dict[str, Any]], tuple[TrainState, dict[str, Any]]]:
    """`step(state, frozen, batch) -> (state, logs)`, compiled; the old state's buffers are reused.

    `batch`: image (b, fh, fw, 3) uint8, input_size (b, 2), mask (b, h, w) bool, which covers the
    frame at any resolution, coords (b, n, 2) and labels (b, n) of `Prompts`. Rounds of
    `corrective_points` follow those prompts; see `samjax.training.objective`. With `accumulate` k
    the batch is cut into k parts whose gradients are averaged before one update: the memory of
    b / k images.

    `logs` are float32 scalars, and the int32 `bad_leaf`: -1, or the first of `finite_names` that is
    NaN or infinite. Then the state stays as it was, to the bit and with its step.
    """

    def loss_fn(train: Any, frozen: Any, batch: dict[str, Any], rng: Any) -> Any:
        return objective(model, combine(train, frozen), batch, rng, loss, corrective_points)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def gradients(train: Any, frozen: Any, batch: dict[str, Any], rng: Any) -> Any:
        if accumulate == 1:
            return grad_fn(train, frozen, batch, rng)
        parts = jax.tree.map(
            lambda x: x.reshape(accumulate, x.shape[0] // accumulate, *x.shape[1:]), batch
        )
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
        batch = {**batch, "key": image_keys(rng, batch["labels"].shape[0])}
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
    keeps = model.remat != "none" and jax.default_backend() == "cpu"
    options = {"xla_disable_hlo_passes": "cse_barrier_expander"} if keeps else None
    return jax.jit(step, donate_argnums=0, compiler_options=options)


def image_keys(rng: Any, batch: int) -> Any:
    """(b,) PRNG keys of a step's images; each depends on its row alone, not on the batch's size."""
    stream = jax.random.fold_in(rng, zlib.crc32(b"images"))
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(stream, jnp.arange(batch))


def first_bad(arrays: list[Any]) -> Int[Array, ""]:
    """The index of the first array that holds NaN or infinity, as int32; -1 where none does."""
    finite = jnp.stack([jnp.isfinite(array).all() for array in arrays])
    return jnp.where(finite.all(), -1, jnp.argmin(finite)).astype(jnp.int32)
