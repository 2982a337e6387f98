"""ISIC 2017, task 1: 2750 dermoscopic images with a skin lesion each.

Each split is two archives: `ISIC-2017_Training_Data/ISIC_N.jpg`, beside superpixels that are not
used, and `ISIC-2017_Training_Part1_GroundTruth/ISIC_N_segmentation.png`, 0 or 255.
"""

from __future__ import annotations

import tensorflow_datasets as tfds

from samjax.data.builders.archives import Archive
from samjax.data.builders.conv_lora import conv_lora
from samjax.data.builders.image_mask import ImageMaskBuilder
from samjax.data.builders.layouts import Folders, Layout

# The MD5s of all six stand in a download script on GitHub and in a torch dataset, and those of the
# images in google-deepmind/dm_nevis (dm_nevis/datasets_storage/handlers/melanoma.py) too.
_FILES = {
    "ISIC-2017_Training_Data": "a14a7e622c67a358797ae59abb8a0b0c",
    "ISIC-2017_Training_Part1_GroundTruth": "77fdbeb6fbec4139937224416b250f4c",
    "ISIC-2017_Validation_Data": "8d6419d942112f709894c0d82f6c9038",
    "ISIC-2017_Validation_Part1_GroundTruth": "64d3e68fa2deeb8a5e89aa8dec2efd44",
    "ISIC-2017_Test_v2_Data": "5f6a0b5e1f2972bd1f5ea02680489f09",
    "ISIC-2017_Test_v2_Part1_GroundTruth": "b1742de6bd257faca3b2b21a4aa3b781",
}
_URL = "https://isic-challenge-data.s3.amazonaws.com/2017"


def _folders(split: str) -> Folders:
    return Folders(
        f"ISIC-2017_{split}_Data",
        f"ISIC-2017_{split}_Part1_GroundTruth",
        suffix="_segmentation",
        skip="_superpixels",
    )


class Isic2017(ImageMaskBuilder):
    """ISIC 2017's segmentation of lesions, with the challenge's splits."""

    VERSION = tfds.core.Version("1.0.0")
    TITLE = "ISIC 2017: skin lesions in dermoscopic images, with masks"
    HOMEPAGE = "https://challenge.isic-archive.com/data/#2017"
    NUM_PAIRS = 2000 + 150 + 600
    THRESHOLD = 127
    LAYOUTS = (
        Layout(
            "the Data and Part1_GroundTruth zips of Training, Validation and Test_v2 from "
            "https://challenge.isic-archive.com/data/#2017",
            tuple(
                Archive(name, f"{name}.zip", f"{_URL}/{name}.zip", checksum=f"md5:{md5}")
                for name, md5 in _FILES.items()
            ),
            {
                "train": _folders("Training"),
                "validation": _folders("Validation"),
                "test": _folders("Test_v2"),
            },
        ),
        conv_lora("isic2017"),
    )
    # By open-mmlab/mmsegmentation (projects/medical/2d_image/dermoscopy/isic2017_task1/README.md).
    LICENSE = "CC0: in the public domain; publications should cite the paper"
    CITATION = """\
@inproceedings{codella2018skin,
  title = {Skin Lesion Analysis Toward Melanoma Detection: A Challenge at the 2017 International
           Symposium on Biomedical Imaging ({ISBI}), Hosted by the International Skin Imaging
           Collaboration ({ISIC})},
  author = {Codella, Noel C. F. and Gutman, David and Celebi, M. Emre and Helba, Brian and
            Marchetti, Michael A. and Dusza, Stephen W. and Kalloo, Aadi and
            Liopyris, Konstantinos and Mishra, Nabin and Kittler, Harald and Halpern, Allan},
  booktitle = {International Symposium on Biomedical Imaging (ISBI)},
  pages = {168--172},
  year = {2018},
}"""
