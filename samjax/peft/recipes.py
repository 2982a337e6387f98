"""Named specs: what `--method NAME` stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from samjax.peft.lora import LoRA
from samjax.peft.spec import PeftSpec, Rule, Train

TRAIN_DECODER = Rule("mask_decoder/**", Train(group="decoder"))


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """A method and its settings, as the command line and experiments take them."""

    # lora: low-rank factors in the encoder's attention; decoder: the mask decoder alone.
    method: str = "lora"
    # Columns of LoRA's A.
    rank: int = 4
    # LoRA's update is scaled by alpha / rank; left out, alpha = rank.
    alpha: float | None = None
    # Which of q, k and v get LoRA factors, for example "qv" or "qkv".
    segments: str = "qv"
    # Probability with which an input of LoRA's A is zeroed in training.
    dropout: float = 0.0
    # Train the mask decoder beside the adapter. Without it the adapter file is a few hundred kB.
    train_decoder: bool = True

    def spec(self) -> PeftSpec:
        """The rules. Raises ValueError for an unknown method or a setting out of range."""
        if self.method not in RECIPES:
            raise ValueError(
                f"unknown method {self.method!r}; this samjax knows {', '.join(RECIPES)}"
            )
        return RECIPES[self.method](self)


def lora(config: MethodConfig) -> PeftSpec:
    """LoRA on segments of every encoder block's qkv, with the mask decoder (SAMed's setting)."""
    if not config.segments or not set(config.segments) <= set("qkv"):
        raise ValueError(
            f"segments must name some of q, k and v, such as 'qv', not {config.segments!r}"
        )
    pattern = f"image_encoder/**/attn/qkv[{','.join(dict.fromkeys(config.segments))}]"
    rules = (Rule(pattern, LoRA(config.rank, config.alpha, config.dropout)),)
    return PeftSpec(rules + ((TRAIN_DECODER,) if config.train_decoder else ()))


def decoder(config: MethodConfig) -> PeftSpec:
    """The mask decoder alone; the encoder stays as it is."""
    if not config.train_decoder:
        raise ValueError("method 'decoder' trains nothing when train_decoder is off")
    unused = MethodConfig(method=config.method)
    for field in dataclasses.fields(config):
        if getattr(config, field.name) != getattr(unused, field.name):
            raise ValueError(f"method 'decoder' has no setting {field.name}; leave it out")
    return PeftSpec((TRAIN_DECODER,))


RECIPES: dict[str, Callable[[MethodConfig], PeftSpec]] = {"lora": lora, "decoder": decoder}
