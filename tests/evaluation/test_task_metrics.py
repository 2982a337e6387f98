"""Metrics of dense tasks over a set against NumPy over all its pixels at once."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from samjax.config import Config
from samjax.data.dense import DenseSample
from samjax.evaluation.task_metrics import add, measure, relative_gain, summarize
from samjax.problems import problem_of
from samjax.task_predictor import TaskPredictor
from samjax.tasks import NYUV2, Task, find

RNG = np.random.default_rng(0)
EDGES = Task("edges", 1, "balanced_bce")
SHAPE = (2, 12, 10)


def batches(task, count=3):
    """Maps that know something of their truth, and pixels that do not count."""
    for i in range(count):
        counts = RNG.random(SHAPE) < 0.2 + 0.3 * i  # so that means of means are something else
        maps = RNG.normal(size=(SHAPE[0], task.channels, *SHAPE[1:]))
        if task.loss == "cross_entropy":
            truth = RNG.integers(0, task.channels - 2, SHAPE)
            maps[:, :-1] += 2 * (np.arange(task.channels - 1)[:, None, None] == truth[:, None])
            maps[:, -1] = -99  # a class that nothing has
            yield maps.astype(np.float32), np.where(counts, truth, -1).astype(np.int32)
            continue
        if task.loss == "balanced_bce":
            truth = RNG.integers(0, 2, SHAPE)
            maps += 1.5 * truth[:, None] - 1
            yield maps.astype(np.float32), np.where(counts, truth, -1).astype(np.int32)
            continue
        truth = RNG.normal(size=maps.shape)
        truth = np.abs(truth) + 0.2 if task.channels == 1 else truth
        if task.channels == 3:
            truth /= np.linalg.norm(truth, axis=1, keepdims=True)
        maps = truth + 0.5 * maps
        yield maps.astype(np.float32), np.where(counts[:, None], truth, 0).astype(np.float32)


def pixels(task, data):
    """Predictions and truths of all pixels that count, (pixels, channels), in float64."""
    maps = np.concatenate([np.moveaxis(m, 1, -1).reshape(-1, task.channels) for m, _ in data])
    if task.loss in ("cross_entropy", "balanced_bce"):
        truth = np.concatenate([t.ravel() for _, t in data])
        own = maps.argmax(-1) if task.channels > 1 else 1 / (1 + np.exp(-maps[:, 0]))
        return own[truth != -1], truth[truth != -1]
    truth = np.concatenate([np.moveaxis(t, 1, -1).reshape(-1, task.channels) for _, t in data])
    known = truth.any(-1)
    return maps[known].astype(np.float64), truth[known].astype(np.float64)


def expected(task, data):
    ours, truth = pixels(task, data)
    if task.loss == "cross_entropy":
        ious = []
        for k in range(task.channels):
            both, either = ((ours == k) & (truth == k)).sum(), ((ours == k) | (truth == k)).sum()
            ious += [both / either] if either else []
        return {"miou": np.mean(ious), "pixel_accuracy": (ours == truth).mean()}
    if task.loss == "balanced_bce":
        scores = []
        for level in range(256):
            found = np.floor(ours * 256) >= level
            scores.append(2 * (found & (truth == 1)).sum() / (found.sum() + truth.sum()))
        found = ours >= 0.5
        both, either = (found & (truth == 1)).sum(), (found | (truth == 1)).sum()
        return {"max_f": max(scores), "iou": both / either}
    if task.loss == "masked_l1":
        error = np.abs(ours - truth)
        return {"absolute_error": error.mean(), "relative_error": (error / truth).mean()}
    cosine = (ours * truth).sum(-1) / np.linalg.norm(ours, axis=-1)
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    return {
        "mean_angle": angle.mean(),
        "median_angle": np.median(angle),
        **{f"within_{limit:g}": (angle < limit).mean() for limit in (11.25, 22.5, 30)},
    }


@pytest.mark.parametrize("task", (*NYUV2, EDGES), ids=lambda task: task.name)
def test_metrics_are_those_of_all_pixels(task):
    data = list(batches(task))
    counts = None
    for maps, truth in data:
        counts = add(counts, measure(task, jnp.asarray(maps), jnp.asarray(truth)))
    got, want = summarize(task, counts), expected(task, data)
    assert list(got) == list(want) == list(task.metrics)
    for name, value in want.items():
        tolerance = {"median_angle": 0.2}.get(name, 1e-4)  # between pixels it is interpolated
        assert got[name] == pytest.approx(value, abs=tolerance), name


def test_a_class_that_nothing_has_does_not_count():
    """The last class of `batches`, neither in truths nor in predictions."""
    task = NYUV2[0]
    (maps, truth), *_ = batches(task)
    counts = add(None, measure(task, jnp.asarray(maps), jnp.asarray(truth)))
    counts["confusion"][: task.channels - 1, : task.channels - 1] = np.eye(task.channels - 1)
    assert summarize(task, counts)["miou"] == 1.0


def full_maps(low, resized, size):
    """A model's maps at an image's size, as the original's `postprocess_masks`."""
    torch = pytest.importorskip("torch")

    def resize(x, to):
        return torch.nn.functional.interpolate(x, to, mode="bilinear", align_corners=False)

    full = resize(torch.tensor(low)[None], (128, 128))
    return resize(full[..., : resized[0], : resized[1]], size)[0].numpy()


