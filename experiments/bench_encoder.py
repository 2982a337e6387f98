"""SAM ViT-B's image encoder against its peers: seconds, memory, and the machine's own rate.

Float32, batch 1, on CPU. Each library has a process of its own and the same random weights, and
must give the same embedding. They take turns (A B C D, A B C D, ...), so that whatever else the
machine does falls on all of them; ratios are medians of the ratios within a round.

    python experiments/bench_encoder.py --scenic scenic --rounds 7

The peers are those of `segment-anything`, `transformers` and scenic that are there:

    pip install -e . torch segment-anything==1.0 transformers
    git clone --depth 1 https://github.com/google-research/scenic
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from bench_models import SCENIC_MODELING, Setup  # pyrefly: ignore[missing-import]
from bench_worker import Worker  # pyrefly: ignore[missing-import]
from rich.console import Console
from safetensors.numpy import save_file

from samjax.arguments import parse
from samjax.bench import cpu_name, machine_load, markdown, take_turns
from samjax.models import Sam, SamConfig, VitConfig
from samjax.terminal import error_console
from weights_convert import from_params

Peer = Literal["segment-anything", "transformers", "scenic"]
# What a round asks of each worker.
TASKS = ("encode", "decode", "product")
# Embeddings differ from samjax's by at most this many of its standard deviations.
BOUND = 1e-3


@dataclasses.dataclass(frozen=True)
class Size:
    """What all comparisons of ViT-B have in common."""

    rounds: int = 5
    """How often each is timed, after one round to warm up; medians are reported."""
    image_size: int = 1024
    """Side of the input in pixels; smaller ones are for a quick try."""
    depth: int = 12
    """Blocks of the encoder; fewer are for a quick try."""
    cores: int | None = None
    """CPU cores for each; left out, all that this process may use."""
    json: bool = False
    """Print one JSON object in place of the table, on one line, last on stdout."""

    def config(self) -> SamConfig:
        """ViT-B at this size and depth. Raises ValueError where there is none."""
        if self.rounds < 1 or self.depth < 1:
            raise ValueError("--rounds and --depth are 1 or more")
        globals_ = tuple(i for i in VitConfig().global_attn_indexes if i < self.depth)
        vit = VitConfig(
            depth=self.depth,
            global_attn_indexes=globals_,
            pretrain_grid=self.image_size // VitConfig().patch_size,
        )
        return SamConfig(image_encoder=vit).with_image_size(self.image_size)


@dataclasses.dataclass(frozen=True)
class Bench(Size):
    """Times SAM ViT-B's image encoder here and in other libraries; float32, batch 1, on CPU.

    Example: python experiments/bench_encoder.py --scenic scenic --rounds 7
    """

    peers: tuple[Peer, ...] | None = None
    """Which to compare with; left out, all that are there. `--peers` alone: none."""
    scenic: Path | None = None
    """A checkout of google-research/scenic, which is no package."""


def run(
    cls: type[Size],
    prog: str,
    bench: Callable[[Any, Console], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> int:
    """Reads the arguments, measures on CPU and prints; returns the exit code."""
    jax.config.update("jax_platforms", "cpu")  # in this process; `started` does for the others
    try:
        args = parse(cls, sys.argv[1:], prog, None, None)
        result = bench(args, error_console())
    except (ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"{prog}: {' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: interrupted\n")
        return 130
    sys.stdout.write(json.dumps(result) + "\n" if args.json else table(result))
    return 0


def bench(args: Bench, console: Console) -> dict[str, Any]:
    """The whole comparison, as a JSON-able dict."""
    config = args.config()
    cores = restrict_cores(args.cores)
    names = ["samjax", *present(args, console)]
    load = machine_load(console)
    with tempfile.TemporaryDirectory(prefix="samjax-bench-") as folder:
        setup = Setup(
            config=config.to_json(),
            weights=f"{folder}/weights.safetensors",
            product=min(4096, 4 * args.image_size),
            cores=cores,
            embedding="",
            scenic=None if args.scenic is None else str(args.scenic),
        )
        save_file(random_weights(config), setup.weights)
        setups = {
            name: dataclasses.replace(setup, embedding=f"{folder}/{name}.npy") for name in names
        }
        with started(setups, "bench_models", console) as workers:
            memory = [first(worker, console) for worker in workers]
            differences = compare({name: np.load(setups[name].embedding) for name in names})
            seconds = rounds_of(workers, TASKS, args.rounds, console)
    facts = {worker.name: {**worker.facts, **m} for worker, m in zip(workers, memory, strict=True)}
    machine = {
        "cpu": cpu_name(),
        "cores": cores,
        "load": load,
        "image_size": args.image_size,
        "depth": args.depth,
        "rounds": args.rounds,
        "product_side": setup.product,
    }
    return {**machine, **summarize(facts, differences, seconds, setup.product)}


def present(args: Bench, console: Console) -> list[Peer]:
    """The peers to compare with; what is missing is told, or, if it was asked for, an error."""
    fixes: dict[Peer, str | None] = {
        "segment-anything": _missing("segment_anything", "torch", "segment-anything==1.0"),
        "transformers": _missing("transformers", "torch", "transformers"),
        "scenic": (
            "git clone --depth 1 https://github.com/google-research/scenic, then --scenic scenic"
            if args.scenic is None
            else None
        ),
    }
    if args.scenic is not None:
        modules = args.scenic.joinpath(*SCENIC_MODELING.split("."))
        if not (modules / "image_encoder.py").is_file():
            raise FileNotFoundError(
                f"{args.scenic} is no checkout of google-research/scenic: it has no "
                f"{modules.relative_to(args.scenic)}/image_encoder.py"
            )
    wanted = tuple(fixes) if args.peers is None else args.peers
    for name in wanted:
        if fixes[name] is not None:
            sentence = f"{name} is left out; to compare with it: {fixes[name]}"
            if args.peers is not None:
                raise ValueError(sentence)
            console.print(sentence)
    return [name for name in wanted if fixes[name] is None]


def _missing(module: str, dependency: str, package: str) -> str | None:
    found = importlib.util.find_spec(module) and importlib.util.find_spec(dependency)
    return None if found else f"pip install {dependency} {package}"


def restrict_cores(cores: int | None) -> int:
    """Keeps this process and its children on so many cores; returns how many there are."""
    if not hasattr(os, "sched_setaffinity"):
        if cores is not None:
            raise ValueError("--cores needs Linux, which can keep a process on some cores")
        return os.cpu_count() or 1
    allowed = sorted(os.sched_getaffinity(0))
    cores = len(allowed) if cores is None else cores
    if not 1 <= cores <= len(allowed):
        raise ValueError(f"--cores {cores}: this process may use 1 to {len(allowed)}")
    os.sched_setaffinity(0, allowed[:cores])
    return cores


def random_weights(config: SamConfig) -> dict[str, np.ndarray]:
    """Tensors with Meta's names; no leaf is all zeros or ones, which would hide differences."""
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        name = path[-1].key
        fan_in = float(np.prod(leaf.shape[:-1]))
        std = fan_in**-0.5 if name == "kernel" else 0.1
        return rng.normal(float(name == "scale"), std, leaf.shape).astype(np.float32)

    shapes = Sam(config).init_params_shapes()
    return from_params(jax.tree.map_with_path(draw, shapes), config)


