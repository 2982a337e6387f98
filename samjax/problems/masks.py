"""Masks from prompts, or without one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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
from samjax.evaluation.metrics import METRICS, quick
from samjax.hosts import gather
from samjax.models import Sam
from samjax.training.objective import MaskObjective
from samjax.training.sharding import BatchLayout
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
        """Those of the config."""
        return {name: METRICS[name].title for name in self.config.measured}

    @property
    def conditions(self) -> str:
        """The prompt."""
        most = self.config.eval_box_outward
        moved = f" with edges 0 to {most} px outward" if most else ""
        return f"prompt: {self.config.evaluation_prompt}{moved}"

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
        self,
        model: Sam,
        source: Source,
        *,
        split: bool,
        rows: Sequence[int] | None = None,
        features: Features | None = None,
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
            rows=rows,
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
        """With the run's evaluation prompt; `briefly`, with metrics of counts and the best one."""

        def on_batch(batch: dict[str, Any], masks: np.ndarray) -> None:
            advance(batch["done"])

        layout = self._eval_layout()
        batches = self._eval_batches(model, source, layout)
        metrics = self.config.measured
        if briefly:
            metrics = tuple(dict.fromkeys((*quick(metrics), self.config.best[0])))
        return evaluate(model, variables, batches, on_batch, metrics=metrics, layout=layout)

    def _eval_layout(self) -> BatchLayout:
        return BatchLayout.for_at_least(self.config.eval_batch_size, self.config.mesh())

    def _eval_batches(self, model: Sam, source: Source, layout: BatchLayout) -> Any:
        return eval_batches(
            source,
            frame=model.config.frame,
            batch_size=layout.size,
            prompts_for=self.config.evaluation_prompt,
            outward=self.config.eval_box_outward,
            seed=self.config.split_seed,
            rows=layout.own,
        )

    def draw(self, model: Sam, versions: dict[str, Any], source: Source) -> Image.Image:
        """A row an image: truth, and the mask of each version."""
        chosen = Chosen(source, self.config.gallery)
        samples = [chosen[i] for i in range(len(chosen))]
        rows = [[s.image, overlay(s.image, s.mask, TRUTH_COLOR)] for s in samples]
        captions = [["", ""] for _ in samples]
        layout = self._eval_layout()
        for variables in versions.values():
            masks: dict[str, np.ndarray] = {}

            def collect(batch: dict[str, Any], predicted: np.ndarray, to: dict = masks) -> None:
                for i in np.flatnonzero(batch["valid"]):
                    height, width = batch["truth"][i].shape
                    to[str(batch["index"][i])] = predicted[i, :height, :width]

            batches = self._eval_batches(model, chosen, layout)
            found = evaluate(model, variables, batches, collect, layout=layout)
            dice = found.per_image["dice"]
            everyones = {key: mask for part in gather(masks) for key, mask in part.items()}
            for i, sample in enumerate(samples):
                rows[i].append(overlay(sample.image, everyones[str(i)]))
                captions[i].append(f"Dice {dice[i]:.3f}")
        return gallery(rows, ("image", "truth", *versions), captions)
