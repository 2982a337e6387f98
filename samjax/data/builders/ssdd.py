"""SSDD: 1160 radar images with ships, whose official release has polygons of them.

The release has its images four times over, with boxes, turned boxes, polygons, and all of these; of
these folders, `PSeg_SSDD` and `BBox_RBox_PSeg_SSDD` have polygons in `coco_style`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from samjax.data.builders.archives import Archive
from samjax.data.builders.coco_records import CocoBuilder, CocoPart
from samjax.data.builders.members import Members

_JSON = "annotations/train.json"
_STYLES = ("PSeg_SSDD/coco_style", "BBox_RBox_PSeg_SSDD/coco_style")


class Ssdd(CocoBuilder):
    """SSDD's official release, in its division into train and test."""

    VERSION = tfds.core.Version("1.0.0")
    TITLE = "SSDD: ships in radar images, with polygons"
    HOMEPAGE = "https://github.com/TianwenZhang0825/Official-SSDD"
    NUM_PAIRS = 928 + 232
    ARCHIVES = (Archive("Official-SSDD-OPEN"),)
    MARKERS = tuple(f"{style}/{_JSON}" for style in _STYLES)
    SOURCE = f"Official-SSDD-OPEN.rar by the link at {HOMEPAGE} and extract it"
    LICENSE = "its authors state none for the images; publications must cite the paper"
    CITATION = """\
@article{zhang2021sar,
  title = {{SAR} Ship Detection Dataset ({SSDD}): Official Release and Comprehensive Data Analysis},
  author = {Zhang, Tianwen and Zhang, Xiaoling and Li, Jianwei and Xu, Xiaowo and Wang, Baoyou and
            others},
  journal = {Remote Sensing},
  volume = {13},
  number = {18},
  pages = {3690},
  year = {2021},
}"""

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The folder, where it holds the release or is one of its folders `coco_style`."""
        return folder if (folder / _JSON).is_file() else super().find(folder)

    def parts(self, found: Path) -> Iterator[CocoPart]:
        """Both splits."""
        if (found / _JSON).is_file():
            style = Members(found)
        else:
            release = self.root(found)
            style = release.under(next(one for one in _STYLES if f"{one}/{_JSON}" in release.names))
        for split in ("train", "test"):
            images = style.under(f"images/{split}")
            yield self.part(split, style, f"annotations/{split}.json", images)
