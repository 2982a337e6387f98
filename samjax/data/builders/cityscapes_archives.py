"""CityScapes' official archives as samples of dense tasks, made as MTAN's author makes them.

    leftImg8bit_trainvaltest.zip    leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png          RGB
    gtFine_trainvaltest.zip         gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png           ids 0 to 33
    disparity_trainvaltest.zip      disparity/SPLIT/CITY/NAME_disparity.png              16 bits

Each is read where it lies; a folder of what was extracted serves too, in a folder of the archive's
name or without. `val` is the test split: truths of the official one are not public.

The code that made MTAN's files is lost. That of its author's later Auto-Lambda
(`dataset/cityscapes_preprocess.py`) resizes images by Pillow's default, and truths by the nearest
pixel, which is done here, at the 128x256 pixels that LibMTL's table has. Disparity is p / 65535, 0
where it is unknown: MTAN's files hold 0 to 0.4922 where the archives hold 0 to 32257
(lorenmt/mtan, issue 25). The 19 classes are those that the official evaluation counts
(`cityscapesscripts/helpers/labels.py`), and the 7 are their categories.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int
from PIL import Image

from samjax.data.builders.members import Members
from samjax.data.dense import DenseSample, resize_nearest
from samjax.data.images import EncodedImage, read_image, read_labels
from samjax.tasks import IGNORE, Task

TASKS = (
    Task("segmentation_7", 7, "cross_entropy"),
    Task("segmentation_19", 19, "cross_entropy"),
    Task("disparity", 1, "masked_l1"),
)
# Height and width of samples.
SIZE = (128, 256)
# The kinds of files, by the folder in which they lie; and how their names end.
_KINDS = {
    "leftImg8bit": "_leftImg8bit.png",
    "gtFine": "_gtFine_labelIds.png",
    "disparity": "_disparity.png",
}
ARCHIVES = {kind: f"{kind}_trainvaltest.zip" for kind in _KINDS}
_SPLITS = {"train": "train", "test": "val"}
# The ids of the classes by category, of those that are evaluated. Their order is that of the 19.
_CATEGORIES = {
    "flat": (7, 8),  # road, sidewalk
    "construction": (11, 12, 13),  # building, wall, fence
    "object": (17, 19, 20),  # pole, traffic light, traffic sign
    "nature": (21, 22),  # vegetation, terrain
    "sky": (23,),
    "human": (24, 25),  # person, rider
    "vehicle": (26, 27, 28, 31, 32, 33),  # car, truck, bus, train, motorcycle, bicycle
}
_LAST_ID = 33
# Of 16 bits.
_BRIGHTEST = 65535
_SEVEN = np.full(_LAST_ID + 1, IGNORE, np.int32)
_NINETEEN = np.full(_LAST_ID + 1, IGNORE, np.int32)
for _label, _ids in enumerate(_CATEGORIES.values()):
    _SEVEN[list(_ids)] = _label
_NINETEEN[[own for ids in _CATEGORIES.values() for own in ids]] = np.arange(19)


def find_archives(folder: Path) -> dict[str, Path]:
    """Of each kind, its archive, or the folder that holds a folder of its name; what there is."""
    found = {}
    for kind, archive in ARCHIVES.items():
        places = (folder, folder / Path(archive).stem)
        extracted = [place for place in places if (place / kind).is_dir()]
        if extracted or (folder / archive).is_file():
            found[kind] = extracted[0] if extracted else folder / archive
    return found


class CityscapesArchives:
    """One split of the official archives, read by position, by one thread."""

    def __init__(self, places: Mapping[str, Path], split: str) -> None:
        """Lists files; reads none. `places` are those of `find_archives`.

        Raises ValueError for an archive that is broken, a split without images, and an image
        without a truth.
        """
        members = {kind: Members(place) for kind, place in places.items()}
        begin = f"leftImg8bit/{_SPLITS[split]}/"
        stems = [
            name.removesuffix(_KINDS["leftImg8bit"]).removeprefix("leftImg8bit/")
            for name in members["leftImg8bit"].names
            if name.startswith(begin) and name.endswith(_KINDS["leftImg8bit"])
        ]
        if not stems:
            raise ValueError(f"{places['leftImg8bit']} has no images in {begin}")
        for kind, ending in _KINDS.items():
            there = set(members[kind].names)
            missing = [stem for stem in stems if f"{kind}/{stem}{ending}" not in there]
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise ValueError(
                    f"{places[kind]} has no {kind}/{missing[0]}{ending}{more}: get "
                    f"{ARCHIVES[kind]} again"
                )
        self._members = members
        self._stems = stems
        self.names = tuple(Path(stem).name for stem in stems)

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.names)

    def __getitem__(self, index: int) -> DenseSample:
        """The sample at a position. Raises ValueError, naming the file, where it cannot be used."""
        image = read_image(self._file("leftImg8bit", index))
        labels = self._values("gtFine", index, image.shape[:2], _LAST_ID)
        disparity = self._values("disparity", index, image.shape[:2], _BRIGHTEST)
        truth = {
            "segmentation_7": _SEVEN[labels],
            "segmentation_19": _NINETEEN[labels],
            "disparity": disparity[..., None].astype(np.float32) / _BRIGHTEST,
        }
        small = Image.fromarray(image).resize(SIZE[::-1])
        return DenseSample(self.names[index], np.array(small), truth)

    def check_sizes(self) -> None:
        """Reads the first sample. Raises as reading does."""
        self[0]

    def image_file(self, index: int) -> EncodedImage:
        """The file of a sample's image, before it is resized."""
        return self._file("leftImg8bit", index)

    def _values(
        self, kind: str, index: int, size: tuple[int, int], highest: int
    ) -> Int[np.ndarray, "h w"]:
        """The values of a file, as large as samples are."""
        file = self._file(kind, index)
        values = read_labels(file)
        if values.shape != size:
            raise ValueError(f"{file} is {list(values.shape)}, and its image is {list(size)}")
        if values.max() > highest:
            raise ValueError(f"{file} has the value {values.max()}, above {highest}")
        return resize_nearest(values, SIZE)

    def _file(self, kind: str, index: int) -> EncodedImage:
        name = f"{kind}/{self._stems[index]}{_KINDS[kind]}"
        return EncodedImage(self._members[kind].read(name), self._members[kind].path(name))
