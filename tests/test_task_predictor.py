"""Maps of dense tasks at an image's own size, against the model and torch's upsampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import special

import samjax
from samjax import task_predictor

RNG = np.random.default_rng(0)
SIDE = 128  # of the model's input


@pytest.fixture(scope="module")
def predictor(dense):
    _, model, variables = dense
    return samjax.TaskPredictor(model, variables["params"], variables["peft"])


def image_of(height, width):
    """Smooth, so that maps are."""
    coarse = Image.fromarray(RNG.integers(0, 256, (6, 6, 3), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def upsampled(maps, resized, size):
    """As the original's `postprocess_masks`."""
    torch = pytest.importorskip("torch")

    def resize(x, to):
        return torch.nn.functional.interpolate(x, to, mode="bilinear", align_corners=False)

    full = resize(torch.tensor(np.asarray(maps))[None], (SIDE, SIDE))
    return resize(full[..., : resized[0], : resized[1]], size)[0].numpy()


def test_predictions_are_the_models_at_the_images_size(dense, predictor):
    _, model, variables = dense
    run = jax.jit(lambda v, i, s: model.apply(v, i, s))
    compiled = task_predictor._maps._cache_size()
    for size, resized in (((90, 120), (96, 128)), ((128, 40), (128, 40)), ((33, 33), (128, 128))):
        image = image_of(*size)
        padded = np.zeros((1, SIDE, SIDE, 3), np.uint8)
        bilinear = Image.Resampling.BILINEAR
        padded[0, : resized[0], : resized[1]] = Image.fromarray(image).resize(
            resized[::-1], bilinear
        )
        maps = run(variables, jnp.asarray(padded), jnp.array([resized], jnp.int32))
        full = {name: upsampled(low[0], resized, size) for name, low in maps.items()}
        found = predictor.predict(image)
        assert list(found) == ["segmentation", "depth", "normals", "edges"]

        assert found["segmentation"].shape == size and found["segmentation"].dtype == np.int32
        ordered = np.sort(full["segmentation"], axis=0)
        clear = ordered[-1] - ordered[-2] > 1e-4 * np.std(ordered)
        same = found["segmentation"] == full["segmentation"].argmax(0)
        assert same[clear].all() and clear.mean() > 0.99
        assert found["depth"].shape == size and found["depth"].dtype == np.float32
        bound = 5e-5 * full["depth"].std()  # rounding of float32
        np.testing.assert_allclose(found["depth"], full["depth"][0], rtol=1e-5, atol=bound)
        assert found["edges"].shape == size and found["edges"].dtype == np.float32
        np.testing.assert_allclose(found["edges"], special.expit(full["edges"][0]), atol=1e-5)
        length = np.linalg.norm(full["normals"], axis=0)
        unit = (full["normals"] / length).transpose(1, 2, 0)
        assert found["normals"].shape == (*size, 3) and found["normals"].dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(found["normals"], axis=-1), 1, atol=1e-5)
        sure = length > 1e-2 * length.mean()
        np.testing.assert_allclose(found["normals"][sure], unit[sure], atol=1e-3)
    assert task_predictor._maps._cache_size() == compiled + 1  # for all the sizes


def test_some_tasks_alone(predictor):
    image = image_of(50, 70)
    every = predictor.predict(image)
    some = predictor.predict(image, ["edges", "depth"])
    assert list(some) == ["edges", "depth"]
    for name, values in some.items():
        np.testing.assert_allclose(values, every[name], rtol=1e-4, atol=1e-4)
    assert list(predictor.predict(image, "normals")) == ["normals"]


def test_what_is_refused(dense, predictor, small_model, small_params):
    _, model, variables = dense
    image = image_of(50, 70)
    with pytest.raises(ValueError, match="no task 'dept'; the nearest is depth"):
        predictor.predict(image, "dept")
    with pytest.raises(ValueError, match="tasks is empty"):
        predictor.predict(image, [])
    with pytest.raises(ValueError, match=r"must hold RGB values in \[0, 255\] as uint8"):
        predictor.predict(image / np.float32(255))
    with pytest.raises(ValueError, match=r"use samjax\.SamPredictor, or load an adapter"):
        samjax.TaskPredictor(small_model, small_params)
    message = r"\(segmentation, depth, normals, edges\).*: use samjax\.TaskPredictor"
    with pytest.raises(ValueError, match=message):
        samjax.SamPredictor(model, variables["params"], variables["peft"])
    with pytest.raises(ValueError, match=message):
        samjax.predict_batch(model, variables["params"], [image], [[samjax.Prompt()]])
