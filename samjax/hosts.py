"""Several processes, on one host or on many, that train and evaluate as one.

Each runs the same program in the same order. What reads or writes the run's folder is the first
process's alone, and the others are told what came of it; of one process, all of this is plain.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")
_AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Hosts:
    """How the processes of a run find each other. Each is started with the same command.

    Raises ValueError for settings that do not go together.
    """

    coordinator: str | None = None
    """HOST:PORT of process 0, the same in each process; or auto: TPU pods and Slurm know it, and
    which process this is. Left out, there is one process, or a TPU pod's."""
    processes: int | None = None
    """How many processes there are, each with its own devices."""
    process: int | None = None
    """Which of them this is, from 0 on; process 0 writes the run's folder, which all must see."""
    heartbeat: int = 100
    """Seconds without a sign of life after which a process counts as lost, and the others end."""

    def __post_init__(self) -> None:
        own = self.processes, self.process
        if self.coordinator in (None, _AUTO):
            if own != (None, None):
                raise ValueError(
                    "processes and process need the address of process 0: add --coordinator "
                    "HOST:PORT"
                )
        elif self.processes is None or self.process is None:
            raise ValueError(
                f"coordinator {self.coordinator} needs --processes, how many there are, and "
                "--process, which one this is"
            )
        elif not 0 <= self.process < self.processes:
            raise ValueError(
                f"process {self.process} is none of the {self.processes}: they count from 0"
            )
        if self.coordinator not in (None, _AUTO) and not _has_port(self.coordinator):
            raise ValueError(f"coordinator {self.coordinator!r} must be HOST:PORT, or auto")
        if self.heartbeat < 1:
            raise ValueError(f"heartbeat must be at least 1 second, not {self.heartbeat}")

    @property
    def several(self) -> bool:
        """Whether there may be other processes."""
        # libtpu puts warnings there where it finds none.
        workers = os.environ.get("TPU_WORKER_HOSTNAMES", "")
        return self.coordinator is not None or ("," in workers and " " not in workers)

    def join(self) -> None:
        """Waits for all processes, whose devices from then on are one set.

        Before JAX is used for anything else. Raises RuntimeError where they do not find each other.
        """
        # Python's handlers save a run that is asked to stop; JAX's own would take their place.
        jax.config.update("jax_enable_preemption_service", False)
        options: dict[str, Any] = {}
        if self.coordinator not in (None, _AUTO):
            options = {
                "coordinator_address": self.coordinator,
                "num_processes": self.processes,
                "process_id": self.process,
                "cluster_detection_method": "deactivate",
            }
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=self.heartbeat, **options)
        except (ValueError, RuntimeError) as error:
            raise RuntimeError(
                f"the processes of the run did not find each other ({_first_line(error)}): start "
                "all of them, each with the same --coordinator and --processes and its own "
                "--process"
            ) from error


def _has_port(address: str | None) -> bool:
    host, _, port = (address or "").rpartition(":")
    return bool(host) and port.isdecimal()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def is_first() -> bool:
    """Whether this is the process that reads and writes the run's folder."""
    return jax.process_index() == 0


def lost(error: Exception) -> RuntimeError:
    """What a failure of the runtime means where there are several processes, in one sentence."""
    return RuntimeError(
        f"process {jax.process_index()} of {jax.process_count()} cannot go on, most likely as "
        f"another was lost ({_first_line(error)}): start all of them again; training goes on with "
        "--resume from the last checkpoint"
    )


def on_first(work: Callable[[], T]) -> T:
    """What `work()` returns in the first process, the only one that does it, in all of them.

    That is anything that JSON holds. What it raises, all raise: elsewhere, as RuntimeError.
    """
    if jax.process_count() == 1:
        return work()
    outcome: dict[str, Any] = {}
    failure = None
    if is_first():
        try:
            outcome = {"value": work()}
        except Exception as error:
            failure, outcome = error, {"error": str(error)}
    told = json.loads(_gather_bytes(json.dumps(outcome).encode())[0])
    if failure is not None:
        raise failure
    if "error" in told:
        raise RuntimeError(told["error"])
    return told["value"]


def in_turn(work: Callable[[], None]) -> None:
    """`work()` in the first process, then in the others, which find done what they share with it.

    What it raises in the first, all raise.
    """
    on_first(work)
    if not is_first():
        work()


def gather(own: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The arrays of each process, in the order of the processes; of any shapes and dtypes."""
    if jax.process_count() == 1:
        return [dict(own)]
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **own)
    return [dict(np.load(io.BytesIO(part))) for part in _gather_bytes(buffer.getvalue())]


def _gather_bytes(own: bytes) -> list[bytes]:
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    # A power of two, so that few shapes are compiled.
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: len(own)] = np.frombuffer(own, np.uint8)
    everyone = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(everyone, sizes, strict=True)]


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process: the same in all of them."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.int32(flag)).any())


def on_host(leaf: Any) -> np.ndarray:
    """All of an array, wherever its parts lie; all processes ask for the same, in one order."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)
