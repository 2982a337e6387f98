"""Leaf disease: 588 photographs of leaves, with masks of what is diseased.

It was published on Kaggle without splits. Taken here is the archive of Conv-LoRA's authors, whose
tables split it. One who used it (GitHub) counts 399 images to train on and 90 for the test, which
leaves 99 for validation.
"""

from __future__ import annotations

import tensorflow_datasets as tfds

from samjax.data.builders.conv_lora import conv_lora
from samjax.data.builders.image_mask import ImageMaskBuilder


class LeafDisease(ImageMaskBuilder):
    """Leaf disease segmentation as Conv-LoRA split it."""

    VERSION = tfds.core.Version("1.0.0")
    TITLE = "Leaf disease: what is diseased in photographs of leaves, with masks"
    HOMEPAGE = "https://www.kaggle.com/datasets/fakhrealam9537/leaf-disease-segmentation-dataset"
    NUM_PAIRS = 588
    LAYOUTS = (conv_lora("leaf_disease_segmentation"),)
    LICENSE = "not known here: see the homepage"
    CITATION = """\
@misc{alam_leaf,
  title = {Leaf disease segmentation dataset},
  author = {Alam, Fakhre},
  howpublished = {Kaggle,
    https://www.kaggle.com/datasets/fakhrealam9537/leaf-disease-segmentation-dataset},
}
@inproceedings{zhong2024convolution,
  title = {Convolution Meets {LoRA}: Parameter Efficient Finetuning for Segment Anything Model},
  author = {Zhong, Zihan and Tang, Zhiqiang and He, Tong and Fang, Haoyang and Yuan, Chun},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year = {2024},
}"""
