"""Prompts: SAM's order of slots, the training mixture, and what a user's prompt may be."""

import numpy as np
import pytest

from samjax.data.prompts import (
    PromptConfig,
    box_of,
    central_point,
    encode_prompt,
    move_outward,
    moves_of,
    pad_prompt,
    sample_prompt,
)

MASK = np.zeros((40, 60), bool)
MASK[10:30, 20:50] = True
ALL_KINDS = PromptConfig(none=1.0, box=2.0, points=1.0, max_points=4, negative_points=True)


def draws(mask, config, count, seed=0):
    rng = np.random.default_rng(seed)
    return [sample_prompt(rng, mask, config) for _ in range(count)]


@pytest.mark.parametrize(
    ("weights", "slots"),
    [((1, 0, 0), 0), ((0, 1, 0), 2), ((1, 0, 1), 4), ((1, 1, 1), 4), ((1, 1, 0), 2)],
)
def test_slots_are_static(weights, slots):
    config = PromptConfig(*map(float, weights))
    assert config.slots == slots
    for coords, labels in draws(MASK, config, 30):
        assert coords.shape == (slots, 2) and coords.dtype == np.float32
        assert labels.shape == (slots,) and labels.dtype == np.int32
    assert PromptConfig(points=1.0, box=1.0, max_points=1).slots == 2


def test_kinds_keep_their_order_and_frequency():
    count = {"none": 0, "box": 0, "points": 0}
    for coords, labels in draws(MASK, ALL_KINDS, 800):
        used = labels[labels > -2].tolist()
        np.testing.assert_array_equal(labels[len(used) :], -2)
        np.testing.assert_array_equal(coords[len(used) :], 0)
        if not used:
            count["none"] += 1
        elif used == [2, 3]:
            count["box"] += 1
        else:
            count["points"] += 1
            assert used[0] == 1 and used[-1] == -1
            assert used[:-1] == sorted(used[:-1], reverse=True) and set(used[:-1]) <= {0, 1}
            np.testing.assert_array_equal(coords[len(used) - 1], 0)
    for kind, share in (("none", 0.25), ("box", 0.5), ("points", 0.25)):
        assert abs(count[kind] / 800 - share) < 0.06, count


def test_points_fall_on_their_side_of_the_mask():
    config = PromptConfig(none=0.0, points=1.0, max_points=4, negative_points=True)
    seen, sizes = set(), set()
    for coords, labels in draws(MASK, config, 200):
        sizes.add(int((labels >= 0).sum()))
        for (x, y), label in zip(coords.astype(int), labels, strict=True):
            if label >= 0:
                seen.add(int(label))
                assert MASK[y, x] == bool(label)
    assert seen == {0, 1} and sizes == {1, 2, 3, 4}
    only_positive = PromptConfig(none=0.0, points=1.0)
    assert all(0 not in labels for _, labels in draws(MASK, only_positive, 50))
    full = np.ones((3, 3), bool)
    assert all(0 not in labels for _, labels in draws(full, config, 50))


def test_box_jitter_is_bounded_and_clipped():
    config = PromptConfig(none=0.0, box=1.0, box_jitter=0.2)
    boxes = np.stack([coords.ravel() for coords, _ in draws(MASK, config, 300)])
    change = (boxes - box_of(MASK)) / (30, 20, 30, 20)
    assert np.abs(change).max() <= 0.2 + 1e-6
    assert (np.abs(change).max(axis=0) > 0.15).all() and (change.min(axis=0) < -0.1).all()
    full = np.stack([c.ravel() for c, _ in draws(np.ones((8, 9), bool), config, 100)])
    assert full.min() == 0 and full[:, 2].max() == 9 and full[:, 3].max() == 8
    exact = PromptConfig(none=0.0, box=1.0, box_jitter=0.0)
    np.testing.assert_array_equal(draws(MASK, exact, 1)[0][0].ravel(), box_of(MASK))
    one = np.zeros((5, 5), bool)
    one[2, 3] = True
    for coords, _ in draws(one, PromptConfig(none=0.0, box=1.0, box_jitter=0.49), 50):
        assert (coords[1] > coords[0]).all()


def test_edges_move_outward_alone_and_stay_in_the_image():
    box = encode_prompt(None, None, [20, 10, 50.5, 30])
    moved = move_outward(*box, np.array([0, 3, 4, 7]), (40, 60))
    np.testing.assert_array_equal(moved, [[20, 7], [54.5, 37]])
    np.testing.assert_array_equal(box[0], [[20, 10], [50.5, 30]])  # what is given stays
    far = move_outward(*box, np.array([21, 99, 10, 11]), (40, 60))
    np.testing.assert_array_equal(far, [[0, 0], [60, 40]])
    both = pad_prompt(*encode_prompt([[3, 4]], [1], [1, 2, 7, 8]), 5)
    moved = move_outward(*both, np.array([1, 1, 1, 1]), (40, 60))
    np.testing.assert_array_equal(moved, [[3, 4], [0, 1], [8, 9], [0, 0], [0, 0]])
    nothing = pad_prompt(*encode_prompt(None, None, None), 2)
    np.testing.assert_array_equal(move_outward(*nothing, np.full(4, 9), (40, 60)), np.zeros((2, 2)))


