"""PEFT methods as functions from trees to trees."""

from samjax.peft.delta import Delta, NotMergeable
from samjax.peft.io import Adapter, apply, describe, load, read, save
from samjax.peft.lora import LoRA
from samjax.peft.recipes import RECIPES, MethodConfig
from samjax.peft.report import Report, report
from samjax.peft.spec import (
    Freeze,
    PeftSpec,
    Rule,
    Train,
    attach,
    check_sites,
    combine,
    groups,
    merge,
    partition,
    trainable,
)
from samjax.peft.verify import verify_merge

__all__ = [
    "RECIPES",
    "Adapter",
    "Delta",
    "Freeze",
    "LoRA",
    "MethodConfig",
    "NotMergeable",
    "PeftSpec",
    "Report",
    "Rule",
    "Train",
    "apply",
    "attach",
    "check_sites",
    "combine",
    "describe",
    "groups",
    "load",
    "merge",
    "partition",
    "read",
    "report",
    "save",
    "trainable",
    "verify_merge",
]
