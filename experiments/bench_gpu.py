"""One call on a GPU: training and encoding of SAM ViT-B here and in torch, bfloat16, 1024 px.

    python experiments/bench_gpu.py --out gpu.json

Images a second and memory: of training steps of several methods, batch 1 to the largest that fits;
of the image encoder with each kind of attention that samjax has; and of what torch makes of them:
the original SAM and HuggingFace's, eager and compiled, and LoRA of HuggingFace's peft. Each library
has the GPU for itself, in a process of its own. The file is written anew after each row, so that a
run that is cut off loses nothing, and the whole takes no longer than --seconds: time that a part
does not need is left to the next. Beside samjax it needs jax, flax, optax, numpy, and torch; what
else is missing (segment-anything, transformers, peft) is left out, and the file says so.

`--tiny` is for a quick try on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Of each library and task, the share of the time. The most telling come first.
PARTS = {
    ("samjax", "encoder"): 0.2,
    ("torch", "encoder"): 0.2,
    ("samjax", "train"): 0.35,
    ("torch", "train"): 0.25,
}
# Dense bfloat16 products, FLOP/s, as the makers state them; the first name that a device's has.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "V100": 125e12,  # of float16, since it has no bfloat16
}


def main(argv: Sequence[str]) -> int:
    """Runs all parts and prints the table; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.part:
        return _child(args)
    if not args.out.absolute().parent.is_dir():
        sys.stderr.write(f"bench_gpu.py: there is no directory {args.out.parent}; create it\n")
        return 1
    result: dict[str, Any] = {"dtype": "bfloat16", "tiny": args.tiny, "rows": [], "notes": []}
    end = time.monotonic() + args.seconds
    left = sum(PARTS.values())
    for (library, task), share in PARTS.items():
        limit = max(0.0, end - time.monotonic()) * share / left
        left -= share
        started = time.monotonic()
        for row in _rows_of(f"{library}:{task}", limit, args, result["notes"]):
            kind = next(key for key in ("facts", "note", "row") if key in row)
            if kind == "facts":
                result.setdefault("facts", {}).setdefault(library, {}).update(row["facts"])
            else:
                result[f"{kind}s"].append(row[kind])
            _share_peak(result)
            _write(args.out, result)
        sys.stderr.write(f"{library} {task}: {time.monotonic() - started:.0f} s\n")
        _write(args.out, result)
    sys.stdout.write(table(result))
    return 0 if result["rows"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the file to write")
    parser.add_argument("--seconds", type=float, default=540.0, help="how long all may take")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8], help="sizes to begin with"
    )
    parser.add_argument("--most", type=int, default=256, help="the largest batch to try")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["lora", "decoder", "nas_lora", "sam_parser"],
        help="what samjax trains; torch has lora and decoder of these",
    )
    parser.add_argument(
        "--attention", default="chunked", help="samjax's in training: chunked, or cudnn on a GPU"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on a CPU")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # LIBRARY:TASK, in a process of its own
    return parser


def _rows_of(
    part: str, limit: float, args: argparse.Namespace, notes: list[str]
) -> Iterator[dict[str, Any]]:
    """What the process of a part says, until it ends or its time is over; `notes` get why."""
    options = [*map(str, ("--most", args.most, "--batches", *args.batches))]
    options += ["--attention", args.attention, "--methods", *args.methods]
    command = [sys.executable, __file__, "--part", part, *options]
    on_jax = part.startswith("samjax")
    environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    if args.tiny or not on_jax:
        environment["JAX_PLATFORMS"] = "cpu"  # torch has the GPU for itself
    over = threading.Event()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*command, *(["--tiny"] if args.tiny else [])],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,
        )

        def stop() -> None:
            over.set()
            with contextlib.suppress(ProcessLookupError):  # compilers of torch's are its children
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                with contextlib.suppress(json.JSONDecodeError):  # cut off
                    yield json.loads(line)
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:  # Ctrl-C
                stop()
        errors.seek(0)
        said = errors.read().strip().splitlines() or [f"exit code {code}"]
    if over.is_set():
        notes.append(f"{part} was stopped after its {limit:.0f} s")
    elif code:
        notes.append(f"{part} failed: {said[-1]}")


def _child(args: argparse.Namespace) -> int:
    """A part, in its own process: a line of JSON for each thing it finds."""
    import bench_gpu_rows  # pyrefly: ignore[missing-import]

    # Libraries may print; only what is found goes to the parent.
    found = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for item in bench_gpu_rows.rows(args.part, args):
        found.write(json.dumps(item) + "\n")
    return 0


def _share_peak(result: dict[str, Any]) -> None:
    """Adds to each row what it computes a second, and which share of the chip's peak that is.

    What a step needs at least is counted in samjax's; torch's has the same.
    """
    device = next((f["device"] for f in result.get("facts", {}).values() if "device" in f), "")
    peak = next((rate for name, rate in PEAKS.items() if name in device), None)
    needed = {
        (row["task"], row["method"]): row["needed_flops"] / row["batch_size"]
        for row in result["rows"]
        if "needed_flops" in row
    }
    for row in result["rows"]:
        per_image = needed.get((row["task"], row["method"]))
        if per_image is not None:
            row["flop_per_second"] = per_image * row["images_per_second"]
            row["share_of_peak"] = None if peak is None else row["flop_per_second"] / peak


def _write(path: Path, result: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    temporary.replace(path)


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    head = ("library", "with", "task", "method", "batch", "images/s", "ms", "memory", "TFLOP/s")
    lines = [(*head, "of the peak"), ("---",) * (len(head) + 1)]
    for row in result["rows"]:
        share, memory = row.get("share_of_peak"), row["memory_bytes"]
        rate = row.get("flop_per_second")
        lines.append(
            (
                row["library"],
                row["with"],
                row["task"],
                row["method"] or "-",
                str(row["batch_size"]),
                f"{row['images_per_second']:.4g}",
                f"{1e3 * row['seconds']:.4g}",
                "-" if memory is None else f"{memory / 1e9:.1f} GB",
                "-" if rate is None else f"{rate / 1e12:.3g}",
                "-" if share is None else f"{share:.0%}",
            )
        )
    facts = "; ".join(
        f"{library}: {', '.join(f'{key} {value}' for key, value in found.items())}"
        for library, found in result.get("facts", {}).items()
    )
    rows = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{facts}\n\n{rows}\n" + "".join(f"- {note}\n" for note in result["notes"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
