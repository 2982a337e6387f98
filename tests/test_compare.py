"""What a comparison plans, refuses, and makes of its runs; no training here."""

import csv
import dataclasses
import io
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from samjax import compare as module
from samjax.compare import choose_baseline, compare, earlier_runs, plan
from samjax.config import Config
from samjax.data.folder import FolderSource
from samjax.peft.method_config import MethodConfig
from samjax.run import open_data
from samjax.terminal import Interrupted
from samjax.training.step import OptimizerConfig

CONFIG = Config(weights="mobile_sam", data="tfds:kvasir_seg", steps=7)
METHODS = ("decoder", "lora:rank=8,targets=q+k+v", "full:learning_rate=1e-5")
DICE = np.array([[0.50, 0.54, 0.58], [0.71, 0.70, 0.75], [0.61, 0.66, 0.62]])  # method, seed


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=500, markup=False, highlight=False)


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Training that leaves `DICE`; `.done` are the folders, `.raises` what happens in some."""
    monkeypatch.setattr(module, "check", lambda runs, console: None)

    def train(config, out, *, resume, console, before_in):
        train.done.append((out.relative_to(tmp_path).as_posix(), resume, before_in))
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(config.to_json()))
        (out / "eval_before.csv").write_text("name,dice\n")
        if out in train.raises:
            raise train.raises.pop(out)
        i = [method.partition(":")[0] for method in METHODS].index(config.method.method)
        dice = DICE[i, config.seed]
        summary = {
            "before": {"dice": 0.3, "iou": 0.2},
            "after": {"dice": dice, "iou": dice / 2},
            "steps": 7,
            "seconds_per_step": 0.25 * 2**config.seed,
            "step_bytes": 2_000_000_000,
            "step_bytes_from": "compiler",
            "file_bytes": 1_500_000,
            "trainable": 10 ** (i + 4),
            "beside_decoder": 10 ** (i + 3),
            "input_size": [352, 352],
            "device": "toy",
            "date": "2026-01-02",
        }
        (out / "summary.json").write_text(json.dumps(summary))

    train.done, train.raises = [], {}
    monkeypatch.setattr(module, "train", train)
    return train


def test_a_table_of_means_and_deviations(trained, tmp_path, console):
    runs = plan(CONFIG, METHODS, (0, 1, 2), tmp_path)
    result = compare(runs, tmp_path, console)
    assert len(trained.done) == 9 and result.errors == 0
    assert trained.done[0] == ("decoder/seed_0", False, None)
    assert trained.done[1] == (
        "lora_rank=8,targets=q+k+v/seed_0",
        False,
        tmp_path / "decoder/seed_0",
    )
    record = json.loads((tmp_path / "compare.json").read_text())
    assert record == json.loads(json.dumps(result.to_json()))
    baseline, *lines = record["methods"]
    assert baseline["dice"] == {"mean": pytest.approx(0.3), "deviation": pytest.approx(0)}
    assert [line["method"] for line in lines] == list(METHODS)
    for line, dice in zip(lines, DICE, strict=True):
        assert line["dice"] == pytest.approx({"mean": dice.mean(), "deviation": dice.std(ddof=1)})
        assert line["iou"]["deviation"] == pytest.approx((dice / 2).std(ddof=1))
        assert line["steps_per_second"] == pytest.approx(np.mean([4, 2, 1]))
    with open(tmp_path / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["dice"]) for row in rows] == pytest.approx(DICE.T.ravel())
    assert {row["learning_rate"] for row in rows if row["method"] == METHODS[2]} == {"1e-05"}
    result.print(console)
    text = console.file.getvalue()
    table = (tmp_path / "compare.md").read_text()
    for said in (
        "0.7200 ± 0.0265",
        "2.33",
        "2.0 GB",
        "1.50 MB",
        "100,000",
        "Budget: 7 steps, batc",
    ):
        assert said in text and said in table
    for said in ("352x352 px", "mobile_sam", "tfds:kvasir_seg", "toy", "2026-01-02", "0, 1, 2"):
        assert said in result.budget()
    for said in ("split seed 0 draws them", "mask decoder at learning rate 0.0005"):
        assert said in result.budget()
    rates = [line["learning_rate"] for line in record["methods"]]
    assert rates == [None, 5e-4, 1e-3, 1e-5]
    assert "| full:learning_rate=1e-5 | 1e-05 | 1,000,000 | 100,000 | 0, 1, 2 |" in table
    pytest.importorskip("matplotlib")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_has_no_deviation(trained, tmp_path, console):
    result = compare(plan(CONFIG, METHODS, (1,), tmp_path), tmp_path, console)
    line = result.lines()[1]
    dice = line.metrics["dice"]
    assert dice.deviation is None and str(dice) == "0.5400"


def test_failures_and_interruptions(trained, tmp_path, console, monkeypatch):
    """Others run on; the same command does what is left, and resumes what was stopped."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    lora, full = (tmp_path / name.replace(":", "_") / "seed_0" for name in METHODS[1:])
    trained.raises = {lora: ValueError("the loss is not\nfinite"), full: Interrupted("stopped")}
    with pytest.raises(Interrupted, match=r"full_learning_rate=1e-5/seed_0; the same command goes"):
        compare(plan(CONFIG, METHODS, (0,), tmp_path), tmp_path, console)
    record = json.loads((tmp_path / "compare.json").read_text())
    assert [row["state"] for row in record["runs"]] == ["finished", "failed", "unfinished"]
    assert record["errors"] == 1 and record["runs"][1]["error"] == "the loss is not finite"
    table = (tmp_path / "compare.md").read_text()
    assert "Failed: lora:rank=8,targets=q+k+v, seed 0: the loss is not finite" in table
    assert "pip install 'samjax[plot]'" in console.file.getvalue()
    assert not (tmp_path / "compare.png").exists()
    trained.done.clear()
    result = compare(plan(CONFIG, METHODS, (0,), tmp_path), tmp_path, console)
    assert [done[:2] for done in trained.done] == [
        (lora.relative_to(tmp_path).as_posix(), True),
        (full.relative_to(tmp_path).as_posix(), True),
    ]
    assert result.errors == 0
    trained.done.clear()
    again = compare(plan(CONFIG, METHODS, (0,), tmp_path), tmp_path, console)
    assert again == result and not trained.done
    with pytest.raises(ValueError, match="steps was 7 and is now 8"):
        plan(Config(weights="mobile_sam", data="tfds:kvasir_seg", steps=8), METHODS, (0,), tmp_path)


