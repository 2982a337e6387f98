"""What the model, PEFT and the training step may import."""

import subprocess
import sys

import pytest

# flax itself brings rich and orbax.
HEAVY = ("grain", "tyro", "torch", "tensorflow", "tensorflow_datasets")


@pytest.mark.parametrize(
    "module",
    [
        "samjax",
        "samjax.models",
        "samjax.peft",
        "samjax.training.step",
        "samjax.bench.programs",
        "samjax.bench.inputs",
        "samjax.bench.machine",
        "weights_convert",
    ],
)
def test_core_needs_no_data_loader_or_command_line(module):
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))\n"  # None makes imports fail
        f"import {module}"
    )
    # In a fresh interpreter, so that circular imports show, whatever is imported first.
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
