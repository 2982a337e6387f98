"""PASCAL VOC 2012, segmentation: 20 classes of objects in photos, 1464 to train and 1449 as `val`.

No truth of its test split is published: the literature's `val` is the split `test`. Label images
are those of SegmentationClass, instances those of SegmentationObject, where 255 marks borders. The
class of an instance is the one of most of its pixels in SegmentationClass.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

from samjax.data import segmentation
from samjax.data.builders.archives import Archive
from samjax.data.builders.label_images import check_files_match, check_present, classes_of
from samjax.data.builders.members import Members
from samjax.data.builders.objects import ObjectsBuilder, Readers, Truth
from samjax.data.coco_json import Annotation
from samjax.data.images import EncodedImage, read_labels
from samjax.data.labels import VOID, present_labels

_LISTS = "ImageSets/Segmentation"
_SPLITS = {"train": "train", "test": "val"}


class Voc2012(ObjectsBuilder):
    """PASCAL VOC 2012's segmentations, as label images and as instances."""

    VERSION = tfds.core.Version("1.0.0")
    TITLE = "PASCAL VOC 2012: objects of 20 classes in photos; its val is the split test"
    HOMEPAGE = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"
    NUM_PAIRS = 1464 + 1449
    # The URL and MD5 stand in torchvision and many others; size and sha256 in tensorflow-datasets
    # (url_checksums/voc.txt) and keras-cv.
    ARCHIVES = (
        Archive(
            "VOCdevkit",
            "VOCtrainval_11-May-2012.tar",
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            1_999_639_040,
            "e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
        ),
    )
    MARKERS = (f"VOC2012/{_LISTS}", _LISTS)
    SOURCE = f"VOCtrainval_11-May-2012.tar from {HOMEPAGE}"
    KEYS = ("labels", "annotations")
    CLASSES = (
        "background",
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    )
    LICENSE = (
        "the photos are Flickr's, under its terms of use; publications must cite the challenge"
    )
    CITATION = """\
@article{everingham2010pascal,
  title = {The {PASCAL} Visual Object Classes ({VOC}) Challenge},
  author = {Everingham, Mark and Van Gool, Luc and Williams, Christopher K. I. and Winn, John and
            Zisserman, Andrew},
  journal = {International Journal of Computer Vision},
  volume = {88},
  pages = {303--338},
  year = {2010},
}"""

    def readers(self, found: Path) -> dict[str, Readers]:
        """The images that the lists of each split name."""
        root = self.root(found)
        # VOC2012/ may lie beside those of other years.
        root = root.under("VOC2012") if f"VOC2012/{_LISTS}/train.txt" in root.names else root
        splits: dict[str, Readers] = {}
        for split, alias in _SPLITS.items():
            file = f"{_LISTS}/{alias}.txt"
            check_present(root, [file], Path("the segmentation of VOC 2012"))
            names = root.read(file).decode().split()
            needed = [path for name in names for path in _files(name)]
            check_present(root, needed, root.path(file))
            splits[split] = {name: functools.partial(self._read, root, name) for name in names}
        return splits

    def _read(self, root: Members, name: str) -> Truth:
        image, class_file, object_file = map(root.image, _files(name))
        check_files_match(image, class_file)
        check_files_match(image, object_file)
        labels = read_labels(class_file)
        classes_of(labels, self.CLASSES, class_file)
        annotations = _instances(read_labels(object_file), labels, object_file)
        return Truth(image.getvalue(), annotations, class_file.getvalue())


def _files(name: str) -> tuple[str, str, str]:
    """An image, its classes, its instances."""
    return (
        f"JPEGImages/{name}.jpg",
        f"SegmentationClass/{name}.png",
        f"SegmentationObject/{name}.png",
    )


def _instances(
    values: Int[np.ndarray, "h w"], labels: Int[np.ndarray, "h w"], file: EncodedImage
) -> list[Annotation]:
    annotations = []
    for value in present_labels(values):
        if value == VOID:
            continue
        mask = values == value
        counts = np.bincount(labels[mask], minlength=VOID + 1)
        counts[[0, VOID]] = 0
        if not counts.any():
            raise ValueError(f"{file} holds the object {value}, which has no class: get it anew")
        annotations.append(
            Annotation(value, int(counts.argmax()), False, segmentation.encode(mask))
        )
    return annotations
