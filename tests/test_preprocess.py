"""Preprocessing and post-processing against PIL, torch and the original's transforms."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from samjax import preprocess
from samjax.models import MODELS
from samjax.preprocess import Frame

# (height, width): both orientations, sizes that round up and down, upscaling, one long strip.
SIZES = [(37, 53), (53, 37), (128, 128), (100, 128), (211, 97), (97, 211), (300, 299), (3, 250)]
SIDE = 128
SQUARE = Frame(SIDE, SIDE)


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
    assert SQUARE.resized_shape(*size) == expected.shape[:2]
    assert np.array_equal(preprocess.resize_image(image, SQUARE), expected)


def test_resized_shape_is_the_originals_at_every_size(transform):
    for target in (128, 352, 1024):
        for height in range(1, 1200, 37):
            for width in range(1, 1200, 41):
                # The original would make a side of a long strip zero pixels wide, and then fail.
                expected = transform.get_preprocess_shape(height, width, target)
                ours = Frame(target, target).resized_shape(height, width)
                assert ours == tuple(max(1, side) for side in expected)


@pytest.mark.parametrize("size", SIZES)
def test_coordinates_are_the_originals(transform, size):
    height, width = size
    coords = np.array([[0, 0], [width, height], [width / 3, height / 7], [1.5, 0.25]])
    expected = transform.apply_coords(coords, size)
    np.testing.assert_allclose(preprocess.scale_coords(coords, size, SQUARE), expected, rtol=1e-12)
    batch = np.stack([coords, coords])
    assert preprocess.scale_coords(batch, size, SQUARE).shape == (2, 4, 2)
    none = preprocess.scale_coords(np.zeros((1, 0, 2), np.float32), size, SQUARE)
    assert none.shape == (1, 0, 2)


@pytest.mark.parametrize("size", [(37, 53), (53, 37), (128, 128)])
def test_normalise_then_pad_as_the_original(transform, small_torch, small_config, size):
    import torch

    image = random_image(size)
    padded, input_size = preprocess.prepare_image(image, SQUARE)
    assert padded.shape == (SIDE, SIDE, 3) and padded.dtype == np.uint8
    mean, std = small_config.pixel_mean, small_config.pixel_std
    batch = jnp.asarray(padded[None]), jnp.asarray(input_size[None])
    ours = np.asarray(preprocess.normalize(*batch, "pixel", mean, std))
    resized = torch.from_numpy(transform.apply_image(image).transpose(2, 0, 1)[None].copy())
    expected = small_torch.preprocess(resized).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    # The padding is the mean colour: zero after normalising, not black.
    height, width = input_size
    assert not ours[0, height:].any() and not ours[0, :, width:].any()
    assert (ours[0, :height, :width] != 0).any()


def normalized(name, image):
    config = MODELS[name]
    size = jnp.asarray([image.shape[:2]], jnp.int32)
    settings = config.normalization, config.pixel_mean, config.pixel_std
    return np.asarray(preprocess.normalize(jnp.asarray(image[None]), size, *settings))[0]


def test_every_model_has_its_own_normalisation():
    image = random_image((5, 7))
    meta = (image - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    for name in ("vit_b", "vit_t"):
        np.testing.assert_allclose(normalized(name, image), meta, rtol=1e-5, atol=1e-6)
    low, high = int(image.min()), int(image.max())
    for name in ("lite_medsam", "medsam"):
        np.testing.assert_allclose(normalized(name, image), (image - low) / (high - low), atol=1e-6)


def test_min_max_ignores_the_padding_and_bears_a_constant_image():
    image = random_image((4, 6)) // 2 + 60
    padded, size = jnp.asarray(preprocess.pad_to(image, Frame(8, 8))[None]), jnp.array([[4, 6]])
    settings = "min_max", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    ours = np.asarray(preprocess.normalize(padded, size, *settings))[0]
    np.testing.assert_allclose(ours[:4, :6], normalized("medsam", image), atol=1e-6)
    assert not ours[4:].any() and not ours[:, 6:].any()
    flat = jnp.full((1, 2, 2, 3), 7, jnp.uint8)
    assert not np.asarray(preprocess.normalize(flat, jnp.array([[2, 2]]), *settings)).any()


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (100, 1000), (1000, 100), (33, 50)])
def test_a_frame_that_is_not_square_holds_the_largest_image_that_fits(size):
    frame = Frame(640, 960)
    height, width = frame.resized_shape(*size)
    assert height <= 640 and width <= 960 and (height == 640 or width == 960)
    assert abs(height / width - size[0] / size[1]) <= 1 / min(height, width)
    padded, input_size = preprocess.prepare_image(random_image(size), frame)
    assert padded.shape == (640, 960, 3) and tuple(input_size) == (height, width)
    corner = preprocess.scale_coords(np.array([size[1], size[0]]), size, frame)
    np.testing.assert_allclose(corner, (width, height))
    mask = preprocess.prepare_mask(np.ones(size, bool), frame)
    assert mask.sum() == height * width and mask[:height, :width].all()


def test_a_frame_that_stretches_has_no_padding():
    frame = Frame(64, 96, "stretch")
    image = random_image((37, 21))
    padded, input_size = preprocess.prepare_image(image, frame)
    assert tuple(input_size) == (64, 96)
    expected = Image.fromarray(image).resize((96, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(padded, expected)
    scaled = preprocess.scale_coords(np.array([[21.0, 37.0]]), (37, 21), frame)
    np.testing.assert_allclose(scaled, [[96, 64]])


@pytest.mark.parametrize("size", [(37, 53), (53, 37), (300, 299)])
@pytest.mark.parametrize("frame", [Frame(64, 96), Frame(96, 64, "stretch")])
def test_postprocessing_of_other_frames(frame, size):
    torch = pytest.importorskip("torch")
    logits = smooth_logits((2, frame.height // 4, frame.width // 4))

    def resize(x, shape):
        return torch.nn.functional.interpolate(x, shape, mode="bilinear", align_corners=False)

    height, width = frame.resized_shape(*size)
    up = resize(torch.from_numpy(logits)[None], frame.shape)[..., :height, :width]
    expected = resize(up, size)[0].numpy()
    ours = np.asarray(preprocess.postprocess_masks(logits, frame, size))
    assert np.abs(ours - expected).max() <= 1e-5 * expected.std()


@pytest.mark.parametrize("size", SIZES)
def test_postprocessing_is_the_originals(small_torch, size):
    import torch

    logits = smooth_logits((2, 3, 32, 32))
    ours = np.asarray(preprocess.postprocess_masks(logits, SQUARE, size))
    input_size = SQUARE.resized_shape(*size)
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
    input_size = Frame(1024, 1024).resized_shape(*size)
    expected = Sam.postprocess_masks(model, torch.from_numpy(logits)[None], input_size, size)
    expected = expected[0].numpy()
    ours = np.asarray(preprocess.postprocess_masks(logits, Frame(1024, 1024), size))
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