def test_settings_of_the_experiment_are_those_of_its_own_method(tmp_path):
    config = Config(
        method=MethodConfig("lora", rank=16, dropout=0.2, decoder="mask"),
        optimizer=OptimizerConfig(learning_rate=2e-3, decoder_learning_rate=3e-3),
    )
    texts = (
        *("decoder", "decoder:learning_rate=1e-4", "lora", "lora:learning_rate=None", "conv_lora"),
        *("rslora:rank=2,dropout=0.5,decoder=none,learning_rate=4e-3", "adaptformer"),
    )
    runs = plan(config, texts, (5,), tmp_path)
    assert [run.config.method for run in runs] == [
        MethodConfig("decoder", decoder="mask"),
        MethodConfig("decoder", decoder="mask"),
        MethodConfig("lora", rank=16, dropout=0.2, decoder="mask"),
        MethodConfig("lora", rank=16, dropout=0.2, decoder="mask"),
        MethodConfig("conv_lora", decoder="mask"),
        MethodConfig("rslora", rank=2, dropout=0.5, decoder="none"),
        MethodConfig("adaptformer", decoder="mask"),
    ]
    optimizers = [run.config.optimizer for run in runs]
    assert [o.learning_rate for o in optimizers] == [None, None, 2e-3, None, None, 4e-3, None]
    assert [o.decoder_learning_rate for o in optimizers] == [3e-3, 1e-4] + 5 * [3e-3]
    rates = [run.config.learning_rate for run in runs]
    assert rates == [3e-3, 1e-4, 2e-3, 1e-3, 3e-4, 4e-3, 1e-3]
    assert all(run.config.seed == 5 and run.config.split_seed == 0 for run in runs)


def test_seeds_share_their_splits(tmp_path, console):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for i in range(20):
            Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / kind / f"{i}.png")

    def test_names(**settings):
        return open_data(Config(data=str(tmp_path), **settings), "test", console).names

    assert test_names() == test_names(seed=1) == FolderSource(tmp_path, "test", seed=0).names
    assert test_names(split_seed=1) == FolderSource(tmp_path, "test", seed=1).names != test_names()


