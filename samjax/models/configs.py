"""What distinguishes one SAM from another: encoder sizes, input size, preprocessing.

A config is plain data. It is stored next to the weights (`config.json` of a samjax checkpoint), so
that a checkpoint is never run with another model's preprocessing.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from samjax.preprocess import Frame, Resize

ImageSize = int | tuple[int, int]


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """SAM's plain ViT with windowed attention (Kirillov et al. 2023, section A; ViTDet)."""

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    # 0-based blocks with global attention; all others attend within windows.
    global_attn_indexes: tuple[int, ...] = (2, 5, 8, 11)
    window_size: int = 14
    patch_size: int = 16
    # The token grid that `pos_embed` and the global `rel_pos` tables were trained on: a side, or
    # (rows, columns).
    pretrain_grid: ImageSize = 64
    kind: str = "vit"

    @property
    def position_grid(self) -> tuple[int, int]:
        """(rows, columns) of `pretrain_grid`."""
        grid = self.pretrain_grid
        return (grid, grid) if isinstance(grid, int) else grid


@dataclasses.dataclass(frozen=True)
class TinyVitConfig:
    """TinyViT-5M as MobileSAM uses it (Zhang et al. 2023): the last stage keeps its resolution."""

    embed_dims: tuple[int, ...] = (64, 128, 160, 320)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (2, 4, 5, 10)
    window_sizes: tuple[int, ...] = (7, 7, 14, 7)
    # The two convolutions of the patch embedding: 3x3 of stride 2 in MobileSAM, 1x1 of stride 1
    # in LiteMedSAM.
    patch_kernel: int = 3
    patch_stride: int = 2
    kind: str = "tiny_vit"

    @property
    def patch_size(self) -> int:
        """Image pixels per side of one token of the image embedding."""
        return self.patch_stride**2 * 2 ** (len(self.embed_dims) - 2)


@dataclasses.dataclass(frozen=True)
class SamConfig:
    """One SAM: its encoder, its input in pixels, and how an image becomes that input."""

    name: str = "vit_b"
    image_encoder: VitConfig | TinyVitConfig = VitConfig()
    # The input in pixels: a side, or (height, width). Fine-tuning may use another one, whose sides
    # are multiples of the patch.
    image_size: ImageSize = 1024
    # How an image is brought to that size; see `samjax.preprocess.Frame`.
    resize: Resize = "longest_side"
    # pixel: RGB values in [0, 255]. min_max: they are first scaled to [0, 1] by the least and the
    # largest value of the image, all channels together.
    normalization: Literal["pixel", "min_max"] = "pixel"
    # model input = (value - pixel_mean) / pixel_std.
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    # Channels of the image embedding, of prompts and of the decoder's tokens.
    prompt_embed_dim: int = 256
    decoder_depth: int = 2
    decoder_num_heads: int = 8
    decoder_mlp_dim: int = 2048

    @property
    def architecture(self) -> SamConfig:
        """The config without its name, its input and its preprocessing.

        Models of equal architectures have the same tensors, which thus cannot tell them apart.
        """
        return dataclasses.replace(
            self,
            name="",
            image_size=0,
            resize="longest_side",
            normalization="pixel",
            pixel_mean=(0.0, 0.0, 0.0),
            pixel_std=(1.0, 1.0, 1.0),
        )

    @property
    def frame(self) -> Frame:
        """The model's input as `samjax.preprocess` takes it."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return Frame(height, width, self.resize)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the image embedding."""
        patch = self.image_encoder.patch_size
        return self.frame.height // patch, self.frame.width // patch

    @property
    def low_res_shape(self) -> tuple[int, int]:
        """(height, width) of the mask decoder's logits, and of mask prompts."""
        rows, columns = self.grid
        return 4 * rows, 4 * columns

    def with_image_size(self, image_size: ImageSize | None) -> SamConfig:
        """The same model at another input, a side or (height, width); `None` keeps its own.

        Raises ValueError where a side is not a positive multiple of the encoder's patch.
        """
        if image_size is None:
            return self
        config = dataclasses.replace(self, image_size=image_size)
        patch = self.image_encoder.patch_size
        for side in (config.frame.height, config.frame.width):
            if side <= 0 or side % patch:
                raise ValueError(
                    f"image_size {side} is not a positive multiple of {patch}, the patch size of "
                    f"{self.name}; the nearest that is: {max(patch, round(side / patch) * patch)}"
                )
        return config

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; `from_json` is its inverse."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> SamConfig:
        """The inverse of `to_json`.

        Raises ValueError on unknown or missing fields, and on values that no model has: a file may
        claim anything, and a depth of a billion would take forever to build.
        """
        try:
            encoder = dict(data["image_encoder"])
            cls = {"vit": VitConfig, "tiny_vit": TinyVitConfig}[encoder["kind"]]
            encoder = _checked(cls(**_tuples(encoder)))
            return _checked(SamConfig(**_tuples({**data, "image_encoder": encoder})))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a samjax model config: {error}") from None


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}