def test_moves_are_a_function_of_seed_and_name():
    np.testing.assert_array_equal(moves_of("a.png", 0, 20), moves_of("a.png", 0, 20))
    assert moves_of("scan#3", 1, 20).tolist() == [0, 13, 16, 14]  # on every machine
    assert (moves_of("scan#3", 2, 20) != moves_of("scan#3", 1, 20)).any()
    assert moves_of("scan#3", 1, 0).tolist() == [0] * 4
    drawn = np.stack([moves_of(f"image{i}", 0, 3) for i in range(2000)])
    for edge in drawn.T:
        np.testing.assert_allclose(np.bincount(edge, minlength=4) / 2000, 0.25, atol=0.04)


def test_an_empty_mask_gives_no_prompt():
    for _, labels in draws(np.zeros((4, 4), bool), ALL_KINDS, 40):
        np.testing.assert_array_equal(labels, [-2] * ALL_KINDS.slots)


def test_the_generator_alone_decides():
    first, second = draws(MASK, ALL_KINDS, 20, seed=5), draws(MASK, ALL_KINDS, 20, seed=5)
    for (a, b), (c, d) in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, d)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"none": 0.0}, "must be positive"),
        ({"box": -1.0}, "not negative"),
        ({"points": float("nan")}, "finite"),
        ({"box_jitter": 0.5}, "box_jitter"),
        ({"box_outward": -1, "box_jitter": 0.0}, "box_outward must not be negative"),
        ({"box_outward": 20}, "box_outward 20 moves .* in place of box_jitter 0.1: set box_jitter"),
        ({"max_points": 0}, "max_points"),
        ({"corrective_points": -1}, "corrective_points"),
    ],
)
def test_config_refuses_nonsense(settings, message):
    with pytest.raises(ValueError, match=message):
        PromptConfig(**settings)


@pytest.mark.parametrize(
    ("points", "labels", "box", "expected_coords", "expected_labels"),
    [
        (None, None, None, np.zeros((0, 2)), []),
        ([[3, 4]], [1], None, [[3, 4], [0, 0]], [1, -1]),
        ([[3, 4], [5, 6]], [1, 0], [1, 2, 7, 8], [[3, 4], [5, 6], [1, 2], [7, 8]], [1, 0, 2, 3]),
        (None, None, np.array([1, 2, 7, 8.5]), [[1, 2], [7, 8.5]], [2, 3]),
    ],
)
def test_encode_prompt_keeps_sams_order(points, labels, box, expected_coords, expected_labels):
    coords, kinds = encode_prompt(points, labels, box)
    np.testing.assert_array_equal(coords, np.asarray(expected_coords, np.float32))
    assert kinds.tolist() == expected_labels
    assert coords.dtype == np.float32 and kinds.dtype == np.int32
    padded, padded_kinds = pad_prompt(coords, kinds, 6)
    np.testing.assert_array_equal(padded[: len(kinds)], coords)
    assert padded_kinds.tolist() == expected_labels + [-2] * (6 - len(kinds))


@pytest.mark.parametrize(
    ("points", "labels", "box", "message"),
    [
        ([[1, 2]], None, None, "go together"),
        (None, [1], None, "go together"),
        ([1, 2], [1], None, r"shape \(k, 2\)"),
        ([[1, np.nan]], [1], None, "finite"),
        ([[1, 2]], [1, 1], None, r"labels must have shape \(1,\)"),
        ([[1, 2]], [2], None, "labels must be 1"),
        (None, None, [1, 2, 3], "four finite numbers"),
        (None, None, [5, 2, 5, 8], "x1 > x0"),
        (None, None, [1, 8, 5, 2], "y1 > y0"),
    ],
)
def test_encode_prompt_refuses_nonsense(points, labels, box, message):
    with pytest.raises(ValueError, match=message):
        encode_prompt(points, labels, box)


def test_pad_prompt_refuses_too_few_slots():
    with pytest.raises(ValueError, match="2 slots"):
        pad_prompt(*encode_prompt(None, None, [0, 0, 1, 1]), 1)


def test_box_of_ends_one_past_the_last_pixel():
    np.testing.assert_array_equal(box_of(MASK), [20, 10, 50, 30])
    np.testing.assert_array_equal(box_of(np.ones((4, 7), bool)), [0, 0, 7, 4])
    with pytest.raises(ValueError, match="empty"):
        box_of(np.zeros((2, 2), bool))


def test_box_of_reproduces_the_reference(asset):
    with np.load(asset("fixtures/mobile_sam_kvasir_test0.npz")) as fixture:
        np.testing.assert_array_equal(box_of(fixture["ground_truth"]), fixture["box"])


def test_central_point():
    x, y = central_point(MASK)
    assert 29 <= x <= 40 and 19 <= y <= 20
    dumbbell = np.zeros((30, 60), bool)
    dumbbell[14:16, 5:50] = True
    dumbbell[2:9, 2:9] = True  # the largest square, although not the largest extent
    np.testing.assert_array_equal(central_point(dumbbell), [5, 5])
    ring = np.ones((21, 21), bool)
    ring[5:16, 5:16] = False
    x, y = central_point(ring).astype(int)
    assert ring[y, x]
    with pytest.raises(ValueError, match="empty"):
        central_point(np.zeros((2, 2), bool))


def test_central_point_against_erosion():
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((13, 17)) < 0.85
        kept, eroded = mask, mask
        while eroded.any():
            kept = eroded
            p = np.pad(eroded, 1)
            windows = [p[i : i + 13, j : j + 17] for i in range(3) for j in range(3)]
            eroded = np.logical_and.reduce(windows)
        x, y = central_point(mask).astype(int)
        assert kept[y, x]
