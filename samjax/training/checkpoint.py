"""Checkpoints of a run: trained leaves and optimiser state, through Orbax, and nothing frozen.

The only file that knows which of Orbax's interfaces is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from samjax.training.step import TrainState


class Checkpoints:
    """The newest checkpoints of a run folder, each whole or absent."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        from orbax.checkpoint import v1 as ocp

        self._ocp = ocp.training.Checkpointer(
            directory.absolute(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def save(self, state: TrainState) -> None:
        """Saves a state, unless one of its step is there; returns once it is on disk.

        Not asynchronously: Orbax forgets a save that is under way when the next one starts.
        """
        step = int(state.step)
        if self._ocp.latest is None or self._ocp.latest.step < step:
            leaves = {k: np.asarray(v) for k, v in _flatten(state).items()}
            if not self._ocp.save(step, leaves, force=True):
                raise RuntimeError(f"the checkpoint of step {step} was not saved")

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest state, or None where there is none.

        Raises ValueError where it belongs to a run with other trained leaves.
        """
        if self._ocp.latest is None:
            return None
        expected = _flatten(like)
        leaves = self._ocp.load(self._ocp.latest.step)
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
        self._ocp.close()


def _flatten(state: TrainState) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
