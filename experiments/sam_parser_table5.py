r"""SAM-PARSER, Table 5: ships in radar images (SSDD), where SAM-PARSER is behind LoRA.

    samjax table sam_parser_table5
    samjax data prepare ssdd
    samjax table sam_parser_table5 --run

Protocol, rows and choices that are not the paper's: those of `sam_parser_table3.py` for remote
sensing. Published numbers: the paper's Table 5.

What was measured: what the table shows; no cell has been run so far.
"""

from __future__ import annotations

from protocols import (  # pyrefly: ignore[missing-import]
    ADAPTER,
    FACT,
    LORA,
    SAM_PARSER_PAPER,
    SSDD,
)

from samjax.tables.table import UNTRAINED, Row, Table


def table() -> Table:
    """Rows of Table 5."""
    return Table(
        title="SAM-PARSER, Table 5: a failure case",
        source=f"{SAM_PARSER_PAPER}, Table 5",
        rows=(
            Row("baseline (no training)", UNTRAINED, "71.4 82.7"),
            Row("baseline (mask decoder)", "decoder", "81.2 89.4"),
            Row("FacT", FACT, "81.7 89.7"),
            Row("LoRA", LORA, "82.4 90.1"),
            Row("Adapter", ADAPTER, "81.8 89.9"),
            Row("SAM-PARSER", "sam_parser", "81.6 89.6"),
        ),
        columns=(SSDD,),
    )