def near(task, maps):
    """A truth (h, w) or (h, w, channels) that lies near what maps (channels, h, w) say."""
    counts = RNG.random(maps.shape[1:]) < 0.6
    other = RNG.random(maps.shape[1:]) < 0.2
    if task.loss in ("cross_entropy", "balanced_bce"):
        said = maps.argmax(0) if task.channels > 1 else maps[0] > 0
        truth = np.where(other, RNG.integers(0, task.classes, other.shape), said)
        return np.where(counts, truth, -1).astype(np.int32)
    truth = np.moveaxis(maps, 0, -1) + 0.1 * maps.std() * RNG.normal(size=(*other.shape, 1))
    if task.loss == "cosine":
        truth /= np.linalg.norm(truth, axis=-1, keepdims=True)
    else:
        truth = np.abs(truth) + 0.1
    return np.where(counts[..., None], truth, 0).astype(np.float32)


def test_a_set_is_measured_at_the_images_own_sizes(dense):
    """Against torch's upsampling; the second batch has one image, and is filled up."""
    _, model, variables = dense
    predictor = TaskPredictor(model, variables["params"], variables["peft"])
    samples, data = [], {task.name: [] for task in model.tasks}
    for size, resized in (((40, 60), (85, 128)), ((64, 33), (128, 66)), ((50, 50), (128, 128))):
        image = RNG.integers(0, 256, (*size, 3), np.uint8)
        low, truths = predictor.predict_low_res(image), {}
        for task in model.tasks:
            maps = full_maps(low[task.name], resized, size)
            truths[task.name] = truth = near(task, maps)
            truth = truth if truth.ndim == 2 else np.moveaxis(truth, -1, 0)
            data[task.name].append((maps[None], truth[None]))
        samples.append(DenseSample(f"{size}", image, truths))
    tasks = tuple(map(str, model.tasks))
    problem = problem_of(Config(tasks=tasks, eval_batch_size=2))
    got = problem.evaluate(model, variables, samples)
    assert got.names == tuple(sample.name for sample in samples)
    assert list(got.mean) == list(got.per_image) == list(problem.titles)

    def check(values, task, data):
        for metric, value in expected(task, data).items():
            tolerance = 0.2 if metric == "median_angle" else 2e-3 * max(1, value)
            assert values[f"{task.name}/{metric}"] == pytest.approx(value, abs=tolerance)

    for task in model.tasks:
        check(got.mean, task, data[task.name])
        for i, own in enumerate(data[task.name]):
            check({k: v[i] for k, v in got.per_image.items()}, task, [own])

    unknown = {"depth": np.zeros((50, 50, 1), np.float32), "edges": np.full((50, 50), -1)}
    some = [samples[0], dataclasses.replace(samples[2], truth=samples[2].truth | unknown)]
    assert np.isnan(problem.evaluate(model, variables, some).per_image["depth/relative_error"][1])
    with pytest.raises(ValueError, match=r"task depth: no pixel of the 1 images .* has a label"):
        problem.evaluate(model, variables, some[1:])


