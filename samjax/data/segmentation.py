"""COCO's segmentations as masks: polygons, and run lengths in both of COCO's notations.

pycocotools fills the polygons, so that their edges are COCO's own. It takes what it is given on
trust: a coordinate that is NaN or far outside makes it ask for all memory, four numbers mean a box,
and of run lengths that end too early the rest of the mask is whatever lay in memory. Therefore
everything is checked first, and the run lengths are expanded here.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Bool, Int


def pycocotools_mask() -> ModuleType:
    """pycocotools' mask module. Raises RuntimeError where it is not installed."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise RuntimeError(
            f"polygons in COCO data need pycocotools ({error}): pip install 'samjax[coco]'"
        ) from None
    return mask


def is_polygons(segmentation: Any) -> bool:
    """Whether a segmentation is a list of polygons rather than run lengths."""
    return isinstance(segmentation, list)


def fault_of(segmentation: Any, height: int, width: int) -> str | None:
    """What is wrong with a segmentation of an image, said so that "it" is the annotation; or None.

    Quick, so that a whole dataset can be checked when it is opened; the characters of compressed
    run lengths are left to `run_lengths`.
    """
    if not segmentation:
        return "has no segmentation, maybe only a box: give it a polygon or run lengths"
    if is_polygons(segmentation):
        return next(filter(None, (_polygon_fault(p, height, width) for p in segmentation)), None)
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return "has a segmentation that is neither a list of polygons nor {size, counts}"
    if segmentation["size"] != [height, width]:
        return (
            f"has run lengths of size {segmentation['size']} (height, width), but its image is "
            f"{[height, width]}"
        )
    counts = segmentation["counts"]
    if isinstance(counts, str):
        return None
    if not isinstance(counts, list) or not {*map(type, counts)} <= {int}:
        return "has run lengths that are neither a string nor a list of whole numbers"
    if min(counts, default=0) < 0:
        return "has run lengths below 0"
    return _total_fault(sum(counts), height, width)


def run_lengths(counts: str | list[int], height: int, width: int) -> Int[np.ndarray, " n"]:
    """The pixels of each run, first outside, then inside the object, column by column.

    Strings are COCO's compression: each character holds five bits of a number, lowest first, and
    whether more follow; from the fourth number on, what is written is the difference to the number
    two before. Raises ValueError, said of "it", where they are no run lengths of this size.
    """
    if isinstance(counts, list):
        return np.array(counts, np.int64)
    unreadable = ValueError("has compressed run lengths that cannot be read")
    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise unreadable
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    places = 5 * (np.arange(len(codes)) - np.repeat(starts, ends - starts + 1))
    if places.max() > 40:  # no image has so many pixels
        raise unreadable
    lengths = np.add.reduceat((codes & 31) << places, starts)
    # The highest bit written is the sign.
    lengths -= np.where(codes[ends] & 16, 32 << places[ends], 0)
    lengths[1::2] = np.cumsum(lengths[1::2])
    lengths[2::2] = np.cumsum(lengths[2::2])
    if lengths.min() < 0:
        raise unreadable
    if fault := _total_fault(int(lengths.sum()), height, width):
        raise ValueError(fault)
    return lengths


def decode(segmentation: Any, height: int, width: int) -> Bool[np.ndarray, "h w"]:
    """The mask of a segmentation in which `fault_of` finds no fault; ValueError as `run_lengths`.

    A pixel is inside where pycocotools' own decoding says so; the union where there are several
    polygons.
    """
    if is_polygons(segmentation):
        mask = pycocotools_mask()
        merged = mask.merge(mask.frPyObjects(segmentation, height, width))
        counts = merged["counts"].decode()
    else:
        counts = segmentation["counts"]
    lengths = run_lengths(counts, height, width)
    inside = np.arange(len(lengths)) % 2 == 1
    return np.ascontiguousarray(np.repeat(inside, lengths).reshape(width, height).T)


def encode(mask: Bool[np.ndarray, "h w"]) -> dict[str, list[int]]:
    """The run lengths of a mask, {size, counts}, which `decode` turns into it again."""
    columns = mask.T.ravel()
    borders = np.flatnonzero(columns[1:] != columns[:-1]) + 1
    counts = np.diff([0, *borders, columns.size]).tolist()
    # The first run is outside.
    return {"size": list(mask.shape), "counts": [0, *counts] if columns[0] else counts}


def _polygon_fault(polygon: Any, height: int, width: int) -> str | None:
    if not isinstance(polygon, list) or not {*map(type, polygon)} <= {int, float}:
        return "has a polygon that is no list of numbers"
    if len(polygon) % 2 or len(polygon) < 6:
        return (
            f"has a polygon of {len(polygon)} numbers: it takes x and y of at least 3 points; "
            "correct or remove it"
        )
    reach = max(height, width)
    # NaN compares as it likes, but a sum is finite only where every number is.
    if min(polygon) < -reach or max(polygon) > 2 * reach or not math.isfinite(sum(polygon)):
        return f"has a polygon far outside of its image of {width}x{height} pixels"
    return None


def _total_fault(total: int, height: int, width: int) -> str | None:
    if total == height * width:
        return None
    return (
        f"has run lengths of {total} pixels, but its image has {height * width}: they are cut off, "
        "or of another size"
    )
