"""What tables of one paper share: the protocol of each dataset, its metrics, its title.

Columns for `samjax.tables.table`. Which choices are a paper's, and which are not, is told by the
tables' own files. Batches, rates and epochs are those of the papers or of their authors' code. What
no table can follow: samjax warms up by `warmup` and lowers rates by a cosine, clips the gradient's
norm at 1, and has AdamW.
"""

from __future__ import annotations

from typing import Literal

from samjax.config import Config
from samjax.data.augment import NO_AUGMENTATION, AugmentConfig
from samjax.data.prompts import PromptConfig
from samjax.peft.method_config import MethodConfig
from samjax.tables.table import Column, Metric, Row
from samjax.training.losses import LossConfig
from samjax.training.step import OptimizerConfig

# SAM-PARSER: "mIoU" and "F1" are taken as means over samples, which are instances.
MIOU, F1, DSC = Metric("iou", "mIoU"), Metric("dice", "F1"), Metric("dice", "DSC")

SAM_PARSER_PAPER = (
    "Peng et al., SAM-PARSER: Fine-tuning SAM Efficiently by Parameter Space Reconstruction, AAAI "
    "2024 (arXiv 2308.14604v3)"
)


def sam_parser_column(
    name: str,
    title: str,
    metrics: tuple[Metric, ...] = (MIOU, F1),
    train: float = 0.8,
    test_split: Literal["test", "validation"] = "test",
) -> Column:
    """SAM-PARSER's protocol: ViT-B, a box for each instance, one a step.

    Natural and remote sensing images: 10 epochs (section 5.1), and a focal loss beside BCE and Dice
    for their many instances. Medical ones, which are measured by `DSC`: 25 epochs. `train` is the
    share of the training split, the rest being the test, where the data has no splits.
    """
    medical = DSC in metrics
    rate, decay = (1.25e-6, 5e-4) if medical else (1e-4, 5e-5)
    outward = 76 if medical else 20  # of 1024 pixels; the medical script's are 19 of 256
    config = Config(
        weights="sam_vit_b",
        model="vit_b",
        image_size=1024,
        data=f"tfds:{name}",
        objects="each",
        fractions=(train, 0.0, round(1 - train, 6)),
        test_split=test_split,
        prompts=PromptConfig(none=0.0, box=1.0, box_jitter=0.0, box_outward=outward),
        eval_box_outward=outward,
        metrics=tuple(metric.name for metric in metrics),
        loss=LossConfig("bce_dice" if medical else "bce_dice_focal", iou_weight=0.0),
        augment=NO_AUGMENTATION,
        epochs=25.0 if medical else 10.0,
        batch_size=1,
        optimizer=OptimizerConfig(decoder_learning_rate=rate, weight_decay=decay, warmup=0.0),
    )
    return Column(name, title, config, metrics, learning_rate=rate)


NWPU = sam_parser_column("nwpu_vhr10", "NWPU VHR-10", train=0.7)
SSDD = sam_parser_column("ssdd", "SSDD")

# What SAM-PARSER is compared with, by its numbers of parameters: LoRA's + 144 K is rank 4 on q and
# v, FacT's + 14.3 K is rank 8 on q, k and v in its tensor-train form. No bottleneck gives the
# adapter's + 351.5 K; 19 channels after attention alone are next to it, + 351.2 K.
FACT = "fact_tt:rank=8,targets=q+k+v"
LORA = "lora:rank=4,targets=q+v"
ADAPTER = "adapter:bottleneck=19,targets=attn"

CONV_LORA_PAPER = (
    "Zhong et al., Convolution Meets LoRA: Parameter Efficient Finetuning for Segment Anything "
    "Model, ICLR 2024 (arXiv 2401.17868), as its referees' reports quote it"
)
_POLYP_METRICS = (
    Metric("s_measure", "S-measure"),
    Metric("mean_e_measure", "mean E"),
    Metric("weighted_f_measure", "weighted F"),
    Metric("mae", "MAE", scale=1.0, decimals=3),
)
_OVERLAP = (Metric("dice", "Dice"), Metric("iou", "IoU"))
_IOU = (Metric("iou", "IoU"),)
_BER = (Metric("ber", "BER"),)


def conv_lora_column(
    name: str,
    title: str,
    data: str,
    metrics: tuple[Metric, ...],
    loss: str = "structure",
    epochs: float = 30.0,
    rate: float = 1e-4,
    tasks: tuple[str, ...] = (),
) -> Column:
    """Conv-LoRA's protocol (AutoGluon's presets): ViT-H, no prompt, batches of 4."""
    config = Config(
        weights="sam_vit_h",
        model="vit_h",
        image_size=1024,
        data=data,
        tasks=tasks,
        metrics=() if tasks else tuple(metric.name for metric in metrics),
        # The mask decoder without its IoU head, as there.
        method=MethodConfig(decoder="mask"),
        loss=LossConfig(loss, iou_weight=0.0),  # pyrefly: ignore[bad-argument-type]
        augment=AugmentConfig(flip=True, scale_crop=0.0, color_jitter=0.0),
        epochs=epochs,
        batch_size=4,
        optimizer=OptimizerConfig(decoder_learning_rate=rate, weight_decay=1e-4, warmup=0.0),
    )
    return Column(name, title, config, metrics, learning_rate=rate)


