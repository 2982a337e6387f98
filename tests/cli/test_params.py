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
