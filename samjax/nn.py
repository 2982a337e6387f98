"""Layers with sites: the one place where an adapter meets a layer.

Every layer that can be adapted looks in the `peft` collection under its own path. Finding nothing,
it is a plain layer; finding a *delta*, a small pytree record, it lets the delta compute the output
in its stead: `delta(site, x, ctx)`. Norms are sites too, and so are a block's residual branches
(`call_branch`). Model code never names a method.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from samjax.ops import depthwise, matmul, standardize

# Leaves of `params` that no method trains and no parameter count includes.
BUFFERS = frozenset({"mean", "var", "positional_encoding_gaussian_matrix"})


@struct.dataclass
class Context:
    """What a delta may need besides its input: the same for all sites of one forward pass."""

    # PRNG key of stochastic deltas (dropout); None makes them deterministic.
    rng: Any = None
    # The index of the task, where there are several: a traced value, so that all share a program.
    task: Any = None
    # Records that deltas of several sites share, by name: `peft["shared"]`, put here by `Sam`.
    shared: Any = None
    # What makes another of a linear layer's `Site.apply`: see `samjax.models.windows`.
    around: Any = struct.field(pytree_node=False, default=None)

    def key(self, path: str) -> Any:
        """A PRNG key of its own for the site at `path`, equal on every host of a pod."""
        return jax.random.fold_in(self.rng, zlib.crc32(path.encode()))


# What the backward pass computes again instead of keeping: nothing, or the inside of each block.
Remat = Literal["none", "blocks"]


def rematerialized(block: type[nn.Module], remat: Remat) -> type[nn.Module]:
    """`block` as the encoders build it, under `jax.checkpoint` where `remat` says so."""
    return block if remat == "none" else nn.remat(block)


@dataclasses.dataclass(frozen=True)
class Segments:
    """How the named parts of a fused projection lie in its output channels.

    `thirds`: all channels of one part, then all of the next (SAM's ViT).
    `heads`: head by head, and within a head part by part (TinyViT: q_h, k_h, v_h).
    """

    names: tuple[str, ...]
    layout: Literal["thirds", "heads"]
    num_heads: int

    def split(self, y: Float[Array, "*b n"]) -> dict[str, Float[Array, "*b m"]]:
        """Cuts the last axis into the named parts, each with its heads in order."""
        if self.layout == "thirds":
            parts = jnp.split(y, len(self.names), axis=-1)
        else:
            grouped = y.reshape(*y.shape[:-1], self.num_heads, len(self.names), -1)
            parts = [grouped[..., i, :].reshape(*y.shape[:-1], -1) for i in range(len(self.names))]
        return dict(zip(self.names, parts, strict=True))

    def join(self, parts: Mapping[str, Float[Array, "*b m"]]) -> Float[Array, "*b n"]:
        """The inverse of `split`; parts that are not given are zero."""
        some = next(iter(parts.values()))
        full = [parts.get(name, jnp.zeros_like(some)) for name in self.names]
        if self.layout == "thirds":
            return jnp.concatenate(full, axis=-1)
        heads = [p.reshape(*p.shape[:-1], self.num_heads, -1) for p in full]
        return jnp.stack(heads, axis=-2).reshape(*some.shape[:-1], -1)


SiteKind = Literal["dense", "conv", "norm", "branch"]


@dataclasses.dataclass(frozen=True)
class SiteInfo:
    """A site as `samjax.peft` sees it before any adapter exists."""

    path: str
    kind: SiteKind
    # dense: (in, out); conv: (k, k, in, out); norm and branch: (channels,).
    kernel_shape: tuple[int, ...]
    use_bias: bool = True
    segments: Segments | None = None

    @property
    def kernel_name(self) -> str:
        """What the leaf of `params` is called that the site's `kernel` is."""
        return "scale" if self.kind == "norm" else "kernel"


@dataclasses.dataclass(frozen=True)
class Site:
    """A layer or a branch as a delta sees it: its frozen weights, and a call of it as it is.

    A branch, such as a block's attention with its norm, has neither kernel nor bias.
    """

    info: SiteInfo
    kernel: Any
    bias: Any
    # (x, kernel, bias) -> y; a bias of None is left out.
    apply: Callable[[Any, Any, Any], Any]
    # Adds a scalar to the training loss, such as one that balances experts.
    add_loss: Callable[[Any], Any] = lambda value: None

    def __call__(self, x: Array) -> Array:
        """The site's output without any adapter."""
        return self.apply(x, self.kernel, self.bias)


_visits: contextvars.ContextVar[list[SiteInfo] | None] = contextvars.ContextVar(
    "samjax_site_visits", default=None
)


@contextlib.contextmanager
def record_sites() -> Iterator[list[SiteInfo]]:
    """Collects a `SiteInfo` for each site that is called, in order, while a forward is traced."""
    visits: list[SiteInfo] = []
    token = _visits.set(visits)
    try:
        yield visits
    finally:
        _visits.reset(token)


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """For a second call of sites, which asks what they make of something else than the input."""
    token = _visits.set(None)
    try:
        yield
    finally:
        _visits.reset(token)


def act_by_token(module: nn.Module, *layers: str) -> bool:
    """Whether what adapts these layers of a module, if anything, looks at each token alone."""
    found = (module.get_variable("peft", layer, {}).get("delta") for layer in layers)
    return all(delta is None or delta.by_token for delta in found)


def _call_site(module: nn.Module, site: Site, x: Array, ctx: Context) -> Array:
    visits = _visits.get()
    if visits is not None:
        visits.append(site.info)
    delta = module.get_variable("peft", "delta")
    if ctx.around is not None and site.info.kind == "dense":
        site = dataclasses.replace(site, apply=ctx.around(site.apply))
    return site(x) if delta is None else delta(site, x, ctx)


def _loss_of(module: nn.Module) -> Callable[[Any], Any]:
    """Where a delta's loss goes: the `losses` collection, if the caller of `apply` takes it."""
    return functools.partial(
        module.sow, "losses", "delta", init_fn=lambda: jnp.float32(0), reduce_fn=jnp.add
    )


def call_branch(
    module: nn.Module, branch: Callable[[Array], Array], x: Float[Array, "*b c"], ctx: Context
) -> Float[Array, "*b c"]:
    """Calls a residual branch, which is a site under the path of the `module` that it is about.

    `x` is the residual stream, before the branch's norm; the output is what is added to it.
    """
    info = SiteInfo("/".join(module.path), "branch", (x.shape[-1],), use_bias=False)
    site = Site(info, None, None, lambda x, *_: branch(x), _loss_of(module))
    return _call_site(module, site, x, ctx)


class Dense(nn.Module):
    """A linear layer over the last axis, and a site."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    segments: Segments | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*b n"], ctx: Context) -> Float[Array, "*b m"]:
        """(..., in) -> (..., features) in `dtype`."""
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), jnp.float32
        )
        bias = (
            self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        )
        path = "/".join(self.path)
        info = SiteInfo(path, "dense", kernel.shape, self.use_bias, self.segments)
        site = Site(info, kernel, bias, self._linear, _loss_of(self))
        return _call_site(self, site, x.astype(self.dtype), ctx)

    def _linear(self, x: Array, kernel: Any, bias: Any) -> Array:
        y = matmul(x, kernel.astype(self.dtype))
        return y if bias is None else y + bias.astype(self.dtype)


class Conv(nn.Module):
    """A 2-D convolution (NHWC, kernel HWIO), and a site.

    Padding is (k - 1) / 2, but a kernel as large as its stride (patch embedding) takes none.
    """

    features: int
    kernel_size: int
    stride: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], ctx: Context) -> Float[Array, "b oh ow d"]:
        """(b, h, w, in) -> (b, h / stride, w / stride, features) in `dtype`."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        bias = (
            self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        )
        info = SiteInfo("/".join(self.path), "conv", shape, self.use_bias)
        site = Site(info, kernel, bias, self._conv, _loss_of(self))
        return _call_site(self, site, x.astype(self.dtype), ctx)

    def _conv(self, x: Array, kernel: Any, bias: Any) -> Array:
        kernel = kernel.astype(self.dtype)
        if self.kernel_size == self.stride:
            # Blocks that do not overlap are a matrix product, which every backend does well.
            batch, height, width, channels = x.shape
            k = self.kernel_size
            x = x.reshape(batch, height // k, k, width // k, k, channels).swapaxes(2, 3)
            x = x.reshape(batch, height // k, width // k, -1)
            y = matmul(x, kernel.reshape(-1, kernel.shape[-1]))
        else:
            pad = (self.kernel_size - 1) // 2
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                (self.stride, self.stride),
                ((pad, pad), (pad, pad)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        return y if bias is None else y + bias.astype(self.dtype)


class DepthwiseConv(nn.Module):
    """A depthwise k x k convolution without bias."""

    kernel_size: int = 3
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow c"]:
        """(b, h, w, c) -> (b, h / stride, w / stride, c) in `dtype`; zero padding."""
        shape = (self.kernel_size, self.kernel_size, 1, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        return depthwise(self.stride, x.astype(self.dtype), kernel.astype(self.dtype))


class ConvTranspose2x2(nn.Module):
    """torch's ConvTranspose2d(kernel_size=2, stride=2): blocks do not overlap, so it is a product.

    The kernel is stored (2, 2, in, out) and unflipped: y[2i + r, 2j + s] = x[i, j] @ kernel[r, s].
    A pixel's block, r and s, stays on axes of its own: what follows is pixel by pixel, and moving
    many channels would take longer than the product.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b 2 2 d"]:
        """(..., in) -> (..., 2, 2, features) in `dtype`."""
        channels, features = x.shape[-1], self.features
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (2, 2, channels, features))
        bias = self.param("bias", nn.initializers.zeros, (features,))
        flat = jnp.moveaxis(kernel.astype(self.dtype), 2, 0).reshape(channels, 4 * features)
        y = matmul(x.astype(self.dtype), flat) + jnp.tile(bias.astype(self.dtype), 4)
        return y.reshape(*x.shape[:-1], 2, 2, features)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis in float32; also SAM's LayerNorm2d, since NHWC.

    A site.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"], ctx: Context) -> Float[Array, "*b c"]:
        """(..., c) -> (..., c) in `dtype`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        info = SiteInfo("/".join(self.path), "norm", scale.shape)
        return _call_site(self, Site(info, scale, bias, self._norm, _loss_of(self)), x, ctx)

    def _norm(self, x: Array, scale: Any, bias: Any) -> Array:
        y = standardize(self.epsilon, x.astype(jnp.float32)) * scale
        return (y if bias is None else y + bias).astype(self.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation in inference mode: its statistics are parameters that never train.

    A site.
    """

    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"], ctx: Context) -> Float[Array, "*b c"]:
        """(..., c) -> (..., c) in `dtype`."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.param("mean", nn.initializers.zeros, shape)
        var = self.param("var", nn.initializers.ones, shape)

        def apply(x: Array, scale: Any, bias: Any) -> Array:
            factor = scale * jax.lax.rsqrt(var + self.epsilon)
            shift = -mean * factor if bias is None else bias - mean * factor
            return (x.astype(jnp.float32) * factor + shift).astype(self.dtype)

        info = SiteInfo("/".join(self.path), "norm", shape)
        return _call_site(self, Site(info, scale, bias, apply, _loss_of(self)), x, ctx)


class Embedding(nn.Module):
    """A table of learnt vectors."""

    num: int
    features: int

    @nn.compact
    def __call__(self) -> Float[Array, "n c"]:
        """The whole table, (num, features)."""
        return self.param("embedding", nn.initializers.normal(1.0), (self.num, self.features))
