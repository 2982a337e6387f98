"""Trans10K-v2: the photos of Trans10K, with 11 classes of transparent objects.

The folder is as its authors' reader has it (xieenze/Trans2Seg, README and transparent11.py): the
mask of NAME.jpg is NAME_mask.png, whose values, or indices into a palette, are the classes. That
reader knows no EXIF orientation, so that masks are of the pixels as they are stored.
"""

from __future__ import annotations

import functools
from pathlib import Path

import tensorflow_datasets as tfds

from samjax.data.builders.archives import Archive
from samjax.data.builders.label_images import (
    check_files_match,
    classes_of,
    image_as_stored,
    pair,
)
from samjax.data.builders.members import Members
from samjax.data.builders.objects import ObjectsBuilder, Readers, Truth
from samjax.data.images import read_labels
from samjax.data.objects import Object


class Trans10kV2(ObjectsBuilder):
    """Trans10K-v2 in its official splits, 12 classes with the background."""

    VERSION = tfds.core.Version("1.0.0")
    TITLE = "Trans10K-v2: transparent objects in photos, 12 classes with the background"
    HOMEPAGE = "https://github.com/xieenze/Trans2Seg"
    NUM_PAIRS = 5000 + 1000 + 4428
    ARCHIVES = (Archive("Trans10K_v2"),)
    MARKERS = ("train/masks_12",)
    SOURCE = (
        f"Trans10K-v2 by the link at {HOMEPAGE}, extract it so that Trans10K_v2/ has train, "
        "validation and test, each with images and masks_12"
    )
    KEYS = ("labels",)
    # As the authors' reader has them.
    CLASSES = (
        "background",
        "shelf",
        "jar or tank",
        "freezer",
        "window",
        "glass door",
        "eyeglass",
        "cup",
        "floor glass",
        "glass bowl",
        "water bottle",
        "storage box",
    )
    LICENSE = "its authors state none that was found; Trans10K is for academic use"
    CITATION = """\
@inproceedings{xie2021segmenting,
  title = {Segmenting Transparent Object in the Wild with Transformer},
  author = {Xie, Enze and Wang, Wenjia and Wang, Wenhai and Sun, Peize and Xu, Hang and
            Liang, Ding and Luo, Ping},
  booktitle = {International Joint Conference on Artificial Intelligence (IJCAI)},
  year = {2021},
}"""

    def readers(self, found: Path) -> dict[str, Readers]:
        """The images of each split."""
        root = self.root(found)
        return {
            split: {
                name: functools.partial(self._read, root, image, mask)
                for name, (image, mask) in pair(
                    root, f"{split}/images", f"{split}/masks_12", "_mask.png"
                ).items()
            }
            for split in ("train", "validation", "test")
        }

    def _read(self, root: Members, image_name: str, mask_name: str) -> Truth:
        image, mask = image_as_stored(root, image_name), root.image(mask_name)
        check_files_match(image, mask)
        present = classes_of(read_labels(mask), self.CLASSES, mask)
        return Truth(image.getvalue(), [Object(label, label) for label in present], mask.getvalue())
