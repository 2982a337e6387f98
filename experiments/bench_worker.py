"""One model in a process of its own: both ends of the line to it.

`python bench_worker.py BUILDER SETUP`: BUILDER is MODULE.FUNCTION, which makes a
`bench_models.Model`, SETUP a JSON object with the fields of `bench_models.Setup`. The worker
answers with one line of JSON when the model is ready, then with one for each line that it reads:
the name of one of the model's calls gives `{"seconds": ...}`; `memory CALL` gives
`{"peak_bytes": ...}`; and `save` writes the embedding of the first image, (rows, columns,
channels), to `Setup.embedding`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from bench_models import Setup  # pyrefly: ignore[missing-import]

if TYPE_CHECKING:
    from rich.console import Console


class Worker:
    """A library's model in a process of its own; `builder` makes it, as MODULE.FUNCTION."""

    def __init__(self, name: str, setup: Setup, environment: dict[str, str], builder: str) -> None:
        self.name = name
        # A pipe would fill up and block; this is read when something goes wrong.
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, __file__, builder, json.dumps(dataclasses.asdict(setup))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        self.facts = self._answer()

    def ask(self, task: str) -> dict[str, Any]:
        """What the worker answers. Raises RuntimeError with its last line where it fails."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(task + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or [f"exit code {code}"]
            raise RuntimeError(f"{self.name} failed: {said[-1]}")
        return json.loads(line)

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


@contextlib.contextmanager
def started(
    setups: Mapping[str, Setup], builders: Mapping[str, str], console: Console
) -> Iterator[list[Worker]]:
    """The workers, each ready; they end with the block."""
    workers: list[Worker] = []
    try:
        for name, setup in setups.items():
            with console.status(f"loading {name}"):
                environment = environment_of(setup.device, builders[name])
                workers.append(Worker(name, setup, environment, builders[name]))
        yield workers
    finally:
        for worker in workers:
            worker.stop()


def environment_of(device: str, builder: str) -> dict[str, str]:
    """On a GPU, JAX leaves room for others, and has it only where it is what is timed."""
    if device == "cpu":
        return {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    platform = "cuda" if builder.startswith("bench_jax.") else "cpu"
    chosen = {"JAX_PLATFORMS": platform, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return {**os.environ, **chosen}


def main(builder: str, setup: Setup) -> None:
    """Builds a model, then does what it is told until its input ends."""
    # Libraries may print; only answers go to the parent.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module, _, function = builder.rpartition(".")
    model = getattr(importlib.import_module(module), function)(setup)
    answers.write(json.dumps(model.facts) + "\n")
    for line in sys.stdin:
        task, *rest = line.split()
        if task == "memory":
            answer = {"peak_bytes": model.peak(*rest)}
        elif task == "save":
            np.save(setup.embedding, model.as_array(model.calls["encode"]())[0])
            answer = {}
        else:
            start = time.perf_counter()
            model.calls[task]()
            answer = {"seconds": time.perf_counter() - start}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Setup(**json.loads(sys.argv[2])))
