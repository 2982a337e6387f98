"""What devices exchange while a compiled program runs: each collective, its bytes and its axes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from samjax.hlo import Operation, Program

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation in which devices exchange what they have."""

    kind: str  # of KINDS
    # On one device, of the whole array: what a reduction takes, what a gather gives.
    bytes: int
    axes: tuple[str, ...]  # of the mesh, along which the devices of a group differ
    group: int  # devices that exchange with one another
    times: int  # a run of the program
    source: str  # the operation of the model that it serves

    @property
    def total_bytes(self) -> int:
        """Of all its runs."""
        return self.bytes * self.times


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """All of a program's, those with the most bytes first; those that are alike are one.

    `mesh` are the names and sizes of the axes, in order. What the compiler hides in fusions counts,
    too; of an asynchronous one, its start. Groups of one device exchange nothing.
    """
    found: Counter[Collective] = Counter()
    seen: set[tuple[str, ...]] = set()
    for part, operation, count in program.runs():
        for where, own in _fused(program, part, operation):
            kind = own.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            # The fusions that an asynchronous one consists of repeat it, under the same number.
            channel = re.search(r"channel_id=(\d+)", own.attributes)
            if where != part and channel is not None:
                if (key := (part, kind, channel[1], own.source)) in seen:
                    continue
                seen.add(key)
            groups = _groups(own.attributes, math.prod(mesh.values()))
            if len(groups[0]) < 2:
                continue
            operands = [program.parts[where][name] for name in own.operands]
            size = max(sum(_bytes(operand) for operand in operands), _result_bytes(own, operands))
            found[Collective(kind, size, _axes(groups, mesh), len(groups[0]), 1, own.source)] += (
                count
            )
    merged = [dataclasses.replace(alike, times=count) for alike, count in found.items()]
    return sorted(merged, key=lambda collective: -collective.total_bytes)


def _fused(program: Program, part: str, operation: Operation) -> Iterator[tuple[str, Operation]]:
    """An operation, or those that it is fused of, with the parts that they stand in."""
    if operation.opcode != "fusion":
        yield part, operation
        return
    for name in operation.called("calls"):
        for inner in program.parts[name].values():
            yield from _fused(program, name, inner)


def _bytes(operation: Operation) -> int:
    return sum(shape.bytes for shape in operation.shapes)


def _result_bytes(operation: Operation, operands: Sequence[Operation]) -> int:
    """Those of an asynchronous one stand between its operands and its flags."""
    shapes = operation.shapes
    if operation.opcode.endswith("-start") and operation.opcode != "all-reduce-start":
        given = sum(len(operand.shapes) for operand in operands)
        shapes = shapes[given : 2 * given]
    return sum(shape.bytes for shape in shapes)


def _groups(attributes: str, devices: int) -> list[list[int]]:
    """Which devices exchange with one another, in each of the ways in which XLA writes it."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        return [[int(n) for n in pair] for pair in re.findall(r"(\d+),(\d+)", pairs[1])] or [[0]]
    text = re.search(r"replica_groups=(.*)", attributes)
    if text is None or text[1].startswith("{}"):
        return [list(range(devices))]
    if text[1].startswith("{{"):
        groups = re.findall(r"\{([\d,]+)\}", text[1][1 : text[1].index("}}") + 1])
        return [[int(n) for n in group.split(",")] for group in groups]
    if iota := re.match(r"\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text[1]):
        return _order(iota[3], devices).reshape(int(iota[1]), int(iota[2])).tolist()
    own = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))?\s*\{([^}]*)\}", text[1])
    if own:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", own[1])}
        chosen = re.findall(r"'(\w+)'", own[3])
        order = _order(own[2], devices).reshape(list(sizes.values()))
        kept = [name for name in sizes if name not in chosen]
        order = order.transpose([list(sizes).index(name) for name in (*kept, *chosen)])
        return order.reshape(-1, math.prod(sizes[name] for name in chosen)).tolist()
    raise ValueError(f"groups of devices are written in an unknown way: {text[1][:80]!r}")


def _order(text: str | None, devices: int) -> np.ndarray:
    """All devices in an order, written as [8], as [4,2]T(1,0), or one by one."""
    if text is None:
        return np.arange(devices)
    sizes = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if sizes is None:
        return np.array([int(n) for n in text.split(",")])
    order = np.arange(devices).reshape([int(n) for n in sizes[1].split(",")])
    axes = [int(n) for n in sizes[2].split(",")] if sizes[2] else range(order.ndim)
    return order.transpose(list(axes)).flatten()


def _axes(groups: list[list[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which the devices of a group differ."""
    shape = len(groups), len(groups[0])
    places = np.unravel_index(list(itertools.chain(*groups)), list(mesh.values()))
    grids = [place.reshape(shape) for place in places]
    return tuple(
        name for name, grid in zip(mesh, grids, strict=True) if (grid != grid[:, :1]).any()
    )
