"""A run of several stages that is interrupted in each of them, and between them."""

import json
import shutil

import pytest

from samjax.cli import main
from samjax.training import loop

EXPERIMENT = """
from samjax.config import Config
from samjax.peft import MethodConfig

def config():
    return Config(
        weights={weights!r}, data={data!r}, steps=9, batch_size=2, eval_batch_size=2,
        checkpoint_every=1, log_every=1, gallery=1,
        method=MethodConfig("nas_pc_lora", rank=2, dropout=0.1),
        stages=("1:weights+decoder", "1:all:split", "1:weights"),
    )
"""


@pytest.fixture(scope="module")
def staged(experiment):
    """An experiment file of three stages of three steps."""
    folder = experiment.parent
    path = folder / "staged.py"
    path.write_text(EXPERIMENT.format(weights=str(folder / "weights"), data=str(folder / "data")))
    return path


@pytest.fixture(scope="module")
def finished(staged, command, tmp_path_factory):
    """The folder of the run that nothing interrupted."""
    out = tmp_path_factory.mktemp("staged") / "whole"
    assert main(command(staged, out)[3:]) == 0
    return out


@pytest.mark.parametrize("after", [2, 3, 5, 6, 8])
def test_a_stage_goes_on_where_it_stopped(staged, finished, command, tmp_path, monkeypatch, after):
    """To the bit: adapter, metrics of each step, and those of the test split."""
    out = tmp_path / "run"
    taken = 0
    take = loop.Feed.take

    def interrupted(feed):
        nonlocal taken
        taken += 1
        if taken > after:
            raise KeyboardInterrupt
        return take(feed)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Feed, "take", interrupted)
        assert main(command(staged, out)[3:]) != 0
    assert not (out / "adapter.safetensors").exists()
    assert main([*command(staged, out)[3:], "--resume"]) == 0
    for name in ("adapter.safetensors", "eval_after.csv"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    one, other = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out, finished)
    )
    for mine, theirs in zip(one, other, strict=True):
        mine.pop("seconds_per_step", None), theirs.pop("seconds_per_step", None)
        assert mine == theirs
    assert {"arch_loss" in line for line in one[3:6]} == {True}


def test_the_log_knows_the_architecture(finished):
    """Shares and entropy of each layer; only the second stage changes them."""
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    names = [name for name in lines[0] if name.endswith("/edge_0/entropy")]
    assert names == [f"image_encoder/blocks_{i}/attn/qkv/edge_0/entropy" for i in (0, 1)]
    for name in names:
        skips = [line[name.replace("entropy", "skip_connect")] for line in lines]
        assert skips[:3] == skips[:1] * 3 and skips[5:] == skips[5:6] * 4
        assert len(set(skips[2:6])) == 4
        shares = [v for k, v in lines[-1].items() if k.startswith(name.removesuffix("entropy"))]
        assert sum(shares) - lines[-1][name] == pytest.approx(1, abs=1e-5)


def test_other_stages_are_another_run(staged, finished, command, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "summary.json").unlink()
    capsys.readouterr()
    assert main([*command(staged, out)[3:], "--resume", "--stages", "1:all"]) == 1
    assert "with another config: stages was" in capsys.readouterr().err


def test_stages_that_cannot_be_are_told_before_any_work(staged, command, tmp_path, capsys):
    out = tmp_path / "run"
    for flags, message in (
        (("--stages", "1:arch", "--method", "lora"), "stage 1 trains arch, and the method has"),
        (("--steps", "2"), "3 stages need as many steps, and the run has 2"),
    ):
        assert main([*command(staged, out)[3:], *flags]) == 1
        assert message in capsys.readouterr().err and not out.exists()
