"""SAM ViT-B here and in other libraries, on this machine: its image encoder, and training steps.

Each library has a process of its own and the same random weights, and must compute the same. They
take turns (A B C D, A B C D, ...), so that whatever else the machine does falls on all of them;
ratios are medians of the ratios within a round.

    python experiments/bench_peers.py encoder --scenic scenic --rounds 7
    python experiments/bench_peers.py train --methods decoder lora
    python experiments/bench_peers.py train --methods lora:targets=qkv conv_lora:targets=qkv

Peers that are not there are left out, which is told. They are

    pip install torch segment-anything==1.0 transformers peft
    git clone --depth 1 https://github.com/google-research/scenic

Of training, `peft` is HuggingFace's `SamModel` with LoRA of its peft on the fused qkv of every
block, where samjax has q and v; its decoder-only step encodes under `torch.no_grad`, as one would
write it. `dispatch` is the same model with Conv-LoRA written as its authors dispatch it, and with
LoRA in the same way. The mask decoder trains beside every method.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from bench_cli import Size, restrict_cores, run  # pyrefly: ignore[missing-import]
from bench_models import Setup, method_name  # pyrefly: ignore[missing-import]
from bench_worker import Worker, started  # pyrefly: ignore[missing-import]
from rich.console import Console
from safetensors.numpy import save_file

from samjax.bench import machine
from samjax.bench.inputs import random_params
from samjax.bench.rounds import ratios, take_turns
from samjax.bench.steps import training_config
from samjax.bench.tables import markdown, size, spread
from samjax.models import Sam
from weights_convert import from_params

# Who makes a peer's model, and what it is made of.
ENCODERS = {
    "samjax": "bench_jax.samjax_encoder",
    "segment-anything": "bench_torch.original_encoder",
    "transformers": "bench_torch.huggingface_encoder",
    "scenic": "bench_jax.scenic_encoder",
}
TRAINING = {
    "samjax": "bench_jax.samjax_training",
    "peft": "bench_torch.peft_training",
    "dispatch": "bench_torch.dispatch_training",
}
# The methods that peers have.
METHODS = {"peft": ("decoder", "lora"), "dispatch": ("lora", "conv_lora")}
PACKAGES = {
    "segment-anything": {"segment_anything": "segment-anything==1.0"},
    "transformers": {"transformers": "transformers"},
    "peft": {"transformers": "transformers", "peft": "peft"},
    "dispatch": {"transformers": "transformers"},
}
SCENIC_FILE = "scenic/projects/baselines/segment_anything/modeling/image_encoder.py"
# The largest difference from what samjax computes, of embeddings in standard deviations, of losses
# as a share: float32 on a CPU, float32 on a GPU, which rounds what it multiplies, and bfloat16.
BOUNDS = {("float32", "cpu"): 1e-3, ("float32", "gpu"): 5e-2}
BOUND_BFLOAT16 = 0.5


@dataclasses.dataclass(frozen=True)
class Peers(Size):
    """What both comparisons with peers have in common."""

    builders: ClassVar[dict[str, str]]

    device: Literal["cpu", "gpu"] = "cpu"
    """Where all of them compute."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """In which dtype."""
    batch_size: int = 1
    """Images a call."""


@dataclasses.dataclass(frozen=True)
class Encoder(Peers):
    """Times SAM ViT-B's image encoder here and in other libraries.

    Example: python experiments/bench_peers.py encoder --scenic scenic --rounds 7
    """

    builders: ClassVar[dict[str, str]] = ENCODERS

    peers: tuple[Literal["segment-anything", "transformers", "scenic"], ...] | None = None
    """Which to compare with; left out, all that are there. `--peers` alone: none."""
    scenic: Path | None = None
    """A checkout of google-research/scenic, which is no package."""
    compile: bool = False
    """Let torch.compile compile the encoders in torch."""

    def calls(self, peer: str) -> dict[str, int | None]:
        """What a round asks of a worker."""
        return dict.fromkeys(("encode", "decode", "product"))

    def checked(self, facts: Any, workers: list[Worker], setups: Mapping[str, Setup]) -> Any:
        """By how much each embedding differs from samjax's, in standard deviations."""
        for worker in workers:
            worker.ask("save")
        ours, *_ = found = [np.load(setup.embedding) for setup in setups.values()]
        differences = {
            name: float(np.abs(theirs - ours).max() / ours.std())
            for name, theirs in zip(setups, found, strict=True)
        }
        return {name: {"encode": difference} for name, difference in differences.items()}


