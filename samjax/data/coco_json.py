"""COCO's JSON as records: what fits together, and in a sentence each what does not."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Bool

from samjax.data import segmentation


@dataclasses.dataclass(frozen=True, slots=True)
class Annotation:
    """One object: `segmentation` is a list of polygons, or {size, counts} with run lengths."""

    id: int | str
    category: int | str | None
    is_crowd: bool
    segmentation: Any


@dataclasses.dataclass(frozen=True, slots=True)
class CocoImage:
    """An image with its annotations; `name` is unique, `file` the path that the JSON gives.

    The name is for people: it depends on the other images, while the file is the image's own.
    """

    name: str
    file: str
    height: int
    width: int
    annotations: tuple[Annotation, ...]


@dataclasses.dataclass(frozen=True)
class Coco:
    """What is well in a JSON, and what is wrong with the rest, which is left out."""

    path: Path
    images: tuple[CocoImage, ...]
    # Names and ids, in order; several categories may have one name.
    categories: tuple[tuple[str, int | str], ...]
    faults: tuple[str, ...]

    def check(self) -> None:
        """Raises ValueError where something is wrong."""
        if self.faults:
            more = f" ({len(self.faults) - 1} more: `samjax check-data`)" if self.faults[1:] else ""
            raise ValueError(f"in {self.path} {self.faults[0]}{more}")


def category_ids(
    names: Sequence[str], categories: Sequence[tuple[str, int | str]], where: str | Path
) -> frozenset[int | str]:
    """The ids of the categories that go by `names`, of those that there are: names and ids.

    Raises ValueError, which calls the data `where`, for an unknown name.
    """
    known = dict.fromkeys(name for name, _ in categories)
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            hint = f"the nearest is {nearest[0]!r}" if nearest else "it names no categories"
            raise ValueError(f"{where} has no category {name!r}; {hint}")
    return frozenset(id for name, id in categories if name in names)


def union(
    annotations: Sequence[Annotation], shape: tuple[int, int], path: Path, file: str
) -> Bool[np.ndarray, "h w"]:
    """The union of annotations of an image of (height, width) `shape`.

    Raises ValueError, which calls the JSON `path` and the image `file`, where one cannot be
    decoded.
    """
    mask = np.zeros(shape, bool)
    for annotation in annotations:
        with _naming(annotation, path, file):
            mask |= segmentation.decode(annotation.segmentation, *shape)
    return mask


def check_run_lengths(
    annotations: Sequence[Annotation], shape: tuple[int, int], path: Path, file: str
) -> None:
    """Raises ValueError as `union` where compressed run lengths have not the image's size."""
    for annotation in annotations:
        if not segmentation.is_polygons(annotation.segmentation):
            with _naming(annotation, path, file):
                segmentation.run_lengths(annotation.segmentation["counts"], *shape)


@contextlib.contextmanager
def _naming(annotation: Annotation, path: Path, file: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"in {path} annotation {annotation.id} of {file!r} {error}") from None


def read_coco(path: Path) -> Coco:
    """Reads a COCO JSON without looking at images; raises ValueError as `parse_coco`."""
    return parse_coco(path.read_bytes(), path)


def parse_coco(content: bytes, path: Path) -> Coco:
    """What a COCO JSON says, which messages call `path`.

    Raises ValueError for what is no JSON, or no COCO JSON, or lists no images; what is wrong
    with single images and annotations is collected in the result.
    """
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(data, dict) or not all(
        isinstance(data.get(key), list) for key in ("images", "annotations")
    ):
        raise ValueError(f"{path} is no COCO JSON: it needs the lists 'images' and 'annotations'")
    if not data["images"]:
        raise ValueError(f"{path} lists no images")
    faults: list[str] = []
    entries = _check_images(data["images"], faults)
    categories = _check_categories(data.get("categories", []), faults)
    ids = frozenset(id for _, id in categories)
    annotations = _check_annotations(data["annotations"], entries, ids, faults)
    names = _names([entry["file_name"] for entry in entries.values()])
    images = tuple(
        CocoImage(name, entry["file_name"], entry["height"], entry["width"], tuple(annotations[id]))
        for name, (id, entry) in zip(names, entries.items(), strict=True)
    )
    return Coco(path, images, categories, tuple(faults))


def _check_images(images: list[Any], faults: list[str]) -> dict[int | str, dict[str, Any]]:
    """The entries of the images that are well, by id."""
    entries: dict[int | str, dict[str, Any]] = {}
    files: set[str] = set()
    for position, entry in enumerate(images):
        if not isinstance(entry, dict) or not _is_id(entry.get("id")):
            faults.append(f"image {position} of the list has no id")
        elif not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
            faults.append(f"image {entry['id']} has no file_name")
        elif not all(
            type(entry.get(side)) is int and entry[side] > 0 for side in ("height", "width")
        ):
            faults.append(f"image {entry['file_name']!r} has no height and width above 0")
        elif entry["id"] in entries or entry["file_name"] in files:
            faults.append(f"image {entry['file_name']!r} (id {entry['id']}) is listed twice")
        else:
            entries[entry["id"]] = entry
            files.add(entry["file_name"])
    return entries


def _check_categories(categories: Any, faults: list[str]) -> tuple[tuple[str, int | str], ...]:
    """The names and ids of the categories that are well; a JSON need not have any."""
    valid: list[tuple[str, int | str]] = []
    for position, entry in enumerate(categories if isinstance(categories, list) else []):
        if (
            isinstance(entry, dict)
            and isinstance(entry.get("name"), str)
            and _is_id(entry.get("id"))
        ):
            valid.append((entry["name"], entry["id"]))
        else:
            faults.append(f"category {position} of the list has no name and id")
    return tuple(valid)


def _check_annotations(
    annotations: list[Any],
    images: dict[int | str, dict[str, Any]],
    categories: frozenset[int | str],
    faults: list[str],
) -> dict[int | str, list[Annotation]]:
    """The annotations that are well, by the id of their image.

    Where there are categories, each must have one: without, it would be of none of the classes that
    a user names, and be left out unseen.
    """
    found: dict[int | str, list[Annotation]] = {id: [] for id in images}
    seen: set[int | str] = set()
    for position, entry in enumerate(annotations):
        if not isinstance(entry, dict) or not _is_id(entry.get("id")):
            faults.append(f"annotation {position} of the list has no id")
            continue
        id, image_id = entry["id"], entry.get("image_id")
        if id in seen:
            faults.append(f"annotation {id} is listed twice")
            continue
        seen.add(id)
        if not _is_id(image_id) or image_id not in images:
            faults.append(
                f"annotation {id} points to image {image_id!r}, which is not among the images"
            )
            continue
        image = images[image_id]
        shape = entry.get("segmentation")
        fault = segmentation.fault_of(shape, image["height"], image["width"])
        if fault:
            faults.append(f"annotation {id} of {image['file_name']!r} {fault}")
            continue
        category = entry.get("category_id")
        category = category if _is_id(category) else None
        if categories and category not in categories:
            faults.append(
                f"annotation {id} of {image['file_name']!r} has the category_id "
                f"{json.dumps(entry.get('category_id'))}, which is no category's id"
            )
            continue
        found[image_id].append(Annotation(id, category, bool(entry.get("iscrowd")), shape))
    return found


def _is_id(value: Any) -> bool:
    return type(value) in (int, str)


def _names(files: list[str]) -> list[str]:
    """Paths without their extensions, or, where these are not unique, with them."""
    stems = [str(PurePosixPath(file).with_suffix("")) for file in files]
    return stems if len(set(stems)) == len(stems) else files
