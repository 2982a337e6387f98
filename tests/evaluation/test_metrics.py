"""Metrics of masks against scikit-learn, pycocotools, medpy and NumPy in float64."""

import warnings
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from samjax.config import Config
from samjax.data.prompts import PromptConfig
from samjax.evaluation.metrics import DEFAULT, METRICS, Counts, count, of_samples, of_set, quick
from samjax.evaluation.surface import hd95
from samjax.problems import problem_of

SHAPE = (30, 41)
SAMPLES = ("dice", "iou", "precision", "recall", "ber", "pixel_accuracy")
SETS = ("set_dice", "set_iou", "set_ber", "set_pixel_accuracy", "class_iou")


def pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Predictions and truths: noise, blobs, and what leaves a ratio without a whole."""
    rng = np.random.default_rng(0)

    def noise(share: float) -> np.ndarray:
        return rng.random(SHAPE) < share

    def blob() -> np.ndarray:
        return ndimage.gaussian_filter(rng.random(SHAPE), 4) > 0.5

    nothing, everything = np.zeros(SHAPE, bool), np.ones(SHAPE, bool)
    pixel, corner = nothing.copy(), nothing.copy()
    pixel[7, 11] = corner[-1, 0] = True
    shapes = blob(), blob(), blob(), blob()
    return {
        "half": (noise(0.5), noise(0.5)),
        "few": (noise(0.05), noise(0.02)),
        "most": (noise(0.9), noise(0.97)),
        "blobs": shapes[:2],
        "a noisy blob": (shapes[2] ^ noise(0.05), shapes[2]),
        "the same": (shapes[3], shapes[3]),
        "opposite": (~shapes[3], shapes[3]),
        "empty truth": (shapes[0], nothing),
        "empty prediction": (nothing, shapes[0]),
        "both empty": (nothing, nothing),
        "one pixel": (pixel, pixel),
        "one pixel of a blob": (pixel, shapes[1]),
        "two pixels": (corner, pixel),
        "one pixel and nothing": (pixel, nothing),
        "all ones": (everything, everything),
        "all predicted": (everything, shapes[0]),
        "all true": (shapes[0], everything),
        "all predicted, none true": (everything, nothing),
        "none predicted, all true": (nothing, everything),
    }


PAIRS = pairs()


def counts_of(masks) -> Counts:
    predicted, truth = (np.stack(side) for side in zip(*masks, strict=True))
    found = count(jnp.asarray(predicted), jnp.asarray(truth))
    exact = {name: np.asarray(values, np.int64) for name, values in found.items()}
    return Counts(**exact, pixels=np.full(len(truth), truth[0].size))


def by_scikit_learn(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Of flat masks; where both are empty, a ratio without a whole is 1."""
    sklearn = pytest.importorskip("sklearn.metrics")
    agree = {"zero_division": 1.0 if not (predicted.any() or truth.any()) else 0.0}
    with warnings.catch_warnings():
        # It tells of classes that no truth has, and of single ones.
        warnings.simplefilter("ignore")
        balanced = sklearn.balanced_accuracy_score(truth, predicted)
    present = np.unique([predicted, truth])
    return {
        "dice": sklearn.f1_score(truth, predicted, **agree),
        "iou": sklearn.jaccard_score(truth, predicted, **agree),
        "precision": sklearn.precision_score(truth, predicted, **agree),
        "recall": sklearn.recall_score(truth, predicted, **agree),
        "ber": 1 - balanced,
        "pixel_accuracy": sklearn.accuracy_score(truth, predicted),
        "class_iou": sklearn.jaccard_score(truth, predicted, labels=present, average="macro"),
    }


@pytest.mark.parametrize("name", PAIRS)
def test_counts_make_the_metrics_of_scikit_learn(name):
    counts = counts_of([PAIRS[name]])
    want = by_scikit_learn(*(mask.ravel() for mask in PAIRS[name]))
    got = of_samples(counts, (*SAMPLES, "mae", "set_iou"))
    assert list(got) == list(SAMPLES)
    of_one = of_set(counts, (name,), SETS)
    for metric in SAMPLES:
        np.testing.assert_allclose(got[metric], [want[metric]], rtol=0, atol=1e-12)
    for metric in SETS:
        assert of_one[metric] == pytest.approx(want[metric.removeprefix("set_")], abs=1e-12)


def test_metrics_of_a_set_are_those_of_all_its_pixels():
    masks = list(PAIRS.values())
    flat = (np.concatenate([mask.ravel() for mask in side]) for side in zip(*masks, strict=True))
    want = by_scikit_learn(*flat)
    got = of_set(counts_of(masks), tuple(PAIRS), ("mae", *SETS, "iou"))
    assert list(got) == list(SETS)
    for metric in SETS:
        assert got[metric] == pytest.approx(want[metric.removeprefix("set_")], abs=1e-12)


