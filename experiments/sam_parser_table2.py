r"""SAM-PARSER, Table 2: bases or coefficients, on NWPU VHR-10.

    samjax table sam_parser_table2
    samjax data prepare nwpu_vhr10
    samjax table sam_parser_table2 --run

Protocol and choices that are not the paper's: those of `sam_parser_table1.py`. Published numbers:
the paper's Table 2, whose rows are told apart by their numbers of parameters. These are in units
of 1024, the mask decoder's among them, and samjax counts its own beside them. The bases' + 888.7
K do not come out: U and V of the neck's two convolutions are 917,504 numbers, + 896.0 K.

What was measured: what the table shows; no cell has been run so far, but for the counts.
"""

from __future__ import annotations

import dataclasses

from protocols import MIOU, NWPU, SAM_PARSER_PAPER  # pyrefly: ignore[missing-import]

from samjax.tables.table import TRAINABLE, Metric, Row, Table


def table() -> Table:
    """Rows of Table 2."""
    params = Metric(TRAINABLE, "params (K)", scale=1 / 1024)
    return Table(
        title="SAM-PARSER, Table 2: bases or coefficients",
        source=f"{SAM_PARSER_PAPER}, Table 2",
        rows=(
            Row("baseline (mask decoder)", "decoder", "82.9 3963.2"),
            Row("coefficients", "sam_parser:train=coefficients", "84.2 3963.7"),
            Row("bases", "sam_parser:train=bases", "84.9 4852.4"),
            Row("both", "sam_parser:train=both", "85.3 4852.9"),
        ),
        columns=(dataclasses.replace(NWPU, metrics=(MIOU, params)),),
        notes=("Params are counted, not run.",),
    )