@dataclasses.dataclass(frozen=True)
class Train(Peers):
    """Times training steps of SAM ViT-B here and in HuggingFace's model.

    Example: python experiments/bench_peers.py train --methods decoder lora
    """

    builders: ClassVar[dict[str, str]] = TRAINING

    peers: tuple[Literal["peft", "dispatch"], ...] | None = None
    """Which to compare with; left out, all that are there and have a method of these. `--peers`
    alone: none."""
    methods: tuple[str, ...] = ("decoder", "lora")
    """Methods with settings as for `samjax compare`; in each library they are compared with the
    first that it has. Peers have the ranks and no other setting."""
    scenic: ClassVar[Path | None] = None
    compile: ClassVar[bool] = False

    def calls(self, peer: str) -> dict[str, int | None]:
        """The methods that a library has, with their ranks."""
        ranks = {text: training_config(text, 1).method.resolved() for text in self.methods}
        return {
            text: settings.get("rank")
            for text, settings in ranks.items()
            if method_name(text) in METHODS.get(peer, (method_name(text),))
        }

    def checked(self, facts: Mapping[str, Any], workers: Any, setups: Any) -> Any:
        """By which share the loss of each first step differs from samjax's."""
        ours = facts["samjax"]["losses"]
        return {
            name: {text: abs(loss / ours[text] - 1) for text, loss in fact["losses"].items()}
            for name, fact in facts.items()
        }


def bench(args: Any, console: Console) -> dict[str, Any]:
    """The whole comparison, as a JSON-able dict."""
    config = args.config()
    if args.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {args.batch_size}")
    cores = restrict_cores(args.cores)
    calls = {name: args.calls(name) for name in ("samjax", *present(args, console))}
    load = machine.machine_load(console)
    with tempfile.TemporaryDirectory(prefix="samjax-bench-") as folder:
        setup = Setup(
            config=config.to_json(),
            weights=f"{folder}/weights.safetensors",
            cores=cores,
            device=args.device,
            dtype=args.dtype,
            batch_size=args.batch_size,
            compiled=args.compile,
            product=min(4 * args.image_size, 4096 if args.device == "cpu" else 8192),
            scenic=None if args.scenic is None else str(args.scenic),
        )
        save_file(from_params(random_params(Sam(config)), config), setup.weights)
        setups = {
            name: dataclasses.replace(setup, embedding=f"{folder}/{name}.npy", methods=of)
            for name, of in calls.items()
        }
        with started(setups, args.builders, console) as workers:
            facts = {worker.name: worker.facts for worker in workers}
            differences = args.checked(facts, workers, setups)
            check_same(differences, args.dtype, args.device)
            memory = {
                (worker.name, call): worker.ask(f"memory {call}")["peak_bytes"]
                for worker in workers
                for call in calls[worker.name]
            }
            turns = {
                (worker.name, call): lambda worker=worker, call=call: worker.ask(call)["seconds"]
                for worker in workers
                for call in calls[worker.name]
            }
            seconds = take_turns(turns, args.rounds, console)
    rows = []
    for (name, call), taken in seconds.items():
        first = next(iter(calls[name]))
        row = {
            "library": name,
            "call": call,
            "with": ", ".join(filter(None, (facts[name]["library"], facts[name].get("attention")))),
            "seconds": float(np.median(taken)),
            "all_seconds": taken,
            # How many times as long as samjax's; and how often while the library's first goes by.
            "times_samjax": ratios(taken, seconds["samjax", call])["ratio"],
            "within": ratios(seconds[name, first], taken),
            "peak_bytes": memory[name, call],
            "difference": differences[name].get(call),
        }
        rows.append(row)
    return {
        "device": args.device,
        "cpu": machine.cpu_name(),
        "cores": cores,
        "load": load,
        "image_size": args.image_size,
        "depth": args.depth,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "facts": facts,
        "product_side": setup.product,
        "rows": rows,
    }


def present(args: Any, console: Console) -> list[str]:
    """The peers to compare with; what is missing is told, or, if it was asked for, an error."""
    known = [name for name in args.builders if name != "samjax"]
    fixes = {name: _missing(args, name) for name in known}
    if args.scenic is not None and not (args.scenic / SCENIC_FILE).is_file():
        raise FileNotFoundError(
            f"{args.scenic} is no checkout of google-research/scenic: it has no {SCENIC_FILE}"
        )
    for name in known if args.peers is None else args.peers:
        if fixes[name] is not None:
            sentence = f"{name} is left out; to compare with it: {fixes[name]}"
            if args.peers is not None:
                raise ValueError(sentence)
            console.print(sentence)
    wanted = known if args.peers is None else args.peers
    return [name for name in wanted if fixes[name] is None]


