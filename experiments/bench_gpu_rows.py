"""What the processes of `bench_gpu.py` do: one library, one task, the GPU for itself.

Each yields `{"facts": ...}` of the library, `{"row": ...}` for what was measured, and
`{"note": ...}` for what was left out.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

from bench_models import random_image, versions  # pyrefly: ignore[missing-import]

from samjax.models import MODELS, Sam, SamConfig, VitConfig

Found = dict[str, Any]
RANK = 4
# A row is timed for about so long, in so many calls at least and at most.
SECONDS, LEAST, MOST = 1.0, 3, 30


def rows(part: str, args: argparse.Namespace) -> Iterator[Found]:
    """What a part LIBRARY:TASK finds."""
    parts = {
        "samjax:encoder": samjax_encoder,
        "samjax:train": samjax_train,
        "torch:encoder": torch_encoder,
        "torch:train": torch_train,
    }
    yield from parts[part](args)


def config_of(args: argparse.Namespace) -> SamConfig:
    """ViT-B at 1024 px, or something tiny."""
    if not args.tiny:
        return MODELS["vit_b"]
    vit = VitConfig(embed_dim=64, depth=2, num_heads=2, global_attn_indexes=(1,), pretrain_grid=4)
    return SamConfig(image_encoder=vit, image_size=64)


def timed(run: Callable[[], Any]) -> float:
    """The median seconds of a call that returns when its result is there."""
    for _ in range(2):
        run()
    taken: list[float] = []
    while len(taken) < LEAST or (sum(taken) < SECONDS and len(taken) < MOST):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _row(
    library: str, with_: str, task: str, method: str | None, batch_size: int, seconds: float
) -> Found:
    return {
        "library": library,
        "with": with_,
        "task": task,
        "method": method,
        "batch_size": batch_size,
        "images_per_second": batch_size / seconds,
        "seconds": seconds,
    }


def _jax_facts(args: argparse.Namespace) -> Found:
    """The device, and the rate of a large product."""
    from samjax.bench import machine
    from samjax.bench.programs import product

    side = 256 if args.tiny else 8192
    rate = 2 * side**3 / timed(product(side, "bfloat16").run)
    facts = {"device": machine.device_name(), "jax": versions("jax", "flax")}
    return {"facts": {**facts, "product_flop_per_second": rate}}


def _counts(program: Any, needed_flops: int) -> Found:
    """What is known of a compiled program; memory is all that it needs, weights too."""
    return {
        "flops": program.flops,
        "needed_flops": needed_flops,
        "memory_bytes": program.bytes,
        "temporary_bytes": program.temporary_bytes,
        "compile_seconds": program.compile_seconds,
    }


def samjax_encoder(args: argparse.Namespace) -> Iterator[Found]:
    """Each kind of attention at each batch size."""
    import jax
    import jax.numpy as jnp

    from samjax.bench.inputs import random_params
    from samjax.bench.programs import DoesNotFit, Program
    from samjax.models.attention import AttentionKind
    from samjax.models.flash import computes

    yield _jax_facts(args)
    config = config_of(args)
    variables = {"params": jax.device_put(random_params(Sam(config)))}

    def encode(kind: Any) -> Any:
        model = Sam(config, attention=kind, dtype=jnp.bfloat16)
        return jax.jit(lambda v, x: model.apply(v, x, method="encode_normalized"))

    for batch_size in args.batches:
        image = jax.device_put(random_image(config, batch_size))
        for kind in get_args(AttentionKind):
            if not computes(kind, "bfloat16", jax.default_backend()):
                continue
            try:
                program = Program(encode(kind), variables, image, twin=encode("chunked"))
                row = _row("samjax", kind, "encoder", None, batch_size, timed(program.run))
            except DoesNotFit as error:
                yield {"note": f"samjax's encoder, {kind}, batch {batch_size}: {error}"}
                continue
            yield {"row": {**row, **_counts(program, program.flops)}}


def training_step(model: Sam, method: str, params: Any, batch_size: int) -> Any:
    """The compiled step of a method, in which all that it has trains at once."""
    import jax
    import jax.numpy as jnp

    from samjax import peft
    from samjax.bench.inputs import random_batch
    from samjax.bench.programs import Step
    from samjax.peft import MethodConfig
    from samjax.training.step import (
        OptimizerConfig,
        init_state,
        make_optimizer,
        make_train_step,
        trained_labels,
    )

    settings = MethodConfig(method)
    spec = settings.spec()
    base = peft.start(spec, model, params, jax.random.key(0))
    train, frozen = peft.partition(base, peft.trainable(spec, model, base))
    labels = trained_labels(peft.groups(spec, model, base))
    optimizer = make_optimizer(OptimizerConfig(), 1000, labels, settings.learning_rate)
    # Copied, since the step gives its state away and the weights must survive it.
    state = init_state(jax.tree.map(jnp.copy, train), optimizer)
    batch = jax.device_put(random_batch(model.config, batch_size))
    step = make_train_step(model, optimizer, labels=labels)
    # Dense attention keeps what chunks compute again: nothing is counted twice.
    twin = make_train_step(model.clone(attention="dense"), optimizer, labels=labels)
    return Step(step, twin, state, frozen, batch)


def samjax_train(args: argparse.Namespace) -> Iterator[Found]:
    """Each method at each batch size, and at the largest that fits by what the smaller need.

    The methods' programs of one batch size are compiled at once: a GPU's compiler has one core.
    """
    import jax
    import jax.numpy as jnp

    from samjax.bench.inputs import random_params
    from samjax.bench.programs import DoesNotFit
    from samjax.models.flash import check_attention
    from samjax.training.memory import available_bytes

    config = config_of(args)
    check_attention(args.attention, "bfloat16", jax.default_backend())
    model = Sam(config, attention=args.attention, dtype=jnp.bfloat16)
    params = jax.device_put(random_params(model))
    known: dict[str, dict[int, int]] = {method: {} for method in args.methods}

    def made(method: str, batch_size: int) -> Any:
        try:
            return training_step(model, method, params, batch_size)
        except (DoesNotFit, ValueError) as error:
            return error

    def measured(sizes: dict[str, int]) -> Iterator[Found]:
        with ThreadPoolExecutor(4) as threads:
            steps = dict(zip(sizes, threads.map(made, sizes, sizes.values()), strict=True))
        for method, size in sizes.items():
            step = steps.pop(method)
            try:
                if isinstance(step, Exception):
                    raise step
                row = _row("samjax", model.attention, "train", method, size, timed(step.run))
            except (RuntimeError, ValueError) as error:
                yield {"note": f"samjax's {method}, batch {size}: {error}"}
                continue
            known[method][size] = step.program.bytes or 0
            yield {"row": {**row, **_counts(step.program, step.needed_flops)}}
            del step
            gc.collect()

    for batch_size in args.batches:
        yield from measured(dict.fromkeys(args.methods, batch_size))
    has = available_bytes(jax.devices()[0])
    for share in (0.97, 0.85):  # the second where the first does not fit
        largest = {
            method: size
            for method, needs in known.items()
            if (size := largest_batch(needs, has, share, args.most)) > max(needs, default=0)
            and max(needs) in args.batches
        }
        if largest:
            yield from measured(largest)


def largest_batch(needs: dict[int, int], has: int | None, share: float, most: int) -> int:
    """The batch that fills a share of the memory, if need grows in a line; 0 where none is known.

    `needs` are bytes by batch size.
    """
    if len(needs) < 2 or not has:
        return 0
    (first, low), *_, (last, high) = sorted(needs.items())
    per_image = (high - low) / (last - first)
    if per_image <= 0:
        return most
    size = int(first + (has * share - low) / per_image)
    return min(most, size // 8 * 8 if size >= 16 else size)


def _place(args: argparse.Namespace) -> Any:
    import os

    from bench_torch import Place  # pyrefly: ignore[missing-import]

    return Place("cpu" if args.tiny else "gpu", "bfloat16", os.cpu_count() or 1)


def _torch_facts(place: Any, args: argparse.Namespace) -> Found:
    import torch

    side = 256 if args.tiny else 8192
    factor = torch.randn(side, side).to(place.device, place.dtype)
    rate = 2 * side**3 / timed(place.finished(lambda: factor @ factor))
    on_gpu = place.device == "cuda"
    facts = {"device": torch.cuda.get_device_name()} if on_gpu else {}
    return {"facts": {**facts, "torch": torch.__version__, "product_flop_per_second": rate}}


def _of_torch(
    what: tuple[str, str, str, str | None, int], make: Callable[[], Callable[[], Any]], place: Any
) -> Found:
    """A row of torch's, or a note of why there is none."""
    import torch

    on_gpu = place.device == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    torch.compiler.reset()
    try:
        start = time.perf_counter()
        run = make()
        run()
        first = time.perf_counter() - start
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        row = _row(*what, timed(run))
        memory = torch.cuda.max_memory_allocated() if on_gpu else None
        return {"row": {**row, "memory_bytes": memory, "first_call_seconds": first}}
    except torch.OutOfMemoryError:
        return {"note": f"{' '.join(map(str, what))}: does not fit into memory"}
    except Exception as error:  # a compiler's, a missing package's: the others go on
        said = str(error).strip().splitlines() or [""]
        return {"note": f"{' '.join(map(str, what))}: {type(error).__name__}: {said[0]}"}


