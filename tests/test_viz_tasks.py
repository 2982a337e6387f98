"""Pictures of dense tasks: what is known has the colours that it should, what is not is black."""

import numpy as np
import pytest

from samjax.tasks import Task
from samjax.viz_tasks import picture_of, range_of, with_bar

LEAST, LARGEST = (68, 1, 84), (253, 231, 37)  # the ends of viridis


def colors(task, values, limits=(0.0, 1.0)):
    """Of pixels in a row."""
    picture = picture_of(task, np.array([values]), limits)
    assert picture.dtype == np.uint8 and picture.shape == (1, len(values), 3)
    return [tuple(color) for color in picture[0].tolist()]


def test_unknown_pixels_are_black():
    task = Task("parts", 21, "cross_entropy")
    *classes, unknown = colors(task, [*range(21), -1])
    assert len(set(classes)) == 21 and unknown == (0, 0, 0) not in classes
    edges = Task("edges", 1, "balanced_bce")
    assert colors(edges, [0, 1, -1]) == [LEAST, LARGEST, (0, 0, 0)]
    assert colors(edges, [[0.0], [1.0]]) == [LEAST, LARGEST]  # probabilities
    depth = Task("depth", 1, "masked_l1")
    limits = range_of(depth, np.array([[[0.0], [2.0], [6.0]]]))
    assert limits == (2.0, 6.0)
    assert colors(depth, [[0.0], [2.0], [6.0], [9.0]], limits) == [
        (0, 0, 0),
        LEAST,
        LARGEST,
        LARGEST,
    ]
    normals = Task("normals", 3, "cosine")
    assert colors(normals, [[0.0, 0, 0], [-1, 0, 0], [0, 0, 1]]) == [
        (0, 0, 0),
        (0, 128, 128),
        (128, 128, 255),
    ]


def test_a_map_of_which_nothing_is_known_has_a_scale():
    task = Task("depth", 1, "masked_l1")
    nothing = np.zeros((4, 5, 1), np.float32)
    assert range_of(task, nothing) == (0.0, 1.0)
    assert not picture_of(task, nothing, (0.0, 1.0)).any()
    even = np.full((4, 5, 1), 3.0, np.float32)
    assert np.ptp(picture_of(task, even, range_of(task, even))[..., 0]) == 0


@pytest.mark.parametrize("width", [40, 500])
def test_the_scale_stands_beside_the_picture(width):
    picture = np.random.default_rng(0).integers(0, 256, (60, width, 3), np.uint8)
    both = with_bar(picture, (0.5, 4.0))
    assert both.shape[0] == 60 and both.shape[1] > width
    np.testing.assert_array_equal(both[:, :width], picture)
    bar = both[:, width + max(4, width // 80) + 2].astype(int).sum(-1)
    assert bar[0] == sum(LARGEST) and bar[-1] == sum(LEAST) and (np.diff(bar) <= 0).all()
