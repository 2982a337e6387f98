"""Operations with derivatives written by hand, where JAX's own take more time or memory.

Each is the plain operation otherwise. Derivatives are for reverse mode only. What is said of XLA
holds on CPU, where `docs/performance.md` has the figures; elsewhere they cost nothing.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def matmul(x: Float[Array, "*b n"], kernel: Float[Array, "n m"]) -> Float[Array, "*b m"]:
    """x @ kernel: the product of every linear layer and every factor of an adapter.

    The kernel's gradient contracts all but the last axis, for which XLA transposes the left side on
    CPU. Here that is the side with fewer channels; by JAX's own rule it is the output's gradient,
    and for an adapter's second factor this took ten times as long as all the rest of it.
    """
    return x @ kernel


def _matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _matmul_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = kept
    axes = tuple(range(x.ndim - 1))
    left, right = (x, g) if x.shape[-1] <= g.shape[-1] else (g, x)
    product = jax.lax.dot_general(left, right, ((axes, axes), ((), ())))
    return g @ kernel.T, product if left is x else product.T


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """The exact GELU (erf), as in SAM; not the tanh approximation.

    A training step keeps `x` for its derivative, where JAX's own keeps up to three arrays.
    """
    return jax.nn.gelu(x, approximate=False)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return gelu(x), x


def _gelu_backward(x: Array, g: Array) -> tuple[Array]:
    # The sum is x, but waits for g: else XLA would compute what follows in the forward pass and
    # store that instead, or as well.
    x = x + 0 * g
    share = 0.5 * jax.lax.erfc(-x * math.sqrt(0.5))
    return (g * (share + x * (jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi))),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def standardize(epsilon: float, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """Mean 0 and variance 1 over the last axis. Its derivative keeps the result and the factor."""
    return _standardize_forward(epsilon, x)[0]


def _standardize_forward(epsilon: float, x: Array) -> tuple[Array, tuple[Array, Array]]:
    centred = x - x.mean(axis=-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + epsilon)
    y = centred * factor
    return y, (y, factor)


def _standardize_backward(epsilon: float, kept: tuple[Array, Array], g: Array) -> tuple[Array]:
    y, factor = kept
    along_y = (g * y).mean(axis=-1, keepdims=True)
    return (factor * (g - g.mean(axis=-1, keepdims=True) - y * along_y),)


standardize.defvjp(_standardize_forward, _standardize_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def depthwise(
    stride: int, x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"], dilation: int = 1
) -> Float[Array, "b oh ow c"]:
    """A depthwise convolution with zero padding, and its derivative, as k * k shifted products.

    XLA's grouped convolution is several times slower than this on CPU, and the products fuse into
    one memory-bound loop elsewhere.
    """
    shifted, weights = (
        _shifted(stride, x, kernel.shape[0], dilation),
        kernel.reshape(-1, x.shape[-1]),
    )
    products = (x * weight for x, weight in zip(shifted, weights, strict=True))
    return sum(products, start=jnp.zeros((), x.dtype))


def _shifted(stride: int, x: Array, size: int, dilation: int) -> list[Array]:
    """What each of a kernel's `size` * `size` weights is multiplied with."""
    pad = dilation * (size - 1) // 2
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    # Else the compiler computes what comes before (a GELU) once for each shift.
    padded = jax.lax.optimization_barrier(padded)
    height, width = x.shape[1:3]
    steps = range(0, dilation * size, dilation)
    offsets = ((i, j) for i in steps for j in steps)
    return [padded[:, i : i + height : stride, j : j + width : stride] for i, j in offsets]


def _depthwise_forward(
    stride: int, x: Array, kernel: Array, dilation: int
) -> tuple[Array, tuple[Array, Array]]:
    return depthwise(stride, x, kernel, dilation), (x, kernel)


def _depthwise_backward(
    stride: int, dilation: int, kept: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    x, kernel = kept
    shifted = _shifted(stride, x, kernel.shape[0], dilation)
    sums = [jnp.sum(x * g, axis=(0, 1, 2)) for x in shifted]
    # Zeros where the stride left an output out.
    spread = [
        (0, size - stride * (outputs - 1) - 1, stride - 1)
        for size, outputs in zip(x.shape[1:3], g.shape[1:3], strict=True)
    ]
    g = jax.lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), *spread, (0, 0, 0)))
    return depthwise(1, g, kernel[::-1, ::-1], dilation), jnp.stack(sums).reshape(kernel.shape)


depthwise.defvjp(_depthwise_forward, _depthwise_backward)
