"""samjax: the Segment Anything Model in JAX/Flax, made to be fine-tuned with few parameters."""

from samjax.models import MODELS, Prompts, Sam, SamConfig
from samjax.predictor import SamPredictor
from samjax.weights import convert, load

__version__ = "0.1.0"

__all__ = ["MODELS", "Prompts", "Sam", "SamConfig", "SamPredictor", "convert", "load"]
