"""Checkpoints of a run: trained leaves and optimiser state, through Orbax, and nothing frozen.

The only file that knows which of Orbax's interfaces is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from samjax.files import error_number
from samjax.hashes import is_sealed, params_sha256, sealed
from samjax.hosts import on_host
from samjax.orbax_saves import clean_save, silence
from samjax.training.step import TrainState

_NEWEST = 2

# Of a disk or of a user's rights, where the checkpoint itself may be whole.
_UNREADABLE = frozenset({errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE})


@dataclasses.dataclass(frozen=True)
class Best:
    """The checkpoint of the best validation."""

    step: int
    metrics: dict[str, float]


class Checkpoints:
    """The newest checkpoints of a run folder and the best one, each whole or absent.

    What a validation measured lies in the checkpoint of its step, so that the two cannot come
    apart. The best has the highest `metric`, or the lowest where less is better; of several such it
    is the first.

    Each carries a sealed record: the hash of its leaves, what a validation measured, and which
    checkpoint was the best then. So damage to the newest or to the best is known: ValueError, here
    or from `restore`. Others are not looked at, since a kill leaves some half deleted.

    Of several processes all make the same calls: each writes and reads what its devices hold, in a
    folder that all see. For the hash, leaves come to the host one by one.
    """

    def __init__(self, directory: Path, metric: str = "dice", more_is_better: bool = True) -> None:
        from orbax.checkpoint import v1 as ocp

        self._directory = directory.absolute()
        self._failed = False
        self._records = _Records(metric, more_is_better)
        unread = self._read_records()

        def start() -> Any:
            return ocp.training.Checkpointer(
                self._directory,
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=_NewestAndBest(self._records),
                cleanup_tmp_directories=True,
            )

        self._ocp = self._read(unread[0], start) if unread else start()

    def save(self, state: TrainState, metrics: dict[str, float] | None = None) -> None:
        """Saves a state, unless one of its step is there; returns once it is on disk.

        `metrics` are those of a validation of this state. Raises OSError where it cannot be
        written; the checkpoints before it stay. Not asynchronously: Orbax forgets a save that is
        under way when the next one starts.
        """
        step = int(state.step)
        if self._ocp.latest is not None and self._ocp.latest.step >= step:
            return
        leaves = _flatten(state)
        record = self._records.add(step, params_sha256(leaves, on_host), metrics)
        with self._failures_of(step):
            if not self._ocp.save(step, leaves, force=True, custom_metadata=record):
                raise RuntimeError(f"Orbax declined to save step {step}")

    def best(self) -> Best | None:
        """The checkpoint of the best validation so far; None where there was none."""
        return self._records.best(self._steps())

    def restore(self, like: TrainState, step: int | None = None) -> TrainState | None:
        """The state of a step, or the newest; None where there is none.

        Its arrays lie where those of `like` do, whatever devices it was saved from. Raises
        ValueError where it is damaged, or belongs to a run with other trained leaves.
        """
        if self._ocp.latest is None:
            return None
        step = self._ocp.latest.step if step is None else step
        expected = {name: _abstract(leaf) for name, leaf in _flatten(like).items()}
        found = self._read(step, lambda: self._shapes(step))
        if found != {name: leaf.shape for name, leaf in expected.items()}:
            raise ValueError(
                "the checkpoint holds other trained leaves than this configuration; "
                "start anew in another folder"
            )
        leaves = self._read(step, lambda: self._load(step, expected))
        values = [leaves[k] for k in expected]
        return jax.tree.unflatten(jax.tree.structure(like), values)

    def close(self) -> None:
        """Releases what Orbax holds."""
        if not self._failed:
            self._ocp.close()
            return
        with silence(), contextlib.suppress(Exception):  # it raises the same once more
            self._ocp.close()

    def _steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self._ocp.checkpoints]

    def _shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        leaves = self._ocp.metadata(step).metadata
        return {name: tuple(leaf.shape) for name, leaf in leaves.items()}

    def _load(self, step: int, expected: dict[str, Any]) -> dict[str, Any]:
        leaves = self._ocp.load(step, expected)
        if params_sha256(leaves, on_host) != self._records.state_sha256(step):
            raise ValueError("these are other leaves than were saved")
        return leaves

    def _read_records(self) -> list[int]:
        """Reads the record of each checkpoint; returns the steps of those that have none.

        That of the newest says which other one matters. Raises as `_read` for these two.
        """
        from orbax.checkpoint import v1 as ocp

        def read() -> None:
            self._records.read(step, ocp.metadata(self._directory / str(step)).custom_metadata)

        names = os.listdir(self._directory) if self._directory.is_dir() else []
        steps = sorted((int(name) for name in names if name.isdecimal()), reverse=True)
        unread = []
        for step in steps:
            try:
                self._read(step, read)
            except (OSError, ValueError):
                if step in (steps[0], self._records.best_step(steps[0])):
                    raise
                unread.append(step)
        return unread

    def _read(self, step: int, read: Callable[[], Any]) -> Any:
        """What `read` returns; what it raises of a damaged checkpoint, of any type, in a sentence.

        The error is not chained: it holds tasks of Orbax that complain when they are collected.
        """
        with silence():
            try:
                return read()
            except Exception as error:
                failure = self._told(step, error)
            time.sleep(0.1)  # its other readers go on after the first has failed
            gc.collect()
        raise failure

    def _told(self, step: int, error: Exception) -> Exception:
        where = f"the checkpoint of step {step} in {self._directory}"
        number = error_number(error)
        if number in _UNREADABLE:
            return OSError(f"{where} cannot be read ({os.strerror(number)}): make it readable")
        return ValueError(
            f"{where} is damaged: delete that folder, {self._directory / str(step)}, and --resume "
            "goes on from the one before"
        )

    @contextlib.contextmanager
    def _failures_of(self, step: int) -> Iterator[None]:
        """Says in one sentence what the disk refuses; in any case, leaves no half of a save."""
        try:
            with clean_save(lambda: list(self._directory.glob(f"{step}.*"))):
                yield
        except Exception as error:
            self._failed = True
            number = error_number(error)
            if number is None:
                raise
            raise OSError(
                f"the checkpoint of step {step} cannot be written to {self._directory} "
                f"({os.strerror(number)}): free space there, or make it writable, and go on with "
                "--resume from the one before"
            ) from error


class _Records:
    """What each checkpoint says of itself, by step."""

    def __init__(self, metric: str, more_is_better: bool) -> None:
        self._metric = metric
        self._sign = 1 if more_is_better else -1
        self._of: dict[int, dict[str, Any]] = {}

    def add(self, step: int, sha256: str, metrics: dict[str, float] | None) -> dict[str, Any]:
        """The record of a new checkpoint."""
        record = {"step": step, "state_sha256": sha256, "metrics": metrics}
        self._of[step] = record
        best = self.best(self._of)
        self._of[step] = sealed({**record, "best": None if best is None else best.step})
        return self._of[step]

    def read(self, step: int, record: Any) -> None:
        """Takes up the record of a checkpoint on disk. Raises ValueError where it was changed."""
        if not isinstance(record, dict) or not is_sealed(record) or record["step"] != step:
            raise ValueError("this is no record of that step")
        self._of[step] = record

    def best(self, steps: Iterable[int]) -> Best | None:
        """The best of these checkpoints; None where none was validated."""
        metrics = {step: self._of[step]["metrics"] for step in steps if step in self._of}
        measured = [step for step, values in metrics.items() if values]
        if not measured:
            return None
        step = max(measured, key=lambda step: (self._sign * metrics[step][self._metric], -step))
        return Best(step, dict(metrics[step]))

    def best_step(self, step: int) -> int | None:
        """Which checkpoint was the best when that of `step`, if it is known, was saved."""
        return self._of[step]["best"] if step in self._of else None

    def state_sha256(self, step: int) -> str:
        """The hash of a checkpoint's leaves. Raises KeyError where it is not known."""
        return self._of[step]["state_sha256"]


class _NewestAndBest:
    """What Orbax does not delete: the newest checkpoints and the one of the best validation."""

    def __init__(self, records: _Records) -> None:
        self._records = records

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        best = self._records.best(steps)
        kept = {*steps[-_NEWEST:], *([] if best is None else [best.step])}
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _flatten(state: TrainState) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        )
        for path, leaf in leaves
    }


def _abstract(leaf: Any) -> Any:
    """What Orbax is to restore, and where."""
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return leaf
