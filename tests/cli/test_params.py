"""`samjax params`."""

import pytest


@pytest.mark.parametrize(("method", "adapter"), [("lora", 147456), ("decoder", 0)])
def test_params_of_vit_b(call, method, adapter):
    result = call("params", "--model", "vit_b", "--method", method, "--json")
    assert result.json == {
        "total": 93735472,
        "adapter": adapter,
        "decoder": 4058340,
        "trainable": adapter + 4058340,
    }
    assert result.out.count("\n") == 1 and "4,058,340" in result.err


def test_params_without_the_decoder(call):
    arguments = ("--model", "vit_t", "--rank", "8", "--decoder", "none", "--json")
    counts = call("params", *arguments).json
    assert counts["decoder"] == 0 and counts["trainable"] == counts["adapter"] > 0
    twice = call("params", *arguments, "--rank", "16").json
    assert twice["adapter"] == 2 * counts["adapter"]


# Beside the mask decoder of ViT-B; docs/methods.md has the arithmetic.
COUNTS = {
    "decoder": 0,
    "bitfit": 12 * (3 + 1 + 4 + 1 + 2) * 768 + 768 + 2 * 256,
    "norm": 12 * 4 * 768 + 4 * 256,
    "full": 93_735_472 - 4_058_340 - 6_220,  # all but the decoder and the prompt encoder
    "lora": 12 * 2 * 4 * (768 + 768),
    "rslora": 147_456,
    "dora": 147_456 + 12 * 2 * 768,
    "fact_tt": 2 * 768 * 8 + 12 * 3 * 8 * 8,
    "fact_tk": 2 * 768 * 8 + 8**3 + 12 * 3 * 8,
    "adapter": 2 * 12 * (2 * 768 * 16 + 16 + 768),
    "adaptformer": 322_752,
    "sam_parser": 512,
}


def test_params_of_every_method(call):
    result = call("params", "--list", "--json")
    assert COUNTS.items() <= result.json.items()
    assert "rank 4, targets q v" in result.err
