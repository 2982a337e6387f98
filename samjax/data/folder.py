"""A folder of images and masks as a source, and how such folders are laid out.

Two layouts are known: `ROOT/{train,validation,test}/{images,masks}/` (validation may be called val
or valid), and the flat `ROOT/{images,masks}/`, which is split by seed. Label images (see
`samjax.data.labels`) lie in `labels/` instead of `masks/`. An image and its mask have the same name
up to the extension.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from samjax.data.images import IMAGE_EXTENSIONS, Notices, image_size, read_image, read_mask
from samjax.data.sources import Sample
from samjax.data.splits import (
    DEFAULT_FRACTIONS,
    Fractions,
    check_split,
    choose_one,
    draw_split,
    quote,
    split_folders,
)
from samjax.data.walk import walk

MASKS = "masks"
LABELS = "labels"


@dataclasses.dataclass(frozen=True)
class Pair:
    """The files of an image and of its truth: a mask, or a label image."""

    name: str
    image: Path
    truth: Path


@dataclasses.dataclass(frozen=True)
class Listing:
    """What lies in one folder: files that belong together by name, and those that do not."""

    folder: Path
    pairs: tuple[Pair, ...]
    # What is wrong, such as "images without a mask", and which files it is wrong of; often empty.
    faults: dict[str, tuple[Path, ...]]

    def check(self) -> None:
        """Raises ValueError where a file has no partner or more than one."""
        if self.faults:
            kinds = (
                f"{kind}: {quote(f.name for f in files)}" for kind, files in self.faults.items()
            )
            raise ValueError(
                f"{self.folder} has {' and '.join(kinds)}; an image and its mask must have the "
                "same name up to the extension (`samjax check-data` lists all)"
            )


class FolderSource:
    """Images and masks with the same file stems under `root`.

    Pairing is decided at construction from file names alone. Images become RGB as
    `samjax.data.images.read_image` tells, and masks become one boolean channel as `read_mask` does,
    whose notices are logged once for a source.

    Raises ValueError, naming the thing and the fix, for a missing folder, an unknown split, files
    without a partner, two files with one stem and an empty split; and on access for a file that
    cannot be decoded and for a mask that has not its image's size.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        seed: int = 0,
        fractions: Fractions = DEFAULT_FRACTIONS,
    ) -> None:
        self._root = Path(root).expanduser()
        self._pairs = open_pairs(self._root, split, seed, fractions, (MASKS,))
        self.names: tuple[str, ...] = tuple(pair.name for pair in self._pairs)
        self._notices = Notices(self._root)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Sample:
        pair = self._pairs[index]
        image = read_image(pair.image)
        mask, notice = read_mask(pair.truth)
        check_pair(pair, image.shape[:2], mask.shape)
        self._notices.say(notice, pair.truth)
        return Sample(pair.name, image, mask)

    def check_sizes(self) -> None:
        """Raises ValueError for a mask that has not its image's size; reads headers only."""
        check_pairs(self._pairs)

    def image_file(self, index: int) -> Path:
        """The file of a sample's image."""
        return self._pairs[index].image


def check_pair(pair: Pair, image: tuple[int, ...], truth: tuple[int, ...]) -> None:
    """Raises ValueError where the sizes (height, width) of a pair differ."""
    if image != truth:
        raise ValueError(
            f"the mask {pair.truth} is {truth[1]}x{truth[0]} pixels (width x height), but its "
            f"image {pair.image} is {image[1]}x{image[0]}: resize one to the other's size"
        )


def check_pairs(pairs: Sequence[Pair]) -> None:
    """`check_pair` from the files' headers."""

    def check(pair: Pair) -> None:
        check_pair(pair, image_size(pair.image), image_size(pair.truth))

    for _ in walk(check, pairs, "checking sizes"):
        pass


