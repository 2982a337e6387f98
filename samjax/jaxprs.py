"""What programs of JAX consist of."""

from __future__ import annotations

from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def inner_jaxprs(params: dict[str, Any]) -> list[Jaxpr]:
    """The programs that an equation with these `params`, such as a scan or a checkpoint, runs."""
    values = [
        v for value in params.values() for v in (value if isinstance(value, tuple) else (value,))
    ]
    inner = [v.jaxpr if isinstance(v, ClosedJaxpr) else v for v in values]
    return [v for v in inner if isinstance(v, Jaxpr)]
