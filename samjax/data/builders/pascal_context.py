"""PASCAL-Context with five dense tasks, as ASTMT made it: 4998 and 5105 images.

It is built from the folder that ASTMT's archive holds, in the layout of
`samjax.data.pascal_context`. Images keep their files' own bytes; truths are arrays, which saves
each epoch what reading files of MATLAB and finding boundaries takes.
"""

from __future__ import annotations

from pathlib import Path

import tensorflow_datasets as tfds

from samjax.data import pascal_context
from samjax.data.builders.dense import DenseBuilder
from samjax.data.dense import DenseDataset, DenseSample
from samjax.tasks import PASCAL_CONTEXT


class PascalContext(DenseBuilder):
    """PASCAL-Context in ASTMT's layout."""

    VERSION = tfds.core.Version("1.0.0")
    TITLE = (
        "PASCAL-Context: photographs, with segmentation in 21 classes, parts of people, saliency, "
        "surface normals and edges"
    )
    HOMEPAGE = "https://github.com/facebookresearch/astmt"
    FOLDER = "PASCAL_MT"
    TASKS = PASCAL_CONTEXT
    NUM_PAIRS = 4998 + 5105
    LICENSE = (
        "PASCAL VOC's images are Flickr's, whose terms of use hold; publications must cite the "
        "papers"
    )
    CITATION = """\
@inproceedings{mottaghi2014role,
  title = {The Role of Context for Object Detection and Semantic Segmentation in the Wild},
  author = {Mottaghi, Roozbeh and Chen, Xianjie and Liu, Xiaobai and Cho, Nam-Gyu and
            Lee, Seong-Whan and Fidler, Sanja and Urtasun, Raquel and Yuille, Alan},
  booktitle = {Conference on Computer Vision and Pattern Recognition (CVPR)},
  year = {2014},
}
@inproceedings{maninis2019attentive,
  title = {Attentive Single-Tasking of Multiple Tasks},
  author = {Maninis, Kevis-Kokitsi and Radosavovic, Ilija and Kokkinos, Iasonas},
  booktitle = {Conference on Computer Vision and Pattern Recognition (CVPR)},
  pages = {1851--1860},
  year = {2019},
}"""

    @classmethod
    def how_to_get(cls) -> str:
        """Where a user finds the archive."""
        # The URL stands in MTI-Net's and many others' code, such as SimonVandenhende's
        # Multi-Task-Learning-PyTorch (data/pascal_context.py); size and hash do not.
        url = "https://data.vision.ee.ethz.ch/kmaninis/share/MTL/PASCAL_MT.tgz"
        return f"get PASCAL_MT.tgz, by the link at {cls.HOMEPAGE} or from {url}"

    @classmethod
    def missing(cls, folder: Path) -> str:
        """What to say where `find` finds nothing."""
        return (
            f"{folder} holds no {pascal_context.LISTS}, nor does its {cls.FOLDER}/: "
            f"{cls.how_to_get()}, and extract it there"
        )

    @classmethod
    def is_dataset(cls, folder: Path) -> bool:
        """Whether a folder has the lists of the splits."""
        return pascal_context.is_pascal_context(folder)

    def sources(self, found: Path) -> dict[str, DenseDataset]:
        """Both splits of the folder."""
        return {
            split: pascal_context.PascalContext(found, split, self.TASKS)
            for split in ("train", "test")
        }

    def image(self, source: DenseDataset, index: int, sample: DenseSample) -> bytes:
        """The image's own file, a JPEG."""
        file = source.image_file(index)
        assert isinstance(file, Path)
        return file.read_bytes()
