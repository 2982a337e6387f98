"""Named specs: what `--method NAME` stands for, with each method's settings and their defaults.

A recipe is a function whose keyword parameters are the method's settings; it returns the rules of
the encoder. Those of the mask decoder are the same for all methods (`MethodConfig.decoder`). A
recipe of dense tasks has one more parameter, how many `tasks` there are.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from samjax.peft.adaptformer import AdaptFormer
from samjax.peft.conv_lora import ConvLoRA
from samjax.peft.dora import DoRA
from samjax.peft.edges import is_search, parse_sites
from samjax.peft.fact import FacT
from samjax.peft.houlsby import Houlsby
from samjax.peft.lora import LoRA
from samjax.peft.lora_conv import LoRAConv
from samjax.peft.nas_lora import NASLoRA
from samjax.peft.per_task import PerTask
from samjax.peft.sam_parser import SAMParser
from samjax.peft.spec import Freeze, Rule, Train
from samjax.peft.ssf import SSF
from samjax.peft.ta_lora import TALoRA
from samjax.peft.targets import check_targets, convolutions, linear_rules

# Peak learning rate of the mask decoder, beside any method.
DECODER_LEARNING_RATE = 5e-4


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
        return {name: p.default for name, p in parameters.items() if name != "tasks"}

    @property
    def dense(self) -> bool:
        """Whether it is for dense tasks alone."""
        return "tasks" in inspect.signature(self.rules).parameters

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
    return linear_rules(config, targets, conv)


def rslora(
    *,
    rank: int = 4,
    alpha: float | None = None,
    targets: tuple[str, ...] = ("q", "v"),
    dropout: float = 0.0,
) -> tuple[Rule, ...]:
    """LoRA scaled by alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023)."""
    settings = (rank, alpha, dropout, True)
    return linear_rules(LoRA(*settings), targets, LoRAConv(*settings))


def dora(
    *,
    rank: int = 4,
    alpha: float | None = None,
    targets: tuple[str, ...] = ("q", "v"),
    dropout: float = 0.0,
) -> tuple[Rule, ...]:
    """DoRA on q and v of every encoder block, or on other `targets` (Liu et al. 2024)."""
    rules = linear_rules(DoRA(rank, alpha, dropout), targets)
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
    return (convolutions(LoRAConv(rank, alpha, dropout)),)


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
    check_targets(targets, _FACT_TARGETS)
    return linear_rules(FacT(rank, "tt", scale, dropout), targets)


def fact_tk(
    *,
    rank: int = 8,
    targets: tuple[str, ...] = ("q", "k", "v"),
    scale: float = 1.0,
    dropout: float = 0.0,
) -> tuple[Rule, ...]:
    """FacT in its Tucker form on q, k and v of every encoder block, or on `targets`."""
    check_targets(targets, _FACT_TARGETS)
    return linear_rules(FacT(rank, "tk", scale, dropout), targets)


def adapter(
    *, bottleneck: int = 16, targets: tuple[str, ...] = ("attn", "mlp")
) -> tuple[Rule, ...]:
    """A bottleneck in series with attention and MLP of every encoder block (Houlsby et al. 2019).

    Raises ValueError for a target that is no branch, or for none.
    """
    check_targets(targets, ("attn", "mlp"))
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
    check_targets(targets, ("neck", "transformer"))
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
    check_targets(targets, ("qkv", "q", "k", "v", "proj", "mlp"))
    return linear_rules(ConvLoRA(rank, alpha, experts, balance, dropout), targets)


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
    check_targets(targets, ("qkv", "q", "k", "v", "proj", "mlp"))
    if sites := parse_sites(operators):
        return tuple(
            Rule(pattern, dataclasses.replace(config, operators=edges))
            for pattern, edges in sites.items()
        )
    return linear_rules(dataclasses.replace(config, operators=operators), targets)


_TASK_TARGETS = ("qkv", "q", "k", "v", "proj", "mlp")


def ta_lora(
    *,
    tasks: int,
    rank: int = 32,
    rank_task: int = 4,
    scale: float = 0.5,
    orthogonality: float = 1.0,
    targets: tuple[str, ...] = ("qkv",),
    first_block: int = 0,
    norms: bool = True,
    dropout: float = 0.1,
) -> tuple[Rule, ...]:
    """TA-LoRA: one low-rank tensor a layer, shared by the tasks (Wang, Ye and Zhang 2024)."""
    config = TALoRA(tasks, rank, rank, rank_task, scale, dropout, orthogonality)
    return _task_rules(config, targets, first_block, norms)


def lora_stl(
    *,
    tasks: int,
    rank: int = 32,
    alpha: float | None = None,
    targets: tuple[str, ...] = ("qkv",),
    first_block: int = 0,
    norms: bool = True,
    dropout: float = 0.1,
) -> tuple[Rule, ...]:
    """A LoRA for each task, which TA-LoRA is compared with; norms, where they train, are shared."""
    config = PerTask(LoRA(rank, alpha, dropout), tasks)
    return _task_rules(config, targets, first_block, norms)


def lora_hps(
    *,
    tasks: int,
    rank: int = 32,
    alpha: float | None = None,
    targets: tuple[str, ...] = ("qkv",),
    first_block: int = 0,
    norms: bool = True,
    dropout: float = 0.1,
) -> tuple[Rule, ...]:
    """One LoRA for all tasks (hard parameter sharing), which TA-LoRA is compared with."""
    return _task_rules(LoRA(rank, alpha, dropout), targets, first_block, norms)


def _task_rules(
    config: Any, targets: tuple[str, ...], first_block: int, norms: bool
) -> tuple[Rule, ...]:
    """A method in the encoder's blocks from `first_block` on, and those blocks' norms."""
    check_targets(targets, _TASK_TARGETS)
    rules = linear_rules(config, targets)
    rules += (Rule("image_encoder/**/{norm*,bn}/*", Train()),) if norms else ()
    return tuple(dataclasses.replace(rule, first_block=first_block) for rule in rules)


def _search_stages(*, operators: str = "", nodes: int = 1, **_: Any) -> tuple[str, ...]:
    """Warm-up with the architecture as it is (PC-DARTS), then both, then what was found as it is.

    Where there is nothing to search for, the architecture stays as it is all the time.
    """
    # One text for all edges of several leaves their weights open.
    if not is_search(operators) and (nodes == 1 or "|" in operators):
        return ("1:weights+decoder",)
    return ("0.3:weights+decoder", "0.4:all", "0.3:weights+decoder")


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
    "ta_lora": Recipe(ta_lora),
    "lora_stl": Recipe(lora_stl),
    "lora_hps": Recipe(lora_hps),
}