def test_the_median_is_of_pixels():
    """With many pixels, it is exact to a bin."""
    task = find(NYUV2, "normals")
    degrees = RNG.gamma(2.0, 8.0, (1, 300, 300))
    radians = np.radians(degrees)
    maps = np.stack([np.cos(radians), np.sin(radians), 0 * radians], axis=1).astype(np.float32)
    truth = np.zeros_like(maps)
    truth[:, 0] = 1
    counts = add(None, measure(task, jnp.asarray(maps), jnp.asarray(truth)))
    assert summarize(task, counts)["median_angle"] == pytest.approx(np.median(degrees), abs=0.01)


def test_nothing_known_is_nan():
    for task in (*NYUV2, EDGES):
        maps = np.zeros((1, task.channels, 4, 4), np.float32)
        truth = np.zeros_like(maps)
        if task.loss in ("cross_entropy", "balanced_bce"):
            truth = np.full((1, 4, 4), -1, np.int32)
        counts = add(None, measure(task, jnp.asarray(maps), jnp.asarray(truth)))
        assert all(np.isnan(value) for value in summarize(task, counts).values())


def test_relative_gain():
    """Two metrics of a task weigh together as much as the five of another."""
    baseline = {f"{task.name}/{metric}": 1.0 for task in NYUV2 for metric in task.metrics}
    better = {
        **baseline,
        "segmentation/miou": 1.2,
        "depth/absolute_error": 0.8,
        "depth/relative_error": 0.8,
        "normals/within_30": 0.5,
    }
    assert relative_gain(NYUV2, better, baseline) == pytest.approx((10 + 20 - 10) / 3)
    assert relative_gain(NYUV2, baseline, baseline) == 0


def test_relative_gain_is_its_definition():
    """1/T sum_t 1/N_t sum_i (-1)^(less is better) (M - B) / B, of signs and sizes written here."""
    less = {
        "segmentation": {"miou": 0, "pixel_accuracy": 0},
        "depth": {"absolute_error": 1, "relative_error": 1},
        "normals": {
            **{"mean_angle": 1, "median_angle": 1},
            **{"within_11.25": 0, "within_22.5": 0, "within_30": 0},
        },
        "edges": {"max_f": 0, "iou": 0},
    }
    names = [f"{task}/{metric}" for task, metrics in less.items() for metric in metrics]
    found, baseline = RNG.uniform(0.1, 30, (2, len(names)))
    signs = (-1.0) ** np.array([sign for metrics in less.values() for sign in metrics.values()])
    shares = np.repeat([1 / len(metrics) for metrics in less.values()], [2, 2, 5, 2]) / 4
    want = 100 * np.sum(shares * signs * (found - baseline) / baseline)
    tasks = (*NYUV2, EDGES)
    got = relative_gain(tasks, *(dict(zip(names, row, strict=True)) for row in (found, baseline)))
    assert got == pytest.approx(want, rel=1e-12)
    # Over nothing there is no relative gain, and neither is there one of what is unknown.
    for value in (0.0, np.nan):
        unlike = {**dict.fromkeys(names, 1.0), "depth/absolute_error": value}
        assert np.isnan(relative_gain(tasks, dict.fromkeys(names, 1.0), unlike))
