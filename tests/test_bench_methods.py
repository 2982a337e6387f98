"""`samjax bench methods`, at sizes of no interest."""

import json

import pytest

from samjax.bench import methods
from samjax.bench.rounds import ratios
from samjax.bench.steps import training_config
from samjax.cli import main
from samjax.models import MODELS
from samjax.peft.method_config import MethodConfig
from samjax.terminal import error_console

RANK = 4


def lora_beside_decoder(recomputed: bool) -> int:
    """FLOPs that LoRA adds to a step of the small model of `conftest`, written out by hand.

    64 tokens of 32 channels, in block 0 in windows of 16; what comes before block 0's q and v has
    no gradient, and no kernel but the decoder's and LoRA's has one.
    """
    tokens, width, inner = 64, 32, 16

    def product(rows: int, n: int, m: int) -> int:
        return 2 * rows * n * m

    def attention(side: int) -> int:
        scores = product(tokens, width, side**2) + 2 * product(tokens, width, side)
        # Of the scores and the values both factors have a gradient, of positions the queries.
        backward = 4 * product(tokens, width, side**2) + 2 * product(tokens, width, side)
        return backward + recomputed * scores

    def lora(first: bool) -> int:
        a, b = product(tokens, width, 2 * RANK), 2 * product(tokens, RANK, width)
        return a * (2 if first else 3) + b * 3

    behind = product(tokens, width, width) + 2 * product(tokens, width, 4 * width)  # proj, MLP
    qkv = product(tokens, width, 3 * width)
    neck = product(tokens, width, width) + product(tokens, 9 * width, width)
    # The gradient enters the encoder through the decoder's first keys, values and queries.
    decoder = 3 * product(tokens, width, inner)
    blocks = 2 * behind + qkv + attention(4) + attention(8) + lora(True) + lora(False)
    return decoder + neck + blocks


def test_ratios_stand_beside_their_bounds(monkeypatch, small_config, quick_compilation):
    monkeypatch.setitem(MODELS, "small", small_config)
    result = methods.measure("small", None, ["lora", "decoder"], 1, 2, error_console())
    json.dumps(result)
    decoder, lora = result["methods"]["decoder"], result["methods"]["lora"]
    assert list(result["methods"]) == ["decoder", "lora"]
    assert lora["flops"] - decoder["flops"] == lora_beside_decoder(recomputed=True)
    assert lora["needed_flops"] - decoder["flops"] == lora_beside_decoder(recomputed=False)
    assert lora["bound"] == decoder["flops"] / lora["needed_flops"]
    assert lora["bound_recomputing"] == decoder["flops"] / lora["flops"]
    assert lora["trainable"] - decoder["trainable"] == 2 * 2 * 2 * RANK * 32
    for row in (decoder, lora):
        assert len(row["all_seconds"]) == 2 and min(row["all_seconds"]) > 0
        assert row["compile_seconds"] > 0 and row["temporary_bytes"] > 0
        assert row["ratio"] == pytest.approx(row["share_of_bound"] * row["bound"])
    assert decoder["ratio"] == decoder["bound"] == 1
    head, *rows = methods.rows(result)
    assert [row[0] for row in rows] == ["decoder", "lora"]
    assert {len(row) for row in rows} == {len(head)}


def test_methods_have_settings():
    config = training_config("lora:rank=8,targets=q+k", 2)
    assert config.method == MethodConfig("lora", rank=8, targets=("q", "k"))
    assert config.batch_size == 2 and config.evaluation_prompt == "box"


def test_ratios_are_of_rounds():
    found = ratios([1.0, 2.0, 8.0], [2.0, 8.0, 10.0])
    assert found == {"ratio": 0.5, "ratio_range": [0.25, 0.8]}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("methods", "--model", "vit_x"), "unknown model 'vit_x'"),
        (("methods", "--methods", "lorra"), "unknown method 'lorra'; the nearest is lora"),
        (("methods", "--methods", "lora:rnk=8"), "no setting 'rnk'; the nearest is rank"),
        (("methods", "--image-size", "100"), "not a positive multiple of 16"),
        (("methods", "--rounds", "0"), "rounds must be at least 1"),
        (("methods", "--batch-size", "0"), "batch_size must be at least 1"),
        (("methods", "--out", "nowhere/table.md"), "there is no directory nowhere"),
    ],
)
def test_bad_input(capsys, args, says):
    assert main(["bench", *args]) == 1
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1


def test_the_table_as_text_and_as_markdown(monkeypatch, capsys, tmp_path):
    row = {
        "trainable": 4058340,
        "seconds": 1.25,
        "ratio": 0.4,
        "ratio_range": [0.39, 0.41],
        "bound": 0.5,
        "share_of_bound": 0.8,
        "bound_recomputing": 0.45,
        "share_of_bound_recomputing": 0.88,
        "flops": 2.4e12,
        "argument_bytes": 400_000_000,
        "temporary_bytes": None,
        "compile_seconds": 30.0,
    }
    result = {
        "device": "a CPU",
        "jax": "0.10",
        "threads": 2,
        "load": 0.1,
        "model": "vit_b",
        "image_size": [1024, 1024],
        "batch_size": 1,
        "rounds": 5,
        "methods": {"lora": row},
    }
    monkeypatch.setattr("samjax.bench.methods.measure", lambda *args: result)
    out = tmp_path / "table.md"
    assert main(["bench", "methods", "--json", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == result
    cells = ("lora", "4,058,340", "0.400", "0.390 to 0.410", "80%", "88%", "2400", "0.4 GB", "30 s")
    for text in (shown.err, out.read_text()):
        assert all(cell in text for cell in cells)
        assert "1024 x 1024 px, float32, batch 1; median of 5 rounds" in text
