r"""Polyps in endoscopy: MobileSAM on Kvasir-SEG with LoRA and the mask decoder, without a prompt.

Data: Kvasir-SEG (Jha et al. 2020; research and education only), as `--data tfds:kvasir_seg` after
`samjax data prepare kvasir_seg`, or as a folder; any other data serves as well. Weights: MobileSAM.

    samjax train experiments/kvasir_lora.py --weights mobile_sam --data Kvasir-SEG
    samjax eval experiments/kvasir_lora.py --weights mobile_sam --data Kvasir-SEG \
        --eval-prompt box --image-size 1024
    samjax compare experiments/kvasir_lora.py --weights mobile_sam --data Kvasir-SEG \
        --methods decoder lora "lora:rank=8,targets=q+k+v" full --seeds 0 1 2

What was measured is in docs/results.md. Another SAM: `--model auto --weights sam_vit_b
--image-size 1024`.
"""

from __future__ import annotations

from samjax.config import Config
from samjax.training.step import OptimizerConfig


def config() -> Config:
    """352 pixels, no prompt, ten epochs: under an hour on two cores."""
    return Config(
        model="vit_t",
        image_size=352,
        epochs=10,
        batch_size=4,
        eval_batch_size=4,
        checkpoint_every=100,
        optimizer=OptimizerConfig(decoder_learning_rate=5e-4),
    )
