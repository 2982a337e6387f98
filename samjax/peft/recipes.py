"""Named specs: what `--method NAME` stands for, with each method's settings and their defaults.

A recipe is a function whose keyword parameters are the method's settings; it returns the rules of
the encoder. Those of the mask decoder are the same for all methods (`MethodConfig.decoder`).
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable
from typing import Any, Literal

from samjax.peft.lora import LoRA
from samjax.peft.spec import Freeze, PeftSpec, Rule, Train

_TRAIN_DECODER = Rule("mask_decoder/**", Train(group="decoder"))
_DECODER = {
    "all": (_TRAIN_DECODER,),
    "mask": (
        Rule("mask_decoder/iou_prediction_head/**", Freeze()),
        Rule("mask_decoder/output_hypernetworks_mlps_{1,2,3}/**", Freeze()),
        _TRAIN_DECODER,
    ),
    "none": (),
}
Target = Literal["q", "k", "v", "proj", "mlp", "decoder"]


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """A method and its settings, as the command line and experiments take them.

    A setting that is left out (None) has the method's own default; `docs/methods.md` has them.
    """

    # The method's name; `samjax params --list` shows all.
    method: str = "lora"
    # Columns of the first factor.
    rank: int | None = None
    # LoRA's update is scaled by alpha / rank; its own default is the rank.
    alpha: float | None = None
    # What is adapted: some of q, k, v, proj, mlp, decoder.
    targets: tuple[Target, ...] | None = None
    # Probability with which an input of the adapter is zeroed in training.
    dropout: float | None = None
    # How many of the encoder's last blocks train (last_k).
    blocks: int | None = None
    # How much of the mask decoder trains beside the adapter: all of it; what the single mask needs
    # (mask), without the IoU head and the multi-mask outputs; none. Without it the adapter file is
    # a few hundred kB.
    decoder: Literal["all", "mask", "none"] = "all"

    def __post_init__(self) -> None:
        if self.method not in RECIPES:
            nearest = difflib.get_close_matches(str(self.method), RECIPES, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"unknown method {self.method!r}; the nearest is {nearest}, and this samjax knows "
                f"{', '.join(RECIPES)}"
            )
        if self.decoder not in _DECODER:
            raise ValueError(f"decoder must be one of {', '.join(_DECODER)}, not {self.decoder!r}")
        known = RECIPES[self.method].settings
        for name in self._given():
            if name not in known:
                has = f"has {', '.join(known)}" if known else "has no settings"
                raise ValueError(f"method {self.method!r} has no setting {name}: it {has}")
        self.spec()

    def _given(self) -> dict[str, Any]:
        """The settings that are not left out."""
        settings = (f.name for f in dataclasses.fields(self) if f.name not in ("method", "decoder"))
        return {name: value for name in settings if (value := getattr(self, name)) is not None}

    def spec(self) -> PeftSpec:
        """The rules. Raises ValueError for a setting out of range."""
        rules = RECIPES[self.method].rules(**self._given()) + _DECODER[self.decoder]
        if not rules:
            raise ValueError(f"method {self.method!r} trains nothing when decoder is none")
        return PeftSpec(rules)

    @property
    def learning_rate(self) -> float:
        """The peak learning rate that suits the method."""
        return RECIPES[self.method].learning_rate


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A method by name."""

    rules: Callable[..., tuple[Rule, ...]]
    # Peak learning rate of what the rules train.
    learning_rate: float = 1e-3

    @property
    def settings(self) -> tuple[str, ...]:
        """The names of its settings."""
        return tuple(inspect.signature(self.rules).parameters)


def decoder() -> tuple[Rule, ...]:
    """The mask decoder alone; the encoder stays as it is."""
    return ()


def bitfit() -> tuple[Rule, ...]:
    """The biases of the encoder (BitFit, Ben Zaken et al. 2022)."""
    return (Rule("image_encoder/**/bias", Train()),)


def norm() -> tuple[Rule, ...]:
    """Scales and biases of the encoder's norms."""
    return (Rule("image_encoder/**/{norm*,neck_1,neck_3,bn}/*", Train()),)


def last_k(*, blocks: int = 2) -> tuple[Rule, ...]:
    """The encoder's last blocks and its neck."""
    return (
        Rule("image_encoder/**", Train(last=blocks)),
        Rule("image_encoder/neck_*/**", Train()),
    )


def full() -> tuple[Rule, ...]:
    """The whole encoder; the prompt encoder stays as it is, as in MedSAM (Ma et al. 2024)."""
    return (Rule("image_encoder/**", Train()),)


def lora(
    *,
    rank: int = 4,
    alpha: float | None = None,
    targets: tuple[str, ...] = ("q", "v"),
    dropout: float = 0.0,
) -> tuple[Rule, ...]:
    """LoRA on q and v of every encoder block (SAMed's setting), or on other `targets`."""
    return _linear_rules(LoRA(rank, alpha, dropout), targets)


def rslora(
    *,
    rank: int = 4,
    alpha: float | None = None,
    targets: tuple[str, ...] = ("q", "v"),
    dropout: float = 0.0,
) -> tuple[Rule, ...]:
    """LoRA scaled by alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023)."""
    return _linear_rules(LoRA(rank, alpha, dropout, rank_stabilized=True), targets)


def _linear_rules(config: Any, targets: tuple[str, ...]) -> tuple[Rule, ...]:
    """A method on linear layers: q, k, v and proj of attention, both layers of MLPs, the decoder's.

    Raises ValueError for a target that there is not, or for none.
    """
    known = ("q", "k", "v", "proj", "mlp", "decoder")
    unknown = [name for name in targets if name not in known]
    if unknown or not targets:
        wrong = repr(unknown[0]) if unknown else "nothing"
        raise ValueError(f"targets must name some of {', '.join(known)}, not {wrong}")
    segments = [name for name in "qkv" if name in targets]
    patterns = {
        "proj": "image_encoder/**/attn/proj",
        "mlp": "image_encoder/**/mlp/*",
        "decoder": "mask_decoder/transformer/**/{q_proj,v_proj}",
    }
    rules = [Rule(f"image_encoder/**/attn/qkv[{','.join(segments)}]", config)] if segments else []
    rules += [Rule(pattern, config) for name, pattern in patterns.items() if name in targets]
    return tuple(rules)


RECIPES: dict[str, Recipe] = {
    "decoder": Recipe(decoder, 5e-4),
    "bitfit": Recipe(bitfit),
    "norm": Recipe(norm),
    "last_k": Recipe(last_k, 1e-4),
    "full": Recipe(full, 1e-4),
    "lora": Recipe(lora),
    "rslora": Recipe(rslora),
}
