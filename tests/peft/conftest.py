"""What tests of several methods share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.models import VitConfig, image_encoder, tiny_vit
from samjax.nn import Context, rematerialized


@pytest.fixture
def drawn():
    """`drawn(delta)` is the record with trained arrays that do something."""
    rng = np.random.default_rng(1)

    def draw(delta):
        names = (f.name for f in dataclasses.fields(delta) if f.metadata.get("group") == "weights")
        arrays = {name: getattr(delta, name) for name in names}
        return delta.replace(
            **{
                name: jnp.asarray(rng.normal(size=array.shape), jnp.float32)
                for name, array in arrays.items()
                if array is not None
            }
        )

    return draw


@pytest.fixture
def run_block():
    """`run_block(encoder, remat, peft)` runs a block whose windows are padded, with records.

    Returns its input `x`; the outputs `attn` and `mlp` of the branches themselves, without what
    adapts them; `between`, what lies between the branches, a function; and the block's output.
    """

    def run(encoder: str, remat: str, peft):
        height, width, dim, size = 5, 6, 16, 4
        if encoder == "vit":
            config = VitConfig(
                embed_dim=dim,
                depth=1,
                num_heads=2,
                global_attn_indexes=(),
                window_size=size,
                pretrain_grid=8,
            )
            block = rematerialized(image_encoder.Block, remat)(config, size)
        else:
            block = rematerialized(tiny_vit.Block, remat)(2, size)
        x = jnp.asarray(np.random.default_rng(2).normal(size=(2, height, width, dim)), jnp.float32)
        shapes = jax.eval_shape(block.init, jax.random.key(0), x, Context())["params"]
        rng = np.random.default_rng(3)
        params = jax.tree.map(
            lambda leaf: jnp.asarray(rng.uniform(0.1, 0.5, leaf.shape), jnp.float32), shapes
        )

        @jax.jit
        def apply(variables, x):
            return block.apply(
                variables, x, Context(), capture_intermediates=True, mutable=["intermediates"]
            )

        out, state = apply({"params": params, "peft": peft}, x)
        seen = state["intermediates"]

        def between(x):
            if encoder == "vit":
                return x
            conv = tiny_vit.ConvBN(dim, 3, depthwise=True)
            x = jnp.asarray(x, jnp.float32)
            return np.asarray(conv.apply({"params": params["local_conv"]}, x, Context()))

        return x, seen["attn"]["__call__"][0], seen["mlp"]["__call__"][0], between, out

    return run
