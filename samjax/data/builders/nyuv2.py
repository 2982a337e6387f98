"""NYUv2 with three dense tasks, as MTAN made it: 795 and 654 rooms of 288x384 pixels.

It is built from a folder in the layout of `samjax.data.dense_folder`, where `normals` are in
`normal` and `segmentation` is in `label`; whoever has it laid out so from another source may build
that.
"""

from __future__ import annotations

from pathlib import Path

import tensorflow_datasets as tfds

from samjax.data.builders.dense import MTAN_PLACES, DenseBuilder, is_mtan
from samjax.data.dense import DenseDataset
from samjax.data.dense_folder import SPLITS, DenseFolder
from samjax.tasks import NYUV2


class Nyuv2(DenseBuilder):
    """NYUv2 in MTAN's layout."""

    VERSION = tfds.core.Version("1.0.0")
    TITLE = "NYUv2: rooms, with segmentation in 13 classes, depth and surface normals"
    HOMEPAGE = "https://github.com/lorenmt/mtan"
    FOLDER = "nyuv2"
    TASKS = NYUV2
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
        return (
            f"{folder} holds no {MTAN_PLACES}, nor does its {cls.FOLDER}/: {cls.how_to_get()}, and "
            "extract it there"
        )

    @classmethod
    def is_dataset(cls, folder: Path) -> bool:
        """Whether a folder has both splits."""
        return is_mtan(folder)

    def sources(self, found: Path) -> dict[str, DenseDataset]:
        """Both splits of the folder."""
        return {split: DenseFolder(found, split, self.TASKS) for split in SPLITS}
