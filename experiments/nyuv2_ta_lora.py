r"""Indoor scenes: MobileSAM on NYUv2 with TA-LoRA: segmentation, depth and surface normals at once.

The data is NYUv2 as MTAN and LibMTL prepare it (288 x 384 pixels, 795 training and 654 test
images): a folder with train/ and val/, each with image/, label/, depth/ and normal/ of .npy files.

    samjax train experiments/nyuv2_ta_lora.py --weights mobile_sam --data nyuv2
    samjax predict room.jpg --weights mobile_sam --adapter runs/nyuv2_ta_lora/adapter.safetensors \
        --task all
    samjax compare experiments/nyuv2_ta_lora.py --weights mobile_sam --data nyuv2 \
        --methods decoder lora_stl lora_hps ta_lora

What was measured is in docs/results.md.
"""

from __future__ import annotations

from samjax.config import Config
from samjax.peft import MethodConfig
from samjax.training.step import OptimizerConfig


def config() -> Config:
    """The images' own size, ten epochs."""
    return Config(
        model="vit_t",
        image_size=(288, 384),
        tasks=("nyuv2",),
        method=MethodConfig("ta_lora"),
        epochs=10,
        batch_size=4,
        eval_batch_size=4,
        checkpoint_every=100,
        gallery=3,
        optimizer=OptimizerConfig(decoder_learning_rate=5e-4),
    )
