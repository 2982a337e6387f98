"""What a searchable cell costs in training: NAS-LoRA, NAS-PC-LoRA and Conv-LoRA beside LoRA.

SAM ViT-B, float32, batch 1, on CPU, rank 4 on the fused qkv of every block, the mask decoder
trained beside it. The steps of NAS-LoRA are those of the stage in which all of it trains. Beside
samjax's Conv-LoRA, whose shapes do not depend on its gate, stands one in torch as its authors
dispatch it: each expert gets the maps that chose it. It is compared with LoRA in torch, in the same
model. All take turns, and ratios are medians of the ratios within a round.

    pip install -e . torch transformers
    python experiments/bench_nas_lora.py
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import tempfile
import types
from collections.abc import Callable
from typing import Any

import numpy as np
from bench_encoder import (  # pyrefly: ignore[missing-import]
    Size,
    random_weights,
    restrict_cores,
    run,
    started,
)
from bench_methods import TorchTraining  # pyrefly: ignore[missing-import]
from bench_models import Setup, versions  # pyrefly: ignore[missing-import]
from rich.console import Console
from safetensors.numpy import save_file

from samjax.bench import (
    compiled_steps,
    cpu_name,
    machine_load,
    markdown,
    ratios,
    take_turns,
    training_config,
)
from samjax.terminal import error_console
from samjax.training.memory import gigabytes

RANK = 4
# Of each library; the first is what the others are compared with.
METHODS = {
    "samjax": ("lora", "nas_lora", "nas_pc_lora", "conv_lora"),
    "torch": ("lora", "conv_lora"),
}


@dataclasses.dataclass(frozen=True)
class Bench(Size):
    """Times training steps of SAM ViT-B with LoRA, NAS-LoRA, NAS-PC-LoRA and Conv-LoRA.

    Example: python experiments/bench_nas_lora.py --rounds 7
    """


def build_samjax(setup: Setup) -> Any:
    """This library's steps, as `samjax bench methods` times them."""
    from samjax.models import Sam
    from weights_convert import to_params

    config, tensors, _ = setup.load()
    names = METHODS["samjax"]
    configs = {name: training_config(f"{name}:rank={RANK},targets=qkv", 1) for name in names}
    steps = compiled_steps(Sam(config), configs, error_console(), to_params(tensors, config))
    counts = {
        name: {"flops": step.flops, "bytes": step.temporary_bytes} for name, step in steps.items()
    }
    facts = {"library": versions("jax"), "counts": counts}
    return types.SimpleNamespace(facts=facts, **{name: step.run for name, step in steps.items()})


def build_torch(setup: Setup) -> Any:
    """HuggingFace's `SamModel` with LoRA, and with Conv-LoRA that dispatches."""
    training = TorchTraining(setup)
    steps = {}
    for name in METHODS["torch"]:
        model = training.load()
        adapters = []
        for block in model.vision_encoder.layers:
            block.attn.qkv = _adapted(block.attn.qkv, experts=8 if name == "conv_lora" else 0)
            adapters.append(block.attn.qkv)

        def balance(adapters: list[Any] = adapters) -> Any:
            return sum(adapter.loss for adapter in adapters)

        steps[name] = training.stepper(model, training.whole, balance)
    return types.SimpleNamespace(facts={"library": versions("transformers", "torch")}, **steps)


