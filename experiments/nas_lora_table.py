r"""NAS-LoRA: nine segmentation benchmarks.

    samjax table nas_lora_table
    samjax data prepare polyp
    samjax table nas_lora_table --run --datasets kvasir_seg --methods lora nas_lora nas_pc_lora

The paper (Chen, Su and Tang, arXiv 2512.03499) says that it has nine segmentation benchmarks,
that NAS-LoRA and NAS-PC-LoRA are better than other methods on them, and that training costs 24.14
% less. Its tables, its protocol and the names of the nine were NOT FOUND: no published number is
shown.

Not the paper's, then: the nine are taken to be Conv-LoRA's, with Conv-LoRA's protocol
(`conv_lora_binary.py`, `conv_lora_trans10k.py`), since both papers have the notation, the count
and the domains in common. Rank 4, the operators, their stages and K = 2 of NAS-PC-LoRA are
samjax's (docs/methods.md), and so is the rate of architecture weights.

What was measured: Kvasir-SEG with MobileSAM at 352 px in four epochs, three seeds
(docs/results.md, "NAS-LoRA"), at each method's own rate: the table's notes say so beside the
numbers.
"""

from __future__ import annotations

from protocols import (  # pyrefly: ignore[missing-import]
    CONV_LORA_BINARY,
    TRANS10K,
    conv_lora_rows,
)

from samjax.tables.table import Row, Table


def table() -> Table:
    """The nine columns, without published numbers."""
    return Table(
        title="NAS-LoRA: nine benchmarks",
        source="NOT FOUND; the nine sets, their protocol and their metrics are Conv-LoRA's",
        rows=(
            *conv_lora_rows({}),
            Row("NAS-LoRA", "nas_lora"),
            Row("NAS-PC-LoRA", "nas_pc_lora"),
        ),
        columns=(*CONV_LORA_BINARY, *TRANS10K),
        seeds=(0, 1, 2),
        records=("kvasir_mobile_sam",),
    )
