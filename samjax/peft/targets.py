"""Which layers a word such as q, mlp or decoder stands for, and the rules of the mask decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from samjax.peft.spec import Freeze, Rule, Train

Target = Literal[
    "qkv", "q", "k", "v", "proj", "attn", "mlp", "decoder", "conv", "neck", "transformer"
]
Decoder = Literal["all", "mask", "none"]


def decoder_rules(decoder: Decoder, *, dense: bool = False) -> tuple[Rule, ...]:
    """What trains of the mask decoder, or, in a model of `dense` tasks, of theirs and their rows.

    `mask` leaves out what the single mask does not need: the IoU head and the multi-mask outputs.
    Dense tasks never do.
    """
    if decoder == "none":
        return ()
    train = Train(group="decoder")
    if dense:
        # By name: a decoder with a semantic head has not got what the others leave out.
        parts = "iou_token,mask_tokens,transformer,output_upscaling_*,output_hypernetworks_mlps_0"
        decoders = f"mask_decoder_*/{{{parts},output_classifier}}/**"
        return Rule(decoders, train), Rule("no_mask_embed_*/*", train)
    unused = (
        Rule("mask_decoder/iou_prediction_head/**", Freeze()),
        Rule("mask_decoder/output_hypernetworks_mlps_{1,2,3}/**", Freeze()),
    )
    return (*(unused if decoder == "mask" else ()), Rule("mask_decoder/**", train))


def in_dense(rule: Rule) -> Rule:
    """A rule of SAM's in a model of dense tasks, which has a mask decoder for each."""
    head, slash, rest = rule.pattern.partition("/")
    if head != "mask_decoder":
        return rule
    return dataclasses.replace(rule, pattern=f"{head}_*{slash}{rest}")


def targets_of(sites: Iterable[str]) -> set[str]:
    """The targets that patterns of sites are of."""
    found: set[str] = set()
    for pattern in sites:
        path, _, segments = pattern.partition("[")
        module, _, layer = path.rpartition("/")
        name = "mlp" if module.endswith("mlp") else layer
        found |= set(segments.rstrip("]").split(",")) if segments else {name}
    return found


def check_targets(targets: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Raises ValueError for a target that there is not, or for none."""
    unknown = [name for name in targets if name not in known]
    if unknown or not targets:
        wrong = repr(unknown[0]) if unknown else "nothing"
        raise ValueError(f"targets must name some of {', '.join(known)}, not {wrong}")


def linear_rules(config: Any, targets: tuple[str, ...], conv: Any = None) -> tuple[Rule, ...]:
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
    check_targets(targets, ("qkv", "q", "k", "v", "proj", "mlp", "decoder", *convs))
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
    rules += [convolutions(conv)] if "conv" in targets else []
    return tuple(rules)


def convolutions(config: Any) -> Rule:
    """A method on the encoder's convolutions."""
    return Rule("image_encoder/**", config)
