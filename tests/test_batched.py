"""Ragged prompts over several images against one-by-one calls, and the original in torch."""

import numpy as np
import pytest
from PIL import Image

import samjax
from samjax import Prompt, predict_batch
from samjax.batched import _decode_each
from samjax.predictor import encode
from samjax.preprocess import Frame, prepare_mask_prompt

SIZES = [(100, 150), (64, 64), (201, 77), (30, 40), (128, 128)]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    result = []
    for height, width in SIZES:
        image = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        image[height // 4 : height // 2, width // 3 :] += np.array([180, 90, 20], np.uint8)
        result.append(image)
    return result


def draw_prompt(rng, size):
    """Any mixture of 0 to 6 points, a box and a mask of the image's size or of low resolution."""
    height, width = size
    parts = {}
    if count := int(rng.integers(0, 7)):
        parts["point_coords"] = rng.uniform((0, 0), (width, height), (count, 2))
        parts["point_labels"] = rng.integers(0, 2, count)
    if rng.random() < 0.5:
        corners = np.sort(rng.uniform(0, 1, (2, 2)), axis=0) * (width, height)
        parts["box"] = corners.ravel() + (0, 0, 1e-3, 1e-3) * np.array(1)
        parts["box"][2:] = np.minimum(parts["box"][2:], (width, height))
    kind = rng.integers(0, 4)
    if kind == 1:
        parts["mask_input"] = rng.normal(size=(1, 32, 32)).astype(np.float32) * 5
    elif kind == 2:
        parts["mask_input"] = rng.random(size) < 0.5
    return Prompt(**parts)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(1)
    return [
        [draw_prompt(rng, s) for _ in range(n)] for s, n in zip(SIZES, (3, 0, 5, 1, 4), strict=True)
    ]


def one_by_one(model, params, images, prompts, **options):
    predictor = samjax.SamPredictor(model, params)
    for image, own in zip(images, prompts, strict=True):
        predictor.set_image(image)
        yield [
            predictor.predict(p.point_coords, p.point_labels, p.box, p.mask_input, **options)
            for p in own
        ]


@pytest.mark.parametrize("multimask", [False, True])
def test_ragged_prompts_equal_one_by_one_calls(
    small_model, small_params, images, prompts, multimask
):
    options = {"multimask_output": multimask, "return_logits": True}
    ours = predict_batch(
        small_model,
        small_params,
        images,
        prompts,
        images_per_batch=2,
        prompts_per_batch=3,
        **options,
    )
    expected = list(one_by_one(small_model, small_params, images, prompts, **options))
    assert [len(own) for own in ours] == [3, 0, 5, 1, 4]
    for own, theirs in zip(ours, expected, strict=True):
        for prediction, reference in zip(own, theirs, strict=True):
            for part, expected_part in zip(prediction, reference, strict=True):
                assert part.shape == expected_part.shape
                assert np.abs(part - expected_part).max() <= 1e-5 * max(1, expected_part.std())
    masks = predict_batch(small_model, small_params, images, prompts, multimask_output=multimask)
    for own, theirs in zip(masks, ours, strict=True):
        for prediction, reference in zip(own, theirs, strict=True):
            assert prediction.masks.dtype == bool
            assert np.mean(prediction.masks == (reference.masks > 0)) >= 0.9999


def test_a_padded_batch_equals_torch(small_model, small_params, segment_anything, small_torch):
    """The reference has no padding at all: each prompt alone."""
    rng = np.random.default_rng(4)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES[:3]]
    prompts = [[draw_prompt(rng, size) for _ in range(3)] for size in SIZES[:3]]
    ours = predict_batch(small_model, small_params, images, prompts, return_logits=True)
    theirs = segment_anything.SamPredictor(small_torch)
    agreeing = []
    for image, own, predictions in zip(images, prompts, ours, strict=True):
        theirs.set_image(image)
        for prompt, prediction in zip(own, predictions, strict=True):
            mask = prompt.mask_input
            if mask is not None and mask.shape == image.shape[:2]:
                mask = prepare_mask_prompt(mask, Frame(128, 128), (32, 32))[None]
            expected, iou, low_res = theirs.predict(
                prompt.point_coords,
                prompt.point_labels,
                prompt.box,
                mask,
                multimask_output=False,
                return_logits=True,
            )
            assert np.abs(prediction.low_res_logits - low_res).max() <= 1e-3 * low_res.std()
            np.testing.assert_allclose(prediction.iou_predictions, iou, rtol=1e-3, atol=1e-5)
            agreeing.append((prediction.masks > 0) == (expected > 0))
    assert np.mean(np.concatenate([a.ravel() for a in agreeing])) >= 0.9999


