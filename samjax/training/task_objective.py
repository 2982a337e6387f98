"""What a training step of dense tasks minimises: the weighted sum of the tasks' losses."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from samjax.models import MSam
from samjax.nn import Context
from samjax.peft.ta_lora import orthogonality
from samjax.preprocess import upsample
from samjax.training.objective import Loss, with_added
from samjax.training.task_losses import known_pixels, task_loss


@dataclasses.dataclass(frozen=True)
class TaskObjective:
    """All tasks of a batch in one pass.

    `batch`: image (b, fh, fw, 3) uint8, input_size (b, 2), and truth, a dict of each task's truth
    on the frame as `samjax.data.dense_pipeline.prepare_truth` gives it.

    The loss is sum_t w_t L_t with the tasks' own weights; with `uncertainty` it is
    sum_t (exp(-s_t) L_t + s_t) / 2, whose s_t, the logarithm of a task's variance, is a leaf of the
    model (Kendall, Gal and Cipolla 2018; one form for all losses, as LibMTL has it). A task of
    which the batch knows no pixel has no part in either sum: its variance would fall without
    reason. The terms are loss_TASK, weight_TASK with `uncertainty`, and orthogonality with TA-LoRA.
    """

    uncertainty: bool = False

    def __call__(self, model: MSam, variables: Any, batch: dict[str, Any], rng: Any) -> Loss:
        """See above; `samjax.training.objective.Objective` has the arguments."""
        maps, added = model.apply(
            variables, batch["image"], batch["input_size"], Context(rng=rng), mutable=["losses"]
        )
        shape = batch["image"].shape[1:3]
        losses = {
            task.name: task_loss(task, upsample(maps[task.name], shape), batch["truth"][task.name])
            for task in model.tasks
        }
        terms = {f"loss_{name}": value for name, value in losses.items()}
        if self.uncertainty:
            variances = model.apply(variables, method="log_variances")
            weights = {name: jnp.exp(-variances[name]) / 2 for name in losses}
            seen = {
                task.name: jnp.any(known_pixels(task, batch["truth"][task.name]))
                for task in model.tasks
            }
            loss = sum(
                weights[name] * losses[name] + jnp.where(seen[name], variances[name] / 2, 0.0)
                for name in losses
            )
            terms |= {f"weight_{name}": value for name, value in weights.items()}
        else:
            loss = sum(task.weight * losses[task.name] for task in model.tasks)
        # Each task's encoding has added what it adds: one that all share has it once.
        loss, terms = with_added(loss, terms, jax.tree.map(jnp.mean, added))
        regularisation = orthogonality(variables["peft"])
        if regularisation is not None:
            loss, terms = loss + regularisation, {**terms, "orthogonality": regularisation}
        return loss, terms
