"""Where samples come from: a folder of images and masks, read at random by position.

Pairing is decided at construction from file names alone, so that a wrong folder fails at once and a
large one opens quickly; pixels are decoded when a sample is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Shaped, UInt8
from PIL import ExifTags, Image, ImageOps

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
SPLITS = ("train", "validation", "test")

_SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
_logger = logging.getLogger("samjax")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image with its truth: `image` holds RGB in [0, 255], `mask` is True on the object."""

    name: str
    image: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"]


@runtime_checkable
class Source(Protocol):
    """Anything that holds a fixed number of samples and reads them by position."""

    def __len__(self) -> int:
        """The number of samples."""

    def __getitem__(self, index: int) -> Sample:
        """The sample at a position in [0, len)."""


class FolderSource:
    """Images and masks with the same file stems under `root`.

    Two layouts are known: `root/{train,validation or val,test}/{images,masks}/`, and the flat
    `root/{images,masks}/`, which is split by `seed` into train, validation and test with
    `fractions`. The flat split depends on the stems, the seed and the fractions only; the hash that
    orders the stems is the same on every machine and with every version of numpy.

    Images become RGB: grey, palette, CMYK and bilevel files are converted, alpha is dropped, EXIF
    orientation is applied, and grey images of 16 bits become 8 bits as round(value / 257), whatever
    their own brightest pixel is. Masks become one boolean channel:

    - palette colours other than black, and whatever is not transparent, are the object;
    - one or two values, {0, 1}, {0, 255}, {0, x}: the object is where the value exceeds 0;
    - more values in a JPEG, or a grey image that is black and white but for one pixel in ten:
      lossy or blurred, the object is where the value exceeds 127 (a notice says so once);
    - otherwise a label image: the object is where the label exceeds 0 (one notice).

    Raises ValueError, naming the thing and the fix, for a missing folder, an unknown split, files
    without a partner, two files with one stem and an empty split; and on access for a file that
    cannot be decoded and for a mask that has not its image's size.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        seed: int = 0,
        fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    ) -> None:
        self.root = Path(root).expanduser()
        self.split = "validation" if split == "val" else split
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, but is {split!r}")
        folder, is_flat = _find_folder(self.root, self.split)
        images, masks = _list_images(folder / "images"), _list_images(folder / "masks")
        _check_pairs(folder, images, masks)
        names = sorted(images)
        if is_flat:
            names = _choose_split(self.root, names, self.split, seed, fractions)
        self.names: tuple[str, ...] = tuple(names)
        self._files = tuple((images[name], masks[name]) for name in names)
        self._notices: dict[str, object] = {}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        image_file, mask_file = self._files[index]
        image = read_image(image_file)
        mask, notice = read_mask(mask_file)
        _check_sizes(image_file, image.shape[1::-1], mask_file, mask.shape[::-1])
        if notice:
            self._notify_once(notice, mask_file)
        return Sample(self.names[index], image, mask)

    def check_sizes(self) -> None:
        """Raises ValueError for a mask that has not its image's size; reads headers only."""
        for image_file, mask_file in self._files:
            _check_sizes(image_file, _size(image_file), mask_file, _size(mask_file))

    def _notify_once(self, notice: str, file: Path) -> None:
        token = object()  # setdefault is atomic, so that two reading threads do not both speak
        if self._notices.setdefault(notice, token) is token:
            _logger.warning("%s %s (said once for %s)", file, notice, self.root)


def _check_sizes(
    image_file: Path, image_size: tuple[int, ...], mask_file: Path, mask_size: tuple[int, ...]
) -> None:
    """Sizes are (width, height)."""
    if image_size != mask_size:
        raise ValueError(
            f"the mask {mask_file} is {mask_size[0]}x{mask_size[1]} pixels (width x height), but "
            f"its image {image_file} is {image_size[0]}x{image_size[1]}: resize one to the other's "
            "size"
        )


def _size(file: Path) -> tuple[int, int]:
    """(width, height) after the EXIF orientation, from the header."""
    with _decoding(file), Image.open(file) as opened:
        turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        width, height = opened.size
        return (height, width) if turned else (width, height)


def read_image(file: Path) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an image file to RGB in [0, 255]; ValueError names a file that cannot be decoded."""
    image = _decode(file)
    if image.mode.startswith("I"):
        image = Image.fromarray(_sixteen_to_eight_bits(np.asarray(image), file))
    elif image.mode == "F":
        raise ValueError(f"{file} holds floating-point pixels: save it with 8 or 16 bits a channel")
    if "transparency" in image.info:
        image = image.convert(
            "RGBA"
        )  # Pillow warns where a transparent palette becomes RGB at once
    return np.array(image.convert("RGB"))


def read_mask(file: Path) -> tuple[Bool[np.ndarray, "h w"], str | None]:
    """Decodes a mask file by the rules of `FolderSource`; also returns the notice it deserves."""
    image = _decode(file)
    values, is_label_image = _mask_values(image)
    present = np.unique(values)
    is_binary = len(present) == 1 or (len(present) == 2 and present[0] == 0)
    if is_binary:
        # A JPEG of one value is the inside or the outside of an object, give or take an error.
        is_lossy = image.format == "JPEG" and len(present) == 1
        return (values > 127 if is_lossy else values > 0), None
    # Blurred edges aside, a mask in grey is black and white; labels are anything else.
    is_grey_mask = np.mean((values > 16) & (values < 239)) < 0.1 and present[-1] >= 239
    if is_label_image or (image.format != "JPEG" and not is_grey_mask):
        return values > 0, "is a label image: every label above 0 becomes the object"
    return values > 127, "is not binary (lossy compression?): it is thresholded at > 127"


def _decode(file: Path) -> Image.Image:
    """Loads a file with its EXIF orientation applied; the result keeps the file's `format`."""
    with _decoding(file), Image.open(file) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
        image.format = opened.format
        return image


