"""SAM in Flax Linen: the only place, with `samjax.nn`, where modules appear."""

from samjax.models.configs import MODELS, ImageSize, SamConfig, TinyVitConfig, VitConfig
from samjax.models.msam import MSam
from samjax.models.prompt_encoder import Prompts
from samjax.models.sam import Sam

__all__ = [
    "MODELS",
    "ImageSize",
    "MSam",
    "Prompts",
    "Sam",
    "SamConfig",
    "TinyVitConfig",
    "VitConfig",
]