def test_ious_of_instances_are_pycocotools():
    coco = pytest.importorskip("pycocotools.mask")

    def code(mask):
        return coco.encode(np.asfortranarray(mask.astype(np.uint8)))

    some = [pair for name, pair in PAIRS.items() if name != "both empty"]  # there it says 0
    want = [coco.iou([code(a)], [code(b)], [0])[0, 0] for a, b in some]
    counts = counts_of(some)
    np.testing.assert_allclose(of_samples(counts, ("iou",))["iou"], want, atol=1e-12)
    # Names may hold the sign themselves, and instances of an image need not follow each other.
    owners = [("x", "x#y", "z")[i % 3] for i in range(len(some))]
    names = tuple(f"{owner}#{i}" for i, owner in enumerate(owners))
    means = [np.mean(want[k::3]) for k in range(3)]
    assert of_set(counts, names, ("image_iou",))["image_iou"] == pytest.approx(np.mean(means))


def test_counts_are_exact_beyond_float32():
    """Where the next float32 after 2**24 is two further."""
    everything = np.ones((1, 4097, 4097), bool)
    almost = everything.copy()
    almost[0, 5, 5] = almost[0, 6, 6] = almost[0, 7, 7] = False
    found = count(jnp.asarray(almost), jnp.asarray(everything))
    assert found["both"].item() == found["predicted"].item() == 4097**2 - 3
    assert found["truth"].item() == 4097**2
    many = Counts(
        both=np.array([2**40, 3]),
        predicted=np.array([2**40 + 1, 3]),
        truth=np.array([2**40 + 1, 5]),
        pixels=np.array([2**41, 7]),
    )
    got = of_set(many, ("a", "b"), ("set_iou", "set_pixel_accuracy"))
    assert got["set_iou"] == float(Fraction(2**40 + 3, 2**40 + 2 + 5))
    assert got["set_pixel_accuracy"] == float(Fraction(2**41 + 7 - 2 - 2, 2**41 + 7))


@pytest.mark.parametrize("name", PAIRS)
def test_hd95_is_medpys(name):
    medpy = pytest.importorskip("medpy.metric.binary")
    predicted, truth = PAIRS[name]
    if predicted.any() and truth.any():
        assert hd95(predicted, truth) == pytest.approx(medpy.hd95(predicted, truth), abs=1e-12)
        assert hd95(truth, predicted) == hd95(predicted, truth)
        return
    with pytest.raises(RuntimeError):  # medpy has no answer
        medpy.hd95(predicted, truth)
    missed = predicted.any() or truth.any()
    assert hd95(predicted, truth) == pytest.approx(np.hypot(30, 41) if missed else 0, abs=1e-12)


def test_what_is_quick():
    assert quick(DEFAULT) == ("dice", "iou")
    slow = {"s_measure", "mean_e_measure", "weighted_f_measure", "mae", "hd95"}
    assert set(METRICS) - set(quick(tuple(METRICS))) == slow


BOXES = PromptConfig(none=0.0, box=1.0)


def test_a_config_chooses_its_metrics():
    assert Config().measured == DEFAULT and Config().best == ("dice", True)
    some = Config(metrics=("hd95", "ber", "hd95"))
    assert some.measured == ("hd95", "ber") and some.best == ("hd95", False)
    assert Config(metrics=("iou", "ber"), best_metric="ber").best == ("ber", False)
    assert Config(metrics=("set_iou",)).best == ("set_iou", True)
    assert list(problem_of(some).titles.values()) == ["HD95 (px)", "BER"]
    each = Config(metrics=("image_iou",), objects="each", prompts=BOXES)
    assert each.best == ("image_iou", True)
    # To name what is measured anyway is no change.
    assert Config().resolved() == Config(metrics=DEFAULT).resolved()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ("dce",)}, r"metrics has 'dce', .*; the nearest is dice"),
        ({"metrics": ("iou", "F1")}, r"metrics has 'F1', .*; the nearest is dice"),
        ({"metrics": ("image_iou",)}, "set objects each, or take iou"),
        ({"best_metric": "ber"}, "best_metric ber is not measured: add it to metrics"),
        ({"best_metric": "ou"}, r"one of dice, .*, not 'ou'; the nearest is iou"),
        ({"metrics": ("ber",), "best_metric": "dice"}, "is not measured"),
        ({"metrics": ("dice",), "tasks": ("depth:1:masked_l1",)}, "leave out metrics"),
        ({"eval_box_outward": 20}, "the evaluation's prompt is none: set eval_prompt box"),
        ({"eval_box_outward": -1}, "eval_box_outward must not be negative"),
    ],
    ids=str,
)
def test_metrics_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)
