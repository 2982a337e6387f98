"""Named specs: what `--method NAME` stands for, with each method's settings and their defaults.

A recipe is a function whose keyword parameters are the method's settings; it returns the rules of
the encoder. Those of the mask decoder are the same for all methods (`MethodConfig.decoder`).
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from samjax.peft.adaptformer import AdaptFormer
from samjax.peft.architecture import read_architecture
from samjax.peft.conv_lora import ConvLoRA
from samjax.peft.dora import DoRA
from samjax.peft.edges import is_search, parse_sites
from samjax.peft.fact import FacT
from samjax.peft.houlsby import Houlsby
from samjax.peft.lora import LoRA
from samjax.peft.lora_conv import LoRAConv
from samjax.peft.nas_lora import NASLoRA
from samjax.peft.sam_parser import SAMParser
from samjax.peft.spec import Freeze, PeftSpec, Rule, Train
from samjax.peft.ssf import SSF

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
# Peak learning rate of the mask decoder, beside any method.
DECODER_LEARNING_RATE = 5e-4
Target = Literal[
    "qkv", "q", "k", "v", "proj", "attn", "mlp", "decoder", "conv", "neck", "transformer"
]


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
    # What the adapter's update is multiplied by.
    scale: float | None = None
    # Hidden channels of an adapter beside or after a branch.
    bottleneck: int | None = None
    # What is adapted: some of q, k, v, proj, mlp, decoder, conv, or qkv, the fused projection as
    # one; of a block's branches attn, mlp; or of neck, transformer.
    targets: tuple[Target, ...] | None = None
    # Probability with which an input of the adapter is zeroed in training.
    dropout: float | None = None
    # How many experts a mixture has.
    experts: int | None = None
    # Weight of the loss that balances a mixture's experts.
    balance: float | None = None
    # How many of the encoder's last blocks train (last_k).
    blocks: int | None = None
    # Operators of a searchable cell, joined by +; of several edges by |; or a JSON file that
    # `samjax arch` wrote, whose architecture is then trained as it is.
    operators: str | None = None
    # Which operators a searchable cell has: linear ones, which collapse, or those of DARTS.
    space: Literal["linear", "darts"] | None = None
    # How the operators of the space darts are normalised.
    norm: Literal["instance", "none"] | None = None
    # How many nodes a searchable cell has.
    nodes: int | None = None
    # One in so many channels goes through the searchable cell (nas_pc_lora).
    partial: int | None = None
    # Whose setting it is, where they differ: the paper's, or its authors' code's (sam_parser).
    recipe: Literal["paper", "code"] | None = None
    # Which factors of a decomposed kernel train (sam_parser).
    train: Literal["coefficients", "bases", "both"] | None = None
    # How much of the mask decoder trains beside the adapter: all of it; what the single mask needs
    # (mask), without the IoU head and the multi-mask outputs; none. Without it the adapter file is
    # a few hundred kB.
    decoder: Literal["all", "mask", "none"] = "all"

    def __post_init__(self) -> None:
        if (self.operators or "").endswith(".json"):
            # Its contents in its place: a run knows its architecture when the file is gone.
            given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
            for name, value in read_architecture(Path(self.operators or ""), given).items():
                object.__setattr__(self, name, value)
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
        sites = parse_sites(self.operators or "")
        if sites and self.targets is not None and set(self.targets) != _targets_of(sites):
            named = ", ".join(sorted(_targets_of(sites)))
            raise ValueError(
                f"operators names layers of {named}, and targets is {', '.join(self.targets)}; "
                "leave out targets"
            )
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

    def resolved(self) -> dict[str, Any]:
        """The method and all its settings, with its own defaults for those that are left out."""
        settings = {**RECIPES[self.method].settings, **self._given()}
        return {"method": self.method, **settings, "decoder": self.decoder}

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of the method's training."""
        stages = RECIPES[self.method].stages
        return stages(**self._given()) if callable(stages) else stages

    @property
    def learning_rate(self) -> float:
        """The peak learning rate that suits the method."""
        rate = RECIPES[self.method].learning_rate
        return rate(**self._given()) if callable(rate) else rate


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A method by name."""

    rules: Callable[..., tuple[Rule, ...]]
    # Peak learning rate of what the rules train, or a function that tells it from the settings.
    learning_rate: float | Callable[..., float] = 1e-3
    # The stages of its training (`samjax.training.stages`), or a function that tells them from the
    # settings; () is one in which all of it trains.
    stages: tuple[str, ...] | Callable[..., tuple[str, ...]] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings with their defaults."""
        parameters = inspect.signature(self.rules).parameters
        return {name: parameter.default for name, parameter in parameters.items()}

    @property
    def summary(self) -> str:
        """What it is, in a sentence."""
        return (inspect.getdoc(self.rules) or "").partition("\n")[0]


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
    config, conv = LoRA(rank, alpha, dropout), LoRAConv(rank, alpha, dropout)
    return _linear_rules(config, targets, conv)


