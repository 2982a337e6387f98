"""CAMO: 1250 images with camouflaged objects, animals and people.

The archive holds `CAMO-V.1.0-CVIU2019/Images/{Train,Test}/*.jpg` and the masks of both in
`CAMO-V.1.0-CVIU2019/GT/*.png`.
"""

from __future__ import annotations

import tensorflow_datasets as tfds

from samjax.data.builders.archives import Archive
from samjax.data.builders.conv_lora import conv_lora
from samjax.data.builders.image_mask import ImageMaskBuilder
from samjax.data.builders.layouts import Folders, Layout

_FOLDER = "CAMO-V.1.0-CVIU2019"


class Camo(ImageMaskBuilder):
    """CAMO, version 1.0, with its 1000 and 250 images."""

    VERSION = tfds.core.Version("1.0.0")
    TITLE = "CAMO: camouflaged animals and people, with masks"
    HOMEPAGE = "https://sites.google.com/view/ltnghia/research/camo"
    NUM_PAIRS = 1000 + 250
    THRESHOLD = 127
    LAYOUTS = (
        Layout(
            f"{_FOLDER}.zip by the link at https://sites.google.com/view/ltnghia/research/camo",
            (Archive(_FOLDER, f"{_FOLDER}.zip"),),
            {
                "train": Folders(f"{_FOLDER}/Images/Train", f"{_FOLDER}/GT"),
                "test": Folders(f"{_FOLDER}/Images/Test", f"{_FOLDER}/GT"),
            },
        ),
        conv_lora("camo_sem_seg", {"camo": "CAMO"}),
    )
    # The authors' repository (ltnghia/CAMO) says so of its code, and nothing else of the data.
    LICENSE = "for academic purposes only; publications must cite the paper"
    CITATION = """\
@article{le2019anabranch,
  title = {Anabranch Network for Camouflaged Object Segmentation},
  author = {Le, Trung-Nghia and Nguyen, Tam V. and Nie, Zhongliang and Tran, Minh-Triet and
            Sugimoto, Akihiro},
  journal = {Computer Vision and Image Understanding},
  volume = {184},
  pages = {45--56},
  year = {2019},
}"""
