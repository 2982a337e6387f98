"""Samples, prompts, augmentation and batches."""

from samjax.data.augment import NO_AUGMENTATION, AugmentConfig
from samjax.data.pipeline import (
    batches_from,
    eval_batches,
    prepare_mask,
    prepare_sample,
    train_batches,
)
from samjax.data.prompts import (
    ABSENT,
    NOT_A_POINT,
    PromptConfig,
    box_of,
    central_point,
    encode_prompt,
    pad_prompt,
    sample_prompt,
)
from samjax.data.sources import FolderSource, Sample, Source

__all__ = [
    "ABSENT",
    "NOT_A_POINT",
    "NO_AUGMENTATION",
    "AugmentConfig",
    "FolderSource",
    "PromptConfig",
    "Sample",
    "Source",
    "batches_from",
    "box_of",
    "central_point",
    "encode_prompt",
    "eval_batches",
    "pad_prompt",
    "prepare_mask",
    "prepare_sample",
    "sample_prompt",
    "train_batches",
]
