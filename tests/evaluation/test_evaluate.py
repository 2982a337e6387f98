"""The padded evaluation of many images against the plain one of each."""

import dataclasses

import numpy as np
import pytest

from samjax.config import Config
from samjax.data.pipeline import eval_batches
from samjax.data.prompts import PromptConfig
from samjax.data.sources import Sample
from samjax.evaluation import evaluate as evaluate_module
from samjax.evaluation.evaluate import Evaluation, evaluate
from samjax.predictor import SamPredictor
from samjax.preprocess import Frame
from samjax.problems import problem_of


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


class Objects(Images):
    """The same as two objects of one image, two of another, and one of a third."""

    owners = ("a#1", "a#7", "b#2", "b#3", "c#1")

    def __getitem__(self, i: int) -> Sample:
        return dataclasses.replace(super().__getitem__(i), name=self.owners[i])


def test_an_evaluation_measures_what_it_is_asked_for(small_model, small_params, tmp_path):
    """Against NumPy on the masks that it predicts; the last batch is filled up."""
    medpy = pytest.importorskip("medpy.metric.binary")
    frame, source, masks = small_model.config.frame, Objects(), []
    batches = eval_batches(source, frame=frame, batch_size=2, prompts_for="box")
    metrics = ("set_iou", "hd95", "image_iou", "mae", "recall")
    result = evaluate(
        small_model,
        {"params": small_params},
        batches,
        lambda batch, found: masks.extend(found[batch["valid"]]),
        metrics=metrics,
    )
    assert list(result.per_image) == ["hd95", "mae", "recall"]
    assert list(result.of_set) == ["set_iou", "image_iou"]
    ious, both, either = [], 0, 0
    for i, found in enumerate(masks):
        truth = source[i].mask
        mask = found[: truth.shape[0], : truth.shape[1]]
        hits, area = (mask & truth).sum(), (mask | truth).sum()
        ious.append(hits / area)
        both, either = both + hits, either + area
        assert result.per_image["recall"][i] == pytest.approx(hits / truth.sum())
        assert result.per_image["hd95"][i] == pytest.approx(medpy.hd95(mask, truth))
    assert result.mean["set_iou"] == pytest.approx(both / either)
    per_image = (ious[0] + ious[1]) / 2, (ious[2] + ious[3]) / 2, ious[4]
    assert result.mean["image_iou"] == pytest.approx(np.mean(per_image))

    result.write_csv(tmp_path / "e.csv")
    first, *_, last = (tmp_path / "e.csv").read_text().splitlines()
    assert first == "name,hd95,mae,recall,set_iou,image_iou"
    assert last == f"(whole set),,,,{result.mean['set_iou']:.6f},{result.mean['image_iou']:.6f}"
    back = Evaluation.read_csv(tmp_path / "e.csv")
    assert back.names == source.owners and list(back.mean) == list(result.mean)
    for metric, value in result.mean.items():
        assert back.mean[metric] == pytest.approx(value, abs=1e-6)

    config = Config(
        objects="each",
        prompts=PromptConfig(none=0.0, box=1.0),
        metrics=(*metrics, "s_measure"),
        best_metric="mae",
        eval_batch_size=2,
    )
    problem = problem_of(config)
    brief = problem.evaluate(small_model, {"params": small_params}, source, briefly=True)
    assert list(brief.mean) == ["recall", "mae", "set_iou", "image_iou"]  # of the slow, the best
    assert brief.mean["mae"] == result.mean["mae"]


def test_a_csv_that_is_no_evaluation(tmp_path):
    for text in ("name,dice\n", "name,dice,set_iou\na,0.5,\n", "name,dice\na,0.5\nb,\n"):
        (tmp_path / "e.csv").write_text(text)
        with pytest.raises(ValueError, match=r"e\.csv is damaged"):
            Evaluation.read_csv(tmp_path / "e.csv")