def rslora(
    *,
    rank: int = 4,
    alpha: float | None = None,
    targets: tuple[str, ...] = ("q", "v"),
    dropout: float = 0.0,
) -> tuple[Rule, ...]:
    """LoRA scaled by alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023)."""
    settings = (rank, alpha, dropout, True)
    return _linear_rules(LoRA(*settings), targets, LoRAConv(*settings))


def dora(
    *,
    rank: int = 4,
    alpha: float | None = None,
    targets: tuple[str, ...] = ("q", "v"),
    dropout: float = 0.0,
) -> tuple[Rule, ...]:
    """DoRA on q and v of every encoder block, or on other `targets` (Liu et al. 2024)."""
    rules = _linear_rules(DoRA(rank, alpha, dropout), targets)
    # A kernel stays as it is where DoRA turns it, though the rest of the decoder trains.
    return rules + tuple(
        Rule(f"{rule.pattern}/kernel", Freeze())
        for rule in rules
        if rule.pattern.startswith("mask_decoder/")
    )


def lora_conv(
    *, rank: int = 4, alpha: float | None = None, dropout: float = 0.0
) -> tuple[Rule, ...]:
    """LoRA on the encoder's convolutions: patch embedding, neck, and TinyViT's own."""
    return (_convolutions(LoRAConv(rank, alpha, dropout)),)


def _convolutions(config: Any) -> Rule:
    return Rule("image_encoder/**", config)


# Not qkv, the fused projection as one: its pieces are q, k and v.
_FACT_TARGETS = ("q", "k", "v", "proj", "mlp", "decoder")


def fact_tt(
    *,
    rank: int = 8,
    targets: tuple[str, ...] = ("q", "k", "v"),
    scale: float = 1.0,
    dropout: float = 0.0,
) -> tuple[Rule, ...]:
    """FacT in its tensor-train form on q, k and v of every encoder block, or on `targets`."""
    _check_targets(targets, _FACT_TARGETS)
    return _linear_rules(FacT(rank, "tt", scale, dropout), targets)


def fact_tk(
    *,
    rank: int = 8,
    targets: tuple[str, ...] = ("q", "k", "v"),
    scale: float = 1.0,
    dropout: float = 0.0,
) -> tuple[Rule, ...]:
    """FacT in its Tucker form on q, k and v of every encoder block, or on `targets`."""
    _check_targets(targets, _FACT_TARGETS)
    return _linear_rules(FacT(rank, "tk", scale, dropout), targets)


def adapter(
    *, bottleneck: int = 16, targets: tuple[str, ...] = ("attn", "mlp")
) -> tuple[Rule, ...]:
    """A bottleneck in series with attention and MLP of every encoder block (Houlsby et al. 2019).

    Raises ValueError for a target that is no branch, or for none.
    """
    _check_targets(targets, ("attn", "mlp"))
    config = Houlsby(bottleneck)
    return tuple(Rule(f"image_encoder/**/{name}", config) for name in dict.fromkeys(targets))


