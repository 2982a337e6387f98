"""The image encoders that `bench_encoder.py` compares: this library's and its peers'.

Each builder takes the same weights and the same image, and gives a model that is ready to be timed.
`Setup` and `load_transformers` serve `bench_methods.py` too.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from samjax.models import SamConfig, VitConfig

# Where scenic keeps its SAM.
SCENIC_MODELING = "scenic.projects.baselines.segment_anything.modeling"


Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all workers have in common."""

    config: dict[str, Any]  # of a SAM with a ViT, as `SamConfig.to_json` gives it
    weights: str  # a .safetensors file of the whole model with Meta's names
    cores: int
    # The rest is of encoders alone.
    product: int = 0  # the side of the matrix product
    embedding: str = ""  # the .npy file to write
    scenic: str | None = None  # a checkout of scenic

    def load(self) -> tuple[SamConfig, Tensors, np.ndarray]:
        """The model's config, its tensors, and an image (1, h, w, 3) that is normalised already."""
        config = SamConfig.from_json(self.config)
        image = np.random.default_rng(0).normal(size=(1, *config.frame.shape, 3))
        return config, load_file(self.weights), image.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that is ready: calls without arguments, which return when their result is there."""

    encode: Callable[[], Any]
    decode: Callable[[], Any]
    product: Callable[[], Any]
    as_array: Callable[[Any], np.ndarray]  # what `encode` returns as (1, rows, columns, channels)
    facts: dict[str, Any]


def build_samjax(setup: Setup) -> Model:
    """This library, as its predictor calls it."""
    import jax

    from samjax.flops import count_flops
    from samjax.models import Prompts, Sam
    from weights_convert import to_params

    config, tensors, image = setup.load()
    model = Sam(config)
    params = jax.device_put(to_params(tensors, config))
    corners, kinds = _box(config).reshape(1, 2, 2), np.array([[2, 3]], np.int32)

    def encode(params: Any, image: Any) -> Any:
        return model.apply({"params": params}, image, method="encode_normalized")

    def decode(params: Any, embedding: Any) -> Any:
        return model.apply({"params": params}, embedding, Prompts(corners, kinds), method="decode")

    flops = count_flops(encode, params, image)
    facts = {"flops": flops, "attention": model.attention}
    return _jax_model(setup, config, encode, decode, params, image, facts)


def build_scenic(setup: Setup) -> Model:
    """google-research/scenic, which has no package; of its SAM only the modules are imported."""
    sys.path.insert(0, str(setup.scenic))
    import jax

    image_encoder, mask_decoder, prompt_encoder = (
        importlib.import_module(f"{SCENIC_MODELING}.{name}")
        for name in ("image_encoder", "mask_decoder", "prompt_encoder")
    )
    config, tensors, image = setup.load()
    vit = _vit(config)
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

    shapes = jax.eval_shape(encoder.init, jax.random.key(0), image)["params"]
    box = _box(config).reshape(1, 4)

    def prompt(module: Any) -> tuple[Any, Any, Any]:
        return (*module(None, None, box), module.get_dense_pe())

    def decode(params: Any, embedding: Any) -> Any:
        sparse, dense, positions = prompts.apply(params["prompts"], method=prompt)
        return decoder.apply(params["decoder"], embedding[0], positions, sparse, dense)

    # The decoder's weights stay random: only its time is compared.
    drawn = prompts.init(jax.random.key(1), method=prompt)
    embedding = np.zeros((*config.grid, config.prompt_embed_dim), np.float32)
    sparse, dense, positions = prompts.apply(drawn, method=prompt)
    params = {
        "encoder": {"params": jax.device_put(jax.tree.map_with_path(fill, shapes))},
        "prompts": drawn,
        "decoder": decoder.init(jax.random.key(2), embedding, positions, sparse, dense),
    }

    def encode(params: Any, image: Any) -> Any:
        return encoder.apply(params["encoder"], image)

    return _jax_model(setup, config, encode, decode, params, image, {})


def _jax_model(
    setup: Setup,
    config: SamConfig,
    encode: Any,
    decode: Any,
    params: Any,
    image: np.ndarray,
    facts: dict[str, Any],
) -> Model:
    import jax

    embedding = np.zeros((1, *config.grid, config.prompt_embed_dim), np.float32)
    image, embedding = jax.device_put((image, embedding))
    encode_now = jax.jit(encode).lower(params, image).compile()
    decode_now = jax.jit(decode).lower(params, embedding).compile()
    factor = jax.numpy.ones((setup.product, setup.product))
    product = jax.jit(lambda a: a @ a)
    memory = encode_now.memory_analysis()
    temporary = None if memory is None else memory.temp_size_in_bytes
    return Model(
        lambda: jax.block_until_ready(encode_now(params, image)),
        lambda: jax.block_until_ready(decode_now(params, embedding)),
        lambda: jax.block_until_ready(product(factor)),
        np.asarray,
        {**facts, "library": versions("jax"), "xla_temporary_bytes": temporary},
    )


def build_segment_anything(setup: Setup) -> Model:
    """The original, of PyPI."""
    _stand_in_for_torchvision()
    import torch
    from segment_anything import modeling

    config, tensors, image = setup.load()
    vit, side, width = _vit(config), config.frame.height, config.prompt_embed_dim
    model = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            depth=vit.depth,
            embed_dim=vit.embed_dim,
            img_size=side,
            mlp_ratio=4,
            norm_layer=lambda channels: torch.nn.LayerNorm(channels, eps=1e-6),
            num_heads=vit.num_heads,
            patch_size=vit.patch_size,
            qkv_bias=True,
            use_rel_pos=True,
            global_attn_indexes=vit.global_attn_indexes,
            window_size=vit.window_size,
            out_chans=width,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=width,
            image_embedding_size=config.grid,
            input_image_size=(side, side),
            mask_in_chans=16,
        ),
        mask_decoder=modeling.MaskDecoder(
            transformer_dim=width,
            transformer=modeling.TwoWayTransformer(
                depth=config.decoder_depth,
                embedding_dim=width,
                num_heads=config.decoder_num_heads,
                mlp_dim=config.decoder_mlp_dim,
            ),
        ),
    )
    _load_torch(model, tensors)
    box = torch.from_numpy(_box(config)[None])

    def decode(embedding: Any) -> Any:
        sparse, dense = model.prompt_encoder(points=None, boxes=box, masks=None)
        positions = model.prompt_encoder.get_dense_pe()
        return model.mask_decoder(embedding, positions, sparse, dense, multimask_output=True)

    facts = {"library": versions("segment_anything", "torch")}
    return _torch_model(setup, model.image_encoder, decode, image, facts)


def load_transformers(config: SamConfig, tensors: Tensors) -> Any:
    """HuggingFace's `SamModel` with these weights, in evaluation mode."""
    import transformers

    from weights_convert.huggingface import from_meta_names

    vit = _vit(config)
    vision = transformers.SamVisionConfig(
        image_size=config.frame.height,
        hidden_size=vit.embed_dim,
        num_hidden_layers=vit.depth,
        num_attention_heads=vit.num_heads,
        global_attn_indexes=list(vit.global_attn_indexes),
        window_size=vit.window_size,
        mlp_dim=4 * vit.embed_dim,
    )
    theirs = transformers.SamConfig(
        vision_config=vision, prompt_encoder_config={"image_size": config.frame.height}
    )
    model = transformers.SamModel(theirs)
    renamed = from_meta_names(tensors)
    # One tensor under two names.
    positions = "shared_image_embedding.positional_embedding"
    renamed["prompt_encoder.shared_embedding.positional_embedding"] = renamed[positions]
    _load_torch(model, renamed)
    return model


