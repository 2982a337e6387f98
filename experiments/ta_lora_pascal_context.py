r"""TA-LoRA on PASCAL-Context: four tasks of photographs at once.

    samjax table ta_lora_pascal_context
    samjax data prepare pascal_context --manual-dir DIR
    samjax table ta_lora_pascal_context --run

Protocol: MTSAM's for NYUv2 (`ta_lora_nyuv2.py`) on PASCAL-Context as ASTMT prepares it. Published
numbers: NOT FOUND; that the set is used, with four tasks, is read from reports on the papers.

Not the papers': which four of ASTMT's five tasks, here all but edges; the losses and their
weights, which are MTI-Net's.

What was measured: what the table shows; no cell has been run so far.
"""

from __future__ import annotations

from protocols import amount, share, ta_lora_column, ta_lora_rows  # pyrefly: ignore[missing-import]

from samjax.tables.table import Table
from samjax.tasks import PASCAL_CONTEXT


def table() -> Table:
    """The first metrics of the four tasks."""
    metrics = (
        share("segmentation/miou", "segmentation mIoU"),
        share("human_parts/miou", "human parts mIoU"),
        share("saliency/max_f", "saliency max F"),
        amount("normals/mean_angle", "normals mean angle", 2),
    )
    tasks = tuple(str(task) for task in PASCAL_CONTEXT if task.name != "edges")
    return Table(
        title="TA-LoRA: PASCAL-Context",
        source="NOT FOUND (TA-LoRA, arXiv 2403.10971, and its successor MTSAM)",
        rows=ta_lora_rows({}),
        columns=(ta_lora_column("pascal_context", "PASCAL-Context", tasks, metrics),),
    )