def adaptformer(
    *, bottleneck: int = 16, scale: float = 1.0, dropout: float = 0.1
) -> tuple[Rule, ...]:
    """A bottleneck in parallel with the MLP of every encoder block (Chen et al. 2022)."""
    return (Rule("image_encoder/**/mlp", AdaptFormer(bottleneck, scale, dropout)),)


def ssf() -> tuple[Rule, ...]:
    """A scale and a shift of each channel, after every layer of the encoder (Lian et al. 2022)."""
    return (Rule("image_encoder/**", SSF()),)


def sam_parser(
    *,
    recipe: str = "paper",
    train: str | None = None,
    targets: tuple[str, ...] | None = None,
) -> tuple[Rule, ...]:
    """The coefficients of the neck's two convolutions, or of other `targets` (Peng et al. 2024).

    `train` is "coefficients" where it is left out. `recipe` "code" is what the authors' script
    trains, the whole neck. Raises ValueError for that with another setting.
    """
    if recipe not in ("paper", "code"):
        raise ValueError(f"recipe must be one of paper, code, not {recipe!r}")
    if recipe == "code":
        if train is not None or targets is not None:
            raise ValueError("recipe 'code' trains the whole neck; leave out train and targets")
        norms = Rule("image_encoder/neck_{1,3}/*", Train())
        return (Rule("image_encoder/neck_{0,2}", SAMParser("both")), norms)
    if targets is None:
        targets = ("neck",)
    _check_targets(targets, ("neck", "transformer"))
    config = SAMParser("coefficients" if train is None else train)
    patterns = {
        "neck": ("image_encoder/neck_{0,2}",),
        "transformer": ("image_encoder/**/attn/{qkv,proj}", "image_encoder/**/mlp/*"),
    }
    return tuple(Rule(p, config) for name in patterns if name in targets for p in patterns[name])


def _sam_parser_rate(*, recipe: str = "paper", train: str | None = None, **_: Any) -> float:
    """Coefficients are of order one, entries of bases far smaller: each as its size allows."""
    return 1e-3 if recipe == "paper" and train in (None, "coefficients") else 1e-4


def conv_lora(
    *,
    rank: int = 3,
    alpha: float = 32.0,
    experts: int = 8,
    balance: float = 1e-2,
    targets: tuple[str, ...] = ("qkv",),
    dropout: float = 0.0,
) -> tuple[Rule, ...]:
    """LoRA with a mixture of convolutions between its factors (Zhong et al. 2024)."""
    _check_targets(targets, ("qkv", "q", "k", "v", "proj", "mlp"))
    return _linear_rules(ConvLoRA(rank, alpha, experts, balance, dropout), targets)


def nas_lora(
    *,
    rank: int = 4,
    alpha: float | None = None,
    operators: str = "",
    space: str = "linear",
    norm: str = "instance",
    nodes: int = 1,
    targets: tuple[str, ...] = ("qkv",),
    dropout: float = 0.0,
) -> tuple[Rule, ...]:
    """LoRA with a searchable cell between its factors (Chen, Su and Tang 2025)."""
    return _cell_rules(NASLoRA(rank, alpha, "", space, norm, nodes, 1, dropout), operators, targets)


def nas_pc_lora(
    *,
    rank: int = 4,
    alpha: float | None = None,
    operators: str = "",
    space: str = "linear",
    norm: str = "instance",
    nodes: int = 1,
    partial: int = 2,
    targets: tuple[str, ...] = ("qkv",),
    dropout: float = 0.0,
) -> tuple[Rule, ...]:
    """NAS-LoRA whose cell sees some of the channels (partial channels, Xu et al. 2020)."""
    return _cell_rules(
        NASLoRA(rank, alpha, "", space, norm, nodes, partial, dropout), operators, targets
    )


def _cell_rules(config: NASLoRA, operators: str, targets: tuple[str, ...]) -> tuple[Rule, ...]:
    """A cell in each of the targets; or where operators names sites, a cell of its own in each."""
    _check_targets(targets, ("qkv", "q", "k", "v", "proj", "mlp"))
    if sites := parse_sites(operators):
        return tuple(
            Rule(pattern, dataclasses.replace(config, operators=edges))
            for pattern, edges in sites.items()
        )
    return _linear_rules(dataclasses.replace(config, operators=operators), targets)


