"""Preprocessing and post-processing against PIL, torch and the original's transforms."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from samjax import preprocess
from samjax.models import MODELS

# (height, width): both orientations, sizes that round up and down, upscaling, one long strip.
SIZES = [(37, 53), (53, 37), (128, 128), (100, 128), (211, 97), (97, 211), (300, 299), (3, 250)]
SIDE = 128


def random_image(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def smooth_logits(shape, seed=0):
    """Logits like a model's: blobs of both signs, none of them constant."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[-2], : shape[-1]] / max(shape[-2:])
    waves = [np.sin(2 * np.pi * (a * x + b * y) + c) for a, b, c in rng.uniform(-4, 4, (6, 3))]
    noise = 0.1 * rng.normal(size=shape)
    return (sum(waves) + noise).astype(np.float32)


@pytest.fixture(scope="module")
def transform(segment_anything):
    from segment_anything.utils.transforms import ResizeLongestSide

    return ResizeLongestSide(SIDE)


@pytest.mark.parametrize("size", SIZES)
def test_resize_is_the_originals(transform, size):
    image = random_image(size)
    expected = transform.apply_image(image)
    assert preprocess.resized_shape(*size, SIDE) == expected.shape[:2]
    assert np.array_equal(preprocess.resize_image(image, SIDE), expected)


def test_resized_shape_is_the_originals_at_every_size(transform):
    for target in (128, 352, 1024):
        for height in range(1, 1200, 37):
            for width in range(1, 1200, 41):
                # The original would make a side of a long strip zero pixels wide, and then fail.
                expected = transform.get_preprocess_shape(height, width, target)
                ours = preprocess.resized_shape(height, width, target)
                assert ours == tuple(max(1, side) for side in expected)


@pytest.mark.parametrize("size", SIZES)
def test_coordinates_are_the_originals(transform, size):
    height, width = size
    coords = np.array([[0, 0], [width, height], [width / 3, height / 7], [1.5, 0.25]])
    expected = transform.apply_coords(coords, size)
    np.testing.assert_allclose(preprocess.scale_coords(coords, size, SIDE), expected, rtol=1e-12)
    batch = np.stack([coords, coords])
    assert preprocess.scale_coords(batch, size, SIDE).shape == (2, 4, 2)
    none = preprocess.scale_coords(np.zeros((1, 0, 2), np.float32), size, SIDE)
    assert none.shape == (1, 0, 2)


@pytest.mark.parametrize("size", [(37, 53), (53, 37), (128, 128)])
def test_normalise_then_pad_as_the_original(transform, small_torch, small_config, size):
    import torch

    image = random_image(size)
    padded, input_size = preprocess.prepare_image(image, SIDE)
    assert padded.shape == (SIDE, SIDE, 3) and padded.dtype == np.uint8
    mean, std = small_config.pixel_mean, small_config.pixel_std
    batch = jnp.asarray(padded[None]), jnp.asarray(input_size[None])
    ours = np.asarray(preprocess.normalize(*batch, mean, std))
    resized = torch.from_numpy(transform.apply_image(image).transpose(2, 0, 1)[None].copy())
    expected = small_torch.preprocess(resized).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    # The padding is the mean colour: zero after normalising, not black.
    height, width = input_size
    assert not ours[0, height:].any() and not ours[0, :, width:].any()
    assert (ours[0, :height, :width] != 0).any()


def test_every_model_has_its_own_normalisation():
    white = jnp.full((1, 2, 2, 3), 255, jnp.uint8)
    full = jnp.full((1, 2), 2, jnp.int32)
    outputs = {
        name: np.asarray(
            preprocess.normalize(white, full, MODELS[name].pixel_mean, MODELS[name].pixel_std)
        )
        for name in ("vit_b", "vit_t", "lite_medsam")
    }
    expected = (255 - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    for name in ("vit_b", "vit_t"):
        np.testing.assert_allclose(outputs[name][0, 0, 0], expected, rtol=1e-6)
    assert (outputs["lite_medsam"] == 1).all()


@pytest.mark.parametrize("size", SIZES)
def test_postprocessing_is_the_originals(small_torch, size):
    import torch

    logits = smooth_logits((2, 3, 32, 32))
    ours = np.asarray(preprocess.postprocess_masks(logits, SIDE, size))
    input_size = preprocess.resized_shape(*size, SIDE)
    expected = small_torch.postprocess_masks(torch.from_numpy(logits), input_size, size).numpy()
    assert ours.shape == expected.shape == (2, 3, *size) and ours.dtype == np.float32
    assert np.abs(ours - expected).max() <= 1e-5 * expected.std()
    threshold = preprocess.MASK_THRESHOLD
    assert threshold == small_torch.mask_threshold
    assert np.mean((ours > threshold) == (expected > threshold)) >= 0.9999


@pytest.mark.parametrize("size", [(352, 352), (480, 641), (683, 311)])
def test_postprocessing_at_full_size(segment_anything, size):
    import torch
    from segment_anything.modeling import Sam

    logits = smooth_logits((1, 256, 256), seed=1)
    # What the original's method needs of its model.
    model = types.SimpleNamespace(image_encoder=types.SimpleNamespace(img_size=1024))
    input_size = preprocess.resized_shape(*size, 1024)
    expected = Sam.postprocess_masks(model, torch.from_numpy(logits)[None], input_size, size)
    expected = expected[0].numpy()
    ours = np.asarray(preprocess.postprocess_masks(logits, 1024, size))
    assert np.abs(ours - expected).max() <= 1e-5 * expected.std()
    assert np.mean((ours > 0) == (expected > 0)) >= 0.9999


@pytest.mark.parametrize(
    ("low", "high"), [((32, 32), (128, 128)), ((8, 8), (37, 53)), ((40, 30), (17, 91))]
)
def test_upsample_is_interpolate(low, high):
    torch = pytest.importorskip("torch")
    logits = smooth_logits((2, *low))
    ours = np.asarray(preprocess.upsample(jnp.asarray(logits), high))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(logits)[None], high, mode="bilinear", align_corners=False
    )[0].numpy()
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= 1e-5 * expected.std()


def test_rows_of_an_interpolation_sum_to_one():
    for low, high in [(1, 7), (7, 1), (13, 13), (256, 1024), (1024, 352)]:
        matrix = preprocess.interpolation_matrix(low, high)
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0)
    assert np.array_equal(preprocess.interpolation_matrix(5, 5), np.eye(5))


def test_what_is_no_image_is_refused_in_a_sentence():
    check = preprocess.check_image
    good = random_image((5, 7))
    assert np.array_equal(check(good), good)
    assert np.array_equal(check(Image.fromarray(good)), good)
    unit = good.astype(np.float32) / 255
    with pytest.raises(ValueError, match=r"\[0, 255\] as uint8, not float32; multiply by 255"):
        check(unit)
    with pytest.raises(ValueError, match=r"photo must hold .* not int64; give an RGB array"):
        check(good.astype(np.int64), "photo")
    for shape in [(5, 7), (5, 7, 1), (5, 7, 4), (1, 5, 7, 3), (3, 5, 7)]:
        with pytest.raises(ValueError, match=r"must have shape \(height, width, 3\), RGB, but has"):
            check(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="holds no pixels"):
        check(np.zeros((0, 7, 3), np.uint8))
