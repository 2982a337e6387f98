"""One model in a process of its own: both ends of the line to it.

`python bench_worker.py MODULE NAME SETUP`: MODULE has the model's builder in its `BUILDERS`, SETUP
is a JSON object with the fields of `bench_models.Setup`. The worker answers with one line of JSON
when the model is ready, then with one for each line that it reads, the name of a method of the
model: `{"seconds": ...}`. An encoder has `encode`, `decode` (one box, prompt encoder and mask
decoder) and `product` (of square matrices, for the machine's rate); `memory` encodes once, gives
`{"peak_bytes": ...}`, and writes the embedding, (rows, columns, channels), to `Setup.embedding`.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_models import Setup  # pyrefly: ignore[missing-import]


class Worker:
    """A library's model in a process of its own; `module` has its builder."""

    def __init__(self, name: str, setup: Setup, environment: dict[str, str], module: str) -> None:
        self.name = name
        # A pipe would fill up and block; this is read when something goes wrong.
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, __file__, module, name, json.dumps(dataclasses.asdict(setup))],
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


def main(module: str, name: str, setup: Setup) -> None:
    """Builds a model, then does what it is told until its input ends."""
    # Libraries may print; only answers go to the parent.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    model = importlib.import_module(module).BUILDERS[name](setup)
    answers.write(json.dumps(model.facts) + "\n")
    for line in sys.stdin:
        if line.strip() == "memory":
            result, peak = _memory(model.encode)
            np.save(setup.embedding, model.as_array(result)[0])
            answers.write(json.dumps({"peak_bytes": peak}) + "\n")
        else:
            call = getattr(model, line.strip())
            start = time.perf_counter()
            call()
            answers.write(json.dumps({"seconds": time.perf_counter() - start}) + "\n")


def _memory(call: Callable[[], Any]) -> tuple[Any, int | None]:
    """The result of a call and the most bytes that the process held meanwhile, beyond before it.

    None for the bytes where there is no Linux to tell.
    """
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what loading has left free would be used again, unseen
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return call(), None
    before = _status("VmRSS")
    result = call()
    return result, _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(kilobytes)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Setup(**json.loads(sys.argv[3])))
