"""Masks for many images at once, each with prompts of its own number and kinds."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Shaped

from samjax.models import Prompts, Sam
from samjax.predictor import PROMPTS_PER_BATCH, check_promptable, encode
from samjax.preprocess import MASK_THRESHOLD, check_image, postprocess_masks, prepare_image
from samjax.prompting import Prompt, assemble, check_prompt


class Prediction(NamedTuple):
    """Masks for one prompt; c is 3 with `multimask_output` and 1 without."""

    # At the image's own size: bool, or float32 logits with `return_logits`.
    masks: Shaped[np.ndarray, "c h w"]
    iou_predictions: Float32[np.ndarray, " c"]
    # What `Prompt.mask_input` takes, one of them, to refine a prediction.
    low_res_logits: Float32[np.ndarray, "c lh lw"]


def predict_batch(
    model: Sam,
    params: Any,
    images: Sequence[np.ndarray],
    prompts: Sequence[Sequence[Prompt]],
    peft: Any = None,
    *,
    multimask_output: bool = False,
    return_logits: bool = False,
    images_per_batch: int = 4,
    prompts_per_batch: int = PROMPTS_PER_BATCH,
) -> list[list[Prediction]]:
    """One list of predictions for each image, one prediction for each of its prompts.

    `images` are (h, w, 3) uint8 RGB of any sizes, `prompts[i]` the prompts of `images[i]`, of any
    number (none among them) and any mixture of kinds: each result equals that of a call with its
    prompt alone, up to float32 rounding. `model, params` come from `samjax.load`; `peft` is an
    adapter's tree. The encoder takes `images_per_batch` images at a time, the decoder
    `prompts_per_batch` prompts, whichever images of those they belong to.

    Raises ValueError, before any work, for a model of dense tasks, and for an image or a prompt
    that cannot be; the message begins with its position.
    """
    arrays = _check(model, images, prompts, images_per_batch, prompts_per_batch)
    variables = jax.device_put({"params": params, "peft": peft or {}})
    results: list[list[Prediction]] = []
    for start in range(0, len(arrays), images_per_batch):
        group = arrays[start : start + images_per_batch]
        own = prompts[start : start + images_per_batch]
        predictions = _predict_group(
            model, variables, group, own, images_per_batch, prompts_per_batch
        )
        for original, of_image in zip(group, own, strict=True):
            size = (original.shape[0], original.shape[1])
            results.append([])
            for _ in of_image:
                logits, iou = next(predictions)
                chosen = slice(1, None) if multimask_output else slice(0, 1)
                full = postprocess_masks(logits[chosen], model.config.frame, size)
                masks = np.asarray(full if return_logits else full > MASK_THRESHOLD)
                results[-1].append(Prediction(masks, iou[chosen], logits[chosen]))
    return results


def _predict_group(
    model: Sam,
    variables: Any,
    images: Sequence[np.ndarray],
    prompts: Sequence[Sequence[Prompt]],
    images_per_batch: int,
    prompts_per_batch: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Low-resolution logits and IoU predictions of each prompt in order."""
    owners = [i for i, own in enumerate(prompts) for _ in own]
    if not owners:
        return
    flat = [prompt for own in prompts for prompt in own]
    sizes = [(images[i].shape[0], images[i].shape[1]) for i in owners]
    prepared = [prepare_image(image, model.config.frame) for image in images]
    # Always as many images, so that the encoder compiles once.
    prepared += [prepared[-1]] * (images_per_batch - len(prepared))
    pixels, input_sizes = (np.stack(parts) for parts in zip(*prepared, strict=True))
    embeddings = encode(model, variables, pixels, input_sizes)
    for start in range(0, len(flat), prompts_per_batch):
        part = slice(start, start + prompts_per_batch)
        batch = assemble(flat[part], sizes[part], model.config)
        index = np.zeros(len(batch.labels), np.int32)
        index[: len(owners[part])] = owners[part]
        logits, iou = _decode_each(model, variables, embeddings, index, batch)
        yield from zip(*(np.asarray(x)[: len(flat[part])] for x in (logits, iou)), strict=True)


@functools.partial(jax.jit, static_argnums=0)
def _decode_each(
    model: Sam, variables: Any, embeddings: Any, index: Any, prompts: Prompts
) -> tuple[Any, Any]:
    """Decodes each prompt on the embedding that `index` (b,) gives it."""
    return model.apply(variables, embeddings[index], prompts, method="decode")


def _check(
    model: Sam,
    images: Sequence[np.ndarray],
    prompts: Sequence[Sequence[Prompt]],
    images_per_batch: int,
    prompts_per_batch: int,
) -> list[np.ndarray]:
    check_promptable(model)
    if len(images) != len(prompts):
        raise ValueError(
            f"prompts must hold one sequence for each image, but there are {len(images)} images "
            f"and {len(prompts)} sequences"
        )
    for name, value in (
        ("images_per_batch", images_per_batch),
        ("prompts_per_batch", prompts_per_batch),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    arrays = [check_image(image, f"images[{i}]") for i, image in enumerate(images)]
    for i, (array, own) in enumerate(zip(arrays, prompts, strict=True)):
        if isinstance(own, Prompt):
            raise ValueError(f"prompts[{i}] must be a sequence of Prompt, not a Prompt: [prompt]")
        for j, prompt in enumerate(own):
            try:
                check_prompt(prompt, (array.shape[0], array.shape[1]), model.config)
            except ValueError as error:
                raise ValueError(f"prompts[{i}][{j}]: {error}") from None
    return arrays