def test_later_commands_add_to_the_table(trained, tmp_path, console):
    """Finished runs of earlier commands are listed, but those that the experiment is not now."""

    def command(config, methods, seeds):
        runs = plan(config, methods, seeds, tmp_path)
        return compare(runs, tmp_path, console, earlier_runs(config, runs, tmp_path, console))

    first = command(CONFIG, METHODS, (0,))
    for i, row in enumerate(first.rows):  # the order in which they were finished
        os.utime(tmp_path / row.run / "summary.json", (i, i))
    trained.done.clear()
    both = command(CONFIG, METHODS[1:2], (1, 2))
    assert [done[0] for done in trained.done] == [
        "lora_rank=8,targets=q+k+v/seed_1",
        "lora_rank=8,targets=q+k+v/seed_2",
    ]
    assert [line.method for line in both.lines()[1:]] == list(METHODS)
    assert [line.seeds for line in both.lines()[1:]] == [(0,), (0, 1, 2), (0,)]
    assert both.lines()[2].metrics["dice"].mean == pytest.approx(DICE[1].mean())
    assert len((tmp_path / "compare.csv").read_text().splitlines()) == 6
    assert "not in the table" not in console.file.getvalue()
    # Logging may differ, the budget may not; what is no run of a comparison is told of.
    again = command(dataclasses.replace(CONFIG, log_every=3), METHODS[:1], (0,))
    assert len(again.rows) == 5
    (tmp_path / "mine/seed_0").mkdir(parents=True)
    (tmp_path / "mine/seed_0/summary.json").write_text("{}")
    longer = dataclasses.replace(CONFIG, steps=8)
    others = command(longer, METHODS[:1], (1,))
    assert [row.method for row in others.rows] == ["decoder"]
    said = console.file.getvalue()
    assert said.count("steps was 7 and is now 8") == 5
    assert f"not in the table: {tmp_path / 'mine/seed_0'}: mine is no method" in said


DENSE = dataclasses.replace(CONFIG, tasks=("d:1:masked_l1", "s:3:cross_entropy"))
DENSE_METHODS = ("decoder", "lora_stl:rank=2", "ta_lora")


@pytest.fixture
def trained_dense(monkeypatch):
    """Training that leaves these numbers, by method, seed and metric."""
    monkeypatch.setattr(module, "check", lambda runs, console: None)
    names = ("d/absolute_error", "d/relative_error", "s/miou", "s/pixel_accuracy")
    numbers = np.random.default_rng(0).uniform(0.2, 0.9, (3, 2, len(names)))

    def train(config, out, *, resume, console, before_in):
        out.mkdir(parents=True)
        (out / "config.json").write_text(json.dumps(config.to_json()))
        i = [method.partition(":")[0] for method in DENSE_METHODS].index(config.method.method)
        summary = {
            "before": dict.fromkeys(names, 0.5),
            "after": dict(zip(names, numbers[i, config.seed], strict=True)),
            **{"steps": 7, "seconds_per_step": 1.0, "file_bytes": 1, "input_size": [64, 64]},
            **{"trainable": 1, "device": "toy", "date": "2026-01-02"},
        }
        (out / "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr(module, "train", train)
    return names, numbers


@pytest.mark.parametrize("asked", [None, "decoder"])
def test_the_gain_of_dense_tasks(trained_dense, tmp_path, console, asked):
    """Every metric, and the gain over the mean of the baseline's runs, in each file."""
    names, numbers = trained_dense
    runs = plan(DENSE, DENSE_METHODS, (0, 1), tmp_path)
    baseline = choose_baseline(DENSE, runs, (), asked)
    assert baseline == (asked or "lora_stl:rank=2")
    result = compare(runs, tmp_path, console, baseline=baseline)
    over = numbers[DENSE_METHODS.index(baseline)].mean(0)
    want = 100 * ((numbers - over) / over * np.array([-1, -1, 1, 1])).mean(-1)
    record = json.loads((tmp_path / "compare.json").read_text())
    assert record["baseline"] == baseline
    untrained, *lines = record["methods"]
    assert "gain" not in untrained
    for line, values, gains in zip(lines, numbers, want, strict=True):
        for name, of_seeds in zip(names, values.T, strict=True):
            assert line[name]["mean"] == pytest.approx(of_seeds.mean())
        assert line["gain"] == pytest.approx({"mean": gains.mean(), "deviation": gains.std(ddof=1)})
    assert want[DENSE_METHODS.index(baseline)].mean() == pytest.approx(0)
    with open(tmp_path / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["gain"]) for row in rows] == pytest.approx(want.T.ravel())
    result.print(console)
    text, table = console.file.getvalue(), (tmp_path / "compare.md").read_text()
    cell = f"{want[2].mean():.4f} ± {want[2].std(ddof=1):.4f}"
    assert f"over the mean of {baseline}'s runs, in percent" in text  # cells fold there
    for said in (f"| Δ over {baseline} (%) |", "s mIoU", "d relative error", f"| {cell} |"):
        assert said in table


