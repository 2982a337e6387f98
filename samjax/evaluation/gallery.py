"""The picture that a run ends with: image, truth, and the masks of each version of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from samjax.config import Config
from samjax.data.pipeline import eval_batches
from samjax.data.sources import Sample, Source
from samjax.evaluation.evaluate import evaluate
from samjax.models import Sam
from samjax.viz import TRUTH_COLOR, gallery, overlay


class Chosen:
    """Some samples of a source, spread evenly over it."""

    def __init__(self, source: Source, count: int) -> None:
        self._source = source
        spread = np.linspace(0, len(source) - 1, min(count, len(source)))
        self._indices = sorted({int(i) for i in spread.round()})

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self._source[self._indices[index]]


def draw_gallery(
    config: Config, model: Sam, versions: dict[str, Any], source: Source
) -> Image.Image:
    """`config.gallery` images of a source, with the masks of each of `versions` (variables)."""
    chosen = Chosen(source, config.gallery)
    samples = [chosen[i] for i in range(len(chosen))]
    rows = [[s.image, overlay(s.image, s.mask, TRUTH_COLOR)] for s in samples]
    captions = [["", ""] for _ in samples]
    for variables in versions.values():
        masks: list[np.ndarray] = []

        def collect(batch: dict[str, Any], predicted: np.ndarray, to: list = masks) -> None:
            pairs = zip(predicted, batch["truth"], batch["valid"], strict=True)
            to.extend(m[: t.shape[0], : t.shape[1]] for m, t, valid in pairs if valid)

        batches = eval_batches(
            chosen,
            frame=model.config.frame,
            batch_size=config.eval_batch_size,
            prompts_for=config.evaluation_prompt,
        )
        dice = evaluate(model, variables, batches, collect).per_image["dice"]
        for i, sample in enumerate(samples):
            rows[i].append(overlay(sample.image, masks[i]))
            captions[i].append(f"Dice {dice[i]:.3f}")
    return gallery(rows, ("image", "truth", *versions), captions)
