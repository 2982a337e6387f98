"""COCO's segmentations, against pycocotools and masks drawn by hand."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from samjax.data.segmentation import decode, encode, fault_of, run_lengths

# pycocotools 2.0.11 with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HEIGHT, WIDTH = 30, 40


def ann_to_mask(segmentation, height=HEIGHT, width=WIDTH):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
    coco.imgs = {1: {"id": 1, "height": height, "width": width}}
    return coco.annToMask({"image_id": 1, "segmentation": segmentation}).astype(bool)


def compress(mask):
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def uncompressed(mask):
    flat = mask.T.ravel().astype(int)
    borders = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *borders, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


@pytest.mark.parametrize(
    "polygons",
    [
        [[3, 4, 20, 4, 20, 25, 3, 25]],
        [[1.5, 2.25, 30.75, 8.5, 12.0, 28.9]],
        [[2, 2, 10, 2, 10, 10, 2, 10], [20, 15, 35, 15, 27, 28]],
        [[2, 2, 20, 2, 20, 20, 2, 20], [10, 10, 35, 10, 35, 28, 10, 28]],
        [[-8, -8, 60, -8, 60, 50, 20, 50]],
        [[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]],
    ],
    ids=["box", "fractions", "apart", "overlapping", "outside", "tiny"],
)
def test_polygons_are_those_of_pycocotools(polygons):
    assert fault_of(polygons, HEIGHT, WIDTH) is None
    np.testing.assert_array_equal(decode(polygons, HEIGHT, WIDTH), ann_to_mask(polygons))


def test_a_polygon_by_hand():
    expected = np.zeros((6, 8), bool)
    expected[1:4, 2:7] = True
    np.testing.assert_array_equal(decode([[2, 1, 7, 1, 7, 4, 2, 4]], 6, 8), expected)


def test_run_lengths_by_hand():
    # Down the columns: two outside, three inside, one outside; then three inside.
    expected = np.array([[0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 0, 0]], bool)
    counts = [2, 2, 1, 1, 2, 3, 1]
    np.testing.assert_array_equal(decode({"size": [4, 3], "counts": counts}, 4, 3), expected)
    np.testing.assert_array_equal(decode(compress(expected), 4, 3), expected)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 1.0])
def test_both_notations_of_random_masks(share):
    rng = np.random.default_rng(int(share * 100))
    for height, width in [(1, 1), (1, 50), (50, 1), (37, 53), (200, 300)]:
        mask = rng.random((height, width)) < share
        for segmentation in (compress(mask), uncompressed(mask)):
            assert fault_of(segmentation, height, width) is None
            np.testing.assert_array_equal(decode(segmentation, height, width), mask)
            np.testing.assert_array_equal(ann_to_mask(segmentation, height, width), mask)


@pytest.mark.parametrize(
    ("segmentation", "fault"),
    [
        ([], "maybe only a box"),
        (None, "maybe only a box"),
        ("polygon", "neither a list of polygons nor"),
        ({"counts": [1200]}, "neither a list of polygons nor"),
        ([[1, 1, 5, 5]], "polygon of 4 numbers"),  # to pycocotools a box
        ([[1, 1, 5, 5, 9]], "polygon of 5 numbers"),
        ([[1, 1, 9, 1, 9, 9], [4, 4]], "polygon of 2 numbers"),
        ([1, 1, 9, 1, 9, 9], "no list of numbers"),
        ([[1, 1, 9, "1", 9, 9]], "no list of numbers"),
        ([[1, 1, 9, 1, 9, float("nan")]], "far outside"),
        ([[1, 1, 9, 1, 9, float("inf")]], "far outside"),
        ([[1, 1, 9, 1, 9, 1e9]], "far outside"),  # pycocotools would take all memory
        ([[1, 1, 9, 1, 9, 10**400]], "far outside"),
        ({"size": [40, 30], "counts": [1200]}, "of size [40, 30] (height, width), but"),
        ({"size": [30, 40], "counts": [1000, 100]}, "of 1100 pixels, but its image has 1200"),
        ({"size": [30, 40], "counts": [-1, 1201]}, "below 0"),
        ({"size": [30, 40], "counts": [0.5, 1199.5]}, "neither a string nor"),
        ({"size": [30, 40], "counts": None}, "neither a string nor"),
    ],
)
def test_faults_are_named(segmentation, fault):
    assert fault in (fault_of(segmentation, HEIGHT, WIDTH) or "")


@pytest.mark.parametrize("counts", ["", "\x01", "é", "zzzz", "o", "oooooooooooooooooooo0"])
def test_what_are_no_compressed_run_lengths(counts):
    with pytest.raises(ValueError, match="cannot be read"):
        run_lengths(counts, 4, 3)


def test_run_lengths_of_another_size():
    """pycocotools returns whatever lay in memory where they end too early."""
    counts = compress(np.eye(10, dtype=bool))["counts"]
    for wrong in (counts[:-1], counts + "1"):
        with pytest.raises(ValueError, match=r"of \d+ pixels, but its image has 100"):
            run_lengths(wrong, 10, 10)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (30, 41)])
def test_masks_are_encoded_as_pycocotools_reads_them(share, shape):
    mask = np.random.default_rng(0).random(shape) < share
    encoded = encode(mask)
    assert fault_of(encoded, *shape) is None
    runs = coco_mask.frPyObjects(encoded, *shape)
    np.testing.assert_array_equal(coco_mask.decode(runs), mask)
    np.testing.assert_array_equal(decode(encoded, *shape), mask)
