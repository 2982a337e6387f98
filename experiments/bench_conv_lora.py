"""Conv-LoRA in torch, written from its formula as its authors dispatch it.

Each expert gets the maps that chose it, where samjax's shapes do not depend on its gate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


def adapted(layer: Any, rank: int, experts: int) -> Any:
    """A linear layer with LoRA, or with Conv-LoRA of so many experts (docs/methods.md)."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer
            self.a = nn.Parameter(torch.randn(layer.in_features, rank) / layer.in_features**0.5)
            self.b = nn.Parameter(torch.zeros(rank, layer.out_features))
            self.convs = nn.ModuleList(nn.Conv2d(rank, rank, 3, padding=1) for _ in range(experts))
            self.gate = nn.Parameter(torch.zeros(rank, experts))
            self.noise = nn.Parameter(torch.zeros(rank, experts))
            self.loss: Any = 0.0

        def forward(self, x: Any) -> Any:
            z = x @ self.a
            if experts:
                z = z + self.mixture(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return self.layer(x) + z @ self.b

        def mixture(self, maps: Any) -> Any:
            means = maps.mean((2, 3))
            clean, deviation = means @ self.gate, functional.softplus(means @ self.noise) + 1e-2
            noisy = clean + deviation * torch.randn_like(clean)
            best = noisy.topk(2, 1)
            chosen = best.indices[:, 0]
            # The probability that each expert is chosen, were its noise drawn anew.
            others = torch.where(
                noisy >= best.values[:, :1], best.values[:, 1:], best.values[:, :1]
            )
            load = torch.distributions.Normal(0.0, 1.0).cdf((clean - others) / deviation).sum(0)
            importance = functional.one_hot(chosen, experts).float().sum(0)
            self.loss = 1e-2 * (_variation(importance) + _variation(load))
            out = torch.zeros_like(maps)
            for i, conv in enumerate(self.convs):
                mine = torch.nonzero(chosen == i)[:, 0]
                if len(mine):
                    found = self.expert(conv, i + 1, maps[mine])
                    out = out.index_copy(0, mine, found.to(out.dtype))
            return out

        def expert(self, conv: Any, times: int, maps: Any) -> Any:
            size = maps.shape[2:]
            if times > 1:
                maps = functional.interpolate(maps, scale_factor=times, mode="bicubic")
            maps = functional.gelu(conv(maps))
            return functional.interpolate(maps, size, mode="bicubic") if times > 1 else maps

    return Adapted()


def _variation(x: Any) -> Any:
    return x.var() / (x.mean() ** 2 + 1e-10)
