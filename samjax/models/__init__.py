"""SAM in Flax Linen: the only place, with `samjax.nn`, where modules appear."""

from samjax.models.configs import MODELS, SamConfig, TinyVitConfig, VitConfig
from samjax.models.prompt_encoder import Prompts
from samjax.models.sam import Sam

__all__ = ["MODELS", "Prompts", "Sam", "SamConfig", "TinyVitConfig", "VitConfig"]
