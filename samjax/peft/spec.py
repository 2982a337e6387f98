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
from samjax.peft.sam_parser import SAMParser
from samjax.peft.ssf import SSF

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
    `.../attn/qkv[q,v]`.
    """

    pattern: str
    config: Any

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
        return [{"pattern": r.pattern, **_encode(r.config)} for r in self.rules]

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
                rules.append(Rule(pattern, _decode(options)))
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not a PEFT spec: {error}") from None
        return PeftSpec(tuple(rules))


def pattern_of(path: str, segments: tuple[str, ...]) -> str:
    """The pattern that matches one site alone, and adapts these segments of it."""
    return f"{path}[{','.join(segments)}]" if segments else path


_KINDS: dict[str, type] = {**METHODS, "train": Train, "freeze": Freeze}


def _encode(config: Any) -> dict[str, Any]:
    """The settings of a rule as JSON; a stack holds settings in its own."""
    kind = next(name for name, cls in _KINDS.items() if cls is type(config))
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {
        "kind": kind,
        **{k: [_encode(m) for m in v] if isinstance(v, tuple) else v for k, v in fields.items()},
    }


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
        else _typed(f"{name} of {kind}", value, types.get(name, Any))
        for name, value in data.items()
        if name != "kind"
    }
    return cls(**options)


def _decode_methods(name: str, value: Any) -> tuple[Any, ...]:
    """The methods of a stack, none of which is a stack."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise TypeError(f"{name} of stack is {type(value).__name__}, not a list of methods")
    for entry in value:
        if entry.get("kind") in ("stack", "train", "freeze"):
            raise TypeError(f"a stack holds {entry['kind']}, which is no method to stack")
    return tuple(_decode(entry) for entry in value)


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
