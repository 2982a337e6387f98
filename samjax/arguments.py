"""Command-line arguments: tyro, with its errors in one sentence."""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import re
from collections.abc import Sequence
from typing import Any

import tyro

# What a verb returns: its result, and whether it is to be printed as JSON. Where the result counts
# `errors` and there are any, the exit code says so.
Outcome = tuple[dict[str, Any], bool]


def parse(cls: type, argv: list[str], prog: str, default: Any, doc: str | None) -> Any:
    """Reads `argv` into the dataclass `cls`; `default` fills in, `doc` goes before its docstring.

    Raises ValueError with one sentence instead of tyro's box, and SystemExit after `--help`.
    """
    description = None if doc is None else f"{doc}\n\n{inspect.getdoc(cls)}"
    options: dict[str, Any] = {"args": argv, "prog": prog, "description": description}
    if default is not None:
        options["default"] = default
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(cls, **options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(_sentence(captured.getvalue(), prog)) from None


def _sentence(box: str, prog: str) -> str:
    """What one of tyro's boxes says is wrong and what it suggests, without its help texts."""
    # Where stdout is not UTF-8, tyro draws no box, only a rule under the title.
    lines = [re.sub("[│╰╯]", " ", line)[2:].rstrip() for line in box.splitlines()[1:]]
    parts = []
    for is_rule, section in itertools.groupby(lines, lambda x: bool(re.fullmatch("[─-]{9,}", x))):
        lines = list(itertools.takewhile(bool, section))
        if is_rule or not lines or lines[0].startswith(("Argument helptext", "For full helptext")):
            continue
        # A sentence stands at the margin, options below it, and what they do below these.
        text = " ".join(line for line in lines if not line.startswith(" "))
        options = ", ".join(line.strip() for line in lines if re.match(" {4}[^ ]", line))
        parts.append(f"{text} {options}".strip().rstrip("."))
    return "; ".join([*parts, f"see `{prog} --help`"])


def numbers(text: str, flag: str, names: Sequence[str]) -> list[float]:
    """The numbers in "X,Y,LABEL" and the like. Raises ValueError where their count is not right."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != len(names):
        raise ValueError(f"{flag} takes {','.join(names)}, numbers with commas, not {text!r}")
    return values
