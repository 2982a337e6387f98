"""Floating-point operations of a program, with the trip counts of its loops.

They are counted in the jaxpr, before any compiler sees it: XLA's `cost_analysis()` counts the body
of a `lax.map` or `lax.scan` once, however often it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters.partial_eval import dce_jaxpr

from samjax.jaxprs import inner_jaxprs


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """FLOPs of the matrix products and convolutions in `function(*args)`: two a multiply-add.

    `args` may be arrays or `jax.ShapeDtypeStruct`s; nothing is computed. Elementwise work is left
    out, as it is where a machine's rate is given in FLOP/s; of a conditional, the costliest branch
    counts. Raises ValueError where products stand in a `while_loop`, whose turns nobody knows.
    """
    return program_flops(jax.make_jaxpr(function)(*args))


def program_flops(program: ClosedJaxpr) -> int:
    """`count_flops` of a function that is traced already (`jax.jit(function).trace(...).jaxpr`).

    What no output depends on does not count, in loops and checkpoints neither: no compiler runs it.
    """
    needed, _ = dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return _count(needed)


def _count(jaxpr: Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        lhs, out = equation.invars[0].aval, equation.outvars[0].aval
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * math.prod(out.shape) * math.prod(lhs.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, out = equation.invars[1].aval, equation.outvars[0].aval
        out_axis = params["dimension_numbers"].rhs_spec[0]
        # The kernel's input channels are those of one group already.
        return 2 * math.prod(out.shape) * math.prod(kernel.shape) // kernel.shape[out_axis]
    inner = [_count(jaxpr) for jaxpr in inner_jaxprs(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "cond":
        return max(inner)
    if name == "while" and sum(inner):
        raise ValueError(
            "a while_loop holds matrix products and nobody knows how often it turns; "
            "write it as lax.scan, lax.map or a fori_loop with constant bounds"
        )
    return sum(inner)
