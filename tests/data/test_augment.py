"""Augmentation: one geometry for image and mask, repeatable, and no object lost to a crop."""

import numpy as np
import pytest

from samjax.data.augment import NO_AUGMENTATION, AugmentConfig, augment

GEOMETRY = AugmentConfig(vertical_flip=True, rotate90=True, scale_crop=0.4, color_jitter=0.0)


def picture(height=20, width=30, seed=0):
    """An image whose red says the mask and whose other channels say the place."""
    mask = np.random.default_rng(seed).random((height, width)) < 0.3
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([mask * 255, rows, columns], axis=-1).astype(np.uint8)
    return image, mask


def test_image_and_mask_move_together():
    image, mask = picture()
    shapes, places = set(), set()
    for seed in range(60):
        new_image, new_mask = augment(np.random.default_rng(seed), image, mask, GEOMETRY)
        np.testing.assert_array_equal(new_image[..., 0] > 0, new_mask)
        shapes.add(new_mask.shape)
        places.add(tuple(new_image[0, 0, 1:].tolist()))
        for array in (new_image, new_mask):
            assert array.flags.c_contiguous
    assert len(shapes) > 10 and len(places) > 10
    assert {height > width for height, width in shapes} == {True, False}
    sides = np.sort(np.array(list(shapes)), axis=1)
    assert (sides >= (12, 18)).all() and (sides <= (20, 30)).all()
    assert np.abs(sides[:, 0] * 1.5 - sides[:, 1]).max() <= 1.25  # the aspect stays


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (AugmentConfig(scale_crop=0.0, color_jitter=0.0), [0, 1]),
        (AugmentConfig(flip=False, vertical_flip=True, scale_crop=0.0, color_jitter=0.0), [0, 2]),
        (AugmentConfig(flip=False, rotate90=True, scale_crop=0.0, color_jitter=0.0), [0, 3, 4, 5]),
        (NO_AUGMENTATION, [0]),
    ],
)
def test_each_setting_does_what_it_says(config, expected):
    image, mask = picture(6, 6)
    candidates = [image, image[:, ::-1], image[::-1], *(np.rot90(image, k) for k in (1, 2, 3))]
    seen = set()
    for seed in range(40):
        changed, _ = augment(np.random.default_rng(seed), image, mask, config)
        seen.add(next(i for i, array in enumerate(candidates) if np.array_equal(array, changed)))
    assert sorted(seen) == expected


def test_colour_changes_the_image_alone():
    image = np.random.default_rng(1).integers(60, 190, (16, 16, 3), np.uint8)
    _, mask = picture(16, 16)
    config = AugmentConfig(flip=False, scale_crop=0.0, color_jitter=0.2)
    changed, same_mask = augment(np.random.default_rng(0), image, mask, config)
    np.testing.assert_array_equal(same_mask, mask)
    assert changed.shape == image.shape and changed.dtype == np.uint8
    difference = np.abs(changed.astype(int) - image)
    assert 0 < difference.mean() < 60


def test_the_generator_alone_decides():
    image, mask = picture()
    config = AugmentConfig(vertical_flip=True, rotate90=True)
    results = [augment(np.random.default_rng(7), image, mask, config) for _ in range(2)]
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)
    other, _ = augment(np.random.default_rng(8), image, mask, config)
    assert not np.array_equal(other, results[0][0])


def test_a_crop_never_loses_the_object_but_may_be_empty_where_there_is_none():
    image, mask = picture()
    mask = np.zeros_like(mask)
    corner = mask.copy()
    corner[0, 0] = True
    config = AugmentConfig(scale_crop=0.9, color_jitter=0.0)
    shapes = set()
    for seed in range(60):
        _, kept = augment(np.random.default_rng(seed), image, corner, config)
        assert kept.sum() == 1
        shapes.add(kept.shape)
        _, empty = augment(np.random.default_rng(seed), image, mask, config)
        assert not empty.any() and empty.shape[0] <= 20
    assert (20, 30) in shapes and len(shapes) > 2


@pytest.mark.parametrize("name", ["scale_crop", "color_jitter"])
def test_config_refuses_nonsense(name):
    for value in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=name):
            AugmentConfig(**{name: value})