def build_transformers(setup: Setup) -> Model:
    """HuggingFace's `SamModel`, with the attention that it takes by itself."""
    import torch

    config, tensors, image = setup.load()
    model = load_transformers(config, tensors)
    box = torch.from_numpy(_box(config)[None, None])

    def decode(embedding: Any) -> Any:
        return model(image_embeddings=embedding, input_boxes=box).pred_masks

    facts = {
        "library": versions("transformers", "torch"),
        "attention": model.vision_encoder.config._attn_implementation,
    }

    def encode(pixels: Any) -> Any:
        return model.vision_encoder(pixels).last_hidden_state

    return _torch_model(setup, encode, decode, image, facts)


def _load_torch(model: Any, tensors: Tensors) -> None:
    import torch

    model.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
    model.eval()


def _torch_model(
    setup: Setup, encode: Any, decode: Any, image: np.ndarray, facts: dict[str, Any]
) -> Model:
    import torch

    torch.set_num_threads(setup.cores)
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
    factor = torch.ones(setup.product, setup.product)
    inference = torch.inference_mode()
    side = image.shape[1] // 16
    embedding = torch.zeros(1, 256, side, side)
    return Model(
        inference(lambda: encode(pixels)),
        inference(lambda: decode(embedding)),
        inference(lambda: factor @ factor),
        lambda result: result.numpy().transpose(0, 2, 3, 1),
        facts,
    )


def _stand_in_for_torchvision() -> None:
    """segment-anything imports four of torchvision's functions; none of them is called here."""
    if importlib.util.find_spec("torchvision"):
        return
    for name, functions in {
        "torchvision": (),
        "torchvision.ops": (),
        "torchvision.ops.boxes": ("batched_nms", "box_area"),
        "torchvision.transforms": (),
        "torchvision.transforms.functional": ("resize", "to_pil_image"),
    }.items():
        module = sys.modules[name] = types.ModuleType(name)
        vars(module).update(dict.fromkeys(functions))


def _vit(config: SamConfig) -> VitConfig:
    assert isinstance(config.image_encoder, VitConfig)
    return config.image_encoder


def _box(config: SamConfig) -> np.ndarray:
    """A box in the middle of the image: (x0, y0, x1, y1)."""
    return np.array([0.25, 0.25, 0.75, 0.75], np.float32) * config.frame.height


def versions(*packages: str) -> str:
    """Packages with their versions."""
    return ", ".join(f"{p.replace('_', '-')} {importlib.metadata.version(p)}" for p in packages)


BUILDERS: dict[str, Callable[[Setup], Model]] = {
    "samjax": build_samjax,
    "segment-anything": build_segment_anything,
    "transformers": build_transformers,
    "scenic": build_scenic,
}
