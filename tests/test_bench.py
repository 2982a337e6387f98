"""`samjax bench`, but its methods, at sizes of no interest."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from samjax.bench.programs import DoesNotFit, Program
from samjax.cli import main
from samjax.models import MODELS


@pytest.fixture(autouse=True)
def small(monkeypatch, small_config, tiny_model):
    monkeypatch.setitem(MODELS, "small", small_config)
    monkeypatch.setitem(MODELS, "tiny", tiny_model.config)


def bench(capsys, *args: str):
    """The JSON of `samjax bench ARGS`, and what it shows."""
    code = main(["bench", *args, "--json"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return json.loads(shown.out), shown.err


def flops(tokens: int, side: int, width: int, patch: int) -> int:
    """Of the small encoder, written out by hand: a block of windows of 4 x 4, and a global one."""

    def block(keys: int, rows: int) -> int:
        linear = 2 * tokens * width * 12 * width  # qkv, projection, MLP
        return linear + 2 * tokens * width * 2 * keys + 2 * tokens * width * 2 * rows

    neck = 2 * tokens * width * (width + 9 * width)
    return block(16, 4) + block(tokens, side) + 2 * tokens * patch**2 * 3 * width + neck


def test_encoders_side_by_side(capsys):
    options = ("--model", "small", "--batch-size", "1", "2", "--rounds", "2")
    result, shown = bench(capsys, "encoder", *options)
    rows = result["encoders"]
    named = [(row["attention"], row["batch_size"]) for row in rows]
    assert named == [("chunked", 1), ("chunked", 2), ("dense", 1), ("dense", 2)]
    assert rows[0]["ratio"] == 1
    for row in rows:
        assert row["flops"] == row["batch_size"] * flops(tokens=64, side=8, width=32, patch=16)
        assert len(row["all_seconds"]) == 2 and row["compile_seconds"] > 0
        assert row["images_per_second"] == pytest.approx(row["batch_size"] / row["seconds"])
        rate = row["flops"] / row["seconds"] / row["product_flop_per_second"]
        assert row["share_of_product_rate"] == pytest.approx(rate)
        assert row["temporary_bytes"] > 0
    assert "image encoder of small at 128 x 128 px" in shown and "dense" in shown


def test_the_step_of_an_experiment(capsys, tmp_path, quick_compilation):
    file = tmp_path / "mine.py"
    file.write_text(
        "from samjax.config import Config\nfrom samjax.peft import MethodConfig\n"
        "def config():\n    return Config(batch_size=2, method=MethodConfig('last_k'))\n"
    )
    options = ("--what", str(file), "--model", "small", "--remat", "blocks", "--rounds", "1")
    result, shown = bench(capsys, "train", *options)
    (row,) = result["steps"]
    assert row["remat"] == "blocks" and row["batch_size"] == 2  # the latter the experiment's
    # What is computed twice is no work that is needed.
    assert row["flops"] > row["needed_flops"]
    rate = row["needed_flops"] / row["seconds"] / row["product_flop_per_second"]
    assert row["share_of_product_rate"] == pytest.approx(rate)
    assert "training step of" in shown and "mine.py" in shown


def test_a_step_from_cached_features(capsys, quick_compilation):
    options = ("--what", "decoder", "--model", "small", "--cache-features", "off", "on")
    result, shown = bench(capsys, "train", *options, "--rounds", "1")
    whole, cached = result["steps"]
    assert (whole["cache_features"], cached["cache_features"]) == ("off", "on")
    # All of the encoder comes before the mask decoder: its products are what is spared.
    assert whole["flops"] - cached["flops"] == flops(tokens=64, side=8, width=32, patch=16)
    assert "features" in shown


def test_features_need_something_before_what_trains(capsys):
    code = main(["bench", "train", "--what", "full", "--model", "small", "--cache-features", "on"])
    assert code != 0
    assert "leaves nothing out of a step of full" in " ".join(capsys.readouterr().err.split())


def test_the_parts_of_an_evaluation(capsys, quick_compilation):
    options = ("--model", "tiny", "--batch-size", "2", "--truth-size", "40", "60", "--rounds", "2")
    result, shown = bench(capsys, "eval", *options)
    rows = {row["part"]: row for row in result["parts"]}
    assert list(rows) == ["model", "counts", "saliency", "hd95"] and rows["model"]["ratio"] == 1
    assert rows["model"]["flops"] > rows["counts"]["flops"] > 0
    metrics = [rows[part] for part in ("counts", "saliency", "hd95")]
    for row in metrics:
        assert row["pixels_per_second"] == pytest.approx(row["images_per_second"] * 40 * 60)
    assert rows["saliency"]["flops"] is None and rows["model"]["pixels_per_second"] is None
    together = result["metrics_pixels_per_second"]["2"]
    assert together == pytest.approx(2 * 40 * 60 / sum(row["seconds"] for row in metrics))
    assert "images of 40 x 60 px" in shown and "million pixels/s in batches of 2" in shown


def test_the_pipeline_beside_its_step(capsys, monkeypatch, tmp_path):
    step = types.SimpleNamespace(run=lambda: 0.5)
    monkeypatch.setattr("samjax.bench.data.open_step", lambda model, config, params: step)
    for i in range(3):
        for kind, image in (
            ("images", np.full((30, 40, 3), 60 * i, np.uint8)),
            ("masks", np.eye(30, 40, dtype=np.uint8) * 255),
        ):
            (tmp_path / "train" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / "train" / kind / f"{i}.png")
    options = ("--model", "tiny", "--method", "sam_parser", "--batch-size", "2", "--rounds", "1")
    for data, images in ((("--data", str(tmp_path)), 3), (("--size", "48", "64"), 16)):
        result, shown = bench(capsys, "data", *options, *data)
        assert result["images"] == images and result["step_images_per_second"] == 4
        fed = np.array(result["all_seconds"]["pipeline"]) / 16  # images a round
        assert result["ratio"] == pytest.approx(0.25 / fed[0])
        assert set(result["parts"]) == {"decode", "augment", "prompts", "resize"}
        assert result["bottleneck"] in result["parts"]
        assert f"most of its time goes to {result['bottleneck']}" in shown


def test_what_does_not_fit_is_left_out(capsys, monkeypatch):
    whole = Program.__init__

    def limited(self, function, *args, **twin):
        whole(self, function, *args, **twin)
        if args[-1].shape[0] == 2:
            raise DoesNotFit("needs 2 GB of memory, and there are 1 GB")

    monkeypatch.setattr(Program, "__init__", limited)
    options = ("encoder", "--model", "tiny", "--rounds", "1")
    result, shown = bench(capsys, *options, "--batch-size", "1", "2")
    fits, not_ = result["encoders"]
    assert fits["ratio"] == 1 and not_["does_not_fit"].startswith("needs 2 GB")
    assert "windows float32 2 is left out: it needs 2 GB of memory" in shown
    assert main(["bench", *options, "--batch-size", "2"]) == 1
    assert "windows float32 2 needs 2 GB of memory" in capsys.readouterr().err


def test_memory_is_asked_for_before_a_program_runs(monkeypatch):
    monkeypatch.setattr("samjax.bench.programs.available_bytes", lambda device: 1_000_000)
    with pytest.raises(DoesNotFit, match="needs 2 MB of memory, and there are 1 MB"):
        Program(jax.jit(jnp.sin), jnp.zeros((250, 1000)))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "samjax bench has no ''; the nearest is"),
        (("method",), "samjax bench has no 'method'; the nearest is methods"),
        (("encoder", "--model", "vit_x"), "unknown model 'vit_x'"),
        (("encoder", "--model", "tiny", "--attention", "dense"), "leave out attention"),
        (("encoder", "--attention", "flsh"), "--attention"),
        (("encoder", "--batch-size", "0"), "batch_size must be at least 1"),
        (("encoder", "--rounds", "0"), "rounds must be at least 1"),
        (("encoder", "--image-size", "100"), "not a positive multiple of 16"),
        (("train", "--what", "loar"), "unknown method 'loar'"),
        (("train", "--what", "nowhere.py"), "no experiment file at nowhere.py"),
        (("train", "--batch-size", "3", "--accumulate", "2"), "accumulate 2 does not divide"),
        (("eval", "--truth-size", "1", "9"), "truth_size must be at least 2"),
        (("data", "--model", "tiny", "--data", "nowhere"), "the data nowhere does not exist"),
        (("data", "--size", "8", "8"), "size must be at least 16"),
    ],
)
def test_bad_input(capsys, args, says):
    assert main(["bench", *args]) == 1
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1
