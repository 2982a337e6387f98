"""What a run learns: masks from prompts, or dense tasks.

All that differs between them is in a `Problem`: data, model, loss, metrics, pictures. Runs,
comparisons and the loop know no more of it, but for the gain that comparisons of tasks sum up by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
from PIL import Image

from samjax.config import Config
from samjax.data.pipeline import Features
from samjax.data.sources import Dataset
from samjax.data.walk import Track, untracked
from samjax.evaluation.evaluate import Evaluation
from samjax.models import Sam
from samjax.training.objective import Objective


@runtime_checkable
class Problem(Protocol):
    """What a run of a config learns."""

    @property
    def objective(self) -> Objective:
        """What training minimises."""

    @property
    def titles(self) -> Mapping[str, str]:
        """The metrics of an evaluation, and how they are written in tables."""

    @property
    def conditions(self) -> str:
        """Under which the model is evaluated, in a word or two."""

    @property
    def metadata(self) -> dict[str, Any]:
        """What an adapter file says of the training."""

    def open(self, split: str, track: Track = untracked) -> Dataset:
        """One split of the run's data. Raises ValueError where it cannot be used."""

    def build(self, sam: Sam, params: Any) -> tuple[Sam, Any]:
        """The model that learns it, made of SAM. Raises ValueError where it cannot be."""

    def batches(
        self,
        model: Sam,
        source: Any,
        *,
        split: bool,
        rows: Sequence[int] | None = None,
        features: Features | None = None,
    ) -> grain.MapDataset:
        """The endless stream of training batches; with `split` from halves of the data in turn.

        `features` take the place of images. Of several processes, each has its `rows`: see
        `samjax.data.pipeline.training_stream`.
        """

    def evaluate(
        self,
        model: Sam,
        variables: Any,
        source: Any,
        advance: Callable[[int], None] = lambda count: None,
        *,
        briefly: bool = False,
    ) -> Evaluation:
        """Measures a model over a split; `advance` hears how many images are done.

        `briefly`, for validation, may leave out metrics that take long.
        """

    def draw(self, model: Sam, versions: dict[str, Any], source: Any) -> Image.Image:
        """The picture of some samples, with what each of `versions` (variables) makes of them."""


def problem_of(config: Config) -> Problem:
    """What a run of `config` learns."""
    from samjax.problems.dense import DenseTasks
    from samjax.problems.masks import Masks

    return DenseTasks(config) if config.tasks else Masks(config)
