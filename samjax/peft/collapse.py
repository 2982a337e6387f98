"""Folds what folds, and puts the rest in its smallest form: an adapter for the folded weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from samjax.flops import count_flops
from samjax.models.sam import Sam
from samjax.peft.delta import NotMergeable
from samjax.peft.resolve import resolve
from samjax.peft.spec import PeftSpec, Rule, pattern_of
from samjax.peft.trees import deltas, fold, shared_names


@dataclasses.dataclass(frozen=True)
class Folded:
    """What `collapse` gives."""

    params: Any  # with all that folds
    spec: PeftSpec  # of what stays; its rules are empty where all folds
    peft: Any  # what stays
    reasons: dict[str, str]  # by site, why it stays


def collapse(spec: PeftSpec, model: Sam, params: Any, peft: Any) -> Folded:
    """Weights and a smaller adapter that do what `params` and `peft`, made by `spec`, did.

    Raises NotMergeable where what stays needs a record that it shares with others.
    """
    merged, reasons = fold(model, params, peft)
    sites, records = resolve(spec, model).sites, deltas(peft)
    rules, rest = [], {}
    for path, reason in reasons.items():
        if shared_names(records[path]):
            raise NotMergeable(f"{path}: {reason}; and it needs what it shares with other sites")
        delta, settings = records[path].collapsed()
        _, rule, segments = sites[path]
        rules.append(Rule(pattern_of(path, segments), settings or rule.config))
        rest[*path.split("/"), "delta"] = delta
    return Folded(merged, PeftSpec(tuple(rules)), unflatten_dict(rest), reasons)


def encoding_flops(model: Sam, params: Any, peft: Any, folded: Folded) -> dict[str, float]:
    """FLOPs of encoding an image, as multiples of the plain model's: `adapted` and with the `rest`.

    Products and convolutions count, in the model's own dtype; nothing is computed.
    """
    frame = model.config.frame.shape
    image = jax.ShapeDtypeStruct((1, *frame, 3), jnp.uint8)

    def flops(variables: Any) -> int:
        def encode(variables: Any, image: Any) -> Any:
            return model.apply(variables, image, jnp.array([frame]), method="encode")

        return count_flops(encode, variables, image)

    plain = flops({"params": params})
    return {
        "adapted": flops({"params": params, "peft": peft}) / plain,
        "rest": flops({"params": folded.params, "peft": folded.peft}) / plain,
    }