def test_gains_of_what_is_not_finished(trained_dense, tmp_path, console, monkeypatch):
    def fail(*arguments, **options):
        raise ValueError("none")

    trained, runs = module.train, plan(DENSE, ("ta_lora", "lora_stl"), (0,), tmp_path)
    baseline = choose_baseline(DENSE, runs, (), None)
    monkeypatch.setattr(
        module,
        "train",
        lambda config, *rest, **options: (
            fail() if config.method.method == "lora_stl" else trained(config, *rest, **options)
        ),
    )
    result = compare(runs, tmp_path, console, baseline=baseline)
    assert [row.state for row in result.rows] == ["finished", "failed"]
    assert "Δ" not in result.markdown() and "gain" not in result.rows[0].after


@pytest.mark.parametrize(
    ("config", "asked", "message"),
    [
        (
            DENSE,
            "lora_slt",
            "the baseline 'lora_slt' is no method .*; the nearest is lora_stl:rank",
        ),
        (CONFIG, "decoder", "a baseline is what dense tasks are measured against"),
    ],
)
def test_baselines_that_cannot_be(config, asked, message, tmp_path):
    methods = DENSE_METHODS if config.tasks else METHODS
    with pytest.raises(ValueError, match=message):
        choose_baseline(config, plan(config, methods, (0,), tmp_path), (), asked)


def test_the_baseline_of_masks_and_of_methods_without_lora_stl(tmp_path):
    def chosen(config, *methods):
        return choose_baseline(config, plan(config, methods, (0,), tmp_path), (), None)

    assert chosen(CONFIG, "decoder", "lora") is None
    assert chosen(DENSE, "ta_lora", "decoder") == "ta_lora"
    assert chosen(DENSE, "ta_lora", "lora_stl") == "lora_stl"
    earlier = plan(DENSE, ("lora_stl",), (0,), tmp_path)
    later = plan(DENSE, ("ta_lora",), (0,), tmp_path)
    assert choose_baseline(DENSE, later, earlier, None) == "lora_stl"


def test_methods_of_folders():
    for text in ("lora", "lora_conv", "fact_tt:rank=2", "lora_conv:rank=2", *METHODS):
        assert module._text(module.label_of(text)) == text


def test_runs_of_before_there_was_a_split_seed_go_on(tmp_path):
    folder = tmp_path / "decoder/seed_0"
    folder.mkdir(parents=True)
    (run,) = plan(CONFIG, METHODS[:1], (0,), tmp_path / "other")
    old = run.config.to_json()
    del old["split_seed"]
    (folder / "config.json").write_text(json.dumps(old))
    plan(CONFIG, METHODS[:1], (0,), tmp_path)
    with pytest.raises(ValueError, match="split_seed was 0 and is now 1"):
        plan(dataclasses.replace(CONFIG, split_seed=1), METHODS[:1], (0,), tmp_path)


@pytest.mark.parametrize(
    ("methods", "seeds", "message"),
    [
        ((), (0,), "no methods: pass --methods with some of decoder"),
        (("lorra",), (0,), "unknown method 'lorra'; the nearest is"),
        (("lora:rnk=8",), (0,), "method 'lora' has no setting 'rnk'; the nearest is rank"),
        (("decoder:rank=8",), (0,), "method 'decoder' has no setting 'rank'"),
        (("lora:rank",), (0,), "lora:rank: rank has no value; write rank=VALUE"),
        (("lora:targets=q,k",), (0,), "'k' is no SETTING=VALUE; several values of a setting are"),
        (("lora:rank=x",), (0,), "lora:rank=x: Error parsing --rank"),
        (("lora:rank=0",), (0,), "lora:rank=0: "),
        (("lora:targets=q+x",), (0,), "lora:targets=q+x: "),
        (("lora:learning_rate=-1",), (0,), "learning_rate must be positive and finite, not -1.0"),
        (("lora", "lora"), (0,), "methods has lora twice"),
        (("lora",), (1, 1), "seeds has 1 twice"),
        (("lora:rank=2,dropout=0.1", "lora:dropout=0.1,rank=2"), (0,), "are the same method"),
        (("decoder:learning_rate=0",), (0,), "learning_rate must be positive"),
        (("lora", "lora:rank=4"), (0,), "are the same method"),
        (("lora",), (-1,), "seed must lie in"),
    ],
)
def test_refused_before_any_work(methods, seeds, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        plan(CONFIG, methods, seeds, tmp_path / "out")
    assert message in str(caught.value)
    assert not os.path.exists(tmp_path / "out")
