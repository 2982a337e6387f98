"""Public datasets of dense tasks as TFDS has them train: a step of a tiny model on each."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from samjax import peft
from samjax.data.builders.prepare import prepare
from samjax.data.dense import open_dense
from samjax.data.dense_augment import DenseAugmentConfig
from samjax.data.dense_pipeline import dense_train_batches
from samjax.models import MSam, Sam, SamConfig, VitConfig
from samjax.models.msam import msam_params
from samjax.peft import PeftSpec, Rule, Train
from samjax.tasks import CITYSCAPES, Task
from samjax.training.step import (
    OptimizerConfig,
    init_state,
    make_optimizer,
    make_train_step,
    trained_labels,
)
from samjax.training.task_objective import TaskObjective


@pytest.fixture
def cityscapes(tmp_path, monkeypatch):
    """What is extracted of the archives, for two streets to train and one to test; prepared."""
    rng = np.random.default_rng(0)
    for split, name in (("train", "ulm_0"), ("train", "ulm_1"), ("val", "bonn_0")):
        kinds = {
            "leftImg8bit": ("leftImg8bit", rng.integers(0, 256, (64, 128, 3), np.uint8)),
            "gtFine": ("gtFine_labelIds", rng.integers(0, 34, (64, 128), np.uint8)),
            "disparity": ("disparity", rng.integers(0, 32258, (64, 128), np.uint16)),
        }
        for kind, (ending, pixels) in kinds.items():
            folder = tmp_path / kind / split / name[:-2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{name}_{ending}.png")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    prepare("cityscapes", tmp_path / "tfds", tmp_path, Console(file=io.StringIO()))


def step_on(data: str, tasks: tuple[Task, ...], draw_params) -> dict[str, float]:
    """The logs of a step on two samples, which trains the ends of a tiny model's decoders."""
    encoder = VitConfig(
        embed_dim=16, depth=1, num_heads=2, global_attn_indexes=(0,), pretrain_grid=4
    )
    size = {"image_size": 64, "prompt_embed_dim": 16, "decoder_depth": 1, "decoder_mlp_dim": 32}
    model = MSam(SamConfig("tiny", encoder, **size), tasks=tasks)
    params = msam_params(draw_params(Sam(model.config)), model)
    spec = PeftSpec((Rule("**/output_hypernetworks_mlps_*/**", Train()),))
    variables = {"params": jax.tree.map(jnp.asarray, params), "peft": {}}
    train, frozen = peft.partition(variables, peft.trainable(spec, model, variables))
    labels = trained_labels(peft.groups(spec, model, variables))
    optimizer = make_optimizer(OptimizerConfig(), 10, labels, 1e-3)
    step = make_train_step(model, optimizer, objective=TaskObjective())
    batches = dense_train_batches(
        open_dense(data, "train", tasks),
        tasks,
        frame=model.config.frame,
        augment=DenseAugmentConfig(),
        seed=0,
        batch_size=2,
    )
    _, logs = step(init_state(train, optimizer), frozen, batches[0])
    return {name: float(value) for name, value in logs.items()}


def test_cityscapes_trains(cityscapes, draw_params):
    logs = step_on("tfds:cityscapes", CITYSCAPES, draw_params)
    assert logs["bad_leaf"] == -1 and logs["grad_norm"] > 0
    assert logs["loss_segmentation"] > 0 and logs["loss_disparity"] > 0
    assert logs["loss"] == pytest.approx(logs["loss_segmentation"] + logs["loss_disparity"])
