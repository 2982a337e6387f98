"""The command line, verb by verb, on a small checkpoint and a folder of tiny images."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import samjax
from samjax import cli
from samjax.models import VitConfig
from samjax.weights import read_weights, save_checkpoint
from weights_convert import from_params, read_tensors

SIZE = (40, 48)  # height, width of every image

EXPERIMENT = '''"""A run of three steps."""

from samjax.config import Config


def config():
    return Config(steps=3, batch_size=2, eval_batch_size=2, gallery=2, log_every=1)
'''


@dataclasses.dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self):
        """The object on the last line of stdout."""
        assert self.code == 0, self.err
        return json.loads(self.out.splitlines()[-1])


def call(*arguments):
    """`samjax ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code or 0
    return Result(code, out.getvalue(), err.getvalue())


def spawn(*arguments):
    """`samjax ARGUMENTS` in its own process."""
    command = [sys.executable, "-m", "samjax.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return Result(done.returncode, done.stdout, done.stderr)


def assert_refused(result, message):
    assert result.code != 0
    assert not result.out
    assert result.err.startswith("samjax: ") and result.err.endswith("\n")
    assert result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err
    assert message in result.err


def draw(index):
    """A bright ellipse on noise, and its mask."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    (cy, cx), (ry, rx) = rng.uniform(12, 28, 2), rng.uniform(6, 11, 2)
    mask = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
    image = rng.integers(0, 60, (*SIZE, 3)) + 150 * mask[..., None]
    return image.astype(np.uint8), mask


@pytest.fixture(scope="module")
def files(tmp_path_factory, small_config, small_params):
    """A folder with a checkpoint, another one, a data set, an image and an experiment."""
    root = tmp_path_factory.mktemp("cli")
    save_checkpoint(root / "small", small_config, small_params)
    narrow = VitConfig(embed_dim=32, depth=2, num_heads=2, global_attn_indexes=(0,))
    other = dataclasses.replace(small_config, name="other", image_encoder=narrow)
    save_checkpoint(root / "other", other, samjax.Sam(other).init_params_shapes_like(small_params))
    return root
