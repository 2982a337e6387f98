"""CVC-ClinicDB, or CVC-612: 612 frames of 29 sequences of colonoscopy, each with a polyp.

The archive is a .rar, which Python does not read. It holds `CVC-ClinicDB/{Original,Ground Truth}/
N.tif`, images and masks of 288x384 pixels. It has no official split.
"""

from __future__ import annotations

import tensorflow_datasets as tfds

from samjax.data.builders.archives import Archive
from samjax.data.builders.image_mask import ImageMaskBuilder
from samjax.data.builders.layouts import Folders, Layout


class CvcClinicdb(ImageMaskBuilder):
    """CVC-ClinicDB in the layout of its archive, extracted."""

    VERSION = tfds.core.Version("1.0.0")
    TITLE = "CVC-ClinicDB (CVC-612): polyps in frames of colonoscopies, with masks"
    HOMEPAGE = "https://polyp.grand-challenge.org/CVCClinicDB/"
    NUM_PAIRS = 612
    THRESHOLD = 127
    LAYOUTS = (
        Layout(
            "CVC-ClinicDB.rar from https://polyp.grand-challenge.org/CVCClinicDB/, extract it, "
            "which takes another program (unar, 7-Zip),",
            (Archive("CVC-ClinicDB"),),
            {"train": Folders("CVC-ClinicDB/Original", "CVC-ClinicDB/Ground Truth")},
        ),
    )
    # As the homepage says, by dataset-ninja/cvc-612 (LICENSE.md).
    LICENSE = "for research and education only; commercial use is forbidden"
    CITATION = """\
@article{bernal2015wm,
  title = {{WM-DOVA} Maps for Accurate Polyp Highlighting in Colonoscopy: Validation vs. Saliency
           Maps from Physicians},
  author = {Bernal, Jorge and S{\\'a}nchez, F. Javier and Fern{\\'a}ndez-Esparrach, Gloria and
            Gil, Debora and Rodr{\\'i}guez, Cristina and Vilari{\\~n}o, Fernando},
  journal = {Computerized Medical Imaging and Graphics},
  volume = {43},
  pages = {99--111},
  year = {2015},
}"""
