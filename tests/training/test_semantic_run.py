"""A run of a semantic head on label images: it learns, and its adapter is the model it trained."""

import dataclasses
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import samjax
from samjax import cli, peft
from samjax.config import Config, OptimizerConfig
from samjax.data.dense_augment import DenseAugmentConfig
from samjax.data.images import read_image
from samjax.models import Sam
from samjax.peft import MethodConfig
from samjax.run import train
from samjax.tasks import Task
from samjax.weights import save_checkpoint

COLOURS = np.uint8([(40, 60, 50), (220, 60, 40), (60, 90, 230)])  # of ground and two classes
COUNTS = {"train": 24, "val": 2, "test": 3}


def scene(rng):
    """An image with a block of one class, or of both, and its labels; a border has none."""
    height, width = 48, 64
    labels = np.zeros((height, width), np.uint8)
    kinds = ((1,), (2,), (1, 2))[rng.integers(3)]
    for kind in kinds:
        top, left = rng.integers(2, 22), rng.integers(2, 8) + 30 * (kind - 1)
        labels[top : top + 22, left : left + 22] = kind
    noise = rng.integers(0, 20, (height, width, 3), np.uint8)
    image = COLOURS[labels] + noise
    labels[:, :2] = 255
    return image, labels


@pytest.fixture(scope="module")
def config(tmp_path_factory, small_config, draw_params):
    root = tmp_path_factory.mktemp("semantic")
    shallow = dataclasses.replace(small_config, decoder_depth=1)
    save_checkpoint(root / "weights", shallow, draw_params(Sam(shallow)))
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for place in ("images", "labels"):
            (root / "data" / split / place).mkdir(parents=True)
        for i in range(count):
            for place, array in zip(("images", "labels"), scene(rng), strict=True):
                Image.fromarray(array).save(root / "data" / split / place / f"{i}.png")
    return Config(
        weights=str(root / "weights"),
        data=str(root / "data"),
        tasks=("segmentation:3:mask_classification",),
        method=MethodConfig("lora", rank=2),
        optimizer=OptimizerConfig(learning_rate=3e-3, decoder_learning_rate=1e-2),
        dense_augment=DenseAugmentConfig(scales=(1.0,)),
        image_size=64,
        steps=120,
        batch_size=4,
        validate_every=60,
        keep="best",
        checkpoint_every=120,
        log_every=40,
        gallery=1,
    )


def run(config, out):
    return train(config, out, resume=False, console=Console(file=io.StringIO(), width=400))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, run(config, out)


def confusion_of(pairs):
    """Truth by prediction, over the pixels that have a label."""
    found = np.zeros((3, 3), int)
    for truth, predicted in pairs:
        np.add.at(found, (truth[truth != 255], predicted[truth != 255]), 1)
    return found


def test_it_learns_the_classes(whole, config):
    """At first all scores are alike, and everything is class 0: a mean IoU of its share / 3."""
    out, summary = whole
    files = sorted(os.listdir(os.path.join(config.data, "test/labels")))
    truths = [np.asarray(Image.open(os.path.join(config.data, "test/labels", f))) for f in files]
    confusion = confusion_of([(truth, np.zeros_like(truth)) for truth in truths])
    ground = confusion[0, 0] / confusion.sum()
    assert summary["before"] == pytest.approx(
        {"segmentation/miou": ground / 3, "segmentation/pixel_accuracy": ground}, abs=1e-6
    )
    assert summary["after"]["segmentation/miou"] > 0.6
    assert summary["best_validation"]["segmentation/miou"] > 0.6
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss_segmentation"] for line in lines if "loss_segmentation" in line]
    assert losses[-1] < losses[0] / 2

    # The metrics are those of what the adapter predicts for the files.
    predictor = samjax.TaskPredictor(
        *samjax.load_adapted(config.weights, out / "adapter.safetensors")
    )
    images = [read_image(Path(config.data, "test/images", file)) for file in files]
    predicted = [predictor.predict(image)["segmentation"] for image in images]
    assert all(classes.dtype == np.int32 for classes in predicted)
    confusion = confusion_of(list(zip(truths, predicted, strict=True)))
    hits = np.diag(confusion)
    ious = hits / (confusion.sum(0) + confusion.sum(1) - hits)
    assert summary["after"] == pytest.approx(
        {
            "segmentation/miou": ious.mean(),
            "segmentation/pixel_accuracy": hits.sum() / confusion.sum(),
        },
        abs=2e-3,
    )


def test_the_adapter_has_the_head_and_nothing_else_has_moved(whole, config):
    out, _ = whole
    adapter = peft.read(out / "adapter.safetensors")
    assert adapter.tasks == (Task("segmentation", 3, "mask_classification"),)
    own = {name.removeprefix("params/") for name in adapter.tensors if name.startswith("params/")}
    parts = {name.split("/")[1] for name in own if name.startswith("mask_decoder_segmentation/")}
    assert parts == {
        "iou_token",
        "mask_tokens",
        "transformer",
        "output_classifier",
        "output_hypernetworks_mlps_0",
        *(f"output_upscaling_{i}" for i in (0, 1, 3)),
    }
    others = {name for name in own if not name.startswith("mask_decoder_segmentation/")}
    assert others == {"no_mask_embed_segmentation/embedding"}
    tokens = adapter.tensors["params/mask_decoder_segmentation/mask_tokens/embedding"]
    assert np.abs(tokens[0] - tokens[1]).max() > 1e-3
    assert any(name.startswith("peft/image_encoder/") for name in adapter.tensors)


def test_verbs_take_it(whole, config, tmp_path):
    """`predict`, and `merge`, whose rest predicts what the adapter does."""
    out, _ = whole
    image = os.path.join(config.data, "test/images/0.png")
    adapter, rest = str(out / "adapter.safetensors"), str(tmp_path / "rest.safetensors")
    merged = str(tmp_path / "merged")
    options = ["--weights", config.weights, "--adapter", adapter, "--task", "segmentation"]
    assert cli.main(["merge", merged, *options, "--rest", rest, "--no-verify"]) == 0
    for name, weights, file in (("one", config.weights, adapter), ("two", merged, rest)):
        options = ["--weights", weights, "--adapter", file, "--task", "all", "--save-logits"]
        assert cli.main(["predict", image, *options, "--out", str(tmp_path / name)]) == 0
    one, two = (np.load(tmp_path / name / "logits.npz")["segmentation"] for name in ("one", "two"))
    assert one.shape == (3, 16, 16) and one.min() >= 0
    np.testing.assert_allclose(one, two, atol=1e-4)
    with Image.open(tmp_path / "one/segmentation.png") as picture:
        assert picture.size == (64, 48)


def test_matched_tokens_train_too(config, tmp_path):
    """Of more tokens than classes."""
    tasks = ("segmentation:3:mask_classification:1:6",)
    changes = {"steps": 2, "validate_every": None, "keep": "last", "tasks": tasks}
    config = dataclasses.replace(config, method=MethodConfig("decoder"), **changes)
    summary = run(config, tmp_path / "run")
    assert all(0 <= value <= 1 for value in summary["after"].values())
    adapter = peft.read(tmp_path / "run/adapter.safetensors")
    tokens = adapter.tensors["params/mask_decoder_segmentation/mask_tokens/embedding"]
    assert tokens.shape == (6, 32) and adapter.tasks[0].tokens == 6
