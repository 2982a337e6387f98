"""COCO 2017: objects of 80 categories in photos, 118287 to train on and 5000 as `val`.

No truth of its test split is published: the literature's `val` is the split `test`. The images are
read from the zips where they are not extracted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from samjax.data.builders.archives import Archive
from samjax.data.builders.coco_records import CocoBuilder, CocoPart
from samjax.data.builders.members import Members

_SPLITS = {"train": "train2017", "test": "val2017"}


class Coco2017(CocoBuilder):
    """COCO 2017's instances, in the layout of its archives."""

    VERSION = tfds.core.Version("1.0.0")
    TITLE = "COCO 2017: objects of 80 categories in photos; its val is the split test"
    HOMEPAGE = "https://cocodataset.org/#download"
    NUM_PAIRS = 118_287 + 5_000
    # Sizes and hashes as tensorflow-datasets 4.9 has them (url_checksums/coco.txt).
    ARCHIVES = (
        Archive(
            "train2017",
            "train2017.zip",
            "http://images.cocodataset.org/zips/train2017.zip",
            19_336_861_798,
            "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
        ),
        Archive(
            "val2017",
            "val2017.zip",
            "http://images.cocodataset.org/zips/val2017.zip",
            815_585_330,
            "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
        ),
        Archive(
            "annotations",
            "annotations_trainval2017.zip",
            "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
            252_907_541,
            "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
        ),
    )
    MARKERS = ()
    SOURCE = f"train2017.zip, val2017.zip and annotations_trainval2017.zip from {HOMEPAGE}"
    LICENSE = (
        "annotations CC BY 4.0; the photos are Flickr's, each under the licence of its author, "
        "which the JSON names"
    )
    CITATION = """\
@inproceedings{lin2014microsoft,
  title = {Microsoft {COCO}: Common Objects in Context},
  author = {Lin, Tsung-Yi and Maire, Michael and Belongie, Serge and Hays, James and
            Perona, Pietro and Ramanan, Deva and Doll{\\'a}r, Piotr and Zitnick, C. Lawrence},
  booktitle = {European Conference on Computer Vision (ECCV)},
  pages = {740--755},
  year = {2014},
}"""

    def parts(self, found: Path) -> Iterator[CocoPart]:
        """Both splits; an archive's one folder is its root, as that of an extracted one is."""
        places = {archive.folder: archive.find(found) for archive in self.ARCHIVES}
        members = {
            folder: Members(place).under("" if place.is_dir() else folder)
            for folder, place in places.items()
            if place is not None
        }
        for split, folder in _SPLITS.items():
            name = f"instances_{folder}.json"
            yield self.part(split, members["annotations"], name, members[folder])