_CHOICES: dict[str, tuple[str, ...]] = {
    "resize": get_args(Resize),
    "normalization": ("pixel", "min_max"),
}
_PAIRS = ("image_size", "pretrain_grid")  # a side or two
_MOST_LAYERS, _MOST = 256, 1 << 16


def _checked(config: Any) -> Any:
    """A dataclass as it is, its values of the defaults' types and within reason."""
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        if dataclasses.is_dataclass(default):
            continue
        values = value if isinstance(value, tuple) else (value,)
        kind = type(default[0] if isinstance(default, tuple) else default)
        fits = isinstance(value, tuple) == isinstance(default, tuple) or (
            field.name in _PAIRS and len(values) == 2
        )
        if kind is int:
            least = 0 if field.name == "global_attn_indexes" else 1
            most = _MOST_LAYERS if "depth" in field.name else _MOST
            fits = fits and all(type(x) is int and least <= x <= most for x in values)
        elif kind is float:
            fits = (
                fits
                and len(values) == 3
                and all(type(x) in (int, float) and math.isfinite(x) for x in values)
            )
        else:
            fits = fits and value in _CHOICES.get(field.name, (str(value),))
        if not fits:
            raise ValueError(f"not a samjax model config: {field.name} cannot be {value!r:.80}")
    return config


_VIT_L = VitConfig(embed_dim=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23))
_VIT_H = VitConfig(embed_dim=1280, depth=32, num_heads=16, global_attn_indexes=(7, 15, 23, 31))

# The names that `--model` takes. `vit_t` is MobileSAM; `medsam` is `vit_b` with other weights and
# another preprocessing.
MODELS: dict[str, SamConfig] = {
    "vit_b": SamConfig(),
    "vit_l": SamConfig(name="vit_l", image_encoder=_VIT_L),
    "vit_h": SamConfig(name="vit_h", image_encoder=_VIT_H),
    "medsam": SamConfig(
        name="medsam",
        resize="stretch",
        normalization="min_max",
        pixel_mean=(0.0, 0.0, 0.0),
        pixel_std=(1.0, 1.0, 1.0),
    ),
    "vit_t": SamConfig(name="vit_t", image_encoder=TinyVitConfig()),
    "lite_medsam": SamConfig(
        name="lite_medsam",
        image_encoder=TinyVitConfig(patch_kernel=1, patch_stride=1),
        image_size=256,
        normalization="min_max",
        pixel_mean=(0.0, 0.0, 0.0),
        pixel_std=(1.0, 1.0, 1.0),
    ),
}


def is_of_before(config: SamConfig) -> bool:
    """True where `MODELS` has that model with another preprocessing: an earlier samjax wrote it."""
    today = MODELS.get(config.name)
    if today is None or today.architecture != config.architecture:
        return False
    return dataclasses.replace(today, image_size=config.image_size) != config
