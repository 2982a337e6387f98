"""A tiny run that tests start in processes of their own; one compilation serves them all."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samjax.data.dense import DenseSample
from samjax.data.images import EncodedImage
from samjax.weights import save_checkpoint

EXPERIMENT = """
from samjax.config import Config
from samjax.data.prompts import PromptConfig
from samjax.peft.method_config import MethodConfig

def config():
    return Config(
        weights={weights!r}, data={data!r}, steps=24, batch_size=2, eval_batch_size=2,
        checkpoint_every=5, log_every=1, gallery=1, method=MethodConfig(dropout=0.1),
        prompts=PromptConfig(none=1.0, box=1.0, points=1.0), eval_prompt="box",
        validate_every=4, keep="best",
    )
"""


@pytest.fixture(scope="session")
def experiment(tmp_path_factory, small_model, small_params):
    """An experiment file of 24 steps, beside the folder `data` and the checkpoint `weights`."""
    folder = tmp_path_factory.mktemp("experiment")
    save_checkpoint(folder / "weights", small_model.config, small_params)
    write_data(folder / "data")
    path = folder / "experiment.py"
    path.write_text(EXPERIMENT.format(weights=str(folder / "weights"), data=str(folder / "data")))
    return path


@pytest.fixture(scope="session")
def whole(experiment, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    subprocess.run(train_command(experiment, out), check=True, capture_output=True, timeout=600)
    return out


@pytest.fixture(scope="session")
def command():
    """`command(experiment, out, *flags)` is what starts a run in a process of its own."""
    return train_command


def train_command(experiment, out, *flags: str) -> list[str]:
    return [sys.executable, "-m", "samjax.cli", "train", str(experiment), "--out", str(out), *flags]


@pytest.fixture(scope="session")
def scenes():
    """Five images of noise, with truths of dense tasks that they have nothing to do with."""
    return Scenes()


class Scenes:
    names = tuple("abcde")

    def __len__(self) -> int:
        return len(self.names)

    def check_sizes(self) -> None:
        pass

    def image_file(self, index) -> EncodedImage:
        file = io.BytesIO()
        Image.fromarray(self[index].image).save(file, "PNG")
        return EncodedImage(file.getvalue(), Path(self.names[index]))

    def __getitem__(self, index) -> DenseSample:
        rng = np.random.default_rng(index)
        normals = rng.normal(size=(96, 128, 3))
        truth = {
            "segmentation": rng.integers(-1, 3, (96, 128)).astype(np.int32),
            "depth": rng.uniform(1, 4, (96, 128, 1)).astype(np.float32),
            "normals": (normals / np.linalg.norm(normals, axis=-1, keepdims=True)).astype("f"),
        }
        return DenseSample(self.names[index], rng.integers(0, 255, (96, 128, 3), np.uint8), truth)


def write_data(folder) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 7), ("validation", 2), ("test", 2)):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(0, 255, (96, 128, 3), np.uint8)
            mask = np.zeros((96, 128), np.uint8)
            mask[20:60, 10 * i : 10 * i + 40] = 255
            image[mask > 0] //= 3
            Image.fromarray(image).save(folder / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(folder / split / "masks" / f"{i}.png")
