r"""Polyps in endoscopy: MobileSAM on Kvasir-SEG with NAS-LoRA and the mask decoder, no prompt.

The budget is that of `kvasir_lora.py`; a searchable cell lies between LoRA's factors.

    samjax train experiments/kvasir_nas_lora.py --weights mobile_sam --data Kvasir-SEG
    samjax arch runs/kvasir_nas_lora
    samjax train experiments/kvasir_nas_lora.py --weights mobile_sam --data Kvasir-SEG \
        --operators runs/kvasir_nas_lora/architecture.json --out runs/found
    samjax compare experiments/kvasir_nas_lora.py --weights mobile_sam --data Kvasir-SEG \
        --epochs 4 --methods decoder lora conv_lora nas_lora nas_pc_lora --seeds 0 1 2

What was measured is in docs/results.md.
"""

from __future__ import annotations

from samjax.config import Config
from samjax.peft import MethodConfig
from samjax.training.step import OptimizerConfig


def config() -> Config:
    """352 pixels, no prompt, ten epochs: about an hour on two cores."""
    return Config(
        model="vit_t",
        image_size=352,
        method=MethodConfig("nas_lora"),
        epochs=10,
        batch_size=4,
        eval_batch_size=4,
        checkpoint_every=100,
        optimizer=OptimizerConfig(decoder_learning_rate=5e-4),
    )
