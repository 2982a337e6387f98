"""The archives that Conv-LoRA's authors made of the sets of its paper, with their own splits.

autogluon/autogluon, examples/automm/Conv-LoRA: `prepare_semantic_segmentation_datasets.py` tells
where they are, `run_semantic_segmentation.py` that each holds train.csv, val.csv and test.csv, or
test_SET.csv for each of its test sets. No size or hash of them is published.
"""

from __future__ import annotations

from collections.abc import Mapping

from samjax.data.builders.archives import Archive
from samjax.data.builders.layouts import Layout, Table

_URL = "https://automl-mm-bench.s3.amazonaws.com/semantic_segmentation"


def conv_lora(name: str, tests: Mapping[str, str] | None = None) -> Layout:
    """The archive of a set by Conv-LoRA's name of it.

    `tests` are the SETs of several test tables by the names of their parts here.
    """
    parts = {part: Table(f"{name}/test_{test}.csv") for part, test in (tests or {}).items()}
    return Layout(
        f"{name}.zip, which has Conv-LoRA's splits, from {_URL}/{name}.zip",
        (Archive(name, f"{name}.zip", f"{_URL}/{name}.zip"),),
        {
            "train": Table(f"{name}/train.csv"),
            "validation": Table(f"{name}/val.csv"),
            "test": parts or Table(f"{name}/test.csv"),
        },
    )