KVASIR = conv_lora_column("kvasir_seg", "Kvasir", "tfds:polyp/kvasir", (*_POLYP_METRICS, *_OVERLAP))
CONV_LORA_BINARY = (
    KVASIR,
    conv_lora_column("cvc_clinicdb", "CVC-612", "tfds:polyp/cvc_clinicdb", _POLYP_METRICS),
    conv_lora_column("isic2017", "ISIC 2017", "tfds:isic2017", _IOU),
    conv_lora_column("camo", "CAMO", "tfds:camo", _POLYP_METRICS, epochs=20.0),
    conv_lora_column(
        "sbu_shadow", "SBU", "tfds:sbu_shadow", _BER, loss="balanced_bce", epochs=10.0
    ),
    conv_lora_column("leaf_disease", "Leaf", "tfds:leaf_disease", _IOU, rate=3e-4),
    conv_lora_column(
        "massachusetts_roads", "Road", "tfds:massachusetts_roads", _IOU, epochs=20.0, rate=3e-4
    ),
)
_CLASSES = (
    Metric("segmentation/miou", "mIoU", decimals=2),
    Metric("segmentation/pixel_accuracy", "pixel accuracy", decimals=2),
)
TRANS10K = tuple(
    conv_lora_column(
        f"trans10k_{version}",
        f"Trans10K-{version}",
        f"tfds:trans10k_{version}",
        _CLASSES,
        tasks=(f"segmentation:{classes}:mask_classification",),
    )
    for version, classes in (("v1", 3), ("v2", 12))
)


def conv_lora_rows(published: dict[str, str]) -> tuple[Row, ...]:
    """The methods that the sources name in Conv-LoRA's tables, with their numbers by name."""
    methods = {
        "decoder only": "decoder",
        "BitFit": "bitfit",
        "Adapter": "adapter",
        "SSF": "ssf",
        "LoRA": "lora:rank=3,alpha=32,targets=qkv",
        "Conv-LoRA": "conv_lora:rank=3,alpha=32,experts=8",
    }
    missing = {
        "VPT": "samjax has no prompt tokens in the encoder",
        "LST": "samjax has no ladder network beside the encoder",
        "SAM-Adapter": "samjax has no adapter with hand-made high-pass features",
    }
    rows = [Row(name, method, published.get(name, "")) for name, method in methods.items()]
    rows += [Row(name, unavailable=reason) for name, reason in missing.items()]
    return tuple(rows)


MTSAM_PAPER = (
    "Wang et al., MTSAM, ICLR 2025, as its referees' reports quote it: the successor of TA-LoRA, "
    "which it calls ToRA; TA-LoRA's own tables (arXiv 2403.10971) were not found"
)


def ta_lora_column(
    name: str, title: str, tasks: tuple[str, ...], metrics: tuple[Metric, ...]
) -> Column:
    """MTSAM's protocol: ViT-L, 200 epochs of batches of 4, all tasks in each step."""
    config = Config(
        weights="sam_vit_l",
        model="vit_l",
        image_size=1024,
        data=f"tfds:{name}",
        tasks=tasks,
        method=MethodConfig("ta_lora"),
        epochs=200.0,
        batch_size=4,
        optimizer=OptimizerConfig(decoder_learning_rate=1e-3, weight_decay=1e-6, warmup=0.05),
    )
    return Column(name, title, config, metrics, learning_rate=1e-3)


def share(name: str, title: str) -> Metric:
    """A metric in percent."""
    return Metric(name, title)


def amount(name: str, title: str, decimals: int = 3) -> Metric:
    """A metric in its own unit, such as metres or degrees."""
    return Metric(name, title, scale=1.0, decimals=decimals)


def ta_lora_rows(published: dict[str, str]) -> tuple[Row, ...]:
    """What the sources say that TA-LoRA is compared with, with their numbers by name."""
    other = "a network of its own, not a method of SAM"
    return (
        Row("mask decoders only", "decoder", published.get("decoder", "")),
        Row("LoRA-HPS", "lora_hps:rank=32", published.get("lora_hps", "")),
        Row("LoRA-STL", "lora_stl:rank=32", published.get("lora_stl", "")),
        Row("TA-LoRA", "ta_lora:rank=32,rank_task=4", published.get("ta_lora", "")),
        Row("MTAN", unavailable=other),
        Row("Cross-Stitch", unavailable=other),
    )
