"""A record for each task at one site: LoRA-STL, which TA-LoRA is compared with.

`PerTask(LoRA(4), tasks=3)` holds at every site three records of LoRA, of which the context's task
(`Context.task`) chooses one: nothing is shared, and numbers grow with the tasks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import struct

from samjax.nn import Context, Site, SiteInfo
from samjax.peft.delta import Delta, Method, check_settings, field


@struct.dataclass
class PerTaskDelta(Delta):
    """The site's output by the record of the context's task."""

    alone = "it holds a record for each task; let it hold a Stack instead"

    tasks: Any = field()  # one record whose arrays have a leading axis, an entry a task

    @property
    def by_token(self) -> bool:  # pyrefly: ignore[bad-override]
        """As the record of each task."""
        return self.tasks.by_token

    @property
    def reads_kernel(self) -> bool:  # pyrefly: ignore[bad-override]
        """As the record of each task."""
        return self.tasks.reads_kernel

    def of(self, task: Any) -> Any:
        """The record of one task, whose index may be traced. Raises ValueError for None."""
        if task is None:
            raise ValueError(
                "this adapter has a record for each task: give its index, Context(task=...), or "
                "choose one with --task"
            )
        return jax.tree.map(lambda leaf: leaf[task], self.tasks)

    def __call__(self, site: Site, x: Any, ctx: Context) -> Any:
        """By the record of the context's task."""
        return self.of(ctx.task)(site, x, ctx)

    def merge(self, info: SiteInfo, kernel: Any, bias: Any, ctx: Context) -> tuple[Any, Any]:
        """Folds the record of the context's task."""
        return self.of(ctx.task).merge(info, kernel, bias, ctx)

    def decays(self) -> Any:
        """As in a record of one task: the leading axis makes no matrix of a vector."""
        one = jax.eval_shape(lambda tasks: jax.tree.map(lambda leaf: leaf[0], tasks), self.tasks)
        return self.replace(tasks=one.decays())  # pyrefly: ignore[missing-attribute]


@dataclasses.dataclass(frozen=True)
class PerTask(Method):
    """Settings of `method` for each of so many `tasks`. Raises ValueError for no task."""

    method: Method
    tasks: int

    def __post_init__(self) -> None:
        check_settings(self, ["tasks"])

    @property
    def kinds(self) -> tuple[str, ...]:  # pyrefly: ignore[bad-override]
        """Those of the method."""
        return self.method.kinds

    @property
    def fixes_kernel(self) -> bool:  # pyrefly: ignore[bad-override]
        """As the method."""
        return self.method.fixes_kernel

    def init(self, key: Any, site: Site, segments: tuple[str, ...]) -> PerTaskDelta:
        """A record of the method for each task, each drawn for itself."""
        keys = jax.random.split(key, self.tasks)
        return PerTaskDelta(tasks=jax.vmap(lambda k: self.method.init(k, site, segments))(keys))
