"""AbdomenCT-1K: slices of 1000 CT volumes, with liver, kidneys, spleen and pancreas.

The archives hold `AbdomenCT-1K-ImagePart{1,2,3}/Case_00001_0000.nii.gz`, 1062 volumes, and
`Case_00001.nii.gz`, 1000 label volumes, which are to be extracted to `Mask/`; the archives of
images are read where they lie, or from what was extracted of them. Images without labels are left
out. There is no official split, and slices of one volume are never in two.

Slices are made as SAM-PARSER's released code wants them, by MedSAM's `pre_CT.py` of that time:
values from -500 to 1000 HU become grey, 256 pixels a side, and slices with 100 pixels of an organ
or less are left out. What differs: that code takes one organ, narrows the window of a volume that
does not fill it, paints black what is exactly 0 HU, and leaves out each volume's topmost slice and
volumes with no more than 1000 voxels of the organ.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

from samjax.data.builders.members import Members
from samjax.data.builders.objects import categories_of
from samjax.data.builders.records import Contents, RecordsBuilder
from samjax.data.builders.settings import parse_settings, settings_text
from samjax.data.labels import present_labels
from samjax.data.objects import Object, add_image, empty_index
from samjax.data.splits import quote
from samjax.data.volumes import (
    VolumeFile,
    check_same_grid,
    nibabel,
    read_label_slices,
    read_slices,
    windowed,
)

ORGANS = ("liver", "kidney", "spleen", "pancreas")
_CLASSES = ("background", *ORGANS)
_NUM_VOLUMES = 1000
_PART = "AbdomenCT-1K-ImagePart"
_MASKS = "Mask"
_IMAGE, _LABEL = "_0000.nii.gz", ".nii.gz"

_logger = logging.getLogger("samjax")


@dataclasses.dataclass(frozen=True)
class SliceSettings:
    """How slices are made.

    `window`: the Hounsfield units that become black and white; -160+240 shows soft tissue, as
    MedSAM's later code does. `size`: a slice's longer side, in pixels. `organs`: those that are
    labelled, all else is background. `min_area`: a slice counts where its organs together have
    more pixels than this.

    Raises ValueError for settings that cannot be.
    """

    window: tuple[float, float] = (-500.0, 1000.0)
    size: int = 256
    organs: tuple[str, ...] = ORGANS
    min_area: int = 100

    def __post_init__(self) -> None:
        low, high = self.window
        if not -np.inf < low < high < np.inf:
            raise ValueError(f"window must go up, such as -160+240, and is {low:g}+{high:g}")
        if self.size < 1 or self.min_area < 0:
            raise ValueError(
                "size must be 1 or more and min_area 0 or more, and they are "
                f"{self.size} and {self.min_area}"
            )
        for organ in self.organs:
            if organ not in ORGANS:
                nearest = difflib.get_close_matches(organ, ORGANS, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"no organ {organ!r}; the nearest is {nearest}, there are {', '.join(ORGANS)}"
                )


class Abdomenct1k(RecordsBuilder):
    """AbdomenCT-1K in the layout of its archives.

    Records hold a slice, `labels`, whose values are the places in the metadata `classes`, and the
    metadata `groups` has each record's volume.
    """

    VERSION = tfds.core.Version("1.0.0")
    TITLE = "AbdomenCT-1K: slices of 1000 CT volumes, with liver, kidney, spleen and pancreas"
    HOMEPAGE = "https://github.com/JunMa11/AbdomenCT-1K"
    # How many slices there are depends on the settings.
    NUM_PAIRS = None
    LICENSE = (
        "see the archives' records at Zenodo, and the datasets that are joined there (LiTS, KiTS, "
        "MSD Spleen and Pancreas, NIH Pancreas); publications must cite the paper"
    )
    CITATION = """\
