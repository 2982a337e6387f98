"""mSAM: SAM without prompts, with a mask decoder for each task (Wang, Ye and Zhang, 2024).

The prompt encoder is gone but for its positional encoding. A task of C channels has C rows of "no
mask" embedding, each of which SAM's mask decoder turns into one map: C decodings that share the
task's decoder, on the batch axis of one call. Parameters are SAM's, under SAM's paths where they
are SAM's own:

    image_encoder/...            the same
    prompt_encoder/pe_layer/...  the positional matrix
    no_mask_embed_TASK/embedding (channels, dim): SAM's row in each, at first
    mask_decoder_TASK/...        SAM's mask decoder, at first
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from samjax.models.prompt_encoder import PositionEmbeddingRandom
from samjax.models.sam import DETERMINISTIC, Sam
from samjax.nn import Context, Embedding


class _Positions(nn.Module):
    """What is left of the prompt encoder."""

    dim: int

    def setup(self) -> None:
        self.pe_layer = PositionEmbeddingRandom(self.dim // 2)

    def __call__(self, grid: tuple[int, int]) -> Float[Array, "h w c"]:
        return self.pe_layer.of_grid(grid)


class MSam(Sam):
    """SAM for dense tasks.

    `channels` has a pair (name, number of maps) for each task; a name is an identifier.
    """

    channels: tuple[tuple[str, int], ...] = ()

    def setup(self) -> None:
        """Names submodules as above."""
        dim = self.config.prompt_embed_dim
        self.image_encoder = self.make_encoder()
        self.prompt_encoder = _Positions(dim)
        self.rows = {
            name: Embedding(count, dim, name=f"no_mask_embed_{name}")
            for name, count in self.channels
        }
        self.decoders = {
            name: self.make_decoder(name=f"mask_decoder_{name}") for name, _ in self.channels
        }

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks, in the order of their index in `Context.task`."""
        return tuple(name for name, _ in self.channels)

    def decode_task(
        self, image_embeddings: Float[Array, "b h w c"], task: str, ctx: Context = DETERMINISTIC
    ) -> Float[Array, "b m h4 w4"]:
        """Low-resolution maps (b, channels, 4 h, 4 w) of one task, float32, without activation."""
        batch, *grid, _ = image_embeddings.shape
        rows, ctx = self.rows[task](), self._with_shared(ctx)
        count = rows.shape[0]
        shape = (batch * count, *image_embeddings.shape[1:])
        embeddings = jnp.repeat(image_embeddings, count, axis=0)
        dense = jnp.broadcast_to(jnp.tile(rows, (batch, 1))[:, None, None, :], shape)
        sparse = jnp.zeros((batch * count, 0, rows.shape[1]))
        present = jnp.zeros((batch * count, 0), bool)
        image_pe = self.prompt_encoder((grid[0], grid[1]))
        logits, _ = self.decoders[task](embeddings, image_pe, sparse, dense, present, ctx)
        return logits[:, 0].reshape(batch, count, *logits.shape[2:])

    def __call__(
        self,
        image: UInt8[Array, "b fh fw 3"],
        input_size: Int[Array, "b 2"],
        ctx: Context = DETERMINISTIC,
    ) -> dict[str, Float[Array, "b m h4 w4"]]:
        """The maps of all tasks, from an encoding each: the adapter may differ by task.

        `jax.vmap` runs over the tasks, so that what no adapter has touched is computed once.
        """
        tasks = jnp.arange(len(self.channels))
        embeddings = self.encode_tasks(image, input_size, tasks, ctx)
        return {
            name: self.decode_task(embeddings[i], name, ctx.replace(task=jnp.int32(i)))
            for i, name in enumerate(self.task_names)
        }

    def encode_tasks(
        self,
        image: UInt8[Array, "b fh fw 3"],
        input_size: Int[Array, "b 2"],
        tasks: Int[Array, " t"],
        ctx: Context = DETERMINISTIC,
    ) -> Float[Array, "t b h w c"]:
        """Image embeddings for each of some tasks, by their index."""

        def encode(module: MSam, task: Any) -> Any:
            return module.encode(image, input_size, ctx.replace(task=task))

        over_tasks = nn.vmap(
            encode,
            variable_axes={"params": None, "peft": None},
            split_rngs={"params": False},
        )
        return over_tasks(self, tasks)

    def example(self) -> tuple[Any, ...]:
        """Arguments of a forward pass that touches every parameter."""
        return super().example()[:2]


def msam_params(params: Any, model: MSam) -> dict[str, Any]:
    """SAM's `params` as mSAM's: each task starts with SAM's row and SAM's mask decoder.

    Leaves are shared, not copied. Raises ValueError where they are those of another SAM.
    """
    row = jnp.asarray(params["prompt_encoder"]["no_mask_embed"]["embedding"])
    built: dict[str, Any] = {
        "image_encoder": params["image_encoder"],
        "prompt_encoder": {"pe_layer": params["prompt_encoder"]["pe_layer"]},
    }
    for name, count in model.channels:
        built[f"no_mask_embed_{name}"] = {"embedding": jnp.tile(row, (count, 1))}
        built[f"mask_decoder_{name}"] = params["mask_decoder"]
    shapes = jax.tree.map(lambda leaf: leaf.shape, built)
    if shapes != jax.tree.map(lambda leaf: leaf.shape, model.init_params_shapes()):
        raise ValueError(f"these weights are not those of {model.config.name}")
    return built
