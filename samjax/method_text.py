"""A method as one word of the command line: NAME, or NAME:SETTING=VALUE,SETTING=VALUE."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro

from samjax.arguments import parse
from samjax.config import Config
from samjax.peft.method_config import MethodConfig
from samjax.peft.recipes import RECIPES


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What a method's text may set."""

    method: Annotated[MethodConfig, tyro.conf.arg(name="")]
    learning_rate: float | None = None
    stages: tuple[str, ...] | None = None


def with_method(config: Config, text: str) -> Config:
    """The config with the method of a text; several values are joined by +, stages by /.

    learning_rate and stages are settings, too; of method decoder the rate is the decoder's. What
    the text leaves out is the config's where the config has the same method, and else the method's
    own default; how much of the decoder trains is the config's with any method. Raises ValueError
    for a method or a setting that cannot be.
    """
    name, _, settings = text.partition(":")
    parts = [part for part in settings.split(",") if part]
    for part in parts:
        if "=" not in part and "=" in settings:
            raise ValueError(
                f"{text}: {part!r} is no SETTING=VALUE; several values of a setting are joined by +"
            )
    given = dict(part.partition("=")[::2] for part in parts)
    if name not in RECIPES:
        MethodConfig(name)  # which says so
    known = (*RECIPES[name].settings, "decoder", "learning_rate", "stages")
    for key, value in given.items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{text}: method {name!r} has no setting {key!r}; the nearest is {nearest}, and it "
                f"has {', '.join(known)}"
            )
        if not value:
            raise ValueError(f"{text}: {key} has no value; write {key}=VALUE")
    hints = get_type_hints(MethodConfig)
    argv = []
    for key, value in given.items():
        values = value.split("+") if _is_tuple(hints.get(key)) else [value]
        values = value.split("/") if key == "stages" else values  # + joins their groups
        argv += [f"--{key.replace('_', '-')}", *values]
    same, optimizer = name == config.method.method, config.optimizer
    try:
        default = _Settings(
            config.method if same else MethodConfig(name, decoder=config.method.decoder),
            optimizer.learning_rate if same and name != "decoder" else None,
            config.stages if same else None,
        )
        found = parse(_Settings, argv, "samjax params", default, None)
        rates: dict[str, Any] = {"learning_rate": found.learning_rate}
        if name == "decoder":  # nothing else trains
            rates = {"learning_rate": None}
            if found.learning_rate is not None:
                rates["decoder_learning_rate"] = found.learning_rate
        optimizer = dataclasses.replace(optimizer, **rates)
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from None
    return dataclasses.replace(
        config, method=found.method, optimizer=optimizer, stages=found.stages
    )


def _is_tuple(hint: Any) -> bool:
    return any(get_origin(kind) is tuple for kind in (hint, *get_args(hint)))
