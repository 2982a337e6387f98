"""What the builders of datasets with label images share: pairing, and checking classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Int
from PIL import ExifTags, Image

from samjax.data.builders.members import Members
from samjax.data.images import IMAGE_EXTENSIONS, EncodedImage, image_size
from samjax.data.labels import VOID, present_labels
from samjax.data.splits import quote

# How a JPEG begins, and the second byte of the marker after which its pixels are.
_JPEG, _SCAN = b"\xff\xd8", 0xDA


def pair(members: Members, images: str, truths: str, ending: str) -> dict[str, tuple[str, str]]:
    """The image files of a folder and their truths by name; a truth is called name + `ending`.

    Raises ValueError where there are no images, two of one name, or one of a pair is missing.
    """
    inside = [PurePosixPath(file) for file in members.names]
    files = [
        file
        for file in inside
        if str(file.parent) == images and file.suffix.lower() in IMAGE_EXTENSIONS
    ]
    if not files:
        raise ValueError(f"{members.path(images)} holds no images: get it, or all of it, anew")
    found = {file.stem: str(file) for file in files}
    if twice := {str(file) for file in files}.difference(found.values()):
        raise ValueError(f"{members.path(images)} has two images of the names of {quote(twice)}")
    pairs = {name: (file, f"{truths}/{name}{ending}") for name, file in found.items()}
    check_present(members, [truth for _, truth in pairs.values()], members.path(images))
    given = {str(file) for file in inside if str(file.parent) == truths}
    extra = given.difference(truth for _, truth in pairs.values())
    if extra := {truth for truth in extra if truth.endswith(ending)}:
        raise ValueError(f"{members.path(images)} lacks the images of {quote(extra)}: get it anew")
    return pairs


def check_present(members: Members, needed: Sequence[str], needs: Path) -> None:
    """Raises ValueError where files that `needs` needs are missing."""
    if missing := set(needed).difference(members.names):
        raise ValueError(
            f"{members.path('')} lacks {quote(missing)}, which {needs} needs: get it anew"
        )


def image_as_stored(members: Members, name: str) -> EncodedImage:
    """An image file whose pixels are shown as they are stored: a JPEG loses its EXIF orientation.

    For datasets whose masks are of the stored pixels, as their authors' reader takes them. Raises
    ValueError, naming it, for a file that is no image.
    """
    image = members.image(name)
    image_size(image)
    with Image.open(image) as opened:
        is_turned = opened.getexif().get(ExifTags.Base.Orientation, 1) != 1
    content = image.getvalue()
    if not (is_turned and content.startswith(_JPEG)):
        return image
    kept, place = bytearray(_JPEG), len(_JPEG)
    while content[place + 1] != _SCAN:
        end = place + 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        if content[place + 4 : place + 10] != b"Exif\0\0":
            kept += content[place:end]
        place = end
    return EncodedImage(bytes(kept + content[place:]), members.path(name))


def check_files_match(image: EncodedImage, truth: EncodedImage) -> None:
    """Raises ValueError where an image and its truth differ in size; reads headers only."""
    one, other = image_size(image), image_size(truth)
    if one != other:
        raise ValueError(
            f"{truth} is {other[1]}x{other[0]} pixels (width x height), but its image {image} is "
            f"{one[1]}x{one[0]}: get both anew"
        )


def classes_of(
    labels: Int[np.ndarray, "h w"], classes: Sequence[str], file: EncodedImage
) -> tuple[int, ...]:
    """The classes that a label image holds, without the background and void.

    Raises ValueError, which names the file, for a class that there is not.
    """
    present = tuple(label for label in present_labels(labels) if label != VOID)
    if present and present[-1] >= len(classes):
        raise ValueError(
            f"{file} holds the class {present[-1]}, but classes are 0 to {len(classes) - 1}, and "
            f"{VOID} where a pixel does not count: get it anew"
        )
    return present
