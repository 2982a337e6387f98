"""WHU's aerial buildings: 8188 tiles of 512x512 pixels, with masks of their buildings.

Each connected part of a mask, without diagonals, is an object, as in RSPrompter's conversion to
COCO's JSON (tools/rsprompter/whu2coco.py): buildings that touch are one.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import scipy.ndimage
import tensorflow_datasets as tfds

from samjax.data import segmentation
from samjax.data.builders.archives import Archive
from samjax.data.builders.label_images import check_files_match, pair
from samjax.data.builders.members import Members
from samjax.data.builders.objects import ObjectsBuilder, Readers, Truth
from samjax.data.coco_json import Annotation
from samjax.data.images import read_mask

_SPLITS = {"train": "train", "validation": "val", "test": "test"}


class WhuBuilding(ObjectsBuilder):
    """WHU's building dataset, aerial imagery, cropped tiles, in its official splits."""

    VERSION = tfds.core.Version("1.0.0")
    TITLE = "WHU building: buildings in aerial images"
    HOMEPAGE = "http://gpcv.whu.edu.cn/data/building_dataset.html"
    NUM_PAIRS = 4736 + 1036 + 2416
    # The names of archive and folder as CAT-SAM's data preparation has them.
    ARCHIVES = (
        Archive(
            "3. The cropped image tiles and raster labels",
            "3. The cropped aerial image tiles and raster labels.zip",
        ),
    )
    MARKERS = ("train/image",)
    SOURCE = f"'{ARCHIVES[0].file}' from {HOMEPAGE}"
    LICENSE = "its authors state none that was found; publications must cite the paper"
    CITATION = """\
@article{ji2018fully,
  title = {Fully Convolutional Networks for Multisource Building Extraction From an Open Aerial and
           Satellite Imagery Data Set},
  author = {Ji, Shunping and Wei, Shiqing and Lu, Meng},
  journal = {IEEE Transactions on Geoscience and Remote Sensing},
  volume = {57},
  number = {1},
  pages = {574--586},
  year = {2019},
}"""

    def categories(self) -> list[dict[str, int | str]]:
        """Buildings."""
        return [{"id": 1, "name": "building"}]

    def readers(self, found: Path) -> dict[str, Readers]:
        """The tiles of each split."""
        root = self.root(found)
        return {
            split: {
                name: functools.partial(_read, root, image, label)
                for name, (image, label) in pair(
                    root, f"{place}/image", f"{place}/label", ".tif"
                ).items()
            }
            for split, place in _SPLITS.items()
        }


def _read(root: Members, image_name: str, label_name: str) -> Truth:
    image, label = root.image(image_name), root.image(label_name)
    check_files_match(image, label)
    parts, count = scipy.ndimage.label(read_mask(label)[0])
    boxes = scipy.ndimage.find_objects(parts)
    annotations = []
    for number, box in zip(range(1, count + 1), boxes, strict=True):
        mask = np.zeros(parts.shape, bool)
        mask[box] = parts[box] == number
        annotations.append(Annotation(number, 1, False, segmentation.encode(mask)))
    return Truth(image.getvalue(), annotations)
