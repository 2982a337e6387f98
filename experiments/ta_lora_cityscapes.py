r"""TA-LoRA on CityScapes: segmentation of streets in 7 classes, and disparity, at once.

    samjax table ta_lora_cityscapes
    samjax data prepare cityscapes --manual-dir DIR
    samjax table ta_lora_cityscapes --run

Protocol: MTSAM's for NYUv2 (`ta_lora_nyuv2.py`) on CityScapes as MTAN prepares it, 128 x 256
pixels. Published numbers: NOT FOUND; that the set is used, with two tasks, is read from reports
on the papers.

Not the papers': the losses, cross-entropy and L1, and their equal weights.

What was measured: what the table shows; no cell has been run so far.
"""

from __future__ import annotations

from protocols import amount, share, ta_lora_column, ta_lora_rows  # pyrefly: ignore[missing-import]

from samjax.tables.table import Table


def table() -> Table:
    """Both metrics of both tasks."""
    metrics = (
        share("segmentation/miou", "mIoU"),
        share("segmentation/pixel_accuracy", "pixel accuracy"),
        amount("disparity/absolute_error", "disparity abs. error", 4),
        amount("disparity/relative_error", "disparity rel. error"),
    )
    return Table(
        title="TA-LoRA: CityScapes",
        source="NOT FOUND (TA-LoRA, arXiv 2403.10971, and its successor MTSAM)",
        rows=ta_lora_rows({}),
        columns=(ta_lora_column("cityscapes", "CityScapes", ("cityscapes",), metrics),),
    )