def test_few_programs_are_compiled(small_model, small_params, images):
    point = Prompt(np.array([[5.0, 5.0]]), np.array([1]))
    shares = {"images_per_batch": 2, "prompts_per_batch": 4}
    for counts in ((4, 4, 4, 4, 4), (1, 2, 3, 4, 2)):
        prompts = [[point] * n for n in counts]
        predict_batch(small_model, small_params, images, prompts, **shares)
        compiled = encode._cache_size(), _decode_each._cache_size()
    for counts in ((0, 3, 1, 1, 2), (2, 2, 2, 2, 4), (0, 0, 0, 0, 0)):
        prompts = [[point] * n for n in counts]
        predict_batch(small_model, small_params, images, prompts, **shares)
    assert (encode._cache_size(), _decode_each._cache_size()) == compiled


def test_a_mask_of_the_images_size_lies_where_the_image_lies():
    frame, low = Frame(128, 128), (32, 32)
    mask = np.zeros((64, 128), bool)
    mask[16:48, 32:96] = True
    logits = prepare_mask_prompt(mask, frame, low)
    assert logits.shape == low and logits.dtype == np.float32
    expected = np.zeros(low, bool)
    expected[4:12, 8:24] = True
    assert np.array_equal(logits > 0, expected)
    assert (logits[17:] < -6).all(), "the padding is background"
    # Logits of the image's size are taken as they are, but for the resize.
    given = np.where(mask, 3.0, -2.0)
    again = prepare_mask_prompt(given, frame, low)
    assert np.isclose(again[8, 16], 3) and np.isclose(again[2, 2], -2)
    # Against an antialiased resize of each axis in turn, which PIL's filter is.
    full = np.full((128, 128), -6.9, np.float32)
    full[:64] = np.where(mask, 6.9, -6.9)
    expected = np.asarray(Image.fromarray(full).reduce(4))
    assert np.abs(logits - expected).max() < 14 * 0.3


def test_refining_with_an_earlier_prediction(small_model, small_params, images):
    [[first]] = predict_batch(
        small_model, small_params, images[:1], [[Prompt(box=[10, 10, 90, 90])]]
    )
    again = Prompt(box=[10, 10, 90, 90], mask_input=first.low_res_logits)
    [[second]] = predict_batch(small_model, small_params, images[:1], [[again]])
    assert np.abs(second.low_res_logits - first.low_res_logits).max() > 1e-3


def test_what_is_refused_names_its_position(small_model, small_params, images):
    def call(prompts, images=images[:2], **options):
        return predict_batch(small_model, small_params, images, prompts, **options)

    good = Prompt(box=[1, 1, 20, 20])
    refused = [
        ([[good]], {}, "2 images and 1 sequences"),
        ([[good], [good, Prompt(box=[20, 1, 1, 20])]], {}, r"prompts\[1\]\[1\]: .*x1 > x0"),
        ([[good], [Prompt(box=[1, 1, 65, 20])]], {}, r"prompts\[1\]\[0\]: .*outside the image"),
        ([[good], [Prompt([[3, 3]], [2])]], {}, r"prompts\[1\]\[0\]: .*one is 2"),
        ([[Prompt(mask_input=np.zeros((9, 9)))], []], {}, r"prompts\[0\]\[0\]: mask_input must"),
        ([[Prompt(mask_input=np.zeros((100, 150), int))], []], {}, "bool or float logits, not int"),
        ([[Prompt(mask_input=np.full((100, 150), np.nan))], []], {}, "finite"),
        ([[Prompt(mask_input=np.full((100, 150), 1e300))], []], {}, "finite"),
        ([[Prompt(mask_input=np.eye(100, 150))], []], {}, "give a mask as bool"),
        ([[], []], {"images_per_batch": 0}, "images_per_batch must be at least 1"),
    ]
    for prompts, options, message in refused:
        with pytest.raises(ValueError, match=message):
            call(prompts, **options)
    with pytest.raises(ValueError, match=r"images\[1\] must hold RGB"):
        call([[good], []], [images[0], images[1] / 255])
    assert call([[], []]) == [[], []]
    assert predict_batch(small_model, small_params, [], []) == []
