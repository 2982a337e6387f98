"""Compiled programs that are timed: their products, their memory, and how long they compile."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from samjax.flops import program_flops
from samjax.training.memory import available_bytes, gigabytes
from samjax.training.step import finite_names


class DoesNotFit(RuntimeError):
    """A program needs more memory than its device has."""


class Program:
    """`function(*args)`, compiled anew, whatever earlier processes have compiled.

    `function` is jitted. `flops` are those of its matrix products and convolutions, of loops with
    each of their turns, or of a `twin` that shows what is inside of kernels; `argument_bytes`,
    `temporary_bytes` and `bytes`, all that it needs, are counted by the compiler, None where it has
    no counts. Raises DoesNotFit where that is known before the first call.
    """

    def __init__(self, function: Any, *args: Any, twin: Any = None) -> None:
        self.args = args
        traced = function.trace(*args)
        self.flops = program_flops((traced if twin is None else twin.trace(*args)).jaxpr)
        start = time.perf_counter()
        with _compiled_anew(), _out_of_memory():
            self.call = traced.lower().compile()
        self.compile_seconds = time.perf_counter() - start
        memory = self.call.memory_analysis()
        self.argument_bytes = None if memory is None else memory.argument_size_in_bytes
        self.temporary_bytes = None if memory is None else memory.temp_size_in_bytes
        self.bytes = None
        if memory is None:
            return
        # What is donated has no room of its own.
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        self.bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs
        has = available_bytes(jax.devices()[0])
        if has is not None and self.bytes > has:
            raise DoesNotFit(
                f"needs {gigabytes(self.bytes)} of memory, and there are {gigabytes(has)}"
            )

    def run(self) -> float:
        """Calls it with `args` and returns the seconds until its result is there.

        Raises DoesNotFit where memory runs out.
        """
        start = time.perf_counter()
        with _out_of_memory():
            jax.block_until_ready(self.call(*self.args))
        return time.perf_counter() - start


class Step:
    """A training step of `samjax.training.step`, compiled, with the state that it changes.

    `twin` is the same step that computes nothing twice: its are the `needed_flops`. `program` has
    what is known of the step itself. The buffers of `state` are given away.
    """

    def __init__(self, step: Any, twin: Any, state: Any, frozen: Any, batch: Any) -> None:
        self.program = Program(step, state, frozen, batch)
        self.needed_flops = program_flops(twin.trace(state, frozen, batch).jaxpr)
        self.trainable = sum(leaf.size for leaf in jax.tree.leaves(state.train))
        self.program.args = ()  # else they would live on beside the state that replaces them
        self._state, self._frozen, self._batch = state, frozen, batch
        self.logs: dict[str, Any] = {}

    def run(self) -> float:
        """Takes one step and returns its seconds.

        Raises RuntimeError where it is not finite, and DoesNotFit where memory runs out.
        """
        start = time.perf_counter()
        with _out_of_memory():
            self._state, self.logs = self.program.call(self._state, self._frozen, self._batch)
            jax.block_until_ready((self._state, self.logs))
        seconds = time.perf_counter() - start
        if (bad_leaf := int(self.logs["bad_leaf"])) >= 0:
            raise RuntimeError(f"{finite_names(self._state.train)[bad_leaf]} is not finite")
        return seconds


def product(side: int, dtype: Any) -> Program:
    """A product of square matrices: what its FLOPs take is the machine's own rate."""
    # Random, since constants cost an accelerator less power, and thus less time.
    factor = jax.random.normal(jax.random.key(0), (side, side), jnp.dtype(dtype))
    return Program(jax.jit(jnp.matmul), factor, factor)


def product_side(side: int) -> int:
    """Of the matrices to multiply beside a model whose input has this `side`, in pixels.

    Large enough to keep the device busy: the smaller ones are for a quick try.
    """
    return min(4 * side, 4096 if jax.default_backend() == "cpu" else 8192)


@contextlib.contextmanager
def _out_of_memory() -> Iterator[None]:
    """Says in one sentence that memory ran out."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit("does not fit into the device's memory") from error


@contextlib.contextmanager
def _compiled_anew() -> Iterator[None]:
    """Programs that earlier processes compiled are not read back."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # whether there is one is asked once only
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()