def _adapted(layer: Any, experts: int) -> Any:
    """A linear layer with LoRA, or with Conv-LoRA of so many experts (docs/methods.md)."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer
            self.a = nn.Parameter(torch.randn(layer.in_features, RANK) / layer.in_features**0.5)
            self.b = nn.Parameter(torch.zeros(RANK, layer.out_features))
            self.convs = nn.ModuleList(nn.Conv2d(RANK, RANK, 3, padding=1) for _ in range(experts))
            self.gate = nn.Parameter(torch.zeros(RANK, experts))
            self.noise = nn.Parameter(torch.zeros(RANK, experts))
            self.loss: Any = 0.0

        def forward(self, x: Any) -> Any:
            z = x @ self.a
            if experts:
                z = z + self.mixture(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return self.layer(x) + z @ self.b

        def mixture(self, maps: Any) -> Any:
            means = maps.mean((2, 3))
            clean, deviation = means @ self.gate, functional.softplus(means @ self.noise) + 1e-2
            noisy = clean + deviation * torch.randn_like(clean)
            best = noisy.topk(2, 1)
            chosen = best.indices[:, 0]
            # The probability that each expert is chosen, were its noise drawn anew.
            others = torch.where(
                noisy >= best.values[:, :1], best.values[:, 1:], best.values[:, :1]
            )
            load = torch.distributions.Normal(0.0, 1.0).cdf((clean - others) / deviation).sum(0)
            importance = functional.one_hot(chosen, experts).float().sum(0)
            self.loss = 1e-2 * (_variation(importance) + _variation(load))
            out = torch.zeros_like(maps)
            for i, conv in enumerate(self.convs):
                mine = torch.nonzero(chosen == i)[:, 0]
                if len(mine):
                    out = out.index_copy(0, mine, self.expert(conv, i + 1, maps[mine]))
            return out

        def expert(self, conv: Any, times: int, maps: Any) -> Any:
            size = maps.shape[2:]
            if times > 1:
                maps = functional.interpolate(maps, scale_factor=times, mode="bicubic")
            maps = functional.gelu(conv(maps))
            return functional.interpolate(maps, size, mode="bicubic") if times > 1 else maps

    return Adapted()


def _variation(x: Any) -> Any:
    return x.var() / (x.mean() ** 2 + 1e-10)


BUILDERS: dict[str, Callable[[Setup], Any]] = {"samjax": build_samjax, "torch": build_torch}


def bench(args: Bench, console: Console) -> dict[str, Any]:
    """The whole comparison, as a JSON-able dict."""
    needs = ("torch", "transformers")
    if missing := [name for name in needs if importlib.util.find_spec(name) is None]:
        raise ValueError(f"to compare with dispatch in torch: pip install {' '.join(missing)}")
    config, cores = args.config(), restrict_cores(args.cores)
    load = machine_load(console)
    with tempfile.TemporaryDirectory(prefix="samjax-bench-") as folder:
        setup = Setup(config.to_json(), f"{folder}/weights.safetensors", cores)
        save_file(random_weights(config), setup.weights)
        with started(dict.fromkeys(BUILDERS, setup), "bench_nas_lora", console) as workers:
            facts = {worker.name: worker.facts for worker in workers}
            calls = {
                (worker.name, name): lambda worker=worker, name=name: worker.ask(name)["seconds"]
                for worker in workers
                for name in METHODS[worker.name]
            }
            taken = take_turns(calls, args.rounds, console)
    rows = [
        {
            "library": library,
            "method": name,
            "seconds": taken[library, name],
            # How many times as long as LoRA.
            **ratios(taken[library, name], taken[library, METHODS[library][0]]),
            **facts[library].get("counts", {}).get(name, {}),
        }
        for library, name in taken
    ]
    return {
        "cpu": cpu_name(),
        "cores": cores,
        "load": load,
        "image_size": args.image_size,
        "depth": args.depth,
        "rounds": args.rounds,
        "libraries": {name: fact["library"] for name, fact in facts.items()},
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    libraries = "; ".join(f"{name}: {said}" for name, said in result["libraries"].items())
    head = (
        f"{result['cpu']}, {result['cores']} cores; ViT-B of {result['depth']} blocks at "
        f"{result['image_size']} px, float32, batch 1, rank {RANK}; median of {result['rounds']} "
        f"rounds at load {result['load']:.1f}; {libraries}."
    )
    lora = next(row for row in result["rows"] if row["library"] == "samjax")
    rows = [("library", "method", "s/step", "LoRA = 1", "rounds", "FLOPs", "temporary memory")]
    for row in result["rows"]:
        least, most = row["ratio_range"]
        has = row.get("flops") is not None
        rows.append(
            (
                row["library"],
                row["method"],
                f"{np.median(row['seconds']):.3g}",
                f"{row['ratio']:.3f}",
                f"{least:.3f} to {most:.3f}",
                f"{row['flops'] / lora['flops']:.4f}" if has else "-",
                gigabytes(row["bytes"]) if has and row["bytes"] is not None else "-",
            )
        )
    return f"{head}\n\n{markdown(rows)}"


if __name__ == "__main__":
    sys.exit(run(Bench, "bench_nas_lora.py", bench, table))
