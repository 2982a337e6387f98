"""How a dataset is made where there is a choice, as one text: SETTING=VALUE,SETTING=VALUE.

The settings are the fields of a frozen dataclass. A dataset's name with a colon and such a text
stands for what these settings make, and each combination is kept in a folder of its own.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def parse_settings(kind: type[T], text: str) -> T:
    """The settings of a text, in which several values of one are joined by +.

    Raises ValueError for a setting that `kind` has not, and for a value that it cannot have.
    """
    hints = get_type_hints(kind)
    given: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or not value:
            raise ValueError(
                f"{part!r} is no SETTING=VALUE; several values of a setting are joined by +"
            )
        if name not in hints:
            nearest = difflib.get_close_matches(name, hints, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"no setting {name!r}; the nearest is {nearest}, there are {', '.join(hints)}"
            )
        try:
            given[name] = _value(hints[name], value)
        except ValueError:
            raise ValueError(f"{name} cannot be {value!r}") from None
    return kind(**given)


def settings_text(settings: Any) -> str:
    """The text of all settings, those that are the default too; always the same."""
    fields = dataclasses.fields(settings)
    return ",".join(f"{f.name}={_text(getattr(settings, f.name))}" for f in fields)


def _value(hint: Any, text: str) -> Any:
    if get_origin(hint) is not tuple:
        return hint(text)
    kinds, values = get_args(hint), text.split("+")
    if kinds[-1] is Ellipsis:
        return tuple(kinds[0](value) for value in values)
    return tuple(kind(value) for kind, value in zip(kinds, values, strict=True))


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
