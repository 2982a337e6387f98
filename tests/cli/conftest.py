"""Calling `samjax`, and what its verbs work on: a small checkpoint, tiny images, a trained run."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from samjax import cli
from samjax.data.images import read_image
from samjax.models import Sam
from samjax.weights import save_checkpoint

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

    @property
    def masks(self):
        """The masks that `samjax predict --json` has written."""
        return np.stack([read_image(Path(file))[..., 0] for file in self.json["masks"]]) > 127

    @property
    def logits(self):
        """What `samjax predict --save-logits --json` has written, by name."""
        with np.load(self.json["logits"]) as arrays:
            return dict(arrays)


@pytest.fixture(scope="session")
def call():
    """`call(*arguments)` is `samjax ARGUMENTS` in this process."""

    def run(*arguments) -> Result:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = cli.main([str(argument) for argument in arguments])
            except SystemExit as stop:
                code = stop.code or 0
        return Result(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def spawn():
    """`spawn(*arguments)` is `samjax ARGUMENTS` in its own process, started by `prefix`."""

    def run(*arguments, prefix=()) -> Result:
        command = [*prefix, sys.executable, "-m", "samjax.cli", *map(str, arguments)]
        # Tyro draws boxes on UTF-8 only: not in `call`.
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment,
            encoding="utf-8",
            timeout=300,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def assert_refused():
    """`assert_refused(result, message)`: an exit code, and one sentence that has the message."""

    def check(result: Result, message: str) -> None:
        assert result.code != 0
        assert not result.out
        assert result.err.startswith("samjax: ") and result.err.endswith("\n")
        assert result.err.count("\n") == 1, result.err
        assert "Traceback" not in result.err
        assert message in result.err

    return check


@pytest.fixture(scope="session")
def files(tmp_path_factory, small_config, small_params, draw_params):
    """A folder with checkpoints, data, experiments, an image, and things that are none of these."""
    root = tmp_path_factory.mktemp("cli")
    save_checkpoint(root / "small", small_config, small_params)
    # Of the same shape, as another model and with other numbers.
    save_checkpoint(root / "named", dataclasses.replace(small_config, name="named"), small_params)
    changed = jax.tree.map(lambda leaf: leaf * np.float32(1.01), small_params)
    save_checkpoint(root / "changed", small_config, changed)
    # Of another shape.
    other = dataclasses.replace(small_config, name="other", decoder_mlp_dim=32)
    save_checkpoint(root / "other", other, draw_params(Sam(other)))
    write_folder(root / "data/train", range(5))
    write_folder(root / "data/test", range(5, 8))
    write_folder(root / "empty", ())
    Image.fromarray(draw(5)[0]).save(root / "image.png")
    (root / "none.png").write_text("no image")
    (root / "none.safetensors").write_text("no weights")
    (root / "tiny.py").write_text(EXPERIMENT)
    (root / "broken.py").write_text("def config():\n    return 1 / 0\n")
    (root / "without.py").write_text("x = 1\n")
    (root / "used").mkdir()
    (root / "used/notes.txt").write_text("mine")
    return root


def write_folder(folder, indices):
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for index in indices:
        image, mask = draw(index)
        Image.fromarray(image).save(folder / f"images/{index}.png")
        Image.fromarray(mask).save(folder / f"masks/{index}.png")


def draw(index):
    """A bright ellipse on noise, and its mask."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    (cy, cx), (ry, rx) = rng.uniform(12, 28, 2), rng.uniform(6, 11, 2)
    mask = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
    image = rng.integers(0, 60, (*SIZE, 3)) + 150 * mask[..., None]
    return image.astype(np.uint8), mask


@pytest.fixture(scope="session")
def trained(files, call):
    """What `samjax train` says; the run is in `files / "run"`."""
    data = ("--weights", files / "small", "--data", files / "data")
    return call("train", files / "tiny.py", *data, "--out", files / "run", "--json")


@pytest.fixture(scope="session")
def predict(files, call):
    """`predict(out, *arguments)` is `samjax predict --json` of the image with the small weights."""

    def run(out, *arguments, image="image.png", weights="small") -> Result:
        options = ("--weights", files / weights, "--out", out, "--json")
        return call("predict", files / image, *options, *arguments)

    return run
