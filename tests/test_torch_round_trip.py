"""Trained here, used in PyTorch: LoRA, merged, under Meta's names, in `segment_anything`."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import samjax
from samjax import cli
from samjax.models import MODELS, Sam
from samjax.weights import save_checkpoint

EXPERIMENT = '''"""LoRA for a few steps."""

from samjax.config import Config
from samjax.training.step import OptimizerConfig


def config():
    return Config(
        optimizer=OptimizerConfig(learning_rate=0.01, warmup=0.0),
        steps={steps}, batch_size=1, eval_batch_size=1, gallery=1, log_every=1,
    )
'''
PROMPTS = {
    "point": {"point_coords": np.array([[60.0, 50.0]]), "point_labels": np.array([1])},
    "box": {"box": np.array([20.0, 15.0, 110.0, 95.0])},
    "none": {},
}


def write_data(folder):
    """Bright discs on noise; the masks are theirs."""
    for index, split in enumerate(("train", "train", "test")):
        rng = np.random.default_rng(index)
        y, x = np.mgrid[:120, :160]
        mask = (y - rng.integers(40, 80)) ** 2 + (x - rng.integers(50, 110)) ** 2 < 30**2
        image = (rng.integers(0, 80, (120, 160, 3)) + 140 * mask[..., None]).astype(np.uint8)
        for kind, array in (("images", image), ("masks", mask)):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / split / kind / f"{index}.png")


@pytest.mark.parametrize(
    "name, steps", [("small", 6), pytest.param("vit_b", 3, marks=pytest.mark.slow)]
)
def test_masks_in_torch_are_the_trained_models(
    name, steps, small_config, draw_params, torch_sam, segment_anything, tmp_path, report_lines
):
    from safetensors.torch import load_file

    config = {"small": small_config, **MODELS}[name]
    params = draw_params(Sam(config))
    save_checkpoint(tmp_path / "base", config, params)
    write_data(tmp_path / "data")
    (tmp_path / "few.py").write_text(EXPERIMENT.format(steps=steps))
    base = ["--weights", str(tmp_path / "base")]
    data, run = ["--data", str(tmp_path / "data")], tmp_path / "run"
    assert not cli.main(["train", str(tmp_path / "few.py"), *base, *data, "--out", str(run)])
    adapter, merged = run / "adapter.safetensors", tmp_path / "merged.safetensors"
    flags = ["--adapter", str(adapter), str(merged), "--to", "meta"]
    assert not cli.main(["merge", *base, *flags])

    reference = torch_sam(config, params)
    reference.load_state_dict(load_file(merged), strict=True)
    theirs = segment_anything.SamPredictor(reference)
    ours = samjax.SamPredictor(*samjax.load_adapted(tmp_path / "base", adapter))
    before = samjax.SamPredictor(*samjax.load(tmp_path / "base"))
    image = np.asarray(Image.open(tmp_path / "data/test/images/2.png"))
    for predictor in (ours, theirs, before):
        predictor.set_image(image)
    agreeing, worst, changed = [], 0.0, 0.0
    for prompt in PROMPTS.values():
        options = {**prompt, "return_logits": True}
        (mine, _, low), (their, _, their_low), (_, _, old) = (
            predictor.predict(**options) for predictor in (ours, theirs, before)
        )
        agreeing.append(np.mean((mine > 0) == (their > 0)))
        worst = max(worst, np.abs(low - their_low).max() / their_low.std())
        changed = max(changed, np.abs(low - old).max() / old.std())
    report_lines.append(
        f"{name}, {steps} steps of LoRA and decoder, merged, in segment-anything: logits within "
        f"{worst:.1e} deviations, {100 * np.mean(agreeing):.4f} % of pixels agree; training moved "
        f"them by {changed:.2f}"
    )
    assert worst <= 1e-3 and min(agreeing) >= 0.9999
    assert changed > 0.1, "otherwise this would show little"
    lora = [v for k, v in samjax.peft.read(adapter).tensors.items() if k.endswith("/b")]
    assert lora and all(np.abs(b).max() > 0 for b in lora)
    assert json.loads((run / "summary.json").read_text())["steps"] == steps
    assert jax.tree.all(jax.tree.map(np.array_equal, params, samjax.load(tmp_path / "base")[1]))
