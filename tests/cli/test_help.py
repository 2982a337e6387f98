"""`--help` of samjax and of its verbs."""

import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

VERBS = (
    *("weights", "convert", "predict", "data", "check-data"),
    *("train", "plan", "compare", "table", "eval", "arch", "params", "merge", "convert-adapter"),
)


def test_the_help_shows_an_example_of_each_verb(call):
    for flag in ("-h", "--help"):
        result = call(flag)
        assert result.code == 0 and not result.err
        for verb in VERBS:
            assert f"samjax {verb} " in result.out
    assert call().code != 0


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_with_an_example(call, verb):
    result = call(verb, "--help")
    assert result.code == 0 and not result.err
    assert f"Example: samjax {verb} " in result.out


def test_examples_run_as_printed(call, files):
    """An experiment without weights and data of its own is given both."""
    helps = [call("--help").out, *(call(verb, "--help").out for verb in VERBS)]
    errors = [call(verb).err for verb in ("train", "compare", "eval")]
    text = "\n".join((*helps, *errors, (REPO / "README.md").read_text()))
    lines = re.findall(r"samjax (?:train|compare|eval) experiments/kvasir_lora\.py[^`\n]*", text)
    assert len(lines) > 8
    for line in lines:
        assert " --weights " in line and " --data " in line, line


@pytest.mark.parametrize("verb", ["train", "compare", "eval"])
def test_the_help_of_an_experiment(call, files, verb):
    result = call(verb, files / "tiny.py", "--help")
    assert result.code == 0
    text = " ".join(result.out.replace("│", " ").split())
    assert text.count("A run of three steps.") == 1 and "Example: samjax" in text
    for flag in ("--weights", "--data", "--image-size", "--method", "--learning-rate"):
        assert f" {flag} " in text
    assert "(default: 3)" in text  # as the experiment says
    # Tyro gives a setting without a comment that of the setting above it.
    for comment in (
        "Parts that a batch is cut into",
        "Peak learning rate of the mask decoder",
        "The mixture of prompts in training",
    ):
        assert text.count(comment) == 1
