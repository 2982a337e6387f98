"""A method and its settings, as the command line and experiments take them."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any, Literal, get_args

from samjax.peft.architecture import read_architecture
from samjax.peft.edges import parse_sites
from samjax.peft.recipes import RECIPES
from samjax.peft.spec import PeftSpec
from samjax.peft.targets import Decoder, Target, decoder_rules, in_dense, targets_of


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
    # Task modes of a tensor that tasks share (ta_lora).
    rank_task: int | None = None
    # Weight of the loss that keeps a tensor's factors orthogonal (ta_lora).
    orthogonality: float | None = None
    # The encoder's first block that is adapted: what comes before is computed once for all tasks.
    first_block: int | None = None
    # Whether the encoder's norms train beside the adapter (methods of dense tasks).
    norms: bool | None = None
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
    decoder: Decoder = "all"

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
        if self.decoder not in get_args(Decoder):
            known = ", ".join(get_args(Decoder))
            raise ValueError(f"decoder must be one of {known}, not {self.decoder!r}")
        known = RECIPES[self.method].settings
        for name in self._given():
            if name not in known:
                has = f"has {', '.join(known)}" if known else "has no settings"
                raise ValueError(f"method {self.method!r} has no setting {name}: it {has}")
        sites = parse_sites(self.operators or "")
        if sites and self.targets is not None and set(self.targets) != targets_of(sites):
            named = ", ".join(sorted(targets_of(sites)))
            raise ValueError(
                f"operators names layers of {named}, and targets is {', '.join(self.targets)}; "
                "leave out targets"
            )
        self.spec(tasks=1 if RECIPES[self.method].dense else 0)

    def _given(self) -> dict[str, Any]:
        """The settings that are not left out."""
        settings = (f.name for f in dataclasses.fields(self) if f.name not in ("method", "decoder"))
        return {name: value for name in settings if (value := getattr(self, name)) is not None}

    def spec(self, tasks: int = 0) -> PeftSpec:
        """The rules, in SAM or, with `tasks`, in a model of so many dense tasks.

        Raises ValueError for a setting out of range, and for a method that needs dense tasks.
        """
        recipe, settings = RECIPES[self.method], self._given()
        if recipe.dense:
            if not tasks:
                raise ValueError(
                    f"method {self.method!r} is for dense tasks: name them, such as --tasks nyuv2"
                )
            settings["tasks"] = tasks
        rules = recipe.rules(**settings)
        if tasks:
            rules = tuple(map(in_dense, rules))
        rules += decoder_rules(self.decoder, dense=tasks > 0)
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
