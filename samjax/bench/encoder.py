"""The image encoder: kinds of attention, dtypes and batch sizes side by side."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from samjax.bench import machine
from samjax.bench.cases import Case, case_rows, product_rates, time_cases
from samjax.bench.inputs import model_config, random_params
from samjax.bench.programs import Program, product_side
from samjax.bench.rounds import check_rounds
from samjax.models import Sam, VitConfig
from samjax.models.attention import AttentionKind
from samjax.models.flash import check_attention, computes


def measure(
    model_name: str,
    image_size: int | None,
    attention: Sequence[AttentionKind] | None,
    dtypes: Sequence[str],
    batch_sizes: Sequence[int],
    rounds: int,
    console: Console,
) -> dict[str, Any]:
    """Times each combination of `attention`, `dtypes` and `batch_sizes`.

    `attention` None is all kinds that the device computes. Raises ValueError for a model, a size or
    a setting that there is not.
    """
    config = model_config(model_name, image_size)
    check_rounds(rounds)
    check_batch_sizes(batch_sizes)
    has_kinds = isinstance(config.image_encoder, VitConfig)
    if attention is not None and not has_kinds:
        raise ValueError(f"{model_name} has one attention only: leave out attention")
    platform = jax.default_backend()
    for kind, dtype in itertools.product(attention or (), dtypes):
        check_attention(kind, dtype, platform)
    kinds = attention or (get_args(AttentionKind) if has_kinds else ("chunked",))
    load = machine.facts(console)
    variables = {"params": jax.device_put(random_params(Sam(config)))}

    def case(kind: Any, dtype: str, batch_size: int) -> Case:
        def encode(kind: Any) -> Any:
            model = Sam(config, attention=kind, dtype=jnp.dtype(dtype))
            return jax.jit(lambda v, x: model.apply(v, x, method="encode_normalized"))

        image = np.random.default_rng(0).normal(size=(batch_size, *config.frame.shape, 3))

        def make() -> Program:
            image_on_device = jax.device_put(image.astype(np.float32))
            return Program(encode(kind), variables, image_on_device, twin=encode("chunked"))

        settings = {"attention": kind if has_kinds else "windows", "dtype": dtype}
        return Case({**settings, "batch_size": batch_size}, batch_size, dtype, make)

    cases = [
        case(kind, dtype, batch_size)
        for kind, dtype, batch_size in itertools.product(kinds, dtypes, batch_sizes)
        if computes(kind, dtype, platform)
    ]
    side = product_side(max(config.frame.shape))
    return {
        **load,
        "model": model_name,
        "image_size": list(config.frame.shape),
        "rounds": rounds,
        "encoders": time_cases(cases, side, rounds, console),
    }


def check_batch_sizes(batch_sizes: Sequence[int]) -> None:
    """Raises ValueError where one is of no image."""
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_size must be at least 1, not {min(batch_sizes, default=0)}")


def caption(result: Mapping[str, Any]) -> str:
    """One sentence on what was measured, and where."""
    height, width = result["image_size"]
    return (
        f"{machine.described(result)}; image encoder of {result['model']} at {height} x {width} "
        f"px; {product_rates(result['encoders'])}; median of {result['rounds']} rounds at load "
        f"{result['load']:.1f}."
    )


def rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table, its head first."""
    titles = {"attention": "attention", "dtype": "dtype", "batch_size": "batch"}
    return case_rows(result["encoders"], titles)
