"""Metrics against NumPy and pycocotools, and the padded evaluation against the plain one."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from samjax.data.pipeline import eval_batches
from samjax.data.sources import Sample
from samjax.evaluation import evaluate as evaluate_module
from samjax.evaluation.evaluate import Evaluation, evaluate
from samjax.evaluation.metrics import overlap
from samjax.predictor import SamPredictor
from samjax.preprocess import Frame

RNG = np.random.default_rng(0)


def test_overlap_is_its_definition():
    a, b = RNG.random((6, 20, 30)) > 0.5, RNG.random((6, 20, 30)) > 0.3
    a[1] = b[1] = False
    b[2] = False
    a[3] = b[3]
    got = overlap(jnp.asarray(a), jnp.asarray(b))
    for i in range(6):
        both, either = (a[i] & b[i]).sum(), (a[i] | b[i]).sum()
        dice = 1.0 if not either else 2 * both / (a[i].sum() + b[i].sum())
        iou = 1.0 if not either else both / either
        np.testing.assert_allclose((got["dice"][i], got["iou"][i]), (dice, iou), rtol=1e-6)


def test_iou_is_pycocotools():
    coco = pytest.importorskip("pycocotools.mask")
    a, b = RNG.random((4, 25, 31)) > 0.4, RNG.random((4, 25, 31)) > 0.6
    for i in range(4):
        codes = [coco.encode(np.asfortranarray(m[i].astype(np.uint8))) for m in (a, b)]
        expected = coco.iou([codes[0]], [codes[1]], [0])[0, 0]
        np.testing.assert_allclose(
            overlap(jnp.asarray(a), jnp.asarray(b))["iou"][i], expected, rtol=1e-6
        )


class Images:
    """Images of several sizes."""

    sizes = ((128, 128), (90, 140), (200, 64), (33, 47), (128, 100))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> Sample:
        rng = np.random.default_rng(i)
        height, width = self.sizes[i]
        mask = np.zeros((height, width), bool)
        mask[height // 4 : height // 2, width // 4 :] = True
        return Sample(f"image{i}", rng.integers(0, 255, (height, width, 3), np.uint8), mask)


@pytest.mark.parametrize(
    ("prompt", "frame"),
    [
        ("none", Frame(128, 128)),
        ("box", Frame(128, 128)),
        ("box", Frame(96, 160)),
        ("box", Frame(160, 96, "stretch")),
    ],
    ids=str,
)
def test_batched_evaluation_is_one_by_one_prediction(
    small_model, small_params, prompt, frame, tmp_path
):
    config = dataclasses.replace(small_model.config, image_size=frame.shape, resize=frame.resize)
    small_model = small_model.clone(config=config)
    source = Images()
    batches = eval_batches(source, frame=frame, batch_size=2, prompts_for=prompt)
    result = evaluate(small_model, {"params": small_params}, batches)
    assert result.names == tuple(f"image{i}" for i in range(5))
    compiled = evaluate_module.predict._cache_size()
    batches = eval_batches(source, frame=frame, batch_size=2, prompts_for=prompt)
    again = evaluate(small_model, {"params": small_params}, batches)
    assert evaluate_module.predict._cache_size() == compiled  # one program for all sizes
    np.testing.assert_array_equal(again.per_image["dice"], result.per_image["dice"])

    predictor = SamPredictor(small_model, small_params)
    for i in range(5):
        sample = source[i]
        predictor.set_image(sample.image)
        ys, xs = np.nonzero(sample.mask)
        box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        masks, _, _ = predictor.predict(
            box=box if prompt == "box" else None, multimask_output=False
        )
        both = (masks[0] & sample.mask).sum()
        dice = 2 * both / max(1, masks[0].sum() + sample.mask.sum())
        assert abs(result.per_image["dice"][i] - dice) < 2e-3
    np.testing.assert_allclose(result.mean["dice"], np.mean(result.per_image["dice"]))

    result.write_csv(tmp_path / "e.csv")
    back = Evaluation.read_csv(tmp_path / "e.csv")
    assert back.names == result.names
    np.testing.assert_allclose(back.per_image["iou"], result.per_image["iou"], atol=1e-6)
    assert (tmp_path / "e.csv").read_text().splitlines()[0] == "name,dice,iou"
