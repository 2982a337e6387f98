"""`samjax.SamPredictor` against the original's, on a small model with the same weights."""

import numpy as np
import pytest

import samjax
from samjax.predictor import decode, encode

BOUND = 1e-3  # of the reference's standard deviation
SIZE = (100, 150)  # height, width; the model's input is 128 x 128


@pytest.fixture(scope="module")
def image():
    """Shapes of several colours, so that masks have both signs and edges."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 40, (*SIZE, 3), dtype=np.uint8)
    image[20:70, 30:90] += np.array([200, 60, 10], np.uint8)
    image[60:95, 80:140] += np.array([10, 120, 200], np.uint8)
    return image


@pytest.fixture(scope="module")
def predictor(small_model, small_params, image):
    predictor = samjax.SamPredictor(small_model, small_params)
    predictor.set_image(image)
    return predictor


@pytest.fixture(scope="module")
def reference(segment_anything, small_torch, image):
    predictor = segment_anything.SamPredictor(small_torch)
    predictor.set_image(image)
    return predictor


def assert_close(ours, reference):
    assert ours.shape == reference.shape
    assert ours.dtype == reference.dtype
    assert np.abs(ours - reference).max() <= BOUND * reference.std()


def points(count):
    rng = np.random.default_rng(count)
    coords = rng.uniform((0, 0), (SIZE[1], SIZE[0]), (count, 2))
    return {"point_coords": coords, "point_labels": rng.permutation(np.arange(count) % 2 ^ 1)}


BOX = {"box": np.array([25.0, 15.5, 95.0, 75.0])}
# A box whose edges are the image's own.
WHOLE = {"box": np.array([0, 0, SIZE[1], SIZE[0]])}
PROMPTS = {
    "1 point": points(1),
    "2 points": points(2),
    "3 points in 4 slots": points(3),
    "4 points": points(4),
    "7 points": points(7),
    "box": BOX,
    "the whole image": WHOLE,
    "2 points and a box": {**points(2), **BOX},
    "no prompt": {},
}


def test_the_embedding(predictor, reference):
    ours = predictor.get_image_embedding()
    assert ours.shape == (1, 32, 8, 8) and ours.dtype == np.float32
    assert_close(ours, reference.get_image_embedding().numpy())
    assert predictor.original_size == SIZE


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_prompts_as_the_original(predictor, reference, prompt, multimask):
    options = {**prompt, "multimask_output": multimask, "return_logits": True}
    ours, expected = predictor.predict(**options), reference.predict(**options)
    count = 3 if multimask else 1
    assert ours[0].shape == (count, *SIZE)
    for part, expected_part in zip(ours, expected, strict=True):
        if part.size == 1:  # a single IoU has no spread of its own
            np.testing.assert_allclose(part, expected_part, rtol=BOUND, atol=1e-5)
        else:
            assert_close(part, expected_part)
    # Masks are the logits above zero.
    masks, iou, low_res = predictor.predict(**{**options, "return_logits": False})
    assert masks.dtype == bool and np.array_equal(masks, ours[0] > 0)
    assert np.array_equal(iou, ours[1]) and np.array_equal(low_res, ours[2])
    assert np.mean(masks == (expected[0] > 0)) >= 0.999


def test_prompts_make_a_difference(predictor):
    """Otherwise the comparisons above would show little."""
    outputs = [predictor.predict(**prompt)[2] for prompt in PROMPTS.values()]
    for i, one in enumerate(outputs):
        assert one.std() > 0.01
        for other in outputs[:i]:
            assert np.abs(one - other).max() > 0.01 * one.std()


@pytest.mark.parametrize("prompt", ["2 points", "box", "no prompt"])
def test_mask_input_as_the_original(predictor, reference, prompt):
    _, iou, low_res = reference.predict(**PROMPTS[prompt])
    given = {**PROMPTS[prompt], "mask_input": low_res[np.argmax(iou)][None]}
    ours = predictor.predict(**given, return_logits=True)
    for part, expected in zip(ours, reference.predict(**given, return_logits=True), strict=True):
        assert_close(part, expected)
    assert np.abs(ours[2] - low_res).max() > 0.01 * low_res.std()


def test_boxes_at_once_equal_boxes_one_by_one(predictor):
    boxes = np.array([BOX["box"], WHOLE["box"], [70, 50, 149.5, 99]])
    for multimask in (False, True):
        masks, iou, low_res = predictor.predict_boxes(boxes, multimask, return_logits=True)
        assert masks.shape == (3, 3 if multimask else 1, *SIZE)
        for i, box in enumerate(boxes):
            one = predictor.predict(box=box, multimask_output=multimask, return_logits=True)
            for part, expected in zip((masks[i], iou[i], low_res[i]), one, strict=True):
                np.testing.assert_allclose(part, expected, atol=1e-4 * max(1, expected.std()))
    assert predictor.predict_boxes(boxes)[0].dtype == bool


def test_the_decoder_compiles_once_for_each_doubling_of_points(predictor):
    # 1 to 4 points and the "not a point" are 2, 3, 4 and 5 slots, in 2, 4, 4 and 8.
    for count in (1, 3, 4):
        predictor.predict(**points(count))
    compiled = decode._cache_size()
    for count in (2, 5, 6, 7):
        predictor.predict(**points(count), multimask_output=count % 2 == 0)
    predictor.predict(**BOX)
    predictor.predict(**points(1), **BOX)
    assert decode._cache_size() == compiled


def test_one_model_compiles_once(predictor, small_config, small_params, image):
    predictor.predict(**points(7))
    compiled = encode._cache_size(), decode._cache_size()
    other = samjax.SamPredictor(samjax.Sam(small_config), small_params)
    other.set_image(image[:, ::-1])
    other.predict(**points(7), return_logits=True)
    assert (encode._cache_size(), decode._cache_size()) == compiled


def test_bgr_images(predictor, small_model, small_params, image):
    other = samjax.SamPredictor(small_model, small_params)
    other.set_image(image[..., ::-1], "BGR")
    assert np.array_equal(other.get_image_embedding(), predictor.get_image_embedding())


def test_images_of_other_sizes(small_model, small_params, segment_anything, small_torch):
    """One predictor, one image after the other; upright and lying, downscaled and upscaled."""
    ours = samjax.SamPredictor(small_model, small_params)
    theirs = segment_anything.SamPredictor(small_torch)
    for size in [(201, 77), (30, 40)]:
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        ours.set_image(image)
        theirs.set_image(image)
        prompt = {"box": np.array([3, 4, size[1], size[0] / 2])}
        actual = ours.predict(**prompt, return_logits=True)
        expected = theirs.predict(**prompt, return_logits=True)
        for part, expected_part in zip(actual, expected, strict=True):
            assert_close(part, expected_part)


def test_before_an_image(small_model, small_params):
    predictor = samjax.SamPredictor(small_model, small_params)
    calls = (
        predictor.get_image_embedding,
        predictor.predict,
        lambda: predictor.predict_boxes(np.array([[0, 0, 5, 5]])),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="call set_image"):
            call()


def test_reset_forgets_the_image(small_model, small_params, image):
    predictor = samjax.SamPredictor(small_model, small_params)
    predictor.set_image(image)
    predictor.reset_image()
    with pytest.raises(RuntimeError, match="call set_image"):
        predictor.predict()


def test_images_that_are_refused(predictor, image):
    before = predictor.get_image_embedding()
    for wrong, message in [
        (image / 255, r"uint8, not float64; multiply by 255"),
        (image.astype(np.float32) / 255, r"uint8, not float32; multiply by 255"),
        (image[..., 0], r"shape \(height, width, 3\)"),
        (image.transpose(2, 0, 1), r"shape \(height, width, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            predictor.set_image(wrong)
    with pytest.raises(ValueError, match="'RGB' or 'BGR', not 'rgb'"):
        predictor.set_image(image, "rgb")
    assert np.array_equal(predictor.get_image_embedding(), before)


ONE = np.array([[10.0, 10.0]])
REFUSED = {
    "label 2": ({"point_coords": ONE, "point_labels": np.array([2])}, "one is 2"),
    "label -1": ({"point_coords": ONE, "point_labels": np.array([-1])}, "one is -1"),
    "points without labels": ({"point_coords": ONE}, "go together"),
    "labels without points": ({"point_labels": np.array([1])}, "go together"),
    "too many labels": ({"point_coords": ONE, "point_labels": np.array([1, 0])}, "one for each"),
    "a flat point": ({"point_coords": ONE[0], "point_labels": np.array([1])}, r"shape \(k, 2\)"),
    "nan": ({"point_coords": ONE * np.nan, "point_labels": np.array([1])}, "finite"),
    "a point outside": ({"point_coords": ONE + 145, "point_labels": np.array([1])}, "outside"),
    "a negative point": ({"point_coords": -ONE, "point_labels": np.array([0])}, "outside"),
    "box inverted": ({"box": np.array([50, 10, 20, 60])}, "x1 > x0"),
    "box of no height": ({"box": np.array([5, 10, 20, 10])}, "y1 > y0"),
    "box outside": ({"box": np.array([5, 10, 150.5, 60])}, "150 pixels wide and 100 high"),
    "box of two": ({"box": np.zeros((2, 4))}, "four finite numbers"),
    "mask of another size": ({"mask_input": np.zeros((1, *SIZE))}, r"shape \(1, 32, 32\)"),
    "three masks": ({"mask_input": np.zeros((3, 32, 32))}, r"shape \(1, 32, 32\)"),
}


@pytest.mark.parametrize(("prompt", "message"), REFUSED.values(), ids=REFUSED)
def test_prompts_that_are_refused(predictor, prompt, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict(**prompt)


def test_boxes_that_are_refused(predictor):
    for boxes, message in [
        (np.array([0, 0, 5, 5]), r"shape \(n, 4\)"),
        (np.zeros((0, 4)), r"n > 0"),
        (np.array([[0, 0, 5, 5], [0, 0, 5, 101]]), "outside"),
        (np.array([[0, 0, 5, 5], [9, 0, 5, 10]]), "x1 > x0"),
    ]:
        with pytest.raises(ValueError, match=message):
            predictor.predict_boxes(boxes)


def test_many_boxes_are_decoded_in_parts(predictor, monkeypatch):
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 1, (7, 2, 2)), axis=1) * (SIZE[1] - 1, SIZE[0] - 1)
    boxes = corners.reshape(7, 4) + np.array([0, 0, 1, 1])
    whole = predictor.predict_boxes(boxes, return_logits=True)
    monkeypatch.setattr("samjax.predictor.PROMPTS_PER_BATCH", 3)
    for part, expected in zip(
        predictor.predict_boxes(boxes, return_logits=True), whole, strict=True
    ):
        np.testing.assert_allclose(part, expected, atol=1e-5 * max(1, expected.std()))
