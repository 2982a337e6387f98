"""Checkpoints of a run: trained leaves and optimiser state, through Orbax, and nothing frozen.

The only file that knows which of Orbax's interfaces is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from samjax.files import error_number
from samjax.orbax_saves import clean_save, silence
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
        with silence(), contextlib.suppress(Exception):  # it raises the same once more
            self._ocp.close()

    @contextlib.contextmanager
    def _failures_of(self, step: int) -> Iterator[None]:
        """Turns what Orbax raises, of many types, into one sentence; leaves no half of a save."""
        try:
            with clean_save(lambda: list(self._directory.glob(f"{step}.*"))):
                yield
        except Exception as error:
            self._failed = True
            number = error_number(error)
            reason = str(error).splitlines()[0] if number is None else os.strerror(number)
            raise OSError(
                f"the checkpoint of step {step} cannot be written to {self._directory} ({reason}): "
                "free space there, or make it writable, and go on with --resume from the one before"
            ) from error


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
