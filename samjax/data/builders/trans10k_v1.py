"""Trans10K: 10428 photos with transparent things, such as cups, and stuff, such as windows.

The archive's masks are pictures: black is background, red are things, white is stuff, which its
authors' reader tells apart by the mean of the three channels (xieenze/Segment_Transparent_Objects,
trans10k.py). It knows no EXIF orientation, so that masks are of the pixels as they are stored.
Validation and test have an easy and a hard part, whose names begin so here.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int
from PIL import Image

from samjax.data.builders.archives import Archive
from samjax.data.builders.label_images import check_files_match, image_as_stored, pair
from samjax.data.builders.members import Members
from samjax.data.builders.objects import ObjectsBuilder, Readers, Truth
from samjax.data.images import EncodedImage, read_image
from samjax.data.labels import present_labels
from samjax.data.objects import Object

_PARTS = {
    "train": ("",),
    "validation": ("easy", "hard"),
    "test": ("easy", "hard"),
}
# The sum of a pixel's channels, by class.
_SUMS = (0, 255, 765)


class Trans10kV1(ObjectsBuilder):
    """Trans10K (v1) in its official splits, three classes with the background."""

    VERSION = tfds.core.Version("1.0.0")
    TITLE = "Trans10K: transparent things and stuff in photos, three classes with the background"
    HOMEPAGE = "https://xieenze.github.io/projects/TransLAB/TransLAB.html"
    NUM_PAIRS = 5000 + 1000 + 4428
    ARCHIVES = (Archive("Trans10K"),)
    MARKERS = ("train/images",)
    SOURCE = (
        f"Trans10K from {HOMEPAGE}, extract it so that Trans10K/ has train, validation and test"
    )
    KEYS = ("labels",)
    # As the authors' reader has them.
    CLASSES = ("background", "things", "stuff")
    LICENSE = "for academic use; commercial use needs permission of the authors"
    CITATION = """\
@inproceedings{xie2020segmenting,
  title = {Segmenting Transparent Objects in the Wild},
  author = {Xie, Enze and Wang, Wenjia and Wang, Wenhai and Ding, Mingyu and Shen, Chunhua and
            Luo, Ping},
  booktitle = {European Conference on Computer Vision (ECCV)},
  year = {2020},
}"""

    def readers(self, found: Path) -> dict[str, Readers]:
        """The images of each split; of both its parts where it has two."""
        root = self.root(found)
        splits: dict[str, Readers] = {}
        for split, parts in _PARTS.items():
            splits[split] = {}
            for part in parts:
                place = f"{split}/{part}".rstrip("/")
                pairs = pair(root, f"{place}/images", f"{place}/masks", "_mask.png")
                for name, (image, mask) in pairs.items():
                    read = functools.partial(_read, root, image, mask)
                    splits[split][f"{part}/{name}".lstrip("/")] = read
        return splits


def _read(root: Members, image_name: str, mask_name: str) -> Truth:
    image, mask = image_as_stored(root, image_name), root.image(mask_name)
    check_files_match(image, mask)
    labels = _classes(mask)
    encoded = io.BytesIO()
    Image.fromarray(labels.astype(np.uint8)).save(encoded, "PNG")
    objects = [Object(label, label) for label in present_labels(labels)]
    return Truth(image.getvalue(), objects, encoded.getvalue())


def _classes(mask: EncodedImage) -> Int[np.ndarray, "h w"]:
    sums = read_image(mask).sum(axis=-1, dtype=np.int32)
    unknown = ~np.isin(sums, _SUMS)
    if unknown.any():
        y, x = np.argwhere(unknown)[0]
        raise ValueError(
            f"{mask} has at x {x}, y {y} a colour that is no class: the masks of Trans10K are "
            "black, red and white; those of its second version are trans10k_v2"
        )
    return np.searchsorted(_SUMS, sums).astype(np.int32)
