"""What a training step minimises: the loss of a batch, over rounds of prompts and corrections."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from samjax.models import Prompts, Sam
from samjax.nn import Context
from samjax.preprocess import MASK_THRESHOLD, upsample
from samjax.training.corrections import corrective_point, make_room, put_point
from samjax.training.losses import LossConfig, mask_loss, multimask_loss

Loss = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]


@runtime_checkable
class Objective(Protocol):
    """What a training step minimises."""

    def __call__(self, model: Any, variables: Any, batch: dict[str, Any], rng: Any) -> Loss:
        """The loss of a batch, and its terms before their weights.

        `batch` is a batch of training with `key` (b,), a PRNG key for each image; `rng` is that of
        stochastic adapters, None for none.
        """


@dataclasses.dataclass(frozen=True)
class MaskObjective:
    """Masks from prompts.

    `batch`: image (b, fh, fw, 3) uint8 (or see `encoder_input`), input_size (b, 2), mask (b, h, w)
    bool, which covers the frame at any resolution, coords (b, n, 2) and labels (b, n) of `Prompts`.

    The first round takes the batch's prompts. Each of `corrective_points` more adds a point where
    the last prediction is wrong, gives its logits as mask prompt and decodes again. The loss of
    mask 0 is the mean over all rounds; that of the three multimask outputs, where they are trained,
    is the first round's, since SAM has them for prompts that are ambiguous. Images are encoded
    once, and the backward pass of a round decodes anew, so that memory hardly grows with rounds.
    What adapters add to the loss is the term `adapter_loss`: those of the encoder once, others as
    the mean over all rounds.
    """

    loss: LossConfig = LossConfig()
    corrective_points: int = 0

    def __call__(self, model: Sam, variables: Any, batch: dict[str, Any], rng: Any) -> Loss:
        """See above; `Objective` has the arguments."""
        frame, truth = model.config.frame.shape, batch["mask"]
        valid = valid_pixels(batch["input_size"], frame, truth.shape[1:])
        embeddings, added = model.apply(
            variables,
            encoder_input(batch),
            batch["input_size"],
            Context(rng=rng),
            method="encode",
            mutable=["losses"],
        )

        def decode(prompts: Prompts, key: Any) -> tuple[Any, Any, tuple[Any, dict[str, Any]]]:
            (logits, iou), added = model.apply(
                variables,
                embeddings,
                prompts,
                Context(rng=key),
                method="decode",
                mutable=["losses"],
            )
            found = mask_loss(logits[:, 0], iou[:, 0], truth, valid, self.loss)
            return logits, iou, with_added(*found, added)

        logits, iou, (loss, terms) = decode(Prompts(batch["coords"], batch["labels"]), rng)

        if self.corrective_points:
            coords, labels = make_room(batch["coords"], batch["labels"], self.corrective_points)
            first_slot = batch["labels"].shape[1]

            def correct(carry: tuple[Any, Any, Any], index: Any) -> tuple[Any, Any]:
                coords, labels, low_res = carry
                predicted = upsample(low_res, truth.shape[1:]) > MASK_THRESHOLD
                keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(batch["key"], index)
                points = jax.vmap(lambda *image: corrective_point(*image, frame))
                new = points(keys, predicted, truth, valid)
                coords, labels = put_point(coords, labels, first_slot + index, *new)
                key = None if rng is None else jax.random.fold_in(rng, index)
                logits, _, found = decode(Prompts(coords, labels, low_res), key)
                return (coords, labels, jax.lax.stop_gradient(logits[:, 0])), found

            start = (coords, labels, jax.lax.stop_gradient(logits[:, 0]))
            # A scan compiles one decoder for all rounds, and needs no barriers that keep the
            # compiler from undoing the recomputation.
            body = jax.checkpoint(correct, prevent_cse=False)
            _, (losses, later) = jax.lax.scan(body, start, jnp.arange(self.corrective_points))

            def mean(first: Any, others: Any) -> Any:
                return (first + jnp.sum(others)) / (self.corrective_points + 1)

            loss = mean(loss, losses)
            # The first round has no mask prompt, so that adapters of its layers add to later ones
            # only.
            terms = {k: mean(terms.get(k, 0.0), others) for k, others in later.items()}

        if self.loss.multimask:
            multimask = multimask_loss(logits[:, 1:], iou[:, 1:], truth, valid, self.loss)
            loss, terms = loss + multimask, {**terms, "multimask_loss": multimask}
        return with_added(loss, terms, added)


def encoder_input(batch: dict[str, Any]) -> Any:
    """What `encode` takes of a batch: image, or in its place features (b, th, tw, tc).

    A model with `start` begins from these.
    """
    return batch["features"] if "features" in batch else batch["image"]


def with_added(loss: Any, terms: dict[str, Any], added: Any) -> tuple[Any, dict[str, Any]]:
    """A loss and its terms with what adapters added to the `losses` collection in a pass."""
    losses = jax.tree.leaves(added)
    if not losses:
        return loss, terms
    more = jnp.sum(jnp.stack(losses))
    return loss + more, {**terms, "adapter_loss": terms.get("adapter_loss", 0.0) + more}


def valid_pixels(
    input_size: Int[Array, "b 2"], frame: tuple[int, int], size: tuple[int, int]
) -> Bool[Array, "b h w"]:
    """True where the centre of a pixel of the truth, (h, w) = `size`, lies on the image.

    The truth covers the `frame` (height, width), of which each image fills `input_size`.
    """
    # In integers: (i + 1/2) * frame / size < input_size.
    rows, columns = (
        (2 * jnp.arange(n) + 1) * side < 2 * n * input_size[:, axis, None]
        for axis, (n, side) in enumerate(zip(size, frame, strict=True))
    )
    return rows[:, :, None] & columns[:, None, :]
