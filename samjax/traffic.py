"""What a compiled program moves between a chip and its memory, and its largest arrays.

The compiler's own `cost_analysis()` counts the body of a loop once; here each operation counts as
often as it runs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from samjax.hlo import Operation, Program, Shape

# What moves nothing itself: names for what is there, and operations whose parts are counted.
_FREE = frozenset(
    (
        *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast"),
        *("while", "conditional", "call", "async-start", "after-all"),
        *("partition-id", "replica-id", "opt-barrier"),
    )
)
# Calls by which the TPU's compiler takes notes.
_NOTES = re.compile(
    r'custom_call_target="(AllocateBuffer|AssumeGatherIndicesInBound|ConcatBitcast)"'
)
_SLICES = "dynamic-slice", "slice", "gather"


def traffic(program: Program) -> int:
    """Bytes that one device reads from and writes to its memory in a run of the program.

    Each operation, a fusion being one, reads its operands and writes its results once: of what it
    only slices, the slices, and of what it updates in place, the update. The padding of tiles
    counts; what the compiler keeps on the chip does not.
    """
    return sum(
        count * _moved(program, part, operation)
        for part, operation, count in program.runs()
        if _moves(operation)
    )


def _moves(operation: Operation) -> bool:
    # Of an asynchronous operation, its start counts.
    ends = operation.opcode.endswith(("-done", "-update"))
    return operation.opcode not in _FREE and not ends and not _NOTES.search(operation.attributes)


def _moved(program: Program, part: str, operation: Operation) -> int:
    known = program.parts[part]
    operands = [known[name] for name in operation.operands]
    results = _results(operation)
    if operation.opcode == "fusion":
        (name,) = operation.called("calls")
        read = sum(
            min(_in_hbm(operand.shapes), _read(program, name, i))
            for i, operand in enumerate(operands)
        )
        return read + _written_by(program, name, results)
    if operation.opcode.removesuffix("-start") in _SLICES:
        return _padded(results) + _in_hbm(results)
    if operation.opcode == "dynamic-update-slice":
        return 2 * _in_hbm(operands[1].shapes)
    return _in_hbm(results) + sum(_in_hbm(operand.shapes) for operand in operands)


def _results(operation: Operation) -> tuple[Shape, ...]:
    """What it makes; an asynchronous one also names its operands, and flags."""
    if operation.opcode in ("copy-start", "all-reduce-start"):
        return operation.shapes[:1]
    count = len(operation.operands)
    ends = operation.opcode.endswith("-start")
    return operation.shapes[count : 2 * count] if ends else operation.shapes


def _read(program: Program, part: str, index: int) -> int:
    """Bytes that a fusion reads of its operand of this index."""
    operations = program.parts[part].values()
    parameter = next(o for o in operations if o.opcode == "parameter" and o.inside == str(index))

    def of_users(source: Operation) -> int:
        total = 0
        for user in (o for o in operations if source.name in o.operands):
            if user.opcode in _SLICES:
                total += _padded(user.shapes)
            elif user.opcode == "bitcast":
                total += of_users(user)
            elif user.opcode == "fusion":
                (inner,) = user.called("calls")
                places = [i for i, name in enumerate(user.operands) if name == source.name]
                total += sum(_read(program, inner, i) for i in places)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != source.name:
                total += _padded(parameter.shapes)
        return total

    return of_users(parameter)


def _written_by(program: Program, part: str, results: Iterable[Shape]) -> int:
    """Bytes that a fusion writes; of arrays that it updates in place, the update."""
    operations = program.parts[part]
    updates = [o for o in operations.values() if o.opcode == "dynamic-update-slice"]
    written = 0
    for shape in results:
        update = next((u for u in updates if u.shapes[0].dims == shape.dims), None)
        own = _in_hbm([shape])
        written += (
            own if update is None else min(own, _padded(operations[update.operands[1]].shapes))
        )
    return written


@dataclasses.dataclass(frozen=True)
class LargeArray:
    """Arrays of one shape that serve one operation of the model."""

    shape: Shape
    source: str
    times: int  # how many of them a run makes


def largest_arrays(program: Program, count: int) -> list[LargeArray]:
    """The largest of what operations write to memory, tiles' padding included.

    Layers, whose names differ by their number, count as one.
    """
    kinds: dict[tuple[str, str, str], LargeArray] = {}
    for _, operation, times in program.runs():
        if not _moves(operation):
            continue
        source = re.sub(r"_\d+\b", "_*", _source(program, operation))
        for shape in _results(operation):
            if shape.in_hbm:
                key = str(shape), shape.layout, source
                known = kinds.get(key, LargeArray(shape, source, 0))
                kinds[key] = dataclasses.replace(known, times=known.times + times)
    ordered = sorted(kinds.values(), key=lambda kind: -kind.shape.padded_bytes)
    return ordered[:count]


def _source(program: Program, operation: Operation) -> str:
    """That of a fusion which has none is the last one in it."""
    inner = [o for name in operation.called("calls") for o in program.parts[name].values()]
    return next((o.source for o in (operation, *reversed(inner)) if o.source), "")


def _in_hbm(shapes: Iterable[Shape]) -> int:
    return _padded(shape for shape in shapes if shape.in_hbm)


def _padded(shapes: Iterable[Shape]) -> int:
    return sum(shape.padded_bytes for shape in shapes)
