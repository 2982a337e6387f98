"""The peers in torch: the original SAM and HuggingFace's, to encode and to train."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from bench_models import (  # pyrefly: ignore[missing-import]
    Model,
    Setup,
    Tensors,
    box_of,
    host_peak,
    method_name,
    random_image,
    versions,
    vit_of,
)

from samjax.bench.inputs import random_batch
from samjax.models import SamConfig
from samjax.preprocess import normalize


class Place:
    """Where torch computes, and in which dtype."""

    def __init__(self, device: str, dtype: str, cores: int) -> None:
        self.device = "cuda" if device == "gpu" else "cpu"
        self.dtype = getattr(torch, dtype)
        torch.set_num_threads(cores)
        # On a GPU JAX multiplies float32 as TF32, too.
        torch.set_float32_matmul_precision("high" if device == "gpu" else "highest")

    def put(self, array: np.ndarray) -> torch.Tensor:
        """A copy of an array."""
        return torch.from_numpy(np.array(array)).to(self.device)

    def finished(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call, which returns when its result is there."""
        if self.device == "cpu":
            return call

        def run() -> Any:
            result = call()
            torch.cuda.synchronize()
            return result

        return run

    def peak(self, call: Callable[[], Any]) -> int | None:
        """The most bytes that a call holds beyond what was held before it."""
        if self.device == "cpu":
            return host_peak(call)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def autocast(self) -> Any:
        """Products in the dtype, whatever that of the weights is."""
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)


def load_original(config: SamConfig, tensors: Tensors) -> Any:
    """The original's `Sam` with these weights, in evaluation mode."""
    with _stand_in_for_torchvision():
        from segment_anything import modeling

    vit, side, width = vit_of(config), config.frame.height, config.prompt_embed_dim
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
    return _loaded(model, tensors)


def load_huggingface(config: SamConfig, tensors: Tensors) -> Any:
    """HuggingFace's `SamModel` with these weights, in evaluation mode."""
    import transformers

    from weights_convert.huggingface import from_meta_names

    vit = vit_of(config)
    vision = transformers.SamVisionConfig(
        image_size=config.frame.height,
        hidden_size=vit.embed_dim,
        output_channels=config.prompt_embed_dim,
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
    return _loaded(model, renamed)


def _loaded(model: Any, tensors: Tensors) -> Any:
    model.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
    return model.eval()


def original_encoder(setup: Setup) -> Model:
    """The original, of PyPI."""
    config, tensors = setup.load()
    place = Place(setup.device, setup.dtype, setup.cores)
    model = load_original(config, tensors).to(place.device)
    box = place.put(box_of(config)[None])

    def decode(embedding: Any) -> Any:
        sparse, dense = model.prompt_encoder(points=None, boxes=box, masks=None)
        positions = model.prompt_encoder.get_dense_pe()
        return model.mask_decoder(embedding, positions, sparse, dense, multimask_output=True)

    encoder = model.image_encoder.to(place.dtype)
    facts = {"library": versions("segment_anything", "torch")}
    return _encoder(setup, config, place, encoder, decode, facts)


def huggingface_encoder(setup: Setup) -> Model:
    """HuggingFace's `SamModel`, with the attention that it takes by itself."""
    config, tensors = setup.load()
    place = Place(setup.device, setup.dtype, setup.cores)
    model = load_huggingface(config, tensors).to(place.device)
    box = place.put(box_of(config)[None, None])
    encoder = model.vision_encoder.to(place.dtype)

    def encode(pixels: Any) -> Any:
        return encoder(pixels).last_hidden_state

    def decode(embedding: Any) -> Any:
        return model(image_embeddings=embedding, input_boxes=box).pred_masks

    attention = encoder.config._attn_implementation
    facts = {"library": versions("transformers", "torch"), "attention": attention}
    return _encoder(setup, config, place, encode, decode, facts)


def pixels_of(config: SamConfig, place: Place, batch_size: int) -> torch.Tensor:
    """(b, 3, h, w): the images that are encoded."""
    pixels = place.put(random_image(config, batch_size).transpose(0, 3, 1, 2))
    return pixels.contiguous().to(place.dtype)


def _encoder(
    setup: Setup, config: SamConfig, place: Place, encode: Any, decode: Any, facts: dict[str, Any]
) -> Model:
    pixels = pixels_of(config, place, setup.batch_size)
    factor = place.put(np.ones((setup.product, setup.product), np.float32)).to(place.dtype)
    embedding = place.put(np.zeros((1, config.prompt_embed_dim, *config.grid), np.float32))
    if setup.compiled:
        encode = torch.compile(encode)
    inference = torch.inference_mode()
    calls = {
        "encode": place.finished(inference(lambda: encode(pixels))),
        "decode": place.finished(inference(lambda: decode(embedding))),
        "product": place.finished(inference(lambda: factor @ factor)),
    }
    if setup.compiled:
        calls["encode"]()
        facts = {**facts, "library": f"{facts['library']}, compiled"}

    def as_array(found: torch.Tensor) -> np.ndarray:
        return found.float().cpu().numpy().transpose(0, 2, 3, 1)

    return Model(calls, facts, lambda task: place.peak(calls[task]), as_array)


class Training:
    """Training steps of HuggingFace's `SamModel`, with the batch and the loss of samjax's."""

    def __init__(self, config: SamConfig, tensors: Tensors, place: Place, batch_size: int) -> None:
        self.place, self._config, self._tensors = place, config, tensors
        batch = random_batch(config, batch_size)
        mean, std, kind = config.pixel_mean, config.pixel_std, config.normalization
        image = np.array(normalize(batch["image"], batch["input_size"], kind, mean, std))
        self._pixels = place.put(image.transpose(0, 3, 1, 2)).contiguous()
        self._truth = place.put(batch["mask"].astype(np.float32))
        self._boxes = place.put(batch["coords"].reshape(batch_size, 1, 4))

    def load(self) -> Any:
        """A frozen model with the weights, whose encoder has them in the compute dtype."""
        model = load_huggingface(self._config, self._tensors).requires_grad_(False)
        model.vision_encoder.to(self.place.dtype)
        return model.to(self.place.device)

    def decode(self, model: Any) -> Any:
        """A forward pass whose embedding has no gradient."""
        with torch.no_grad():
            embedding = model.vision_encoder(self._pixels).last_hidden_state
        return model(image_embeddings=embedding, input_boxes=self._boxes, multimask_output=False)

    def whole(self, model: Any) -> Any:
        """A forward pass from the pixels."""
        return model(pixel_values=self._pixels, input_boxes=self._boxes, multimask_output=False)

    def stepper(
        self,
        model: Any,
        forward: Callable[[Any], Any],
        extra_loss: Callable[[], Any] = lambda: 0.0,
    ) -> Callable[[], float]:
        """A step that trains the mask decoder and whatever in the model is not frozen."""
        # Not peft's `modules_to_save`, whose wrapper wants an argument without a name.
        model.mask_decoder.requires_grad_(True)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-4)

        def step() -> float:
            optimizer.zero_grad()
            with self.place.autocast():
                output = forward(model)
            loss = self._loss(output) + extra_loss()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            return loss.item()  # which waits for the device's work, but for the update

        return self.place.finished(step)

    def decoder(self) -> Callable[[], float]:
        """The step of the mask decoder alone."""
        return self.stepper(self.load(), self.decode)

    def lora(self, rank: int, compiled: bool = False) -> Callable[[], float]:
        """That of LoRA of HuggingFace's peft on the fused qkv of every block."""
        import peft

        qkv = r"vision_encoder\..*\.qkv"
        lora = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=qkv)
        model = peft.get_peft_model(self.load(), lora)
        if compiled:
            model.vision_encoder.compile()
        return self.stepper(model, self.whole)

    def _loss(self, output: Any) -> Any:
        """BCE, Dice and the squared error of the predicted IoU, as in `samjax.training.losses`."""
        from torch.nn import functional

        truth = self._truth
        masks, iou = output.pred_masks[:, 0].float(), output.iou_scores[:, 0, 0].float()
        size = truth.shape[1:]
        logits = functional.interpolate(masks, size, mode="bilinear", align_corners=False)[:, 0]
        bce = functional.binary_cross_entropy_with_logits(logits, truth)
        p, axes = logits.sigmoid(), (1, 2)
        overlap = (p * truth).sum(axes)
        dice = 1 - (2 * overlap + 1) / (p.sum(axes) + truth.sum(axes) + 1)
        found = logits > 0
        both, either = (found & (truth > 0)).sum(axes), (found | (truth > 0)).sum(axes)
        return bce + dice.mean() + (iou - both / either.clamp(min=1)).square().mean()


