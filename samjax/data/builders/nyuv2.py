"""NYUv2 with three dense tasks, as MTAN made it: 795 and 654 rooms of 288x384 pixels.

It is built from a folder in the layout of `samjax.data.dense_folder`, where `normals` are in
`normal` and `segmentation` is in `label`; whoever has it laid out so from another source may build
that. Records hold samples as that folder gives them: the image as PNG, the truths as arrays that
zlib packs.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from samjax.data.builders.records import Contents, RecordsBuilder
from samjax.data.dense_folder import IMAGES, SPLITS, DenseFolder
from samjax.tasks import CLASSES, NYUV2


class Nyuv2(RecordsBuilder):
    """NYUv2 in MTAN's layout; the literature's `val` is the split `test`."""

    VERSION = tfds.core.Version("1.0.0")
    TITLE = "NYUv2: rooms, with segmentation in 13 classes, depth and surface normals"
    HOMEPAGE = "https://github.com/lorenmt/mtan"
    NUM_PAIRS = 795 + 654
    LICENSE = "NYUv2's authors state none; publications must cite the papers"
    CITATION = """\
@inproceedings{silberman2012indoor,
  title = {Indoor Segmentation and Support Inference from {RGBD} Images},
  author = {Silberman, Nathan and Hoiem, Derek and Kohli, Pushmeet and Fergus, Rob},
  booktitle = {European Conference on Computer Vision (ECCV)},
  pages = {746--760},
  year = {2012},
}
@inproceedings{liu2019end,
  title = {End-to-End Multi-Task Learning with Attention},
  author = {Liu, Shikun and Johns, Edward and Davison, Andrew J.},
  booktitle = {Conference on Computer Vision and Pattern Recognition (CVPR)},
  pages = {1871--1880},
  year = {2019},
}"""

    @classmethod
    def how_to_get(cls) -> str:
        """Where a user finds the folder."""
        return f"get NYUv2, preprocessed, by the link at {cls.HOMEPAGE}"

    @classmethod
    def missing(cls, folder: Path) -> str:
        """What to say where `find` finds nothing."""
        places = " and ".join(f"{place}/{IMAGES}" for place in SPLITS.values())
        return (
            f"{folder} holds no {places}, nor does its nyuv2/: {cls.how_to_get()}, and extract it "
            "there"
        )

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The folder that has both splits: `folder` or its nyuv2/."""
        for found in (folder, folder / "nyuv2"):
            if all((found / place / IMAGES).is_dir() for place in SPLITS.values()):
                return found
        return None

    def record_features(self) -> dict[str, Any]:
        """An image, and an array for each task."""
        features: dict[str, Any] = {"image": tfds.features.Image(shape=(None, None, 3))}
        for task in NYUV2:
            labels = task.loss in CLASSES
            features[task.name] = tfds.features.Tensor(
                shape=(None, None) if labels else (None, None, task.channels),
                dtype=np.int32 if labels else np.float32,
                encoding="zlib",
            )
        return features

    def contents(self, found: Path) -> dict[str, Contents]:
        """Both splits, samples read as they are written."""
        sources = {split: DenseFolder(found, split, NYUV2) for split in SPLITS}
        return {
            split: Contents(list(source.names), _records(source))
            for split, source in sources.items()
        }


def _records(source: DenseFolder) -> Iterator[dict[str, Any]]:
    for index in range(len(source)):
        sample = source[index]
        image = io.BytesIO()
        Image.fromarray(sample.image).save(image, "PNG")
        yield {"image": image.getvalue(), **sample.truth}
