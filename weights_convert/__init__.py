"""Checkpoints of the original SAM to samjax parameters and back, without torch.

A checkpoint is data, never a program: what is read are tensors, and nothing else is ever built.
"""

from weights_convert.convert import Params, expected_shapes, from_params, to_params
from weights_convert.errors import CheckpointError
from weights_convert.read import read_tensors
from weights_convert.recognise import recognise

__all__ = [
    "CheckpointError",
    "Params",
    "expected_shapes",
    "from_params",
    "read_tensors",
    "recognise",
    "to_params",
]
