"""NWPU VHR-10: 3921 objects of ten categories in 650 aerial and satellite images.

Its authors published boxes alone. The masks are those of Su et al. (IGARSS 2019), who annotated the
650 images of the "positive image set" as COCO's JSON. There is no official split: a run draws one,
such as SAM-PARSER's 70 to 30 with `--fractions 0.7 0 0.3`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from samjax.data.builders.archives import Archive
from samjax.data.builders.coco_records import CocoBuilder, CocoPart

_IMAGES = "positive image set"
_JSON = "annotations.json"


class NwpuVhr10(CocoBuilder):
    """NWPU VHR-10 with the instances of Su et al."""

    VERSION = tfds.core.Version("1.0.0")
    TITLE = "NWPU VHR-10: objects of ten categories in aerial and satellite images"
    HOMEPAGE = "https://github.com/chaozhong2010/VHR-10_dataset_coco"
    NUM_PAIRS = 650
    # URLs as torchgeo has them (torchgeo/datasets/vhr10.py), which knows the zip's MD5 alone; size
    # and sha256 of the JSON are those of commit ce0ba0f, whose MD5 is the one that torchgeo knows.
    ARCHIVES = (
        Archive(
            "NWPU VHR-10 dataset",
            "NWPU VHR-10 dataset.zip",
            "https://hf.co/datasets/isaaccorley/vhr10/resolve/"
            "60ecc4be33609184e2224606858cd00b7daba8df/NWPU%20VHR-10%20dataset.zip",
            checksum="md5:6add6751469c12dd8c8d6223064c6c4d",
        ),
        Archive(
            _JSON,
            _JSON,
            "https://raw.githubusercontent.com/chaozhong2010/VHR-10_dataset_coco/"
            "ce0ba0f5f6a0737031f1cbe05e785ddd5ef05bd7/NWPU%20VHR-10_dataset_coco/annotations.json",
            1_265_416,
            "dde27d9362d9c6aa358a1cab160c9e075e57405d3fe876de049973c6e6150f0e",
        ),
    )
    MARKERS = (_IMAGES,)
    SOURCE = (
        f"the images from {ARCHIVES[0].url} (extract what is a .rar elsewhere) and the masks from "
        f"{ARCHIVES[1].url}"
    )
    LICENSE = "none is stated for the images, which are Google Earth's and Vaihingen's; masks MIT"
    CITATION = """\
@article{cheng2014multi,
  title = {Multi-class geospatial object detection and geographic image classification based on
           collection of part detectors},
  author = {Cheng, Gong and Han, Junwei and Zhou, Peicheng and Guo, Lei},
  journal = {ISPRS Journal of Photogrammetry and Remote Sensing},
  volume = {98},
  pages = {119--132},
  year = {2014},
}
@inproceedings{su2019object,
  title = {Object Detection and Instance Segmentation in Remote Sensing Imagery Based on Precise
           {Mask R-CNN}},
  author = {Su, Hao and Wei, Shunjun and Yan, Min and Wang, Chen and Shi, Jun and
            Zhang, Xiaoling},
  booktitle = {International Geoscience and Remote Sensing Symposium (IGARSS)},
  pages = {1454--1457},
  year = {2019},
}"""

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The folder, where it has the images, in themselves or in their archive, and the JSON."""
        has_images = cls._is_root(folder) or cls.ARCHIVES[0].find(folder)
        return folder if has_images and cls._json(folder) else None

    @classmethod
    def _json(cls, folder: Path) -> Path | None:
        # Others put it beside the images (torchgeo), as those who made it do.
        files = (folder / _JSON, folder / cls.ARCHIVES[0].folder / _JSON)
        return next(filter(Path.is_file, files), None)

    @classmethod
    def missing(cls, folder: Path) -> str:
        """What to say where `find` finds nothing."""
        has_images = cls._is_root(folder) or cls.ARCHIVES[0].find(folder)
        lacking = [] if has_images else [f"{_IMAGES}/ nor {cls.ARCHIVES[0].file}"]
        lacking += [] if cls._json(folder) else [_JSON]
        return (
            f"{folder} holds no {' and no '.join(lacking)}: {cls.how_to_get()}, and put them there"
        )

    def parts(self, found: Path) -> Iterator[CocoPart]:
        """All images as one split."""
        file = self._json(found)
        assert file is not None  # or `find` would not have found it
        yield CocoPart("train", file, file.read_bytes(), self.root(found).under(_IMAGES))
