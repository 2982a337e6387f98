"""The pickle of a torch checkpoint, read as data: a small interpreter that calls nothing.

Python's own `pickle` runs what a file asks for. `find_class` can restrict whom it calls, but not
what its memo allocates (one opcode may ask for 64 GB) nor which objects receive a state. A torch
checkpoint needs some thirty opcodes and seven names, so this module interprets just these, and a
tensor comes out as a `TensorRef`: a description that `torch_zip` checks before it reads a byte.
"""

from __future__ import annotations

import dataclasses
import pickletools
from typing import Any

import ml_dtypes
import numpy as np

from weights_convert.errors import CheckpointError, shown

# The storage types that torch writes, all little-endian on disk unless the archive says otherwise.
_DTYPES: dict[str, np.dtype] = {
    "torch.DoubleStorage": np.dtype("float64"),
    "torch.FloatStorage": np.dtype("float32"),
    "torch.HalfStorage": np.dtype("float16"),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype("int64"),
    "torch.IntStorage": np.dtype("int32"),
    "torch.ShortStorage": np.dtype("int16"),
    "torch.CharStorage": np.dtype("int8"),
    "torch.ByteStorage": np.dtype("uint8"),
    "torch.BoolStorage": np.dtype("bool"),
    "torch.storage.UntypedStorage": np.dtype("uint8"),
}
_ORDERED_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_SIZE = "torch.Size"
_ALLOWED = frozenset({*_DTYPES, _ORDERED_DICT, _TENSOR, _PARAMETER, _SIZE})

_MOST_BYTES = 8 << 20  # ViT-H's pickle has 0.2 MB, one with an optimiser's state 0.5 MB


@dataclasses.dataclass(frozen=True)
class StorageRef:
    """A storage that the archive holds under `key`: `count` numbers of type `dtype`."""

    key: str
    dtype: np.dtype
    count: int


@dataclasses.dataclass(frozen=True)
class TensorRef:
    """A strided view of a storage; offset and strides count numbers. Not checked yet."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Name:
    """A name that the pickle asked for. It stands for the thing and never becomes it."""

    name: str


class _Mark:
    """What MARK leaves on the stack."""


def unpickle(data: bytes) -> Any:
    """The plain objects of `data`: dicts, lists, tuples, numbers, strings and `TensorRef`s.

    Raises CheckpointError, a sentence, where the pickle asks for anything else. Damaged bytes may
    also raise what `pickletools` and list operations raise; the caller puts that in a sentence.
    """
    if len(data) > _MOST_BYTES:
        raise CheckpointError(
            f"its pickle has {len(data)} bytes, too many for a checkpoint; save only "
            "model.state_dict()"
        )
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "STOP":
                return stack.pop()
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_Mark())
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                items = _pop_to_mark(stack)
                stack.append(tuple(items))
            case "APPEND":
                item = stack.pop()
                _is(stack[-1], list).append(item)
            case "APPENDS":
                items = _pop_to_mark(stack)
                _is(stack[-1], list).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key, value])
            case "SETITEMS":
                items = _pop_to_mark(stack)
                _set_items(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                module, _, name = argument.partition(" ")
                stack.append(_find(module, name))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_find(_is(module, str), _is(name, str)))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, name = stack.pop(), stack.pop()
                stack.append(_rebuild(_is(name, _Name).name, _is(arguments, tuple)))
            case "BUILD":
                # The version numbers that a state dict carries as `_metadata`; not needed.
                stack.pop()
                _is(stack[-1], dict)
            case _:
                raise CheckpointError(
                    f"its pickle holds the opcode {opcode.name}, which no checkpoint of tensors "
                    "needs; save only model.state_dict()"
                )
    raise EOFError("the pickle ends early")


def _is(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"the pickle has a {type(value).__name__} for a {kind.__name__}")
    return value


def _integer(value: Any) -> int:
    if type(value) is not int or abs(value) >= 1 << 63:
        raise TypeError(f"the pickle has a {type(value).__name__} for a 64-bit number")
    return value


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    items: list[Any] = []
    while not isinstance(item := stack.pop(), _Mark):
        items.append(item)
    return items[::-1]


def _set_items(target: Any, items: list[Any]) -> None:
    _is(target, dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Hashing a deeply nested tuple would overflow the C stack.
        if not isinstance(key, str | int | float | None):
            raise TypeError(f"the pickle has a {type(key).__name__} for a dict's key")
        target[key] = value


def _find(module: str, name: str) -> _Name:
    full = f"{module}.{name}"
    if full not in _ALLOWED:
        raise CheckpointError(
            f"its pickle asks for {shown(full)}, which is not a tensor and is never run; open it "
            "with torch where you trust it and save only model.state_dict()"
        )
    return _Name(full)


def _storage(ident: Any) -> StorageRef:
    kind, dtype, key, _, count = _is(ident, tuple)
    name = _is(dtype, _Name).name
    if kind != "storage" or name not in _DTYPES:
        raise TypeError("a storage of an unknown kind")
    return StorageRef(_is(key, str), _DTYPES[name], _integer(count))


def _rebuild(name: str, arguments: tuple[Any, ...]) -> Any:
    if name == _TENSOR:
        storage, offset, shape, strides = arguments[:4]
        return TensorRef(
            _is(storage, StorageRef),
            _integer(offset),
            tuple(_integer(size) for size in _is(shape, tuple)),
            tuple(_integer(stride) for stride in _is(strides, tuple)),
        )
    if name == _PARAMETER:
        return _is(arguments[0], TensorRef)
    if name == _SIZE:
        return _is(arguments[0], tuple | list)
    if name == _ORDERED_DICT and not arguments:
        return {}
    raise TypeError(f"{name} is called in an unknown way")
