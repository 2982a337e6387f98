"""What the `adapter_config.json` of HuggingFace's peft says, and what of it samjax computes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weights_convert import CheckpointError
from weights_convert.errors import listed, shown, told

CONFIG = "adapter_config.json"
# Keys of the config that do not change what the saved tensors compute.
_SILENT = frozenset(
    "auto_mapping base_model_name_or_path ensure_weight_tying eva_config exclude_modules "
    "inference_mode layers_pattern layers_to_transform megatron_core peft_version "
    "qalora_group_size revision runtime_config target_modules task_type".split()
)
# Ways to draw the first factors that leave the weights as they are; PiSSA and others change them.
_DRAWN = ("gaussian", "orthogonal", "eva")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an `adapter_config.json` says of the update."""

    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    dropout: float
    rank_stabilized: bool
    dora: bool
    modules_to_save: tuple[str, ...]

    def of(self, module: str) -> tuple[int, float]:
        """Rank and alpha of a module: of the first pattern that ends its name, as peft does it."""
        return (
            _matching(self.rank_pattern, module, self.rank),
            _matching(self.alpha_pattern, module, self.alpha),
        )

    def saves(self, name: str) -> bool:
        """True for a tensor of a module that is trained as a whole."""
        parts = name.split(".")
        modules = (".".join(parts[:i]) for i in range(1, len(parts)))
        return any(module.endswith(self.modules_to_save) for module in modules)


def read_settings(folder: Path) -> Settings:
    """A folder's. Raises FileNotFoundError, or ValueError for what samjax does not compute."""
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{folder} lacks its {CONFIG}; copy the whole folder")
    with told(str(file)):
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it holds no JSON object")
    kind = record.pop("peft_type", None)
    if kind != "LORA":
        raise ValueError(f"{file}: samjax reads LoRA and DoRA of peft, and this is {shown(kind)}")
    if (bias := record.pop("bias", "none")) != "none":
        raise ValueError(
            f"{file}: bias is {shown(bias)}, and samjax reads adapters with bias none; merge it in "
            "peft (merge_and_unload) and convert the weights"
        )
    start = record.pop("init_lora_weights", True)
    if start not in (True, False, None, *_DRAWN):
        raise ValueError(
            f"{file}: init_lora_weights {shown(start)} changes the weights themselves; save it in "
            "peft with path_initial_model_for_weight_conversion"
        )
    with told(str(file)):
        settings = Settings(
            rank=_number(file, record, "r", 8, int),
            alpha=_number(file, record, "lora_alpha", 8),
            rank_pattern=_patterns(file, record, "rank_pattern", int),
            alpha_pattern=_patterns(file, record, "alpha_pattern"),
            dropout=_number(file, record, "lora_dropout", 0.0),
            rank_stabilized=bool(record.pop("use_rslora", False)),
            dora=bool(record.pop("use_dora", False)),
            modules_to_save=_strings(file, record, "modules_to_save"),
        )
    # What a newer peft adds is null, false or empty where it is not used.
    asks = {k for k, v in record.items() if k not in _SILENT and v not in (None, False, "", [], {})}
    if asks:
        raise ValueError(
            f"{file}: samjax does not compute what {listed(asks, 'of its keys')} asks for; merge "
            "it in peft (merge_and_unload) and convert the weights"
        )
    return settings


def _number(file: Path, record: dict[str, Any], key: str, default: Any, kind: type = float) -> Any:
    return _checked(file, key, record.pop(key, default), kind)


def _checked(file: Path, key: str, value: Any, kind: type) -> Any:
    kinds = (int,) if kind is int else (int, float)
    good = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not good or (kind is int and value < 1):
        what = "a whole number above 0" if kind is int else "a number"
        raise CheckpointError(f"{file}: {key} is {shown(value)}, not {what}; copy the folder again")
    return kind(value)


def _patterns(file: Path, record: dict[str, Any], key: str, kind: type = float) -> dict[str, Any]:
    patterns = record.pop(key, None) or {}
    for pattern, value in patterns.items():
        patterns[pattern] = _checked(file, f"{key} of {shown(pattern)}", value, kind)
        try:
            re.compile(pattern)
        except re.error:
            raise CheckpointError(
                f"{file}: {key} has {shown(pattern)}, which is no regular expression; correct it"
            ) from None
    return patterns


def _strings(file: Path, record: dict[str, Any], key: str) -> tuple[str, ...]:
    values = record.pop(key, None) or []
    if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
        raise CheckpointError(f"{file}: {key} is {shown(values)}, not a list of names; correct it")
    return tuple(values)


def _matching(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise
