"""Massachusetts Roads: 1171 aerial images of 1500x1500 pixels, with the roads in them.

The official place has files, no archive: `mass_roads/{train,valid,test}/sat/*.tiff` and
`.../map/*.tif`. Kaggle has a copy as `tiff/{train,val,test}/*.tiff` and
`tiff/{train,val,test}_labels/*.tif`.
"""

from __future__ import annotations

import tensorflow_datasets as tfds

from samjax.data.builders.archives import Archive
from samjax.data.builders.conv_lora import conv_lora
from samjax.data.builders.image_mask import ImageMaskBuilder
from samjax.data.builders.layouts import Folders, Layout

_KAGGLE = "massachusetts-roads-dataset"


class MassachusettsRoads(ImageMaskBuilder):
    """Massachusetts Roads with Mnih's splits."""

    VERSION = tfds.core.Version("1.0.0")
    TITLE = "Massachusetts Roads: roads in aerial images, with masks"
    HOMEPAGE = "https://www.cs.toronto.edu/~vmnih/data/"
    NUM_PAIRS = 1108 + 14 + 49
    THRESHOLD = 127
    LAYOUTS = (
        Layout(
            "train, valid and test, each with sat and map, of the folder mass_roads at "
            "https://www.cs.toronto.edu/~vmnih/data/",
            (Archive("mass_roads"),),
            {
                split: Folders(f"mass_roads/{place}/sat", f"mass_roads/{place}/map")
                for split, place in (("train", "train"), ("validation", "valid"), ("test", "test"))
            },
        ),
        Layout(
            f"{_KAGGLE}.zip from https://www.kaggle.com/datasets/balraj98/{_KAGGLE}",
            (Archive("tiff", f"{_KAGGLE}.zip"),),
            {
                split: Folders(f"tiff/{place}", f"tiff/{place}_labels")
                for split, place in (("train", "train"), ("validation", "val"), ("test", "test"))
            },
        ),
        conv_lora("road_segmentation"),
    )
    LICENSE = "the author states none; publications must cite the thesis"
    CITATION = """\
@phdthesis{mnih2013machine,
  title = {Machine Learning for Aerial Image Labeling},
  author = {Mnih, Volodymyr},
  school = {University of Toronto},
  year = {2013},
}"""
