"""samjax: the Segment Anything Model in JAX/Flax, made to be fine-tuned with few parameters."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samjax.batched import predict_batch
    from samjax.loading import load, load_adapted
    from samjax.models import MODELS, Prompts, Sam, SamConfig
    from samjax.predictor import SamPredictor
    from samjax.prompting import Prompt
    from samjax.task_predictor import TaskPredictor
    from samjax.weights import convert

__version__ = "0.1.0"

__all__ = [
    "MODELS",
    "Prompt",
    "Prompts",
    "Sam",
    "SamConfig",
    "SamPredictor",
    "TaskPredictor",
    "convert",
    "load",
    "load_adapted",
    "predict_batch",
]

# Imported when asked for: `weights_convert` needs `samjax.models` alone, and the other way round.
_MODULES = {
    "MODELS": "samjax.models",
    "Prompt": "samjax.prompting",
    "Prompts": "samjax.models",
    "Sam": "samjax.models",
    "SamConfig": "samjax.models",
    "SamPredictor": "samjax.predictor",
    "TaskPredictor": "samjax.task_predictor",
    "convert": "samjax.weights",
    "load": "samjax.loading",
    "load_adapted": "samjax.loading",
    "predict_batch": "samjax.batched",
}


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'samjax' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
