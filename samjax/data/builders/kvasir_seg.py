"""Kvasir-SEG: 1000 polyps in images of colonoscopies.

The archive holds `Kvasir-SEG/{images,masks}/*.jpg`, an image and its mask under the same name, and
`kavsir_bboxes.json` (so spelt), which is not used: the boxes are those of the masks. It has no
official split.
"""

from __future__ import annotations

import tensorflow_datasets as tfds

from samjax.data.builders.archives import Archive
from samjax.data.builders.image_mask import ImageMaskBuilder
from samjax.data.builders.layouts import Folders, Layout


class KvasirSeg(ImageMaskBuilder):
    """Kvasir-SEG in the layout of its archive."""

    VERSION = tfds.core.Version("1.0.0")
    TITLE = "Kvasir-SEG: polyps in images of colonoscopies, with masks"
    HOMEPAGE = "https://datasets.simula.no/kvasir-seg/"
    NUM_PAIRS = 1000
    LAYOUTS = (
        Layout(
            "kvasir-seg.zip from https://datasets.simula.no/kvasir-seg/",
            # The hash stands in two projects on GitHub: constantinpape/torch-em (torch_em/data/
            # datasets/medical/kvasir.py) and MECLabTUDA/NCALab (tasks/segmentation_kvasir_seg).
            (
                Archive(
                    "Kvasir-SEG",
                    "kvasir-seg.zip",
                    "https://datasets.simula.no/downloads/kvasir-seg.zip",
                    46_227_172,
                    "03b30e21d584e04facf49397a2576738fd626815771afbbf788f74a7153478f7",
                ),
            ),
            {"train": Folders("Kvasir-SEG/images", "Kvasir-SEG/masks")},
        ),
    )
    LICENSE = (
        "for research and education only; commercial use needs prior written permission of the "
        "authors, and publications must cite the paper"
    )
    CITATION = """\
@inproceedings{jha2020kvasir,
  title = {Kvasir-SEG: A Segmented Polyp Dataset},
  author = {Jha, Debesh and Smedsrud, Pia H. and Riegler, Michael A. and Halvorsen, P{\\aa}l and
            de Lange, Thomas and Johansen, Dag and Johansen, H{\\aa}vard D.},
  booktitle = {MultiMedia Modeling (MMM)},
  pages = {451--462},
  year = {2020},
}"""
