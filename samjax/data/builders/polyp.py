"""Polyps by PraNet's protocol: 900 images of Kvasir-SEG and 550 of CVC-ClinicDB to train on.

The test split is Kvasir-SEG's other 100 and CVC-ClinicDB's other 62; its parts are `kvasir` and
`cvc_clinicdb`, as in `tfds:polyp/kvasir`. PraNet's archives hold `TrainDataset/{image,mask}/*.png`
(or `images`, `masks`: both are about) and `TestDataset/{Kvasir,CVC-ClinicDB}/{images,masks}/*.png`,
beside three other test sets, which are not used.
"""

from __future__ import annotations

import tensorflow_datasets as tfds

from samjax.data.builders.archives import Archive
from samjax.data.builders.conv_lora import conv_lora
from samjax.data.builders.image_mask import ImageMaskBuilder
from samjax.data.builders.layouts import Folders, Layout

_TESTS = {"kvasir": "Kvasir", "cvc_clinicdb": "CVC-ClinicDB"}


class Polyp(ImageMaskBuilder):
    """PraNet's training set and two of its test sets."""

    VERSION = tfds.core.Version("1.0.0")
    TITLE = "Polyp: PraNet's split of Kvasir-SEG and CVC-ClinicDB, with masks"
    HOMEPAGE = "https://github.com/DengPingFan/PraNet"
    NUM_PAIRS = 900 + 550 + 100 + 62
    # Masks are PNGs made of JPEGs, and nearly black or white.
    THRESHOLD = 127
    LAYOUTS = (
        Layout(
            "TrainDataset.zip and TestDataset.zip by the links at "
            "https://github.com/DengPingFan/PraNet",
            (
                Archive("TrainDataset", "TrainDataset.zip"),
                Archive("TestDataset", "TestDataset.zip"),
            ),
            {
                "train": Folders(
                    ("TrainDataset/image", "TrainDataset/images"),
                    ("TrainDataset/mask", "TrainDataset/masks"),
                ),
                "test": {
                    part: Folders(f"TestDataset/{test}/images", f"TestDataset/{test}/masks")
                    for part, test in _TESTS.items()
                },
            },
        ),
        conv_lora("polyp", _TESTS),
    )
    LICENSE = "that of kvasir_seg and of cvc_clinicdb: for research and education only"
    CITATION = """\
@inproceedings{fan2020pranet,
  title = {{PraNet}: Parallel Reverse Attention Network for Polyp Segmentation},
  author = {Fan, Deng-Ping and Ji, Ge-Peng and Zhou, Tao and Chen, Geng and Fu, Huazhu and
            Shen, Jianbing and Shao, Ling},
  booktitle = {Medical Image Computing and Computer Assisted Intervention (MICCAI)},
  pages = {263--273},
  year = {2020},
}
@inproceedings{jha2020kvasir,
  title = {Kvasir-SEG: A Segmented Polyp Dataset},
  author = {Jha, Debesh and Smedsrud, Pia H. and Riegler, Michael A. and Halvorsen, P{\\aa}l and
            de Lange, Thomas and Johansen, Dag and Johansen, H{\\aa}vard D.},
  booktitle = {MultiMedia Modeling (MMM)},
  pages = {451--462},
  year = {2020},
}
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