def _tensors(config: SamConfig) -> Any:
    """Random weights with Meta's names."""
    from samjax.bench.inputs import random_params
    from weights_convert import from_params

    return from_params(random_params(Sam(config)), config)


def torch_encoder(args: argparse.Namespace) -> Iterator[Found]:
    """The original's and HuggingFace's encoder, eager and compiled."""
    from bench_torch import (  # pyrefly: ignore[missing-import]
        load_huggingface,
        load_original,
        pixels_of,
    )

    config, place = config_of(args), _place(args)
    yield _torch_facts(place, args)
    tensors, encoders = _tensors(config), {}
    for name, load in (
        ("segment-anything", lambda: load_original(config, tensors).image_encoder),
        ("transformers", lambda: load_huggingface(config, tensors).vision_encoder),
    ):
        try:
            encoders[name] = load().to(place.device, place.dtype)
        except ImportError as error:
            yield {"note": f"{name} is left out: {error}"}
    for compiled in (False, True):
        for batch_size in args.batches:
            pixels = pixels_of(config, place, batch_size)
            for name, encoder in encoders.items():
                with_ = "compiled" if compiled else "eager"
                make = functools.partial(_encoder_call, encoder, pixels, place, compiled)
                yield _of_torch((name, with_, "encoder", None, batch_size), make, place)


