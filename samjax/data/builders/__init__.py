"""Builders of public datasets for tensorflow-datasets (TFDS), which work without TensorFlow.

A dataset is a module of its name with one class, which says where its files come from and what they
hold; what the datasets share is in `records` and `archives` and, for masks, in `image_mask` and
`layouts`. `prepare` builds them.
"""

from __future__ import annotations

import difflib
import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorflow_datasets.core import BuilderConfig

    from samjax.data.builders.records import RecordsBuilder

_CLASSES = {
    "kvasir_seg": "KvasirSeg",
    "cvc_clinicdb": "CvcClinicdb",
    "polyp": "Polyp",
    "isic2017": "Isic2017",
    "camo": "Camo",
    "sbu_shadow": "SbuShadow",
    "leaf_disease": "LeafDisease",
    "massachusetts_roads": "MassachusettsRoads",
    "nyuv2": "Nyuv2",
    "coco2017": "Coco2017",
    "nwpu_vhr10": "NwpuVhr10",
    "ssdd": "Ssdd",
    "trans10k_v1": "Trans10kV1",
    "trans10k_v2": "Trans10kV2",
    "voc2012": "Voc2012",
    "whu_building": "WhuBuilding",
    "cityscapes": "Cityscapes",
    "pascal_context": "PascalContext",
    "abdomenct1k": "Abdomenct1k",
}
DATASETS = tuple(_CLASSES)


def builder_class(name: str) -> type[RecordsBuilder]:
    """The builder of a dataset, whose name may go on with settings; imports TFDS.

    Raises ValueError for an unknown name, and RuntimeError where the system has no array_record.
    """
    name = name.partition(":")[0]
    if name not in _CLASSES:
        nearest = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown dataset {name!r}; the nearest is {nearest}, samjax has {', '.join(DATASETS)}"
        )
    try:
        importlib.import_module("array_record.python.array_record_module")
    except ImportError as error:
        raise RuntimeError(
            f"datasets of TFDS need array_record, which does not work here ({error}); it is made "
            "for Linux and macOS: elsewhere, use a folder of images and masks"
        ) from error
    return getattr(importlib.import_module(f"{__name__}.{name}"), _CLASSES[name])


def default_data_dir() -> Path:
    """Where TFDS keeps datasets: the environment variable TFDS_DATA_DIR, or TFDS's default."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def prepared_folder(name: str, data_dir: Path) -> Path:
    """Where a dataset's records are once it is prepared; until then the folder does not exist.

    A dataset that can be made in several ways is NAME:SETTING=VALUE,..., and each has its folder.
    Raises ValueError for a dataset or settings that there are not.
    """
    cls, config = builder_class(name), configuration(name)
    base = data_dir / name.partition(":")[0]
    return (base / config.name if config else base) / str(cls.VERSION)


def configuration(name: str) -> BuilderConfig | None:
    """TFDS's form of a dataset's settings, which its name gives; None where it has none.

    Raises ValueError for a dataset or settings that there are not.
    """
    try:
        return builder_class(name).configured(name.partition(":")[2])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def read_pairs(folder: Path) -> int:
    """How many images a prepared dataset has."""
    import tensorflow_datasets as tfds

    splits = tfds.builder_from_directory(folder).info.splits
    return sum(split.num_examples for split in splits.values())