@contextlib.contextmanager
def _decoding(file: Path) -> Iterator[None]:
    """Pillow's plugins raise many kinds of errors for broken files; each means the same."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{file} cannot be decoded as an image ({type(error).__name__}: {error}): "
            "replace it, or, in a dataset, remove it with its partner"
        ) from error


def _sixteen_to_eight_bits(
    values: Shaped[np.ndarray, "h w"], file: Path
) -> UInt8[np.ndarray, "h w"]:
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"{file} holds values from {values.min()} to {values.max()}, outside of 16 bits: "
            "save it with 8 or 16 bits a channel"
        )
    if values.max() < 4096:
        _notice_dark(file.parent)
    return np.round(values / 257).astype(np.uint8)


@functools.cache
def _notice_dark(folder: Path) -> None:
    _logger.warning(
        "%s holds 16-bit images that use 12 bits or less: they become nearly black; stretch them "
        "to the full range first",
        folder,
    )


def _mask_values(image: Image.Image) -> tuple[Shaped[np.ndarray, "h w"], bool]:
    """One value a pixel, and whether the file's mode says that the values are labels."""
    if image.mode.startswith("I") or image.mode == "F":
        return np.asarray(image), True
    if image.mode in ("1", "L") and "transparency" not in image.info:
        return np.asarray(image.convert("L")), False
    colours = np.asarray(image.convert("RGBA"))
    visible = colours[..., 3] > 0
    if not visible.all() and len(np.unique(colours[visible], axis=0)) <= 1:
        return visible, False  # one colour, maybe black, on a transparent ground
    # The brightest channel, since the luma of pure blue (29) would not pass a threshold.
    values = np.where(colours[..., 3] > 0, colours[..., :3].max(axis=-1), 0)
    is_grey = bool((colours[..., :1] == colours[..., :3]).all())
    return values, image.mode == "P" and not is_grey


def _find_folder(root: Path, split: str) -> tuple[Path, bool]:
    """The folder that holds `images` and `masks`, and whether it is yet to be split."""
    if not root.is_dir():
        raise ValueError(f"the data folder {root} does not exist")
    found = {
        name: root / name
        for folders in _SPLIT_FOLDERS.values()
        for name in folders
        if (root / name).is_dir()
    }
    is_flat = (root / "images").is_dir() or (root / "masks").is_dir()
    if found and is_flat:
        raise ValueError(
            f"{root} holds images or masks next to split folders ({', '.join(found)}): "
            "keep one of the two layouts"
        )
    if is_flat:
        return root, True
    if not found:
        raise ValueError(
            f"{root} holds neither images/ and masks/ nor folders named train, validation and test "
            "with these in them"
        )
    chosen = [found[name] for name in _SPLIT_FOLDERS[split] if name in found]
    if not chosen:
        raise ValueError(f"{root} has no split {split!r}, only {', '.join(found)}")
    if len(chosen) > 1:
        raise ValueError(f"{root} has both validation/ and val/: remove one of them")
    return chosen[0], False


def _list_images(folder: Path) -> dict[str, Path]:
    """Image files by stem; hidden files (such as the ._ files of macOS) do not count."""
    if not folder.is_dir():
        raise ValueError(f"the folder {folder} is missing: put the {folder.name} there")
    files: dict[str, Path] = {}
    duplicates = set()
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.suffix.lower() not in IMAGE_EXTENSIONS:
            continue
        if file.stem in files:
            duplicates.add(file.stem)
        files[file.stem] = file
    if duplicates:
        raise ValueError(
            f"{folder} has several files for {_quote(duplicates)}: keep one extension of each"
        )
    if not files:
        raise ValueError(f"{folder} holds no image files ({', '.join(IMAGE_EXTENSIONS)})")
    return files


def _check_pairs(folder: Path, images: dict[str, Path], masks: dict[str, Path]) -> None:
    complaints = [
        f"{have} without {want}: {_quote(stems)}"
        for have, want, stems in (
            ("images", "a mask", images.keys() - masks.keys()),
            ("masks", "an image", masks.keys() - images.keys()),
        )
        if stems
    ]
    if complaints:
        raise ValueError(
            f"{folder} has {' and '.join(complaints)}; an image and its mask must have the same "
            "name up to the extension"
        )


def _quote(stems: Iterable[str]) -> str:
    stems = sorted(stems)
    more = f" and {len(stems) - 3} more" if len(stems) > 3 else ""
    return ", ".join(repr(stem) for stem in stems[:3]) + more


def _choose_split(
    root: Path, names: list[str], split: str, seed: int, fractions: tuple[float, float, float]
) -> list[str]:
    """The names of one split of a flat folder, sorted."""
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1.0) > 1e-6:
        raise ValueError(
            "fractions must be three shares that are not negative and sum to 1 "
            f"(train, validation, test), but are {fractions}"
        )
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    # Rounded at the borders, so that the three splits always partition the folder.
    borders = [round(len(names) * share) for share in (0, *np.cumsum(fractions[:2]).tolist(), 1)]
    index = SPLITS.index(split)
    chosen = sorted(order[borders[index] : borders[index + 1]])
    if not chosen:
        raise ValueError(
            f"the split {split!r} of {root} is empty: its share of {len(names)} images is "
            f"{fractions[index]}; raise it in fractions or add images"
        )
    return chosen
