"""PEFT methods as functions from trees to trees."""

from samjax.peft.adaptformer import AdaptFormer
from samjax.peft.architecture import architecture
from samjax.peft.collapse import collapse, encoding_flops
from samjax.peft.compose import Stack, interpolate, pad_rank, pick, scale, side_by_side, stack
from samjax.peft.conv_lora import ConvLoRA
from samjax.peft.delta import Delta, NotComposable, NotMergeable
from samjax.peft.dora import DoRA
from samjax.peft.fact import FacT
from samjax.peft.houlsby import Houlsby
from samjax.peft.io import Adapter, apply, describe, load, read, records, save
from samjax.peft.lora import LoRA
from samjax.peft.lora_conv import LoRAConv
from samjax.peft.method_config import MethodConfig
from samjax.peft.nas_lora import NASLoRA
from samjax.peft.one_task import OneTask, one_task
from samjax.peft.recipes import RECIPES
from samjax.peft.report import Report, report
from samjax.peft.sam_parser import SAMParser
from samjax.peft.spec import Freeze, PeftSpec, Rule, Train
from samjax.peft.ssf import SSF
from samjax.peft.trees import (
    as_computed,
    attach,
    check_sites,
    combine,
    deltas,
    groups,
    merge,
    metrics,
    partition,
    start,
    trainable,
)
from samjax.peft.verify import verify_merge, verify_task_merge

__all__ = [
    "RECIPES",
    "SSF",
    "AdaptFormer",
    "Adapter",
    "ConvLoRA",
    "Delta",
    "DoRA",
    "FacT",
    "Freeze",
    "Houlsby",
    "LoRA",
    "LoRAConv",
    "MethodConfig",
    "NASLoRA",
    "NotComposable",
    "NotMergeable",
    "OneTask",
    "PeftSpec",
    "Report",
    "Rule",
    "SAMParser",
    "Stack",
    "Train",
    "apply",
    "architecture",
    "as_computed",
    "attach",
    "check_sites",
    "collapse",
    "combine",
    "deltas",
    "describe",
    "encoding_flops",
    "groups",
    "interpolate",
    "load",
    "merge",
    "metrics",
    "one_task",
    "pad_rank",
    "partition",
    "pick",
    "read",
    "records",
    "report",
    "save",
    "scale",
    "side_by_side",
    "stack",
    "start",
    "trainable",
    "verify_merge",
    "verify_task_merge",
]