def _encoder_call(encoder: Any, pixels: Any, place: Any, compiled: bool) -> Callable[[], Any]:
    import torch

    call = torch.compile(encoder, dynamic=False) if compiled else encoder
    return place.finished(torch.inference_mode()(lambda: call(pixels)))


def torch_train(args: argparse.Namespace) -> Iterator[Found]:
    """HuggingFace's model: LoRA of peft and the decoder alone, then LoRA compiled."""
    from bench_torch import Training  # pyrefly: ignore[missing-import]

    config, place = config_of(args), _place(args)
    yield _torch_facts(place, args)
    tensors = _tensors(config)

    def row(method: str, compiled: bool, batch_size: int) -> Found:
        def make() -> Callable[[], Any]:
            training = Training(config, tensors, place, batch_size)
            return training.lora(RANK, compiled) if method == "lora" else training.decoder()

        with_ = "peft, compiled" if compiled else "peft" if method == "lora" else "eager"
        return _of_torch(("transformers", with_, "train", method, batch_size), make, place)

    sizes = [*args.batches]
    while sizes[-1] * 2 <= args.most:
        sizes.append(sizes[-1] * 2)
    fit = [name for name in ("lora", "decoder") if name in args.methods]
    for batch_size in sizes:
        for name in list(fit):
            found = row(name, False, batch_size)
            yield found
            if "note" in found:  # a larger batch would not fit either
                fit.remove(name)
    if "lora" in args.methods:
        for batch_size in args.batches:
            yield row("lora", True, batch_size)
