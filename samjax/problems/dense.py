"""Dense tasks: a model that predicts segmentation, depth, normals and the like at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from PIL import Image

from samjax.config import Config
from samjax.data.chosen import Chosen
from samjax.data.dense import DenseSource, has_labels, open_dense
from samjax.data.dense_pipeline import dense_eval_batches, dense_train_batches
from samjax.data.pipeline import Features
from samjax.data.sources import Dataset
from samjax.data.walk import Track, untracked
from samjax.evaluation.evaluate import Evaluation
from samjax.evaluation.evaluate_tasks import evaluate_tasks, titles
from samjax.hosts import any_process, gather
from samjax.models import MSam, Sam
from samjax.models.msam import msam_params
from samjax.tasks import Task
from samjax.training.sharding import BatchLayout
from samjax.training.task_objective import TaskObjective
from samjax.viz import gallery
from samjax.viz_tasks import picture_of, predicted, range_of


@dataclasses.dataclass(frozen=True)
class DenseTasks:
    """See `samjax.problems.Problem`."""

    config: Config

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks."""
        return self.config.parsed_tasks()

    @property
    def objective(self) -> TaskObjective:
        """The weighted sum of the tasks' losses."""
        return TaskObjective(self.config.task_weighting == "uncertainty")

    @property
    def titles(self) -> Mapping[str, str]:
        """TASK/METRIC."""
        return titles(self.tasks)

    @property
    def conditions(self) -> str:
        """The tasks' names."""
        return ", ".join(task.name for task in self.tasks)

    @property
    def metadata(self) -> dict[str, Any]:
        """The tasks stand in the adapter itself."""
        return {"task_weighting": self.config.task_weighting}

    def open(self, split: str, track: Track = untracked) -> Dataset:
        """Images with a truth for each task."""
        config = self.config
        return open_dense(
            config.data, split, self.tasks, seed=config.split_seed, fractions=config.fractions
        )

    def build(self, sam: Sam, params: Any) -> tuple[MSam, Any]:
        """mSAM, which starts with SAM's mask decoder for each task."""
        settings = {name: getattr(sam, name) for name in ("config", "attention", "dtype", "remat")}
        model = MSam(**settings, tasks=self.tasks)
        return model, msam_params(params, model)

    def batches(
        self,
        model: Sam,
        source: DenseSource,
        *,
        split: bool,
        rows: Sequence[int] | None = None,
        features: Features | None = None,
    ) -> grain.MapDataset:
        """Changed images with their truths."""
        return dense_train_batches(
            source,
            self.tasks,
            frame=model.config.frame,
            augment=self.config.dense_augment,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            tasks_per_step=self.config.tasks_per_step,
            features=features,
            split=split,
            rows=rows,
        )

    def evaluate(
        self,
        model: MSam,
        variables: Any,
        source: DenseSource,
        advance: Callable[[int], None] = lambda count: None,
        *,
        briefly: bool = False,
    ) -> Evaluation:
        """All metrics of all tasks. Raises ValueError for one without labels in the source."""
        labelled: set[str] = set()

        def on_batch(batch: dict[str, Any], maps: dict[str, Any]) -> None:
            advance(batch["done"])
            for truth in batch["truth"]:
                labelled.update(t.name for t in model.tasks if has_labels(t, truth[t.name]))

        layout = self._eval_layout()
        batches = self._eval_batches(model, source, layout)
        found = evaluate_tasks(model, variables, batches, on_batch, layout=layout)
        unlabelled = [t.name for t in model.tasks if not any_process(t.name in labelled)]
        if unlabelled:
            raise ValueError(
                f"task {unlabelled[0]}: no pixel of the {len(source)} images that it is "
                "measured on has a label: add labels, or leave the task out"
            )
        return found

    def _eval_layout(self) -> BatchLayout:
        return BatchLayout.for_at_least(self.config.eval_batch_size, self.config.mesh())

    def _eval_batches(self, model: Sam, source: DenseSource, layout: BatchLayout) -> Any:
        return dense_eval_batches(
            source, frame=model.config.frame, batch_size=layout.size, rows=layout.own
        )

    def draw(self, model: MSam, versions: dict[str, Any], source: DenseSource) -> Image.Image:
        """A row for each image and task: image, truth, and the prediction of each version."""
        chosen = Chosen(source, self.config.gallery)
        samples = [chosen[i] for i in range(len(chosen))]
        found: dict[str, dict[str, np.ndarray]] = {}
        measured, layout = {}, self._eval_layout()
        for name, variables in versions.items():
            own: dict[str, np.ndarray] = {}

            def collect(batch: dict[str, Any], maps: dict[str, Any], to: dict = own) -> None:
                ours = {task.name: predicted(task, maps[task.name]) for task in model.tasks}
                ours = jax.device_get(ours)
                for i in np.flatnonzero(batch["valid"]):
                    height, width = next(iter(batch["truth"][i].values())).shape[:2]
                    for key, value in ours.items():
                        to[f"{batch['index'][i]}/{key}"] = value[i, :height, :width]

            batches = self._eval_batches(model, chosen, layout)
            evaluation = evaluate_tasks(model, variables, batches, collect, layout=layout)
            measured[name] = evaluation.per_image
            found[name] = {key: map_ for part in gather(own) for key, map_ in part.items()}
        rows, captions = [], []
        for i, sample in enumerate(samples):
            for task in model.tasks:
                truth = sample.truth[task.name]
                limits = range_of(task, truth)
                versions_of_it = [found[name][f"{i}/{task.name}"] for name in versions]
                pictures = [picture_of(task, x, limits) for x in (truth, *versions_of_it)]
                rows.append([sample.image, *pictures])
                metric = next(iter(task.metrics))
                values = (measured[name][f"{task.name}/{metric}"][i] for name in versions)
                title = titles([task])[f"{task.name}/{metric}"]
                captions.append(["", task.name, *(f"{title} {value:.3f}" for value in values)])
        return gallery(rows, ("image", "truth", *versions), captions)
