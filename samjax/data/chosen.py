"""Which samples a run's picture shows."""

from __future__ import annotations

from typing import Any

import numpy as np


class Chosen:
    """Some samples of a source, spread evenly over it."""

    def __init__(self, source: Any, count: int) -> None:
        self._source = source
        spread = np.linspace(0, len(source) - 1, min(count, len(source)))
        self._indices = sorted({int(i) for i in spread.round()})

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        return self._source[self._indices[index]]
