"""The README's main job: its parts, and, for minutes and with the package registry, the whole."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from samjax.catalog import CATALOG
from samjax.config import load_experiment

REPO = Path(__file__).resolve().parent.parent
KINDS = ("images", "masks")


def tiff(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "TIFF")
    return content.getvalue()


@pytest.mark.slow
def test_demo_segments_nuclei(tmp_path):
    command = [
        sys.executable,
        "-m",
        "samjax.cli",
        "train",
        str(REPO / "experiments/demo_nuclei.py"),
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run"), "--json"],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["before"]["dice"] < 0.3
    assert summary["after"]["dice"] > 0.85
    assert Path(summary["adapter"]).is_file() and Path(summary["gallery"]).is_file()


def test_the_image_is_cut_into_tiles(tmp_path):
    demo = load_experiment(REPO / "experiments/demo_nuclei.py")
    assert demo.config.weights in CATALOG
    module = sys.modules["samjax_experiment_demo_nuclei"]
    instances = np.zeros((512, 512), np.uint16)
    instances[130:140, 5:20] = 300  # in row 1, column 0
    grey = np.linspace(0, 2000, 512 * 512).reshape(512, 512).astype(np.uint16)
    module._cut(*(tiff(pixels) for pixels in (grey, instances)), tmp_path)
    for split, count in (("train", 12), ("test", 4)):
        names = [sorted(f.name for f in (tmp_path / split / k).iterdir()) for k in KINDS]
        assert names[0] == names[1] and len(names[0]) == count
    mask = np.asarray(Image.open(tmp_path / "train/masks/tile_1_0.png"))
    assert mask.shape == (128, 128) and np.unique(mask).tolist() == [0, 255]
    assert np.array_equal(mask[2:12, 5:20], np.full((10, 15), 255)) and mask.sum() == 150 * 255
    image = np.asarray(Image.open(tmp_path / "test/images/tile_3_2.png"))
    assert image.dtype == np.uint8 and image[0, 0] < image[-1, -1] == 255


def test_what_is_there_or_replaced_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMJAX_CACHE", str(tmp_path))
    demo = load_experiment(REPO / "experiments/demo_nuclei.py")
    monkeypatch.setattr(sys.modules["samjax_experiment_demo_nuclei"], "take", None)  # not called
    demo.prepare(dataclasses.replace(demo.config, data="mine"), Console(quiet=True))
    assert not any(tmp_path.iterdir())
    Path(demo.config.data).mkdir(parents=True)
    demo.prepare(demo.config, Console(quiet=True))
