"""Rules that say what adapts and what trains.

    PeftSpec((
        Rule("image_encoder/**/attn/qkv[q,v]", LoRA(rank=4)),
        Rule("mask_decoder/**", Train(group="decoder")),
    ))

First match wins; every rule must match something; what no rule claims is frozen. `*` matches
within one component of a path, `**` any number of components, `{a,b}` either of two.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any, get_args, get_type_hints

from samjax.peft.adaptformer import AdaptFormer
from samjax.peft.collapsed import Collapsed
from samjax.peft.compose import Stack
from samjax.peft.conv_lora import ConvLoRA
from samjax.peft.delta import WEIGHTS, Method
from samjax.peft.dora import DoRA
from samjax.peft.fact import FacT
from samjax.peft.houlsby import Houlsby
from samjax.peft.lora import LoRA
from samjax.peft.lora_conv import LoRAConv
from samjax.peft.nas_lora import NASLoRA
from samjax.peft.per_task import PerTask
from samjax.peft.sam_parser import SAMParser
from samjax.peft.ssf import SSF
from samjax.peft.ta_lora import TALoRA

# The methods that a spec can name in an adapter file.
METHODS: dict[str, type[Method]] = {
    "lora": LoRA,
    "dora": DoRA,
    "lora_conv": LoRAConv,
    "stack": Stack,
    "conv_lora": ConvLoRA,
    "fact": FacT,
    "adapter": Houlsby,
    "adaptformer": AdaptFormer,
    "ssf": SSF,
    "sam_parser": SAMParser,
    "nas_lora": NASLoRA,
    "collapsed": Collapsed,
    "ta_lora": TALoRA,
    "per_task": PerTask,
}


@dataclasses.dataclass(frozen=True)
class Train:
    """Trains leaves of the model itself; `group` names them for `optax.partition`.

    `last`: only what lies in the encoder's last so many blocks.
    """

    group: str = WEIGHTS
    last: int | None = None


@dataclasses.dataclass(frozen=True)
class Freeze:
    """Keeps leaves frozen that a later rule would train."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A pattern and what happens to what it matches.

    With `Train` or `Freeze` the pattern matches paths of `params`' leaves; with a method it matches
    sites of the kinds that the method adapts, and may end in the segments of a fused projection:
    `.../attn/qkv[q,v]`. What lies in blocks of the encoder before `first_block` it does not match.
    """

    pattern: str
    config: Any
    first_block: int = 0

    @property
    def adapts(self) -> bool:
        """True for a method, which adds records; False for Train and Freeze."""
        return not isinstance(self.config, Train | Freeze)


@dataclasses.dataclass(frozen=True)
class PeftSpec:
    """An ordered set of rules: one PEFT method, or a mixture."""

    rules: tuple[Rule, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """A JSON-able list, one dict a rule; `from_json` is its inverse."""
        return [
            {
                "pattern": rule.pattern,
                **({"first_block": rule.first_block} if rule.first_block else {}),
                **_encode(rule.config),
            }
            for rule in self.rules
        ]

    @staticmethod
    def from_json(data: Any) -> PeftSpec:
        """Rebuilds a spec. Raises ValueError naming what it does not know."""
        if not isinstance(data, list):
            raise ValueError(
                f"not a PEFT spec: {type(data).__name__} where a list of rules should be"
            )
        rules = []
        try:
            for entry in data:
                if not isinstance(entry, dict):
                    raise TypeError(f"a rule is {type(entry).__name__}, not an object")
                options = dict(entry)
                pattern = _typed("pattern", options.pop("pattern"), str)
                first_block = _typed("first_block", options.pop("first_block", 0), int)
                rules.append(Rule(pattern, _decode(options), first_block))
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not a PEFT spec: {error}") from None
        return PeftSpec(tuple(rules))


def pattern_of(path: str, segments: tuple[str, ...]) -> str:
    """The pattern that matches one site alone, and adapts these segments of it."""
    return f"{path}[{','.join(segments)}]" if segments else path


_KINDS: dict[str, type] = {**METHODS, "train": Train, "freeze": Freeze}


def _encode(config: Any) -> dict[str, Any]:
    """The settings of a rule as JSON; some hold other methods' settings in their own."""
    kind = next(name for name, cls in _KINDS.items() if cls is type(config))
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name, value in fields.items():
        if isinstance(value, tuple):
            fields[name] = [_encode(method) for method in value]
        elif isinstance(value, Method):
            fields[name] = _encode(value)
    return {"kind": kind, **fields}


def _decode(data: dict[str, Any]) -> Any:
    """The inverse of `_encode`."""
    kind = _typed("kind", data["kind"], str)
    if kind not in _KINDS:
        nearest = difflib.get_close_matches(kind, _KINDS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown PEFT method {kind!r}; the nearest is {nearest}, and this samjax knows "
            f"{', '.join(_KINDS)}"
        )
    cls = _KINDS[kind]
    hints = get_type_hints(cls)
    types = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    # What is no field, the constructor refuses.
    options = {
        name: _decode_methods(name, value)
        if cls is Stack
        else _decode_method(kind, value)
        if types.get(name) is Method
        else _typed(f"{name} of {kind}", value, types.get(name, Any))
        for name, value in data.items()
        if name != "kind"
    }
    return cls(**options)


def _decode_methods(name: str, value: Any) -> tuple[Any, ...]:
    """The methods of a stack, none of which is a stack."""
    if not isinstance(value, list):
        raise TypeError(f"{name} of stack is {type(value).__name__}, not a list of methods")
    for entry in value:
        if isinstance(entry, dict) and entry.get("kind") == "stack":
            raise TypeError("a stack holds stack, which is no method to stack")
    return tuple(_decode_method("stack", entry) for entry in value)


def _decode_method(kind: str, value: Any) -> Method:
    """A method that the settings of another hold."""
    if not isinstance(value, dict):
        raise TypeError(f"{kind} holds {type(value).__name__}, not a method")
    if value.get("kind") in ("per_task", "train", "freeze"):
        raise TypeError(f"a {kind} holds {value['kind']}, which is no method to hold")
    return _decode(value)


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A value of a JSON file as a field's annotation wants it; whole numbers serve as float.

    Raises TypeError for another type, and for a number that is not finite.
    """
    if kind is Any:
        return value
    kinds = get_args(kind) or (kind,)
    given = type(value)
    if given not in kinds and not (given is int and float in kinds):
        wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise TypeError(f"{name} is {value!r}, not {wanted}")
    if float not in kinds or value is None:
        return value
    if not math.isfinite(value):
        raise TypeError(f"{name} is {value!r}, not a finite number")
    return float(value)
