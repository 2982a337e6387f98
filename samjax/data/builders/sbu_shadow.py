"""SBU: 4723 photographs with shadows.

The archive holds `SBU-shadow/{SBUTrain4KRecoveredSmall,SBU-Test}/{ShadowImages/*.jpg,
ShadowMasks/*.png}`.
"""

from __future__ import annotations

import tensorflow_datasets as tfds

from samjax.data.builders.archives import Archive
from samjax.data.builders.conv_lora import conv_lora
from samjax.data.builders.image_mask import ImageMaskBuilder
from samjax.data.builders.layouts import Folders, Layout


def _folders(split: str) -> Folders:
    # The paper counts 4089 images to train on, loaders 4085 with a mask (Tramac/
    # awesome-semantic-segmentation-pytorch, README.md): the others cannot be an error.
    folder = f"SBU-shadow/{split}"
    return Folders(f"{folder}/ShadowImages", f"{folder}/ShadowMasks", lenient=True)


class SbuShadow(ImageMaskBuilder):
    """SBU with its training and test images."""

    VERSION = tfds.core.Version("1.0.0")
    TITLE = "SBU: shadows in photographs, with masks"
    HOMEPAGE = "https://www3.cs.stonybrook.edu/~cvl/projects/shadow_noisy_label/index.html"
    NUM_PAIRS = 4085 + 638
    THRESHOLD = 127
    LAYOUTS = (
        # The first to be looked for, since the official archive has the same name.
        conv_lora("SBU-shadow"),
        Layout(
            "SBU-shadow.zip from "
            "https://www3.cs.stonybrook.edu/~cvl/projects/shadow_noisy_label/index.html",
            (
                Archive(
                    "SBU-shadow",
                    "SBU-shadow.zip",
                    "https://www3.cs.stonybrook.edu/~cvl/content/datasets/shadow_db/SBU-shadow.zip",
                    # Stands in the README of one project on GitHub, with a size of 286 MB.
                    checksum="8ac703bc4ec0cf3f57e128a6e7a8ed73680d9f68e4e22d08fc83a3f60c612109",
                ),
            ),
            {"train": _folders("SBUTrain4KRecoveredSmall"), "test": _folders("SBU-Test")},
        ),
    )
    # As that project says of the README in the archive.
    LICENSE = "for non-commercial research only; publications must cite the paper"
    CITATION = """\
@inproceedings{vicente2016large,
  title = {Large-Scale Training of Shadow Detectors with Noisily-Annotated Shadow Examples},
  author = {Vicente, Tom{\\'a}s F. Yago and Hou, Le and Yu, Chen-Ping and Hoai, Minh and
            Samaras, Dimitris},
  booktitle = {European Conference on Computer Vision (ECCV)},
  pages = {816--832},
  year = {2016},
}"""
