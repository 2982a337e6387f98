"""mSAM: SAM without prompts, with a mask decoder for each task (Wang, Ye and Zhang, 2024).

The prompt encoder is gone but for its positional encoding. A task of C channels has C rows of "no
mask" embedding, each of which SAM's mask decoder turns into one map: C decodings that share the
task's decoder, on the batch axis of one call. A task of loss `mask_classification` has one row, and
a decoder with a semantic head (`samjax.models.semantic_decoder`). Parameters are SAM's, under SAM's
paths where they are SAM's own:

    image_encoder/...            the same
    prompt_encoder/pe_layer/...  the positional matrix
    no_mask_embed_TASK/embedding (C or 1, dim): SAM's row in each, at first
    log_variance/TASK            zero; its loss may learn it (uncertainty weighting)
    mask_decoder_TASK/...        SAM's mask decoder, at first
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from samjax.models.mask_decoder import MaskDecoder
from samjax.models.prompt_encoder import PositionEmbeddingRandom
from samjax.models.sam import DETERMINISTIC, EncoderInput, Sam
from samjax.models.semantic_decoder import ClassifiedMasks, SemanticDecoder, semantic_params
from samjax.nn import Context, Embedding
from samjax.tasks import Task, find


class _Positions(nn.Module):
    """What is left of the prompt encoder."""

    dim: int

    def setup(self) -> None:
        self.pe_layer = PositionEmbeddingRandom(self.dim // 2)

    def __call__(self, grid: tuple[int, int]) -> Float[Array, "h w c"]:
        return self.pe_layer.of_grid(grid)


class _Numbers(nn.Module):
    """A number by name, zero at first."""

    names: Sequence[str]

    @nn.compact
    def __call__(self) -> dict[str, Float[Array, ""]]:
        return {name: self.param(name, nn.initializers.zeros, ()) for name in self.names}


# What a task's decoder makes.
Decoded = Float[Array, "b m h4 w4"] | ClassifiedMasks


def maps_of(decoded: Decoded) -> Float[Array, "b m h4 w4"]:
    """A task's maps (b, channels, 4 h, 4 w), of classified masks their classes' scores.

    The scores are made at low resolution and are then resized as other maps are. (AutoGluon first
    resizes the masks' logits: with N masks that takes N / channels as much memory.)
    """
    return decoded.scores() if isinstance(decoded, ClassifiedMasks) else decoded


class MSam(Sam):
    """SAM for dense `tasks`, whose index in that order is `Context.task`."""

    tasks: tuple[Task, ...] = ()

    def setup(self) -> None:
        """Names submodules as above."""
        dim = self.config.prompt_embed_dim
        self.image_encoder = self.make_encoder()
        self.prompt_encoder = _Positions(dim)
        names = [task.name for task in self.tasks]
        self.rows = {
            task.name: Embedding(task.decodings, dim, name=f"no_mask_embed_{task.name}")
            for task in self.tasks
        }
        self.decoders = {task.name: self._make_decoder_of(task) for task in self.tasks}
        self.log_variance = _Numbers(names)

    def _make_decoder_of(self, task: Task) -> MaskDecoder | SemanticDecoder:
        config, name = self.config, f"mask_decoder_{task.name}"
        if task.loss != "mask_classification":
            return self.make_decoder(name=name)
        return SemanticDecoder(
            config.prompt_embed_dim,
            config.decoder_depth,
            config.decoder_num_heads,
            config.decoder_mlp_dim,
            self.dtype,
            num_tokens=task.masks,
            num_classes=task.channels,
            name=name,
        )

    def decode_task(
        self, image_embeddings: Float[Array, "b h w c"], task: str, ctx: Context = DETERMINISTIC
    ) -> Decoded:
        """What a task's loss takes, at low resolution (4 h, 4 w), float32, without activation.

        Its maps (b, channels, 4 h, 4 w), or of loss `mask_classification` classified masks, of
        which `maps_of` makes such maps.
        """
        batch, *grid, _ = image_embeddings.shape
        rows, ctx = self.rows[task](), self._with_shared(ctx)
        count = rows.shape[0]
        shape = (batch * count, *image_embeddings.shape[1:])
        embeddings = jnp.repeat(image_embeddings, count, axis=0)
        dense = jnp.broadcast_to(jnp.tile(rows, (batch, 1))[:, None, None, :], shape)
        sparse = jnp.zeros((batch * count, 0, rows.shape[1]))
        present = jnp.zeros((batch * count, 0), bool)
        image_pe = self.prompt_encoder((grid[0], grid[1]))
        decoder = self.decoders[task]
        if isinstance(decoder, SemanticDecoder):
            return decoder(embeddings, image_pe, dense, ctx)
        logits, _ = decoder(embeddings, image_pe, sparse, dense, present, ctx)
        return logits[:, 0].reshape(batch, count, *logits.shape[2:])

    def __call__(
        self,
        image: EncoderInput,
        input_size: Int[Array, "b 2"],
        ctx: Context = DETERMINISTIC,
    ) -> dict[str, Decoded]:
        """What `decode_task` gives of all tasks, an encoding for each: adapters differ by task.

        `jax.vmap` runs over the tasks, so that what no adapter has touched is computed once.
        """
        tasks = jnp.arange(len(self.tasks))
        embeddings = self.encode_tasks(image, input_size, tasks, ctx)
        self.log_variance()  # so that `init` makes them
        return {
            task.name: self.decode_task(embeddings[i], task.name, ctx.replace(task=jnp.int32(i)))
            for i, task in enumerate(self.tasks)
        }

    def encode_tasks(
        self,
        image: EncoderInput,
        input_size: Int[Array, "b 2"],
        tasks: Int[Array, " t"],
        ctx: Context = DETERMINISTIC,
    ) -> Float[Array, "t b h w c"]:
        """Image embeddings for each of some tasks, by their index."""

        def encode(module: MSam, task: Any) -> Any:
            return module.encode(image, input_size, ctx.replace(task=task))

        over_tasks = nn.vmap(
            encode,
            variable_axes={"params": None, "peft": None, "losses": 0},
            split_rngs={"params": False},
        )
        return over_tasks(self, tasks)

    def log_variances(self) -> dict[str, Float[Array, ""]]:
        """Of each task: what uncertainty weighting learns."""
        return self.log_variance()

    def example(self) -> tuple[Any, ...]:
        """Arguments of a forward pass that touches every parameter."""
        return super().example()[:2]

    def index(self, name: str) -> int:
        """The index of a task. Raises ValueError for one that there is not, with the nearest."""
        return self.tasks.index(find(self.tasks, name))


def msam_params(params: Any, model: MSam) -> dict[str, Any]:
    """SAM's `params` as mSAM's: each task starts with SAM's row and SAM's mask decoder.

    Leaves are shared, not copied. Raises ValueError where they are those of another SAM.
    """
    row = np.asarray(params["prompt_encoder"]["no_mask_embed"]["embedding"])
    built: dict[str, Any] = {
        "image_encoder": params["image_encoder"],
        "prompt_encoder": {"pe_layer": params["prompt_encoder"]["pe_layer"]},
        "log_variance": {task.name: np.zeros((), np.float32) for task in model.tasks},
    }
    for task in model.tasks:
        built[f"no_mask_embed_{task.name}"] = {"embedding": np.tile(row, (task.decodings, 1))}
        decoder = params["mask_decoder"]
        if task.loss == "mask_classification":
            decoder = semantic_params(decoder, task.masks, task.channels)
        built[f"mask_decoder_{task.name}"] = decoder
    shapes = jax.tree.map(lambda leaf: leaf.shape, built)
    if shapes != jax.tree.map(lambda leaf: leaf.shape, model.init_params_shapes()):
        raise ValueError(f"these weights are not those of {model.config.name}")
    return built