@article{ma2022abdomenct,
  title = {{AbdomenCT-1K}: Is Abdominal Organ Segmentation a Solved Problem?},
  author = {Ma, Jun and Zhang, Yao and Gu, Song and Zhu, Cheng and Ge, Cheng and Zhang, Yichi and
            An, Xingle and Wang, Congcong and Wang, Qiyuan and Liu, Xin and Cao, Shucheng and
            Zhang, Qi and Liu, Shangqing and Wang, Yunpeng and Li, Yuhui and He, Jian and
            Yang, Xiaoping},
  journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
  volume = {44},
  number = {10},
  pages = {6695--6714},
  year = {2022},
}"""

    @classmethod
    def configured(cls, settings: str) -> tfds.core.BuilderConfig:
        """The settings of a text; their whole text is the name of a folder."""
        return tfds.core.BuilderConfig(settings_text(parse_settings(SliceSettings, settings)))

    @classmethod
    def how_to_get(cls) -> str:
        """Where a user finds the archives."""
        # The records stand in torch-em (torch_em/data/datasets/medical/abdomenct_1k.py).
        return (
            f"get {_PART}1.zip from https://zenodo.org/records/5903099, {_PART}2.zip from "
            f"https://zenodo.org/records/5903846, and {_PART}3.zip and Mask.7z from "
            f"https://zenodo.org/records/5903769, and extract Mask.7z to {_MASKS}/"
        )

    @classmethod
    def missing(cls, folder: Path) -> str:
        """What to say where `find` finds nothing."""
        what = f"{_PART}1.zip or {_PART}1/" if (folder / _MASKS).is_dir() else f"{_MASKS}/"
        return f"{folder} holds no {what}: {cls.how_to_get()}, all of it there"

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The folder, where it has labels and some of the images."""
        return folder if (folder / _MASKS).is_dir() and _parts(folder) else None

    def record_features(self) -> dict[str, Any]:
        """A slice and its labels."""
        return {
            "image": tfds.features.Image(shape=(None, None, 1)),
            "labels": tfds.features.Image(shape=(None, None, 1)),
        }

    def contents(self, found: Path) -> dict[str, Contents]:
        """The slices of all volumes; labels are read to tell which slices there are.

        Raises ValueError, naming the file, for a label without its image and one that does not lie
        on it, for files that cannot be read and for labels that there are not.
        """
        nibabel()
        images, labels = _volumes(found)
        if len(labels) != _NUM_VOLUMES:
            _logger.warning("%s has labels of %s of 1000 volumes", found, len(labels))
        for case in self.track(labels, "comparing headers", len(labels)):
            check_same_grid(images[case], labels[case])
        kept = {
            case: self._kept(label)
            for case, label in self.track(labels.items(), "reading labels", len(labels))
        }
        # One volume at a time, since a large one takes half a gigabyte.
        read = functools.lru_cache(maxsize=1)(
            lambda case: (read_slices(images[case]), self._labels(labels[case]))
        )

        index = empty_index()

        def record(case: str, z: int) -> dict[str, bytes]:
            volume, organs = read(case)
            grey = windowed(volume[z], self._settings.window, images[case])
            image = self._resized(grey, Image.Resampling.BICUBIC)
            present = present_labels(organs[z].astype(np.int32))
            add_image(index, [Object(organ, organ) for organ in present])
            return {"image": _png(image), "labels": _png(organs[z])}

        places = [(case, z) for case, slices in kept.items() for z in slices]
        if not places:
            raise ValueError(
                f"the labels of {found} have no slice of more than {self._settings.min_area} "
                f"pixels of {', '.join(self._settings.organs)}: lower min_area"
            )
        metadata = self.info.metadata
        metadata["classes"], metadata["categories"] = list(_CLASSES), categories_of(_CLASSES)
        metadata["objects"] = {"train": index}
        metadata["groups"] = {"train": [case for case, _ in places]}
        names = [f"{case}_{z:04}" for case, z in places]
        return {"train": Contents(names, (record(case, z) for case, z in places))}

    @functools.cached_property
    def _settings(self) -> SliceSettings:
        return parse_settings(SliceSettings, self.builder_config.name)

    def _labels(self, file: VolumeFile) -> UInt8[np.ndarray, "slices h w"]:
        """The labels of a volume: of organs that are wanted, as large as slices are."""
        labels = read_label_slices(file, len(_CLASSES))
        wanted = [_CLASSES.index(organ) for organ in self._settings.organs]
        labels = np.where(np.isin(labels, wanted), labels, np.uint8(0))
        return np.stack([self._resized(own, Image.Resampling.NEAREST) for own in labels])

    def _kept(self, file: VolumeFile) -> list[int]:
        areas = np.count_nonzero(self._labels(file), axis=(1, 2))
        return np.flatnonzero(areas > self._settings.min_area).tolist()

    def _resized(
        self, values: UInt8[np.ndarray, "h w"], resample: Image.Resampling
    ) -> UInt8[np.ndarray, "h2 w2"]:
        height, width = values.shape
        scale = self._settings.size / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return np.asarray(Image.fromarray(values).resize(size, resample))


def _parts(folder: Path) -> list[Path]:
    """Where the images are: of each part what was extracted, or else its archive."""
    places = sorted(folder.glob(f"{_PART}*"))
    folders = [place for place in places if place.is_dir()]
    extracted = {place.name for place in folders}
    zips = [p for p in places if p.suffix == ".zip" and p.stem not in extracted]
    return folders + zips


def _volumes(folder: Path) -> tuple[dict[str, VolumeFile], dict[str, VolumeFile]]:
    """Images and labels by case. Raises ValueError where a label has no image."""
    images: dict[str, VolumeFile] = {}
    for part in _parts(folder):
        images |= _by_case(Members(part), _IMAGE)
    labels = _by_case(Members(folder / _MASKS), _LABEL)
    if not labels:
        raise ValueError(f"{folder / _MASKS} has no Case_00001{_LABEL} or the like")
    if lonely := [case for case in labels if case not in images]:
        raise ValueError(
            f"labels in {folder / _MASKS} have no image in {_PART}1 to 3: {quote(lonely)}"
        )
    return images, labels


def _by_case(members: Members, ending: str) -> dict[str, VolumeFile]:
    names = [name for name in members.names if name.endswith(ending)]
    return {
        Path(name).name.removesuffix(ending): VolumeFile(
            members.path(name), functools.partial(members.open, name)
        )
        for name in names
    }


def _png(values: UInt8[np.ndarray, "h w"]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()
