"""What a training step of dense tasks minimises: the weighted sum of the tasks' losses."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from samjax.models import MSam
from samjax.models.semantic_decoder import ClassifiedMasks
from samjax.nn import Context
from samjax.peft.ta_lora import orthogonality
from samjax.preprocess import upsample
from samjax.tasks import Task
from samjax.training.mask_classification import mask_classification_loss
from samjax.training.objective import Loss, encoder_input, with_added
from samjax.training.task_losses import known_pixels, task_loss


@dataclasses.dataclass(frozen=True)
class TaskObjective:
    """All tasks of a batch in one pass, or those that are drawn.

    `batch`: image (b, fh, fw, 3) uint8 (or see `samjax.training.objective.encoder_input`),
    input_size (b, 2), and truth, a dict of each task's truth on the frame as
    `samjax.data.dense_pipeline.prepare_truth` gives it. Where it has drawn (b, k), rows that are
    alike, only the tasks of these k indices are encoded and decoded.

    The loss is sum_t w_t L_t with the tasks' own weights; with `uncertainty` it is
    sum_t (exp(-s_t) L_t + s_t) / 2, whose s_t, the logarithm of a task's variance, is a leaf of the
    model (Kendall, Gal and Cipolla 2018; one form for all losses, as LibMTL has it). A task of
    which the batch knows no pixel has no part in either sum: its variance would fall without
    reason. With k of T tasks drawn the sum is over these, times T / k, whose mean over all draws is
    the sum over all tasks. The terms are loss_TASK, NaN of what is not drawn, weight_TASK with
    `uncertainty`, and orthogonality with TA-LoRA.
    """

    uncertainty: bool = False

    def __call__(self, model: MSam, variables: Any, batch: dict[str, Any], rng: Any) -> Loss:
        """See above; `samjax.training.objective.Objective` has the arguments."""
        if "drawn" in batch:
            losses, shares, added = _of_drawn(model, variables, batch, rng)
        else:
            maps, added = model.apply(
                variables,
                encoder_input(batch),
                batch["input_size"],
                Context(rng=rng),
                mutable=["losses"],
            )
            losses = {task.name: _loss(model, task, maps[task.name], batch) for task in model.tasks}
            shares = dict.fromkeys(losses, 1.0)
        terms = {
            f"loss_{name}": jnp.where(shares[name] > 0, value, jnp.nan)
            for name, value in losses.items()
        }
        if self.uncertainty:
            variances = model.apply(variables, method="log_variances")
            weights = {name: jnp.exp(-variances[name]) / 2 for name in losses}
            seen = {
                task.name: jnp.any(known_pixels(task, batch["truth"][task.name]))
                for task in model.tasks
            }
            parts = {
                name: weights[name] * losses[name] + jnp.where(seen[name], variances[name] / 2, 0.0)
                for name in losses
            }
            terms |= {f"weight_{name}": value for name, value in weights.items()}
        else:
            parts = {task.name: task.weight * losses[task.name] for task in model.tasks}
        loss = sum(shares[name] * part for name, part in parts.items())
        # Each task's encoding has added what it adds: one that all share has it once.
        loss, terms = with_added(loss, terms, jax.tree.map(jnp.mean, added))
        regularisation = orthogonality(variables["peft"])
        if regularisation is not None:
            loss, terms = loss + regularisation, {**terms, "orthogonality": regularisation}
        return loss, terms


def _of_drawn(
    model: MSam, variables: Any, batch: dict[str, Any], rng: Any
) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Losses, 0 where a task is not drawn, by name; T / k or 0; and what adapters have added.

    One program for all draws: the encodings are those of the drawn tasks, whose indices it takes,
    and a decoder runs only where its task is among them.
    """
    drawn = batch["drawn"][0]
    scale = len(model.tasks) / drawn.shape[0]
    embeddings, added = model.apply(
        variables,
        encoder_input(batch),
        batch["input_size"],
        drawn,
        Context(rng=rng),
        method="encode_tasks",
        mutable=["losses"],
    )
    losses, shares, added_later = {}, {}, []
    for i, task in enumerate(model.tasks):

        def decode(embedding: Any, i: int = i, task: Task = task) -> tuple[Any, Any]:
            context = Context(rng=rng, task=jnp.int32(i))
            maps, added = model.apply(
                variables, embedding, task.name, context, method="decode_task", mutable=["losses"]
            )
            return _loss(model, task, maps, batch), added

        def leave_out(embedding: Any, decode: Any = decode) -> tuple[Any, Any]:
            shapes = jax.eval_shape(decode, embedding)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        place = drawn == i
        is_drawn = jnp.any(place)
        found = jax.lax.cond(is_drawn, decode, leave_out, embeddings[jnp.argmax(place)])
        losses[task.name], of_decoder = found
        shares[task.name] = jnp.where(is_drawn, scale, 0.0)
        added_later.append(jax.tree.map(lambda x: scale * x, of_decoder))
    return losses, shares, (added, added_later)


def _loss(model: MSam, task: Task, decoded: Any, batch: dict[str, Any]) -> Any:
    shape, truth = model.config.frame.shape, batch["truth"][task.name]
    if isinstance(decoded, ClassifiedMasks):
        masks = decoded.replace(masks=upsample(decoded.masks, shape))
        return mask_classification_loss(task, masks, truth)
    return task_loss(task, upsample(decoded, shape), truth)
