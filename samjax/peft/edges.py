"""Edges of a searchable cell as text, for the command line, adapter files and JSON.

skip_connect+sep_conv_3x3            candidates, to be searched
skip_connect=0.7+sep_conv_3x3=0.3    the same with the shares that they start from
0.4*skip_connect|0.6*sep_conv_3x3    edges, in order; before the star what each weighs in its
                                     node
image_encoder/blocks_0/attn/qkv: skip_connect; image_encoder/blocks_1/attn/qkv: sep_conv_3x3
                                     sites, each with edges of its own
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Edge:
    """Candidates of an edge; positive shares of them, and a weight in the node, where known."""

    operators: tuple[str, ...]
    shares: tuple[float, ...] | None = None
    weight: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is something to search for."""
        return len(self.operators) > 1 and self.shares is None

    def __str__(self) -> str:
        """The text that `parse_edges` reads, to six digits."""
        names = self.operators
        if self.shares is not None and len(names) > 1:
            names = [f"{n}={s:.6g}" for n, s in zip(names, self.shares, strict=True)]
        return ("" if self.weight is None else f"{self.weight:.6g}*") + "+".join(names)


def edges_text(edges: Sequence[Edge]) -> str:
    """Edges as one text."""
    return "|".join(map(str, edges))


def parse_edges(text: str) -> tuple[Edge, ...]:
    """The edges of a text without sites. Raises ValueError for what is none."""
    return tuple(_parse_edge(part.strip()) for part in text.split("|"))


def _parse_edge(text: str) -> Edge:
    before, star, names = text.rpartition("*")
    operators, shares = [], []
    for part in names.split("+"):
        name, equals, share = (piece.strip() for piece in part.partition("="))
        operators.append(name)
        shares += [_number(share, part)] if equals else []
    if shares and len(shares) < len(operators):
        raise ValueError(f"operators {names!r}: give each a share, such as {operators[0]}=0.5")
    if len(set(operators)) < len(operators):
        twice = next(name for name in operators if operators.count(name) > 1)
        raise ValueError(f"operators {names!r} names {twice!r} twice for an edge")
    return Edge(tuple(operators), tuple(shares) or None, _number(before, text) if star else None)


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"operators {where.strip()!r}: {text.strip()!r} is no positive number")
    return value


def sites_text(sites: Mapping[str, str]) -> str:
    """Texts of edges by site, as one text."""
    return "; ".join(f"{pattern}: {edges}" for pattern, edges in sites.items())


def parse_sites(text: str) -> dict[str, str]:
    """The inverse of `sites_text`; {} for a text without sites. Raises ValueError."""
    if ":" not in text:
        return {}
    sites: dict[str, str] = {}
    for part in text.split(";"):
        pattern, colon, edges = (piece.strip() for piece in part.partition(":"))
        if not (pattern and colon and edges):
            raise ValueError(f"operators {part.strip()!r}: write SITE: OPERATORS; SITE: OPERATORS")
        if pattern in sites:
            raise ValueError(f"operators names the site {pattern} twice")
        sites[pattern] = edges
    return sites


def is_search(text: str) -> bool:
    """Whether a text, with or without sites, leaves something open.

    That is an edge with candidates without shares, or one of several without a weight.
    """
    texts = parse_sites(text).values() or [text]
    cells = [parse_edges(t) for t in texts]
    return not text or any(
        edge.is_open or (len(cell) > 1 and edge.weight is None) for cell in cells for edge in cell
    )
