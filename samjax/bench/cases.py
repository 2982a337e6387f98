"""Programs side by side: images a second, beside the machine's own rate."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from samjax.bench.programs import DoesNotFit, Program, Step, product
from samjax.bench.rounds import ratios, take_turns
from samjax.bench.tables import size, spread
from samjax.terminal import progress_bar


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to be made, what it is made with, and how many images one call of it takes."""

    settings: dict[str, Any]  # JSON-able; these become columns
    images: int
    dtype: str
    make: Callable[[], Program | Step]

    @property
    def name(self) -> str:
        """The settings as words."""
        return " ".join(str(value) for value in self.settings.values())


def time_cases(
    cases: Sequence[Case], side: int, rounds: int, console: Console
) -> list[dict[str, Any]]:
    """A JSON-able row for each case; ratios are to the first that fits into memory.

    `side` is that of the matrix product, in each dtype, whose rate they are compared with. One that
    does not fit has its `settings` and `does_not_fit`, why. Raises RuntimeError where none fits.
    """
    made: dict[str, Program | Step] = {}
    reasons: dict[str, str] = {}
    with progress_bar(console) as bar:
        task = bar.add_task("compiling", total=len(cases), note="")
        for case in cases:
            bar.update(task, note=case.name)
            try:
                made[case.name] = made_case = case.make()
                made_case.run()
            except DoesNotFit as error:
                made.pop(case.name, None)
                reasons[case.name] = str(error)
                console.print(f"{case.name} is left out: it {error}")
            bar.advance(task)
    if not made:
        raise RuntimeError(f"{cases[0].name} {reasons[cases[0].name]}: lower what it takes")
    fitting = [case for case in cases if case.name in made]
    products = {f"product {dtype}": dtype for dtype in dict.fromkeys(c.dtype for c in fitting)}
    calls = {name: product(side, dtype).run for name, dtype in products.items()}
    calls |= {name: one.run for name, one in made.items()}
    seconds = take_turns(calls, rounds, console)
    rates = {
        dtype: 2 * side**3 / statistics.median(seconds[name]) for name, dtype in products.items()
    }
    each = {case.name: np.array(seconds[case.name]) / case.images for case in fitting}
    first = each[fitting[0].name].tolist()
    rows = []
    for case in cases:
        row: dict[str, Any] = {**case.settings}
        if case.name in reasons:
            rows.append({**row, "does_not_fit": reasons[case.name]})
            continue
        one = made[case.name]
        rate, taken = rates[case.dtype], statistics.median(seconds[case.name])
        rows.append({**row, **_facts(one, taken, rate), "images_per_second": case.images / taken})
        rows[-1] |= ratios(first, each[case.name].tolist())
        rows[-1] |= {"seconds": taken, "all_seconds": seconds[case.name]}
    return rows


def _facts(one: Program | Step, seconds: float, rate: float) -> dict[str, Any]:
    program = one.program if isinstance(one, Step) else one
    needed = one.needed_flops if isinstance(one, Step) else one.flops
    return {
        "flops": program.flops,
        "needed_flops": needed,
        "product_flop_per_second": rate,
        "share_of_product_rate": needed / seconds / rate,
        "argument_bytes": program.argument_bytes,
        "temporary_bytes": program.temporary_bytes,
        "compile_seconds": program.compile_seconds,
    }


def case_rows(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, str]) -> list[tuple]:
    """The table of `time_cases`, its head first; `settings` are columns, by their titles."""
    head = ("images/s", "seconds", "first = 1", "least to most", "GFLOP", "of the product's rate")
    table: list[tuple[str, ...]] = [
        (*settings.values(), *head, "weights, state", "temporary", "compiled in")
    ]
    for row in rows:
        names = tuple(str(row[key]) for key in settings)
        if "does_not_fit" in row:
            table.append((*names, row["does_not_fit"], *["-"] * (len(head) + 2)))
            continue
        table.append(
            (
                *names,
                f"{row['images_per_second']:.4g}",
                f"{row['seconds']:.3g}",
                f"{row['ratio']:.3f}",
                spread(row["ratio_range"]),
                f"{row['flops'] / 1e9:.4g}",
                f"{row['share_of_product_rate']:.0%}",
                size(row["argument_bytes"]),
                size(row["temporary_bytes"]),
                f"{row['compile_seconds']:.0f} s",
            )
        )
    return table


def product_rates(rows: Sequence[Mapping[str, Any]]) -> str:
    """The machine's own rate in each dtype, as words."""
    rates = {
        row["dtype"]: row["product_flop_per_second"] for row in rows if "does_not_fit" not in row
    }
    each = (f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in rates.items())
    return f"products run at {', '.join(each)}"