def _missing(args: Any, name: str) -> str | None:
    """What to do to have a peer; None where it is there."""
    if not args.calls(name):
        return f"pass one of its methods, {' or '.join(METHODS[name])}"
    if name == "scenic":
        clone = "git clone --depth 1 https://github.com/google-research/scenic, then"
        return f"{clone} --scenic scenic" if args.scenic is None else None
    packages = {"torch": "torch", **PACKAGES[name]}
    if all(importlib.util.find_spec(module) for module in packages):
        return None
    return f"pip install {' '.join(packages.values())}"


def check_same(differences: Mapping[str, Mapping[str, float]], dtype: str, device: str) -> None:
    """Raises RuntimeError where a library does not compute what samjax does."""
    bound = BOUNDS.get((dtype, device), BOUND_BFLOAT16)
    for name, found in differences.items():
        for call, difference in found.items():
            if not difference <= bound:
                raise RuntimeError(
                    f"{name} does not compute what samjax does: {call} differs by "
                    f"{difference:.1e}, more than {bound:.0e}"
                )


def encoder_table(result: dict[str, Any]) -> str:
    """The comparison of encoders as Markdown."""
    found = {(row["library"], row["call"]): row for row in result["rows"]}
    libraries = [name for name, call in found if call == "encode"]
    flops, side = result["facts"]["samjax"]["flops"], result["product_side"]
    # The machine's rate is what the better of the libraries gets out of it.
    rate = max(2 * side**3 / found[name, "product"]["seconds"] for name in libraries)
    head = (
        f"{described(result)}, {flops / 1e9:.0f} GFLOP of matrix products; a product of side "
        f"{side} runs at {rate / 1e9:.0f} GFLOP/s; median of {result['rounds']} rounds at load "
        f"{result['load']:.1f}."
    )
    names = ("encoder", "with", "seconds", "samjax's = 1", "of the product's rate", "memory")
    rows = [(*names, "one box")]
    for name in libraries:
        row = found[name, "encode"]
        rows.append(
            (
                name,
                row["with"],
                f"{row['seconds']:.3g}",
                f"{row['times_samjax']:.2f}",
                f"{flops / row['seconds'] / rate:.0%}",
                size(row["peak_bytes"]),
                f"{found[name, 'decode']['seconds']:.3g} s",
            )
        )
    return f"{head}\n\n{markdown(rows)}"


def train_table(result: dict[str, Any]) -> str:
    """The comparison of training steps as Markdown."""
    head = f"{described(result)}; median of {result['rounds']} rounds at load {result['load']:.1f}."
    names = ("library", "method", "with", "s/step", "samjax's = 1", "speed, first = 1", "rounds")
    rows = [(*names, "memory")]
    for row in result["rows"]:
        rows.append(
            (
                row["library"],
                row["call"],
                row["with"],
                f"{row['seconds']:.3g}",
                f"{row['times_samjax']:.2f}",
                f"{row['within']['ratio']:.3f}",
                spread(row["within"]["ratio_range"]),
                size(row["peak_bytes"]),
            )
        )
    return f"{head}\n\n{markdown(rows)}"


def described(result: dict[str, Any]) -> str:
    """Machine, model and inputs."""
    place = "GPU" if result["device"] == "gpu" else result["cpu"]
    return (
        f"{place}, {result['cores']} cores; ViT-B of {result['depth']} blocks at "
        f"{result['image_size']} px, {result['dtype']}, batch {result['batch_size']}"
    )


def main(argv: list[str]) -> int:
    """Chooses the comparison and runs it; returns the exit code."""
    kinds = {"encoder": (Encoder, encoder_table), "train": (Train, train_table)}
    what, rest = (argv[0], argv[1:]) if argv else ("", [])
    if what in ("-h", "--help"):
        sys.stdout.write(f"{__doc__}\n`bench_peers.py encoder --help` lists options.\n")
        return 0
    if what not in kinds:
        nearest = difflib.get_close_matches(what, kinds, n=1, cutoff=0.0)[0]
        sys.stderr.write(f"bench_peers.py has no {what!r}; the nearest is {nearest}\n")
        return 1
    cls, table = kinds[what]
    return run(cls, rest, f"bench_peers.py {what}", bench, table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