@contextlib.contextmanager
def started(setups: dict[str, Setup], module: str, console: Console) -> Iterator[list[Worker]]:
    """The workers, each ready, on CPU; they end with the block. `module` has their builders."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    workers: list[Worker] = []
    try:
        for name, setup in setups.items():
            with console.status(f"loading {name}"):
                workers.append(Worker(name, setup, environment, module))
        yield workers
    finally:
        for worker in workers:
            worker.stop()


def first(worker: Worker, console: Console) -> dict[str, Any]:
    """Memory of a worker's first call."""
    with console.status(f"memory of {worker.name}"):
        return worker.ask("memory")


def compare(embeddings: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest difference from samjax's embedding over its standard deviation, by name.

    Raises RuntimeError where one is so large that the two are not the same function.
    """
    ours = embeddings["samjax"]
    found = {
        name: float(np.abs(theirs - ours).max() / ours.std()) for name, theirs in embeddings.items()
    }
    for name, difference in found.items():
        if not difference <= BOUND:
            raise RuntimeError(
                f"{name} does not compute what samjax does: the embeddings differ by "
                f"{difference:.1e} standard deviations, more than {BOUND:.0e}"
            )
    return found


def rounds_of(
    workers: list[Worker], tasks: Sequence[str], rounds: int, console: Console
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each round, by worker and task."""

    def call(worker: Worker, task: str) -> Callable[[], float]:
        return lambda: worker.ask(task)["seconds"]

    calls = {(worker.name, task): call(worker, task) for worker in workers for task in tasks}
    seconds = take_turns(calls, rounds, console)
    return {worker.name: {task: seconds[worker.name, task] for task in tasks} for worker in workers}


def summarize(
    facts: dict[str, dict[str, Any]],
    differences: dict[str, float],
    seconds: dict[str, dict[str, list[float]]],
    product: int,
) -> dict[str, Any]:
    """Medians, ratios and rates; `product` is the side of the matrices that were multiplied."""
    flops = facts["samjax"]["flops"]
    median = {
        name: {task: statistics.median(taken) for task, taken in tasks.items()}
        for name, tasks in seconds.items()
    }
    # The machine's rate is what the better of the libraries gets out of it.
    rate = max(2 * product**3 / tasks["product"] for tasks in median.values())
    encoders = {}
    for name, tasks in seconds.items():
        rounds = zip(tasks["encode"], seconds["samjax"]["encode"], strict=True)
        encoders[name] = {
            "library": facts[name]["library"],
            "attention": facts[name].get("attention"),
            "seconds": median[name]["encode"],
            "all_seconds": tasks["encode"],
            "times_samjax": statistics.median(theirs / ours for theirs, ours in rounds),
            "share_of_product_rate": flops / median[name]["encode"] / rate,
            "decode_seconds": median[name]["decode"],
            "peak_bytes": facts[name]["peak_bytes"],
            "xla_temporary_bytes": facts[name].get("xla_temporary_bytes"),
            "product_flop_per_second": 2 * product**3 / median[name]["product"],
            "difference": differences[name],
        }
    return {"flops": flops, "product_flop_per_second": rate, "encoders": encoders}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    head = (
        f"{result['cpu']}, {result['cores']} cores; ViT-B of {result['depth']} blocks at "
        f"{result['image_size']} px, float32, batch 1, {result['flops'] / 1e9:.0f} GFLOP of matrix "
        f"products; a product of side {result['product_side']} runs at "
        f"{result['product_flop_per_second'] / 1e9:.0f} GFLOP/s; median of {result['rounds']} "
        f"rounds at load {result['load']:.1f}."
    )
    names = ("encoder", "with", "seconds", "samjax = 1", "of the product's rate", "memory")
    rows = [(*names, "one box")]
    for name, row in result["encoders"].items():
        rows.append(
            (
                name,
                ", ".join(filter(None, (row["library"], row["attention"]))),
                f"{row['seconds']:.2f}",
                f"{row['times_samjax']:.2f}",
                f"{row['share_of_product_rate']:.0%}",
                "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f} GB",
                f"{row['decode_seconds']:.3f} s",
            )
        )
    return f"{head}\n\n{markdown(rows)}"


if __name__ == "__main__":
    sys.exit(run(Bench, "bench_encoder.py", bench, table))