def _targets_of(sites: Iterable[str]) -> set[str]:
    """The targets that patterns of sites are of."""
    found: set[str] = set()
    for pattern in sites:
        path, _, segments = pattern.partition("[")
        module, _, layer = path.rpartition("/")
        name = "mlp" if module.endswith("mlp") else layer
        found |= set(segments.rstrip("]").split(",")) if segments else {name}
    return found


def _search_stages(*, operators: str = "", nodes: int = 1, **_: Any) -> tuple[str, ...]:
    """Warm-up with the architecture as it is (PC-DARTS), then both, then what was found as it is.

    Where there is nothing to search for, the architecture stays as it is all the time.
    """
    # One text for all edges of several leaves their weights open.
    if not is_search(operators) and (nodes == 1 or "|" in operators):
        return ("1:weights+decoder",)
    return ("0.3:weights+decoder", "0.4:all", "0.3:weights+decoder")


def _check_targets(targets: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Raises ValueError for a target that there is not, or for none."""
    unknown = [name for name in targets if name not in known]
    if unknown or not targets:
        wrong = repr(unknown[0]) if unknown else "nothing"
        raise ValueError(f"targets must name some of {', '.join(known)}, not {wrong}")


def _linear_rules(config: Any, targets: tuple[str, ...], conv: Any = None) -> tuple[Rule, ...]:
    """A method on linear layers: q, k, v and proj of attention, both layers of MLPs, the decoder's.

    The target qkv is the fused projection as one, without segments. `conv`: what adapts the
    encoder's convolutions, for the target conv. Raises ValueError for a target that there is not,
    or for none.
    """
    if "conv" in targets and conv is None:
        raise ValueError(
            f"{type(config).__name__} is defined for linear layers alone: take conv from targets, "
            "or use lora, rslora or lora_conv for convolutions"
        )
    convs = ("conv",) if conv else ()
    _check_targets(targets, ("qkv", "q", "k", "v", "proj", "mlp", "decoder", *convs))
    segments = [name for name in "qkv" if name in targets]
    if segments and "qkv" in targets:
        raise ValueError("the target qkv is all of q, k and v as one: name it without them")
    patterns = {
        "qkv": "image_encoder/**/attn/qkv",
        "proj": "image_encoder/**/attn/proj",
        "mlp": "image_encoder/**/mlp/*",
        "decoder": "mask_decoder/transformer/**/{q_proj,v_proj}",
    }
    rules = [Rule(f"image_encoder/**/attn/qkv[{','.join(segments)}]", config)] if segments else []
    rules += [Rule(pattern, config) for name, pattern in patterns.items() if name in targets]
    rules += [_convolutions(conv)] if "conv" in targets else []
    return tuple(rules)


RECIPES: dict[str, Recipe] = {
    "decoder": Recipe(decoder, DECODER_LEARNING_RATE),
    "bitfit": Recipe(bitfit),
    "norm": Recipe(norm),
    "last_k": Recipe(last_k, 1e-4),
    "full": Recipe(full, 1e-4),
    "lora": Recipe(lora),
    "rslora": Recipe(rslora),
    "dora": Recipe(dora),
    "lora_conv": Recipe(lora_conv),
    "fact_tt": Recipe(fact_tt),
    "fact_tk": Recipe(fact_tk),
    "adapter": Recipe(adapter),
    "adaptformer": Recipe(adaptformer),
    "ssf": Recipe(ssf),
    "sam_parser": Recipe(sam_parser, _sam_parser_rate),
    "conv_lora": Recipe(conv_lora, 3e-4),
    "nas_lora": Recipe(nas_lora, 3e-3, _search_stages),
    "nas_pc_lora": Recipe(nas_pc_lora, 3e-3, _search_stages),
}
