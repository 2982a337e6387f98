"""The models in JAX that `bench_peers.py` compares: this library's, and scenic's."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_models import (  # pyrefly: ignore[missing-import]
    Model,
    Setup,
    box_of,
    host_peak,
    random_image,
    versions,
    vit_of,
)

from samjax.allocator import keep_freed_memory
from samjax.bench.programs import Program, product
from samjax.bench.steps import compiled_steps, training_config
from samjax.models import Prompts, Sam, SamConfig
from samjax.terminal import error_console
from weights_convert import to_params

# Where scenic keeps its SAM.
SCENIC_MODELING = "scenic.projects.baselines.segment_anything.modeling"


def samjax_encoder(setup: Setup) -> Model:
    """This library, as its predictor calls it."""
    keep_freed_memory()  # as `samjax` does
    config, tensors = setup.load()
    model = Sam(config, dtype=jnp.dtype(setup.dtype))
    params = jax.device_put(to_params(tensors, config))
    corners, kinds = box_of(config).reshape(1, 2, 2), np.array([[2, 3]], np.int32)

    def encode(params: Any, image: Any) -> Any:
        return model.apply({"params": params}, image, method="encode_normalized")

    def decode(params: Any, embedding: Any) -> Any:
        return model.apply({"params": params}, embedding, Prompts(corners, kinds), method="decode")

    image = jax.device_put(random_image(config, setup.batch_size))
    facts = {"attention": model.attention}
    return _encoder(setup, config, encode, decode, params, image, facts)


def scenic_encoder(setup: Setup) -> Model:
    """google-research/scenic, which has no package; of its SAM only the modules are imported."""
    keep_freed_memory()  # the same allocator as samjax's
    sys.path.insert(0, str(setup.scenic))
    image_encoder, mask_decoder, prompt_encoder = (
        importlib.import_module(f"{SCENIC_MODELING}.{name}")
        for name in ("image_encoder", "mask_decoder", "prompt_encoder")
    )
    config, tensors = setup.load()
    vit, dtype = vit_of(config), jnp.dtype(setup.dtype)
    encoder = image_encoder.ImageEncoderViT(
        img_size=config.frame.height,
        embed_dim=vit.embed_dim,
        depth=vit.depth,
        num_heads=vit.num_heads,
        window_size=vit.window_size,
        window_block_indexes=sorted({*range(vit.depth)} - {*vit.global_attn_indexes}),
        drop_path_rate=0.0,
    )
    prompts = prompt_encoder.PromptEncoder(
        image_embedding_size=config.grid, input_image_size=config.frame.shape
    )
    decoder = mask_decoder.MaskDecoder()

    def fill(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        """The torch tensor of a leaf: the names differ in the last word, the axes of kernels."""
        *layer, last = (key.key for key in path)
        name = {"kernel": "weight", "scale": "weight"}.get(last, last)
        array = tensors[".".join(["image_encoder", *layer, name])]
        axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(array.ndim) if last == "kernel" else None
        return (array if axes is None else array.transpose(axes)).reshape(leaf.shape)

    image = jnp.asarray(random_image(config, setup.batch_size), dtype)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), image)["params"]
    box = box_of(config).reshape(1, 4)

    def prompt(module: Any) -> tuple[Any, Any, Any]:
        return (*module(None, None, box), module.get_dense_pe())

    def decode(params: Any, embedding: Any) -> Any:
        sparse, dense, positions = prompts.apply(params["prompts"], method=prompt)
        return decoder.apply(params["decoder"], embedding[0], positions, sparse, dense)

    # The decoder's weights stay random: only its time is compared.
    drawn = prompts.init(jax.random.key(1), method=prompt)
    embedding = np.zeros((*config.grid, config.prompt_embed_dim), np.float32)
    sparse, dense, positions = prompts.apply(drawn, method=prompt)
    filled = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype), jax.tree.map_with_path(fill, shapes)
    )
    params = {
        "encoder": {"params": filled},
        "prompts": drawn,
        "decoder": decoder.init(jax.random.key(2), embedding, positions, sparse, dense),
    }

    def encode(params: Any, image: Any) -> Any:
        return encoder.apply(params["encoder"], image)

    return _encoder(setup, config, encode, decode, params, image, {})


def _encoder(
    setup: Setup,
    config: SamConfig,
    encode: Any,
    decode: Any,
    params: Any,
    image: Any,
    facts: dict[str, Any],
) -> Model:
    embedding = jnp.zeros((1, *config.grid, config.prompt_embed_dim))
    programs = {
        "encode": Program(jax.jit(encode), params, image),
        "decode": Program(jax.jit(decode), params, embedding),
        "product": product(setup.product, setup.dtype),
    }

    def call(program: Program) -> Any:
        return lambda: jax.block_until_ready(program.call(*program.args))

    calls = {name: call(program) for name, program in programs.items()}
    facts = {
        **facts,
        "library": versions("jax"),
        "flops": programs["encode"].flops,
        "compile_seconds": programs["encode"].compile_seconds,
        "xla_temporary_bytes": programs["encode"].temporary_bytes,
    }

    def peak(task: str) -> int | None:
        on_host = jax.default_backend() == "cpu"
        return host_peak(calls[task]) if on_host else programs[task].temporary_bytes

    return Model(calls, facts, peak, lambda found: np.asarray(found, np.float32))


def samjax_training(setup: Setup) -> Model:
    """This library's steps, as `samjax bench methods` times them."""
    keep_freed_memory()  # as `samjax` does
    config, tensors = setup.load()
    configs = {text: training_config(text, setup.batch_size) for text in setup.methods}
    model = Sam(config, dtype=jnp.dtype(setup.dtype))
    steps = compiled_steps(model, configs, error_console(), to_params(tensors, config))
    for step in steps.values():
        step.run()
    programs = {name: step.program for name, step in steps.items()}
    temporary = {name: program.temporary_bytes for name, program in programs.items()}
    facts = {
        "library": versions("jax"),
        "losses": {name: float(step.logs["loss"]) for name, step in steps.items()},
        "flops": {name: program.flops for name, program in programs.items()},
        "compile_seconds": {name: program.compile_seconds for name, program in programs.items()},
        "xla_temporary_bytes": temporary,
    }

    def peak(task: str) -> int | None:
        on_host = jax.default_backend() == "cpu"
        return host_peak(steps[task].run) if on_host else programs[task].temporary_bytes

    return Model({name: step.run for name, step in steps.items()}, facts, peak)