def _training(setup: Setup) -> Training:
    config, tensors = setup.load()
    place = Place(setup.device, setup.dtype, setup.cores)
    return Training(config, tensors, place, setup.batch_size)


def peft_training(setup: Setup) -> Model:
    """HuggingFace's `SamModel`, as it is and with LoRA of its `peft`."""
    training = _training(setup)
    calls = {
        text: training.decoder() if rank is None else training.lora(rank)
        for text, rank in setup.methods.items()
    }
    losses = {text: call() for text, call in calls.items()}
    facts = {"library": versions("transformers", "peft", "torch"), "losses": losses}
    return Model(calls, facts, lambda task: training.place.peak(calls[task]))


def dispatch_training(setup: Setup) -> Model:
    """HuggingFace's `SamModel` with LoRA, and with Conv-LoRA as its authors dispatch it."""
    from bench_conv_lora import adapted  # pyrefly: ignore[missing-import]

    training = _training(setup)
    calls = {}
    for text, rank in setup.methods.items():
        model = training.load()
        adapters = []
        experts = 8 if method_name(text) == "conv_lora" else 0
        for block in model.vision_encoder.layers:
            block.attn.qkv = adapted(block.attn.qkv, rank, experts).to(training.place.device)
            adapters.append(block.attn.qkv)

        def balance(adapters: list[Any] = adapters) -> Any:
            return sum(adapter.loss for adapter in adapters)

        calls[text] = training.stepper(model, training.whole, balance)
    # Conv-LoRA's has the balance of its experts beside what it has in common with others.
    losses = {text: call() for text, call in calls.items() if method_name(text) == "lora"}
    facts = {"library": versions("transformers", "torch"), "losses": losses}
    return Model(calls, facts, lambda task: training.place.peak(calls[task]))


@contextlib.contextmanager
def _stand_in_for_torchvision() -> Iterator[None]:
    """segment-anything imports four of torchvision's functions; none of them is called here.

    They are gone afterwards: transformers would take them for torchvision.
    """
    if importlib.util.find_spec("torchvision"):
        yield
        return
    names = {
        "torchvision": (),
        "torchvision.ops": (),
        "torchvision.ops.boxes": ("batched_nms", "box_area"),
        "torchvision.transforms": (),
        "torchvision.transforms.functional": ("resize", "to_pil_image"),
    }
    for name, functions in names.items():
        module = sys.modules[name] = types.ModuleType(name)
        vars(module).update(dict.fromkeys(functions))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
