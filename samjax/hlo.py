"""Compiled programs, read out of their text: operations, and how often each runs.

The text is that of `jax.stages.Compiled.as_text()`, of any backend.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator

# Memories of a chip that are no HBM, by the S(n) of a layout: TPUs' vector and scalar memories.
_ON_CHIP = re.compile(r"S\([1-9]\d*\)")
# Of types whose names do not say it.
_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array as it lies in memory."""

    dtype: str  # as XLA names it: f32, bf16, s8
    dims: tuple[int, ...]
    layout: str  # the axes, minor first, then tiles and memory; "" where the text does not say

    @property
    def bytes(self) -> int:
        """Those of its elements."""
        return math.prod(self.dims) * self._bits // 8

    @property
    def padded_bytes(self) -> int:
        """Those that it takes, its minor axes rounded up to whole tiles."""
        order, _, rest = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        if tile is None or not order:
            return self.bytes
        # The tile's last side lies along the minor axis.
        sides = [int(side) for side in tile[1].split(",")][::-1]
        minor = [self.dims[int(axis)] for axis in order.split(",")]
        whole = [-(-n // side) * side for n, side in zip(minor, sides, strict=False)]
        return math.prod([*whole, *minor[len(whole) :]]) * self._bits // 8

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in the device's large memory."""
        return _ON_CHIP.search(self.layout) is None

    @property
    def _bits(self) -> int:
        if self.dtype in _BITS:
            return _BITS[self.dtype]
        number = re.search(r"\d+", self.dtype)
        return int(number[0]) if number else 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a program."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result: of a tuple, all its arrays
    operands: tuple[str, ...]
    inside: str  # what stands in its parentheses
    attributes: str

    @property
    def source(self) -> str:
        """The operation of the model that it comes of, as JAX names it; "" where nothing tells."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, *keys: str) -> list[str]:
        """The parts that it runs, under attributes such as calls or body."""
        found = []
        for key in keys:
            # One name, or several in braces.
            match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            found += re.findall(r"[\w.\-]+", match[1]) if match else []
        return found


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, where the attributes of a kernel, JSON among them, may go over several."""
    whole = ""
    for line in text.splitlines():
        if line.startswith(('"', "}}")):
            whole += line
        else:
            yield whole
            whole = line
    yield whole


class Program:
    """A compiled program: its parts, each a dict of its operations by name.

    Raises ValueError for a text that holds none.
    """

    def __init__(self, text: str) -> None:
        self.parts: dict[str, dict[str, Operation]] = {}
        self._entry = ""
        part: dict[str, Operation] | None = None
        for line in _whole_lines(text):
            head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if part is None and head is not None and head[2] != "HloModule":
                part = self.parts[head[2]] = {}
                self._entry = head[2] if head[1] else self._entry
            elif part is not None and line.startswith("}"):
                part = None
            elif part is not None and (operation := _operation(line)) is not None:
                part[operation.name] = operation
        if not self._entry:
            raise ValueError("the text holds no compiled program")

    def runs(self) -> Iterator[tuple[str, Operation, int]]:
        """Each operation with the part that it stands in, and how often a run comes by it.

        Fusions are one operation. Of a conditional all branches count, as if each was taken.
        """
        for part, count in self._times.items():
            for operation in self.parts[part].values():
                yield part, operation, count

    @functools.cached_property
    def _times(self) -> Counter[str]:
        times: Counter[str] = Counter()

        def visit(part: str, count: int) -> None:
            times[part] += count
            for operation in self.parts[part].values():
                for inner, turns in self._inner(operation):
                    visit(inner, count * turns)

        visit(self._entry, 1)
        return times

    def _inner(self, operation: Operation) -> list[tuple[str, int]]:
        if operation.opcode == "while":
            turns = self._turns(operation)
            return [(name, turns) for name in operation.called("body")]
        if operation.opcode == "conditional":
            branches = "branch_computations", "true_computation", "false_computation"
            return [(name, 1) for name in operation.called(*branches)]
        if operation.opcode in ("call", "async-start"):
            return [(name, 1) for name in operation.called("calls", "to_apply")]
        return []

    def _turns(self, loop: Operation) -> int:
        """As the compiler says, or the one number that the loop's condition compares with."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        (condition,) = loop.called("condition")
        operations = self.parts[condition].values()
        numbers = [o.inside for o in operations if o.opcode == "constant" and o.inside.isdigit()]
        if len(numbers) != 1:
            raise ValueError(f"nothing tells how often the loop {loop.name} turns")
        return int(numbers[0])


def _operation(line: str) -> Operation | None:
    head = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shapes, rest = rest[:end], rest[end:].lstrip()
    opcode = rest[: rest.index("(")]
    rest = rest[len(opcode) :]
    end = _closing(rest)
    inside, attributes = rest[1:end], rest[end + 1 :]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Operation(head[1], opcode, _shapes(shapes), operands, inside, attributes)


def _closing(text: str) -> int:
    """Where the parenthesis that opens the text closes."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"a parenthesis stays open in {text[:80]!r}")


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n), layout)
        for dtype, dims, layout in re.findall(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?", text)
    )
