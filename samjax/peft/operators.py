"""Candidate operators of a searchable cell: maps of c channels to themselves, on a map of tokens.

The names are those of DARTS (Liu et al. 2019, appendix A.1.1), and so is the space `darts`:

    sep_conv_kxk  twice: ReLU, depthwise k x k, 1 x 1, norm
    dil_conv_kxk  ReLU, depthwise k x k with dilation 2, 1 x 1, norm
    avg_pool_3x3  the mean of those of 3 x 3 neighbours that there are, norm
    max_pool_3x3  the largest of them, norm

In the space `linear` an operator is one depthwise convolution and one 1 x 1, and avg_pool_3x3
counts the zeros around the map: each is a convolution with zeros around it, and so is any mixture
of them. max_pool_3x3 is no such thing and is not there.

The norm of the space `darts` has no parameters, as in a DARTS search. DARTS's own takes statistics
over a batch, which one image cannot give; `instance` takes them over each map and channel alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from samjax.ops import depthwise
from samjax.peft.lora import kaiming_uniform

Space = Literal["linear", "darts"]
Norm = Literal["instance", "none"]
Weights = Mapping[str, Any]


class Operator:
    """A candidate; its weights are a dict of arrays, empty where it has none."""

    # False for what the space `linear` does not have.
    linear: bool = True

    def init(self, key: Any, channels: int, space: Space) -> dict[str, Array]:
        """Weights for maps of so many channels."""
        return {}

    def apply(
        self, weights: Weights, z: Float[Array, "n h w c"], norm: Norm
    ) -> Float[Array, "n h w c"]:
        """Its output in the space `darts`."""
        raise NotImplementedError

    def kernel(self, weights: Weights, channels: int) -> Float[Array, "k k c c"]:
        """What it is in the space `linear`: the kernel of a convolution, of odd size."""
        raise NotImplementedError


class Zero(Operator):
    """Nothing."""

    def apply(self, weights: Weights, z: Array, norm: Norm) -> Array:
        """Zeros."""
        return jnp.zeros_like(z)

    def kernel(self, weights: Weights, channels: int) -> Array:
        """One zero."""
        return jnp.zeros((1, 1, channels, channels))


class Skip(Operator):
    """The map as it is."""

    def apply(self, weights: Weights, z: Array, norm: Norm) -> Array:
        """`z`."""
        return z

    def kernel(self, weights: Weights, channels: int) -> Array:
        """The identity."""
        return jnp.eye(channels)[None, None]


class AveragePool(Operator):
    """The mean of 3 x 3 neighbours."""

    def apply(self, weights: Weights, z: Array, norm: Norm) -> Array:
        """Of those that there are."""
        y = nn.avg_pool(z, (3, 3), (1, 1), padding="SAME", count_include_pad=False)
        return normalized(y, norm)

    def kernel(self, weights: Weights, channels: int) -> Array:
        """A ninth of the identity at each of nine places."""
        return jnp.broadcast_to(jnp.eye(channels) / 9, (3, 3, channels, channels))


class MaxPool(Operator):
    """The largest of 3 x 3 neighbours."""

    linear = False

    def apply(self, weights: Weights, z: Array, norm: Norm) -> Array:
        """Of those that there are."""
        return normalized(nn.max_pool(z, (3, 3), (1, 1), padding="SAME"), norm)


@dataclasses.dataclass(frozen=True)
class Separable(Operator):
    """Depthwise `size` x `size`, then 1 x 1; in the space `darts` so many `times`."""

    size: int
    dilation: int = 1
    times: int = 1

    def init(self, key: Any, channels: int, space: Space) -> dict[str, Array]:
        """torch's defaults for convolutions: uniform on +-1 / sqrt(fan in)."""
        weights = {}
        for i in range(self.times if space == "darts" else 1):
            depth, point = jax.random.split(jax.random.fold_in(key, i))
            area = self.size * self.size
            weights[f"depthwise_{i}"] = kaiming_uniform(
                depth, (self.size, self.size, 1, channels), area
            )
            weights[f"pointwise_{i}"] = kaiming_uniform(point, (channels, channels), channels)
        return weights

    def apply(self, weights: Weights, z: Array, norm: Norm) -> Array:
        """ReLU, both convolutions, norm, and again."""
        for i in range(self.times):
            kernel = weights[f"depthwise_{i}"].astype(z.dtype)
            z = depthwise(1, nn.relu(z), kernel, self.dilation)
            point = weights[f"pointwise_{i}"].astype(z.dtype)
            z = normalized(jnp.matmul(z, point, precision=jax.lax.Precision.HIGHEST), norm)
        return z

    def kernel(self, weights: Weights, channels: int) -> Array:
        """The product of both convolutions."""
        depth = dilated(jnp.asarray(weights["depthwise_0"]), self.dilation)
        return depth.reshape(*depth.shape[:2], channels, 1) * weights["pointwise_0"]


def dilated(kernel: Float[Array, "k k 1 c"], dilation: int) -> Float[Array, "m m 1 c"]:
    """The kernel with zeros between its entries."""
    spread = (0, 0, dilation - 1)
    return jax.lax.pad(kernel, jnp.zeros((), kernel.dtype), (spread, spread, (0,) * 3, (0,) * 3))


def normalized(z: Float[Array, "n h w c"], norm: Norm) -> Float[Array, "n h w c"]:
    """Mean 0 and variance 1 of each channel of each map; `none` leaves it as it is."""
    if norm == "none":
        return z
    centred = z - z.mean(axis=(1, 2), keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=(1, 2), keepdims=True) + 1e-5)


OPERATORS: dict[str, Operator] = {
    "none": Zero(),
    "skip_connect": Skip(),
    "avg_pool_3x3": AveragePool(),
    "max_pool_3x3": MaxPool(),
    "sep_conv_3x3": Separable(3, times=2),
    "sep_conv_5x5": Separable(5, times=2),
    "dil_conv_3x3": Separable(3, dilation=2),
    "dil_conv_5x5": Separable(5, dilation=2),
}
