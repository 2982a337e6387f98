"""How much a spec trains, and where: the counts that papers quote."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from samjax.models.sam import Sam
from samjax.nn import BUFFERS
from samjax.peft.delta import FROZEN, UNTRAINED
from samjax.peft.resolve import resolve
from samjax.peft.spec import PeftSpec
from samjax.peft.trees import attach, deltas, groups


@dataclasses.dataclass(frozen=True)
class Line:
    """What one rule does: how many sites or leaves it claims, and how many numbers it trains.

    What sites share has a line of its own.
    """

    pattern: str
    method: str
    claimed: int
    trainable: int


@dataclasses.dataclass(frozen=True)
class Report:
    """Counts of numbers; buffers (BatchNorm statistics, the fixed positional matrix) are apart."""

    total: int  # of the model itself
    adapter: int  # trainable, in adapter records
    decoder: int  # trainable, in the mask decoder or decoders, with the rows of dense tasks
    trainable: int
    lines: tuple[Line, ...]

    def __str__(self) -> str:
        """A table with one line a rule, and the sum."""
        rows = [(x.pattern, x.method, x.claimed, f"{x.trainable:,}") for x in self.lines]
        width = max(len(r[0]) for r in rows)
        lines = [f"{p:<{width}}  {m:<28} {c:>4} x  {n:>12} numbers" for p, m, c, n in rows]
        share = 100 * self.trainable / self.total
        lines.append(f"trainable: {self.trainable:,} of {self.total:,} numbers ({share:.3f} %)")
        return "\n".join(lines)


def report(spec: PeftSpec, model: Sam) -> Report:
    """Counts what a spec trains in a model; allocates nothing."""
    params = model.init_params_shapes()
    peft = jax.eval_shape(lambda p: attach(spec, model, p, jax.random.key(0)), params)
    variables = {"params": params, "peft": peft}
    labels = groups(spec, model, variables)
    resolved = resolve(spec, model)

    sizes = {"/".join(k): int(np.prod(v.shape)) for k, v in flatten_dict(params).items()}
    trained = {
        "/".join(path): sizes["/".join(path)]
        for path, group in flatten_dict(labels["params"]).items()
        if group != FROZEN
    }
    groups_by_path = deltas(labels["peft"])
    records = {path: _count(delta, groups_by_path[path]) for path, delta in deltas(peft).items()}
    lines = []
    for rule in spec.rules:
        if rule.adapts:
            claimed = [path for path, (_, r, _) in resolved.sites.items() if r is rule]
            count = sum(records[path] for path in claimed)
        else:
            claimed = [path for path, r in resolved.leaves.items() if r is rule]
            count = sum(trained.get(path, 0) for path in claimed)
        lines.append(Line(rule.pattern, str(rule.config), len(claimed), count))
    shared = {
        name: _count(record, labels["peft"]["shared"][name])
        for name, record in peft.get("shared", {}).items()
    }
    lines += [Line("shared", name, 1, count) for name, count in shared.items()]
    decoder = sum(
        n for path, n in trained.items() if path.startswith(("mask_decoder", "no_mask_embed"))
    )
    adapter = sum(records.values()) + sum(shared.values())
    return Report(
        total=sum(n for path, n in sizes.items() if path.rsplit("/", 1)[-1] not in BUFFERS),
        adapter=adapter,
        decoder=decoder,
        trainable=adapter + sum(trained.values()),
        lines=tuple(lines),
    )


def _count(record: object, group: object) -> int:
    pairs = zip(jax.tree.leaves(record), jax.tree.leaves(group), strict=True)
    return sum(int(np.prod(leaf.shape)) for leaf, name in pairs if name not in UNTRAINED)
