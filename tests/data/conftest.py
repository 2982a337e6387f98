"""What tests of datasets share: building one, and a training step on it."""

import io

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from samjax import peft
from samjax.data.augment import NO_AUGMENTATION
from samjax.data.builders.prepare import prepare
from samjax.data.pipeline import train_batches
from samjax.data.prompts import PromptConfig
from samjax.models import Sam, SamConfig, VitConfig
from samjax.peft import PeftSpec, Rule, Train
from samjax.training.objective import MaskObjective
from samjax.training.step import (
    OptimizerConfig,
    init_state,
    make_optimizer,
    make_train_step,
    trained_labels,
)

SIDE = 64


@pytest.fixture(scope="session")
def build():
    """Builds a dataset in a folder, from a folder, and says nothing."""
    return lambda name, data_dir, manual_dir: prepare(
        name, data_dir, manual_dir, Console(file=io.StringIO(), soft_wrap=True)
    )


@pytest.fixture(scope="session")
def train_one_step(draw_params):
    """Trains a tiny model for a step on two objects of a source, and returns the loss."""
    encoder = VitConfig(
        embed_dim=16, depth=1, num_heads=2, global_attn_indexes=(0,), pretrain_grid=4
    )
    model = Sam(
        SamConfig(
            "tiny",
            encoder,
            image_size=SIDE,
            prompt_embed_dim=16,
            decoder_depth=1,
            decoder_mlp_dim=32,
        )
    )
    spec = PeftSpec((Rule("mask_decoder/output_hypernetworks_mlps_*/**", Train()),))
    variables = {"params": jax.tree.map(jnp.asarray, draw_params(model)), "peft": {}}
    train, frozen = peft.partition(variables, peft.trainable(spec, model, variables))
    labels = trained_labels(peft.groups(spec, model, variables))
    optimizer = make_optimizer(OptimizerConfig(warmup=0.0), 10, labels, 1e-3)
    step = make_train_step(model, optimizer, objective=MaskObjective())

    def run(source):
        batch = train_batches(
            source,
            frame=model.config.frame,
            batch_size=2,
            seed=0,
            prompts=PromptConfig(none=0.0, box=1.0),
            augment=NO_AUGMENTATION,
        )[0]
        assert batch["mask"].any(axis=(1, 2)).all()
        copied = jax.tree.map(jnp.array, train)  # the step donates its state
        _, logs = step(init_state(copied, optimizer), frozen, batch)
        assert int(logs["bad_leaf"]) == -1 and logs["grad_norm"] > 0
        return float(logs["loss"])

    return run