def open_pairs(
    root: Path, split: str, seed: int, fractions: Fractions, kinds: Sequence[str]
) -> tuple[Pair, ...]:
    """The pairs of one split, sorted by name. `kinds` are the folders that the truth may lie in.

    Raises ValueError where they cannot be had, or a file has no partner.
    """
    split = check_split(split)
    folder, is_flat = find_folder(root, split)
    listing = list_folder(folder, kinds)
    listing.check()
    if not is_flat:
        return listing.pairs
    pairs = {pair.name: pair for pair in listing.pairs}
    return tuple(pairs[name] for name in draw_split(root, list(pairs), split, seed, fractions))


def find_folder(root: Path, split: str) -> tuple[Path, bool]:
    """The folder that holds a split's `images`, and whether it holds all splits at once."""
    if not root.is_dir():
        raise ValueError(f"the data folder {root} does not exist")
    found = split_folders(root)
    flat = [name for name in ("images", MASKS, LABELS) if (root / name).is_dir()]
    if found and flat:
        folders = ", ".join(path.name for paths in found.values() for path in paths)
        raise ValueError(
            f"{root} holds {' and '.join(flat)} next to split folders ({folders}): keep one of the "
            "two layouts"
        )
    if flat:
        return root, True
    if not found:
        raise ValueError(
            f"{root} holds neither images/ and masks/, nor folders named train, validation and "
            "test with these in them, nor COCO annotations"
        )
    return choose_one(root, split, found), False


def has_masks(root: Path) -> bool:
    """Whether there are folders for truths as images, so that a JSON beside them is a trifle."""
    return _has(root, MASKS) or has_labels(root)


def has_labels(root: Path) -> bool:
    """Whether the truths are label images by the name of their folder."""
    return _has(root, LABELS)


def _has(root: Path, name: str) -> bool:
    folders = [root, *(path for paths in split_folders(root).values() for path in paths)]
    return any((folder / name).is_dir() for folder in folders)


def list_folder(folder: Path, kinds: Sequence[str] = (MASKS, LABELS)) -> Listing:
    """Pairs files by stem. Raises ValueError for a folder that is missing or without images."""
    images = list_images(folder / "images")
    return Listing(folder, *match(images, list_images(_truth_folder(folder, kinds))))


def match(
    images: Mapping[str, list[Path]], truths: Mapping[str, list[Path]]
) -> tuple[tuple[Pair, ...], dict[str, tuple[Path, ...]]]:
    """The pairs among files by name, sorted, and the files that have not one partner, by fault."""
    faults = {
        "images without a mask": [f for name in images.keys() - truths for f in images[name]],
        "masks without an image": [f for name in truths.keys() - images for f in truths[name]],
        "several files of one name": [
            file
            for files in (*images.values(), *truths.values())
            if len(files) > 1
            for file in files
        ],
    }
    pairs = tuple(
        Pair(name, images[name][0], truths[name][0])
        for name in sorted(images.keys() & truths.keys())
        if len(images[name]) == len(truths[name]) == 1
    )
    return pairs, {kind: tuple(sorted(files)) for kind, files in faults.items() if files}


def _truth_folder(folder: Path, kinds: Sequence[str]) -> Path:
    if all((folder / kind).is_dir() for kind in (MASKS, LABELS)):
        raise ValueError(f"{folder} holds both {MASKS}/ and {LABELS}/: keep one of them")
    usual = MASKS if MASKS in kinds else LABELS
    return next((folder / kind for kind in kinds if (folder / kind).is_dir()), folder / usual)


def list_images(folder: Path, skip: str | None = None, suffix: str = "") -> dict[str, list[Path]]:
    """Image files by stem; hidden files (such as the ._ files of macOS) do not count.

    Neither do stems that end in `skip`. Where stems end in `suffix`, it is no part of the name.
    Raises ValueError for a folder that is missing or without images.
    """
    if not folder.is_dir():
        raise ValueError(f"the folder {folder} is missing: put the {folder.name} there")
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        is_image = not file.name.startswith(".") and file.suffix.lower() in IMAGE_EXTENSIONS
        if is_image and not (skip and file.stem.endswith(skip)):
            files.setdefault(file.stem.removesuffix(suffix), []).append(file)
    if not files:
        raise ValueError(f"{folder} holds no image files ({', '.join(IMAGE_EXTENSIONS)})")
    return files
