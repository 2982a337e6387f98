"""From a source of dense samples to batches of model input, for training and evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from samjax.data.dense import DenseSource, resize_nearest
from samjax.data.dense_augment import DenseAugmentConfig, augment_dense
from samjax.data.pipeline import Batch, Features, one_pass, prepare_input, training_stream
from samjax.preprocess import Frame
from samjax.tasks import CLASSES, IGNORE, Task


def dense_train_batches(
    source: DenseSource,
    tasks: Sequence[Task],
    *,
    frame: Frame,
    augment: DenseAugmentConfig,
    seed: int,
    features: Features | None = None,
    tasks_per_step: int | None = None,
    **stream: Any,
) -> grain.MapDataset:
    """The endless stream of training batches; element i is the batch of step i.

    Each is a dict of numpy arrays with a leading batch axis: image (fh, fw, 3) uint8, or in its
    place the `features` of an `augment` that changes no image, and input_size (2,) int32 as
    `samjax.data.pipeline.prepare_input` gives them, truth, a dict of what `prepare_truth` gives for
    each task, and index () int32; with `tasks_per_step` also drawn, in
    each row the (tasks_per_step,) int32 indices of the step's `drawn_tasks`. `stream` are the other
    arguments of `samjax.data.pipeline.training_stream`.
    """

    def load(index: int, rng: np.random.Generator) -> Batch:
        sample = augment_dense(rng, source[index], tasks, augment)
        given = None if features is None else features(index)
        truth = {task.name: prepare_truth(task, sample.truth[task.name], frame) for task in tasks}
        return {**prepare_input(sample.image, frame, given), "truth": truth}

    batches = training_stream(load, source, seed=seed, **stream)
    if tasks_per_step is None:
        return batches

    def with_drawn(step: int, batch: Batch) -> Batch:
        drawn = drawn_tasks(len(tasks), tasks_per_step, seed, int(step))
        return {**batch, "drawn": np.tile(drawn, (len(batch["index"]), 1))}

    return batches.map_with_index(with_drawn)


def drawn_tasks(tasks: int, per_step: int, seed: int, step: int) -> np.ndarray:
    """The (per_step,) int32 indices, each another one, of the tasks that a step trains.

    A function of the seed and the step alone. Steps go through the tasks in a random order, round
    and round, until all have been drawn equally often, and then in a new order.
    """
    cycle, place = divmod(step, tasks // math.gcd(tasks, per_step))
    order = np.random.default_rng((seed, cycle)).permutation(tasks).astype(np.int32)
    return np.take(order, place * per_step + np.arange(per_step), mode="wrap")


def dense_eval_batches(
    source: DenseSource, *, frame: Frame, batch_size: int, rows: Sequence[int] | None = None
) -> Iterator[dict[str, Any]]:
    """One pass over the source in order, without randomness.

    Each batch has image and input_size as in training, and what
    `samjax.data.pipeline.one_pass` adds; truths are `DenseSample.truth`.
    """

    def load(index: int) -> Batch:
        sample = source[index]
        prepared = prepare_input(sample.image, frame)
        return {**prepared, "truth": sample.truth, "name": sample.name}

    return one_pass(load, source, batch_size, rows)


def prepare_truth(task: Task, truth: np.ndarray, frame: Frame) -> np.ndarray:
    """A truth on the padded input, resized as the image with nearest neighbour.

    Of losses of `samjax.tasks.CLASSES` (fh, fw) int32, else (channels, fh, fw) float32; the padding
    does not count.
    """
    height, width = truth.shape[:2]
    truth = resize_nearest(truth, frame.resized_shape(height, width))
    return place_truth(task, truth, frame.shape)


def place_truth(task: Task, truth: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A truth, with its channels before its pixels, in the upper left corner of `shape`."""
    height, width = truth.shape[:2]
    if task.loss in CLASSES:
        placed = np.full(shape, IGNORE, np.int32)
        placed[:height, :width] = truth
    else:
        placed = np.zeros((task.channels, *shape), np.float32)
        placed[:, :height, :width] = np.moveaxis(truth, -1, 0)
    return placed
