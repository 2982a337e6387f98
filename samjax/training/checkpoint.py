"""Checkpoints of a run: trained leaves and optimiser state, through Orbax, and nothing frozen.

The only file that knows which of Orbax's interfaces is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from samjax.files import error_number
from samjax.training.step import TrainState

_NEWEST = 2


@dataclasses.dataclass(frozen=True)
class Best:
    """The checkpoint of the best validation."""

    step: int
    metrics: dict[str, float]


class Checkpoints:
    """The newest checkpoints of a run folder and the best one, each whole or absent.

    What a validation measured lies in the checkpoint of its step, so that the two cannot come
    apart. The best is the highest `metric`, and of several such the first.
    """

    def __init__(self, directory: Path, metric: str = "dice") -> None:
        from orbax.checkpoint import v1 as ocp

        self._directory = directory.absolute()
        self._metric = metric
        self._failed = False
        self._ocp = ocp.training.Checkpointer(
            self._directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=_NewestAndBest(metric),
            cleanup_tmp_directories=True,
        )

    def save(self, state: TrainState, metrics: dict[str, float] | None = None) -> None:
        """Saves a state, unless one of its step is there; returns once it is on disk.

        `metrics` are those of a validation of this state. Raises OSError where it cannot be
        written; the checkpoints before it stay. Not asynchronously: Orbax forgets a save that is
        under way when the next one starts.
        """
        step = int(state.step)
        if self._ocp.latest is not None and self._ocp.latest.step >= step:
            return
        leaves = {k: np.asarray(v) for k, v in _flatten(state).items()}
        with self._failures_of(step):
            if not self._ocp.save(step, leaves, force=True, metrics=metrics):
                raise RuntimeError("Orbax declined")

    def best(self) -> Best | None:
        """The checkpoint of the best validation so far; None where there was none."""
        found = _best(self._ocp.checkpoints, self._metric)
        return None if found is None else Best(found.step, dict(found.metrics))

    def restore(self, like: TrainState, step: int | None = None) -> TrainState | None:
        """The state of a step, or the newest; None where there is none.

        Raises ValueError where it belongs to a run with other trained leaves.
        """
        if self._ocp.latest is None:
            return None
        expected = _flatten(like)
        leaves = self._ocp.load(self._ocp.latest.step if step is None else step)
        if leaves.keys() != expected.keys() or any(
            np.shape(leaves[k]) != np.shape(v) for k, v in expected.items()
        ):
            raise ValueError(
                "the checkpoint holds other trained leaves than this configuration; "
                "start anew in another folder"
            )
        values = [leaves[k] for k in expected]
        return jax.device_put(jax.tree.unflatten(jax.tree.structure(like), values))

    def close(self) -> None:
        """Releases what Orbax holds."""
        if not self._failed:
            self._ocp.close()
            return
        with _silence(), contextlib.suppress(Exception):  # it raises the same once more
            self._ocp.close()

    @contextlib.contextmanager
    def _failures_of(self, step: int) -> Iterator[None]:
        """Turns what Orbax raises, of many types, into one sentence; leaves no half of a save."""
        with _silence():
            try:
                yield
            except Exception as error:
                self._failed = True
                self._remove_parts(step)
                number = error_number(error)
                reason = str(error).splitlines()[0] if number is None else os.strerror(number)
                raise OSError(
                    f"the checkpoint of step {step} cannot be written to {self._directory} "
                    f"({reason}): free space there, or make it writable, and go on with --resume "
                    "from the one before"
                ) from error

    def _remove_parts(self, step: int) -> None:
        """Removes what a failed save left. Its other writers go on for a moment after the first."""
        for _ in range(20):
            time.sleep(0.05)
            parts = list(self._directory.glob(f"{step}.*"))
            if not parts:
                break
            for part in parts:
                shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Leaves only what is raised: Orbax's threads log it too, each with a traceback, and
    TensorStore complains of event loops that the first error has closed.
    """
    log, hook = logging.getLogger("absl"), sys.unraisablehook
    level = log.level
    log.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    try:
        yield
    finally:
        log.setLevel(level)
        sys.unraisablehook = hook


class _NewestAndBest:
    """What Orbax does not delete: the newest checkpoints and the one of the best validation."""

    def __init__(self, metric: str) -> None:
        self._metric = metric

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        best = _best(checkpoints, self._metric)
        kept = {*steps[-_NEWEST:], *([] if best is None else [best.step])}
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _best(checkpoints: Sequence[Any], metric: str) -> Any:
    measured = [checkpoint for checkpoint in checkpoints if checkpoint.metrics]
    return max(measured, key=lambda c: (c.metrics[metric], -c.step), default=None)


def _flatten(state: TrainState) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
