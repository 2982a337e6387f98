"""Image files as arrays: pictures as RGB, masks as booleans, label images as integers.

All files go through `_decode`, so that EXIF orientation, errors and zero sizes mean the same for
each. Pictures: grey, palette, CMYK and bilevel files are converted, alpha is dropped, and grey
images of 16 bits become 8 bits as round(value / 257), whatever their own brightest pixel is.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")

_logger = logging.getLogger("samjax")


class EncodedImage(io.BytesIO):
    """The bytes of an image file that lies in another file; messages call it by `path`."""

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(data)
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    @property
    def parent(self) -> Path:
        """The folder by which messages call it."""
        return self._path.parent


ImageFile = Path | EncodedImage

LABELLED = "is a label image: every label above 0 becomes the object"
SOFT = "is not binary (lossy compression?): it is thresholded at > 127"


class Notices:
    """What there is to know of the masks of a source, said once each; threads may speak at once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._said: dict[str, object] = {}

    def say(self, notice: str | None, file: ImageFile) -> None:
        """Logs a notice on a file, where it is the first of its kind."""
        token = object()  # setdefault is atomic, so that two threads do not both speak
        if notice and self._said.setdefault(notice, token) is token:
            _logger.warning("%s %s (said once for %s)", file, notice, self._root)


def read_image(file: ImageFile) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an image file to RGB in [0, 255]; ValueError names a file that cannot be decoded."""
    image = _decode(file)
    if image.mode.startswith("I"):
        image = Image.fromarray(_sixteen_to_eight_bits(np.asarray(image), file))
    elif image.mode == "F":
        raise ValueError(f"{file} holds floating-point pixels: save it with 8 or 16 bits a channel")
    if "transparency" in image.info:
        # Pillow warns where a transparent palette becomes RGB at once.
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def read_mask(
    file: ImageFile, threshold: int | None = None
) -> tuple[Bool[np.ndarray, "h w"], str | None]:
    """Decodes a mask file to one boolean channel, and says what a user should know about it.

    - Palette colours other than black, and whatever is not transparent, are the object.
    - One or two values, {0, 1}, {0, 255}, {0, x}: the object is where the value exceeds 0.
    - More values in a JPEG, or a grey image that is black and white but for one pixel in ten:
      lossy or blurred, the object is where the value exceeds 127, and the notice is `SOFT`.
    - Otherwise a label image: the object is where the label exceeds 0, the notice `LABELLED`.

    Grey of 16 bits that exceeds 255 counts as value / 257. With a `threshold`, which a dataset may
    tell, nothing is guessed: the object is where grey exceeds it, or where coloured palettes are
    not black.
    """
    image = _decode(file)
    values, is_label_image = _mask_values(image)
    if threshold is not None:
        return values > (0 if image.mode == "P" and is_label_image else threshold), None
    present = np.unique(values)
    is_binary = len(present) == 1 or (len(present) == 2 and present[0] == 0)
    if is_binary:
        # A JPEG of one value is the inside or the outside of an object, give or take an error.
        is_lossy = image.format == "JPEG" and len(present) == 1
        return (values > 127 if is_lossy else values > 0), None
    # Blurred edges aside, a mask in grey is black and white; labels are anything else, such as low
    # ones and 255 for void: no blur leaves out all values between the two.
    is_grey_mask = (
        np.mean((values > 16) & (values < 239)) < 0.1
        and present[-1] >= 239
        and bool(np.any((present > 16) & (present < 255)))
    )
    if is_label_image or (image.format != "JPEG" and not is_grey_mask):
        return values > 0, LABELLED
    return values > 127, SOFT


def read_labels(file: ImageFile) -> Int[np.ndarray, "h w"]:
    """Decodes a label image: grey values or palette indices as they are, none below 0.

    Raises ValueError for what cannot hold labels: JPEG, colours, floating point, negative values.
    """
    image = _decode(file)
    if image.format == "JPEG":
        raise ValueError(f"{file} is a JPEG, which changes labels: save label images as PNG")
    if image.mode == "1" or image.mode == "L" or image.mode == "P" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int32)
        if values.min() < 0:
            raise ValueError(f"{file} holds the label {values.min()}: labels must not be negative")
        return values
    if image.mode in ("LA", "RGB", "RGBA"):
        colours = np.asarray(image.convert("RGBA"))
        if (colours[..., :1] == colours[..., :3]).all():
            return np.where(colours[..., 3] > 0, colours[..., 0], 0).astype(np.int32)
    raise ValueError(
        f"{file} holds colours or fractions (mode {image.mode}), not labels: save it with one "
        "channel of 8 or 16 bits"
    )


def image_size(file: ImageFile) -> tuple[int, int]:
    """(height, width) after the EXIF orientation, from the header; ValueError as `read_image`."""
    with _decoding(file), Image.open(file) as opened:
        turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        width, height = opened.size
        return (width, height) if turned else (height, width)


def _decode(file: ImageFile) -> Image.Image:
    """Loads a file with its EXIF orientation applied; the result keeps the file's `format`."""
    with _decoding(file), Image.open(file) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
        image.format = opened.format
        return image


@contextlib.contextmanager
def _decoding(file: ImageFile) -> Iterator[None]:
    """Pillow's plugins raise many kinds of errors for broken files; each means the same."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{file} cannot be decoded as an image ({_reason(file, error)}): replace it, or, in a "
            "dataset, remove it with its partner"
        ) from error


def _reason(file: ImageFile, error: Exception) -> str:
    if not isinstance(error, UnidentifiedImageError):
        return f"{type(error).__name__}: {error}"
    size = file.getbuffer().nbytes if isinstance(file, EncodedImage) else file.stat().st_size
    return "it is in no format that Pillow knows" if size else "it is empty"


def _sixteen_to_eight_bits(
    values: Shaped[np.ndarray, "h w"], file: ImageFile
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
    if image.mode == "F":
        return np.asarray(image), True
    if image.mode.startswith("I"):
        values = np.asarray(image)
        # What does not exceed 8 bits is labels, of which a file of 16 bits may have few.
        return (values / 257, False) if values.max() > 255 else (values, True)
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
