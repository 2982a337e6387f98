"""The command line: `samjax VERB ...`; each verb is a module of `samjax.verbs`.

Results go to stdout, progress and messages to stderr. With `--json` the last line of stdout is one
JSON object. An error is one sentence on stderr and an exit code other than 0.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from samjax.allocator import keep_freed_memory
from samjax.download import cache_dir
from samjax.terminal import Interrupted, error_console, notices_on

_HELP = """usage: samjax VERB ...

Segment Anything in JAX, made to be fine-tuned with few parameters.

verbs:
  weights     the published weights, by name: a list, or one of them
              samjax weights get mobile_sam
  convert     weights from PyTorch to samjax and back
              samjax convert sam_vit_b converted
  predict     masks for an image from points and boxes
              samjax predict photo.jpg --weights sam_vit_b --point 320,200,1 --out masks
  data        public datasets, by name: a list, or one prepared for training
              samjax data prepare kvasir_seg
  check-data  what is wrong with a dataset, all of it at once
              samjax check-data my_images
  train       fine-tune, as an experiment file says
              samjax train experiments/kvasir_lora.py --weights mobile_sam --data Kvasir-SEG
  plan        what a run needs of each device, of TPUs that are not there too
              samjax plan experiments/kvasir_lora.py --topology v5e:4x4 --model vit_b
  compare     several methods at one budget, in one table
              samjax compare experiments/kvasir_lora.py --weights mobile_sam --data Kvasir-SEG \\
                  --methods decoder lora --seeds 0 1 2
  table       a table of a paper: published numbers, and what was measured beside them
              samjax table nas_lora_table
  eval        metrics of a run, or of an experiment's weights before training
              samjax eval runs/kvasir_lora --split test
  arch        the architecture that a run of nas_lora found
              samjax arch runs/kvasir_nas_lora
  params      how many numbers a method trains
              samjax params --model vit_b --method lora
  bench       how fast models encode, train and are evaluated on this machine
              samjax bench methods --model vit_b
  merge       fold an adapter into its weights
              samjax merge --weights mobile_sam --adapter runs/kvasir_lora/adapter.safetensors dst
  convert-adapter
              an adapter of HuggingFace's peft or of SAMed to samjax's, or one to peft's
              samjax convert-adapter peft_folder adapter.safetensors --weights sam_vit_b

`samjax VERB --help` lists a verb's options.
"""


_VERBS = (
    "weights",
    "convert",
    "predict",
    "data",
    "check-data",
    "train",
    "plan",
    "compare",
    "table",
    "eval",
    "arch",
    "params",
    "bench",
    "merge",
    "convert-adapter",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = error_console()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(_HELP)
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb not in _VERBS:
        nearest = difflib.get_close_matches(verb, _VERBS, n=1, cutoff=0)[0]
        return _fail(
            f"unknown verb {verb!r}; the nearest is {nearest}, and samjax has {', '.join(_VERBS)}"
        )
    keep_freed_memory()
    # Read when JAX starts. What one command compiled, the next reads back; where that cannot be
    # kept, it is compiled again, and nobody needs to know.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "compiled"))
    try:
        with notices_on(console):
            module = importlib.import_module(f"samjax.verbs.{verb.replace('-', '_')}")
            result, as_json = module.run(rest, console)
    except Interrupted as stop:
        return _fail(str(stop), 130)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("SAMJAX_TRACEBACK"):
            raise
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    sys.stdout.write(json.dumps(result) + "\n" if as_json else _plain(result))
    return 1 if result.get("errors") else 0


def _plain(result: dict[str, Any]) -> str:
    def show(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{k} {show(v)}" for k, v in value.items())
        if isinstance(value, list):
            return " ".join(show(v) for v in value)
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    return "".join(f"{key}: {show(value)}\n" for key, value in result.items())


def _fail(message: str, code: int = 1) -> int:
    sys.stderr.write("samjax: " + " ".join(message.split()) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
