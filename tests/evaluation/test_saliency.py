"""The measures of salient objects against PySODMetrics, and in an evaluation."""

import numpy as np
import pytest
from scipy import ndimage, special

from samjax.data.pipeline import eval_batches
from samjax.data.sources import Sample
from samjax.evaluation.evaluate import evaluate
from samjax.evaluation.saliency import saliency


def pairs():
    """Smooth truths and maps that know more or less of them."""
    rng = np.random.default_rng(0)
    for i in range(12):
        shape = tuple(rng.integers(20, 90, 2))
        truth = ndimage.gaussian_filter(rng.random(shape), 4) > 0.5
        noise = rng.random(shape)
        yield f"noise {i}", np.clip((1 - i / 12) * truth + i / 12 * noise, 0, 1), truth
    shape = (31, 40)
    blob = ndimage.gaussian_filter(rng.random(shape), 4) > 0.5
    yield "perfect", blob.astype(np.float64), blob
    yield "opposite", 1.0 - blob, blob
    yield "constant", np.full(shape, 0.3), blob
    yield "empty truth", noise[:20, :20], np.zeros((20, 20), bool)
    yield "full truth", noise[:20, :20], np.ones((20, 20), bool)
    one = np.zeros((20, 20), bool)
    one[3, 5] = True
    yield "one pixel", noise[:20, :20], one


@pytest.mark.parametrize(
    ("probability", "truth"), [pytest.param(p, t, id=i) for i, p, t in pairs()]
)
def test_measures_are_those_of_pysodmetrics(probability, truth):
    package = pytest.importorskip("py_sod_metrics")
    measures = {
        "s_measure": (package.Smeasure(), lambda r: r["sm"]),
        "mean_e_measure": (package.Emeasure(), lambda r: r["em"]["curve"].mean()),
        "weighted_f_measure": (package.WeightedFmeasure(), lambda r: r["wfm"]),
        "mae": (package.MAE(), lambda r: r["mae"]),
    }
    got = saliency(probability, truth)
    assert list(got) == list(measures)
    for name, (measure, read) in measures.items():
        measure.step(probability * 255, truth.astype(np.uint8) * 255)
        np.testing.assert_allclose(got[name], read(measure.get_results()), rtol=1e-9, atol=1e-12)


def test_an_object_at_the_last_pixel_has_a_structure():
    """Where the package divides by an area of nothing."""
    truth = np.zeros((9, 7), bool)
    truth[-1, -1] = True
    assert saliency(truth.astype(float), truth)["s_measure"] == pytest.approx(1)


class Images:
    """Three images of three sizes."""

    sizes = ((128, 128), (90, 140), (33, 47))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> Sample:
        rng = np.random.default_rng(i)
        mask = ndimage.gaussian_filter(rng.random(self.sizes[i]), 6) > 0.5
        return Sample(f"image{i}", rng.integers(0, 255, (*mask.shape, 3), np.uint8), mask)


def test_an_evaluation_measures_each_image_at_its_own_size(small_model, small_params, monkeypatch):
    from samjax.evaluation import evaluate as module

    seen = []

    def spy(probability, truth, names):
        seen.append((probability, truth))
        return saliency(probability, truth, names)

    monkeypatch.setattr(module, "saliency", spy)
    source, masks = Images(), []
    batches = eval_batches(source, frame=small_model.config.frame, batch_size=2, prompts_for="none")
    result = evaluate(
        small_model,
        {"params": small_params},
        batches,
        lambda batch, predicted: masks.extend(predicted),
        metrics=("dice", "weighted_f_measure", "mae"),
    )
    assert list(result.per_image) == ["dice", "weighted_f_measure", "mae"]
    assert sorted(p.shape for p, _ in seen) == sorted(source.sizes)  # the filling row is left out
    by_shape = {p.shape: p for p, _ in seen}
    for i, shape in enumerate(source.sizes):
        p = by_shape[shape]
        np.testing.assert_array_equal(p > 0.5, masks[i][: shape[0], : shape[1]])
        expected = saliency(p, source[i].mask, ("weighted_f_measure", "mae"))
        assert len(expected) == 2
        for name, value in expected.items():
            assert result.per_image[name][i] == value
    assert special.expit(0.0) == 0.5  # the masks' threshold as a probability
