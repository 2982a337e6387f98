r"""Conv-LoRA: glass in Trans10K-v1 and Trans10K-v2, several classes, without a prompt.

    samjax table conv_lora_trans10k
    samjax data prepare trans10k_v2
    samjax table conv_lora_trans10k --run --datasets trans10k_v2

Protocol: that of `conv_lora_binary.py`, with a mask for each class: 3 classes in v1 and 12 in v2,
the background among them. Published numbers: mIoU on Trans10K-v2, as referees' reports quote it,
one run.

Not the paper's: these sets are not in its authors' example script, so that 30 epochs at 1e-4 are
what most of its sets have. The semantic head has a token for each class; whether the paper
matches more tokens with the classes, as AutoGluon's code can, is not known. AutoGluon's weights
of the loss are kept.

What was measured: what the table shows; no cell has been run so far.
"""

from __future__ import annotations

from protocols import (  # pyrefly: ignore[missing-import]
    CONV_LORA_PAPER,
    TRANS10K,
    conv_lora_rows,
)

from samjax.tables.table import Table


def table() -> Table:
    """mIoU and pixel accuracy of both versions."""
    published = {"LoRA": "- - 66.01 -", "Conv-LoRA": "- - 67.09 -"}
    return Table(
        title="Conv-LoRA: Trans10K",
        source=CONV_LORA_PAPER,
        rows=conv_lora_rows(published),
        columns=TRANS10K,
    )
