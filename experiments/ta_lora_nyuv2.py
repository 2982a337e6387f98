r"""TA-LoRA on NYUv2: segmentation, depth and surface normals of indoor scenes at once.

The data is NYUv2 as MTAN and LibMTL prepare it (288 x 384 pixels, 795 training and 654 test
images): a folder with train/ and val/, each with image/, label/, depth/ and normal/ of .npy
files. One run of it with MobileSAM, at the images' own size:

    samjax train experiments/ta_lora_nyuv2.py --weights mobile_sam --data nyuv2
    samjax predict room.jpg --weights mobile_sam --adapter runs/ta_lora_nyuv2/adapter.safetensors \
        --task all
    samjax compare experiments/ta_lora_nyuv2.py --weights mobile_sam --data nyuv2 \
        --methods decoder lora_stl lora_hps ta_lora

The paper's table, and a cell of it:

    samjax table ta_lora_nyuv2
    samjax table ta_lora_nyuv2 --run --data nyuv2=nyuv2 --methods ta_lora

Protocol, as the code of MTSAM has it, TA-LoRA's successor, which calls the method ToRA: SAM
ViT-L, 200 epochs, 4 images a step, Adam at 1e-3 with 5 % warm-up, ranks 32, 32 and 4; losses
cross-entropy, L1 and cosine with weights 1, 1 and 4 sixths. Published numbers: mIoU and absolute
error of ToRA and LoRA-STL in MTSAM's paper, as referees' reports quote them, single runs.
TA-LoRA's own five tables were NOT FOUND.

Not the paper's: 1024 px stretch to MTSAM's longest side; rates fall by a cosine, there linearly;
images are normalised as SAM's are, there not; the regularisation's weight is 1, MTSAM's.

What was measured: MobileSAM at 288 x 384 in two epochs, one seed (docs/results.md, "NYUv2"), far
from the paper's ViT-L and 200 epochs: the table's notes say so beside the numbers.
"""

from __future__ import annotations

from protocols import (  # pyrefly: ignore[missing-import]
    MTSAM_PAPER,
    amount,
    share,
    ta_lora_column,
    ta_lora_rows,
)

from samjax.config import Config
from samjax.peft import MethodConfig
from samjax.tables.table import Table
from samjax.training.step import OptimizerConfig


def config() -> Config:
    """The images' own size, ten epochs."""
    return Config(
        model="vit_t",
        image_size=(288, 384),
        tasks=("nyuv2",),
        method=MethodConfig("ta_lora"),
        epochs=10.0,
        batch_size=4,
        eval_batch_size=4,
        checkpoint_every=100,
        gallery=3,
        optimizer=OptimizerConfig(decoder_learning_rate=5e-4),
    )


def table() -> Table:
    """All metrics of the three tasks."""
    metrics = (
        share("segmentation/miou", "mIoU"),
        share("segmentation/pixel_accuracy", "pixel accuracy"),
        amount("depth/absolute_error", "depth abs. error"),
        amount("depth/relative_error", "depth rel. error"),
        amount("normals/mean_angle", "mean angle", 2),
        amount("normals/median_angle", "median angle", 2),
        share("normals/within_11.25", "11.25°"),
        share("normals/within_22.5", "22.5°"),
        share("normals/within_30", "30°"),
    )
    unknown = " ".join("-" * 6)
    return Table(
        title="TA-LoRA: NYUv2",
        source=MTSAM_PAPER,
        rows=ta_lora_rows(
            {"lora_stl": f"51.8 - 0.283 {unknown}", "ta_lora": f"52.1 - 0.282 {unknown}"}
        ),
        columns=(ta_lora_column("nyuv2", "NYUv2", ("nyuv2",), metrics),),
        notes=("Published as TA-LoRA is MTSAM's ToRA, single runs.",),
    )
