"""Edges of label maps, against OpenCV and scikit-image, which ASTMT makes them with."""

import numpy as np
import pytest

from samjax.data.boundaries import boundaries, thin

cv2 = pytest.importorskip("cv2")
morphology = pytest.importorskip("skimage.morphology")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 1.0])
def test_thinning(share):
    rng = np.random.default_rng(int(10 * share))
    for _ in range(30):
        mask = rng.random(rng.integers(1, 30, 2)) < share
        np.testing.assert_array_equal(thin(mask), morphology.thin(mask))


@pytest.mark.parametrize("classes", [3, 460])
def test_boundaries(classes):
    rng = np.random.default_rng(0)
    small = rng.integers(0, classes, (6, 7)).astype(np.uint16)
    labels = cv2.resize(small, (71, 53), interpolation=cv2.INTER_NEAREST)
    expected = morphology.thin(np.abs(cv2.Laplacian(labels, cv2.CV_64F)) > 0)
    got = boundaries(labels.astype(np.int32))
    np.testing.assert_array_equal(got, expected)
    assert 0.01 < got.mean() < 0.5
    # One region has no edges.
    assert not boundaries(np.full((9, 8), classes)).any()
