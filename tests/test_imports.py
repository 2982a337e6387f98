"""What the model, PEFT and the training step may import."""

import subprocess
import sys

import pytest

HEAVY = ("grain", "tyro", "rich", "orbax", "torch", "tensorflow", "tensorflow_datasets")


@pytest.mark.parametrize(
    "module", ["samjax", "samjax.models", "samjax.peft", "samjax.training.step"]
)
def test_core_needs_no_data_loader_or_command_line(module):
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))\n"  # None makes imports fail
        f"import {module}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
