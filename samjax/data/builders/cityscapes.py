"""CityScapes with segmentation and disparity: 2975 and 500 streets of 128x256 pixels.

It is built from the official archives (`samjax.data.builders.cityscapes_archives`), or from a
folder in the layout of `samjax.data.dense_folder` that has `label_7` and `label_19`, as MTAN made
it. A task `segmentation` of 7 or 19 classes reads the truth of as many.
"""

from __future__ import annotations

from pathlib import Path

import tensorflow_datasets as tfds

from samjax.data.builders.cityscapes_archives import (
    ARCHIVES,
    TASKS,
    CityscapesArchives,
    find_archives,
)
from samjax.data.builders.dense import MTAN_PLACES, DenseBuilder, is_mtan
from samjax.data.dense import DenseDataset
from samjax.data.dense_folder import SPLITS, DenseFolder


class Cityscapes(DenseBuilder):
    """CityScapes in the layout of its archives, or in MTAN's."""

    VERSION = tfds.core.Version("1.0.0")
    TITLE = "CityScapes: streets, with segmentation in 7 and in 19 classes, and disparity"
    HOMEPAGE = "https://www.cityscapes-dataset.com"
    FOLDER = "cityscapes"
    TASKS = TASKS
    NUM_PAIRS = 2975 + 500
    LICENSE = (
        "for non-commercial purposes, such as research, teaching and publications; the rest stands "
        "in the terms to which those agree who register; publications must cite the paper"
    )
    CITATION = """\
@inproceedings{cordts2016cityscapes,
  title = {The Cityscapes Dataset for Semantic Urban Scene Understanding},
  author = {Cordts, Marius and Omran, Mohamed and Ramos, Sebastian and Rehfeld, Timo and
            Enzweiler, Markus and Benenson, Rodrigo and Franke, Uwe and Roth, Stefan and
            Schiele, Bernt},
  booktitle = {Conference on Computer Vision and Pattern Recognition (CVPR)},
  year = {2016},
}"""

    @classmethod
    def how_to_get(cls) -> str:
        """Where a user finds the archives."""
        return f"register at {cls.HOMEPAGE}, get {', '.join(ARCHIVES.values())}"

    @classmethod
    def missing(cls, folder: Path) -> str:
        """What to say where `find` finds nothing."""
        found = find_archives(folder)
        lacking = [archive for kind, archive in ARCHIVES.items() if kind not in found]
        what = f"{lacking[0]}, or what was extracted of it" if found else "archive of CityScapes"
        return (
            f"{folder} holds no {what}, nor {MTAN_PLACES} as MTAN has them: {cls.how_to_get()}, "
            "and put them there"
        )

    @classmethod
    def is_dataset(cls, folder: Path) -> bool:
        """Whether a folder has all archives, or both splits as MTAN has them."""
        return is_mtan(folder) or find_archives(folder).keys() == ARCHIVES.keys()

    def sources(self, found: Path) -> dict[str, DenseDataset]:
        """Both splits, of MTAN's folder where it is one."""
        if is_mtan(found):
            return {split: DenseFolder(found, split, self.TASKS) for split in SPLITS}
        places = find_archives(found)
        return {split: CityscapesArchives(places, split) for split in SPLITS}
