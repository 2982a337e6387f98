"""Flash attention with SAM's decomposed relative positions, by kernels that know no bias.

A score is q . k / sqrt(d) + h[row of k] + w[column of k], where h and w depend on the query alone.
It is thus one product of longer vectors: [q / sqrt(d), h, w] with [k, one-hot row, one-hot column].
That is exact, its derivative with respect to the positions' tables comes through h and w, and any
kernel of plain attention computes it without ever holding the scores.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FlashKind = Literal["cudnn", "splash"]

# Tokens of a splash kernel's blocks: of queries and keys, forwards and backwards.
_BLOCK = 512
# What a TPU's vector registers hold along their longer side: blocks are multiples of it.
_LANES = 128


def fold_positions(
    q: Float[Array, "b h y x d"],
    k: Float[Array, "b h y x d"],
    bias_h: Float[Array, "b h y x y"],
    bias_w: Float[Array, "b h y x x"],
) -> tuple[Float[Array, "b h n e"], Float[Array, "b h n e"]]:
    """Queries and keys of e = d + y + x numbers whose products are the scores with their bias."""
    batch, heads, height, width, dim = q.shape
    queries = jnp.concatenate([q * dim**-0.5, bias_h, bias_w], axis=-1)
    shape = batch, heads, height, width
    rows = jnp.broadcast_to(jnp.eye(height, dtype=k.dtype)[:, None], (*shape, height))
    columns = jnp.broadcast_to(jnp.eye(width, dtype=k.dtype), (*shape, width))
    keys = jnp.concatenate([k, rows, columns], axis=-1)
    return queries.reshape(*shape[:2], height * width, -1), keys.reshape(
        *shape[:2], height * width, -1
    )


def flash(
    kind: FlashKind,
    q: Float[Array, "b h n e"],
    k: Float[Array, "b h n e"],
    v: Float[Array, "b h n d"],
    interpret: bool = False,
) -> Float[Array, "b h n d"]:
    """Attention of queries that are scaled already. `interpret` emulates a TPU's kernel elsewhere.

    Of several devices, `jax.set_mesh` tells those that share the batch.
    """
    if kind == "cudnn":
        return _cudnn(q, k, v)
    attend = jax.vmap(_splash_kernel(q.shape[1], q.shape[2], interpret))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        # The compiler cannot cut a kernel of Pallas: each device gets its images.
        images = jax.sharding.PartitionSpec(mesh.axis_names)
        attend = jax.shard_map(attend, in_specs=images, out_specs=images, check_vma=False)
    return attend(q, k, v).astype(v.dtype)


def check_attention(kind: str, dtype: str, platform: str) -> None:
    """Raises ValueError where devices of a platform (cpu, gpu, tpu) do not compute a kind."""
    needs = {"cudnn": "gpu", "splash": "tpu"}.get(kind, platform)
    if platform != needs:
        raise ValueError(
            f"attention {kind} is a kernel for {needs.upper()}s, and this is a {platform.upper()}: "
            "leave it out, or set it to chunked"
        )
    if kind == "cudnn" and dtype != "bfloat16":
        raise ValueError("attention cudnn computes in 16 bits: set dtype to bfloat16")


def computes(kind: str, dtype: str, platform: str) -> bool:
    """Whether `check_attention` lets it pass."""
    try:
        check_attention(kind, dtype, platform)
    except ValueError:
        return False
    return True


def fits(kind: FlashKind, tokens: int, width: int) -> bool:
    """Whether the kernel takes maps of so many tokens and folded heads of so many numbers.

    Windows of 14 x 14 do not fill a TPU's; cuDNN's has heads of 256, before Hopper of 128.
    """
    if kind == "splash":
        return tokens % _LANES == 0
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    return width <= (256 if float(capability) >= 9 else 128)


def _cudnn(q: Array, k: Array, v: Array) -> Array:
    # The kernel wants heads of one width, a multiple of 8; zeros change no product.
    width = -(-q.shape[-1] // 8) * 8
    padded = (_widened(t, width).swapaxes(1, 2) for t in (q, k, v))
    out = jax.nn.dot_product_attention(*padded, scale=1.0, implementation="cudnn")
    return out.swapaxes(1, 2)[..., : v.shape[-1]]


def _widened(x: Array, width: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))


def _splash_kernel(heads: int, tokens: int, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention

    block = max(b for b in range(_LANES, _BLOCK + 1, _LANES) if tokens % b == 0)
    sizes = splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    masks = [splash_attention.FullMask((tokens, tokens)) for _ in range(heads)]
    return splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask(masks), block_sizes=sizes, interpret=interpret
    )
