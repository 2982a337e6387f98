"""Masks from prompts, or without one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np
from PIL import Image

from samjax.config import Config
from samjax.data.chosen import Chosen
from samjax.data.pipeline import Features, eval_batches, train_batches
from samjax.data.sources import Dataset, Source, open_source
from samjax.data.walk import Track, untracked
from samjax.evaluation.evaluate import Evaluation, evaluate
from samjax.evaluation.metrics import TITLES
from samjax.models import Sam
from samjax.training.objective import MaskObjective
from samjax.viz import TRUTH_COLOR, gallery, overlay


@dataclasses.dataclass(frozen=True)
class Masks:
    """See `samjax.problems.Problem`."""

    config: Config

    @property
    def objective(self) -> MaskObjective:
        """Rounds of prompts and corrections."""
        return MaskObjective(self.config.loss, self.config.prompts.corrective_points)

    @property
    def titles(self) -> Mapping[str, str]:
        """Overlap and saliency."""
        return TITLES

    @property
    def conditions(self) -> str:
        """The prompt."""
        return f"prompt: {self.config.evaluation_prompt}"

    @property
    def metadata(self) -> dict[str, Any]:
        """The prompts, and which outputs were trained."""
        return {
            "trained_prompts": dataclasses.asdict(self.config.prompts),
            "multimask": self.config.loss.multimask,
            "eval_prompt": self.config.evaluation_prompt,
        }

    def open(self, split: str, track: Track = untracked) -> Dataset:
        """Images with masks."""
        config = self.config
        return open_source(
            config.data,
            split,
            seed=config.split_seed,
            fractions=config.fractions,
            objects=config.objects,
            classes=config.classes,
            track=track,
        )

    def build(self, sam: Sam, params: Any) -> tuple[Sam, Any]:
        """SAM itself."""
        return sam, params

    def batches(
        self, model: Sam, source: Source, *, split: bool, features: Features | None = None
    ) -> grain.MapDataset:
        """Changed images with prompts drawn from their masks."""
        return train_batches(
            source,
            frame=model.config.frame,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            prompts=self.config.prompts,
            augment=self.config.augment,
            features=features,
            split=split,
        )

    def evaluate(
        self,
        model: Sam,
        variables: Any,
        source: Source,
        advance: Callable[[int], None] = lambda count: None,
        *,
        briefly: bool = False,
    ) -> Evaluation:
        """With the run's evaluation prompt; `briefly` leaves out saliency."""

        def on_batch(batch: dict[str, Any], masks: np.ndarray) -> None:
            advance(int(batch["valid"].sum()))

        batches = self._eval_batches(model, source)
        return evaluate(model, variables, batches, on_batch, with_saliency=not briefly)

    def _eval_batches(self, model: Sam, source: Source) -> Any:
        return eval_batches(
            source,
            frame=model.config.frame,
            batch_size=self.config.eval_batch_size,
            prompts_for=self.config.evaluation_prompt,
        )

    def draw(self, model: Sam, versions: dict[str, Any], source: Source) -> Image.Image:
        """A row an image: truth, and the mask of each version."""
        chosen = Chosen(source, self.config.gallery)
        samples = [chosen[i] for i in range(len(chosen))]
        rows = [[s.image, overlay(s.image, s.mask, TRUTH_COLOR)] for s in samples]
        captions = [["", ""] for _ in samples]
        for variables in versions.values():
            masks: list[np.ndarray] = []

            def collect(batch: dict[str, Any], predicted: np.ndarray, to: list = masks) -> None:
                pairs = zip(predicted, batch["truth"], batch["valid"], strict=True)
                to.extend(m[: t.shape[0], : t.shape[1]] for m, t, valid in pairs if valid)

            batches = self._eval_batches(model, chosen)
            dice = evaluate(model, variables, batches, collect).per_image["dice"]
            for i, sample in enumerate(samples):
                rows[i].append(overlay(sample.image, masks[i]))
                captions[i].append(f"Dice {dice[i]:.3f}")
        return gallery(rows, ("image", "truth", *versions), captions)
