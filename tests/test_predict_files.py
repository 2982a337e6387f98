"""What predicting from files says of the files."""

import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from samjax.predict_files import predict_files
from samjax.weights import save_checkpoint

SIDE = 64
WHITE = np.zeros((SIDE, SIDE), np.uint8)
WHITE[16:40, 20:50] = 255
GREY = WHITE.copy()
GREY[15, 20:50] = 100
LABELS = WHITE // 255 * 3
LABELS[50:, 50:] = 7


@pytest.mark.parametrize(
    ("pixels", "note"),
    [
        (WHITE, ""),
        (LABELS, "is a label image: every label above 0 becomes the object"),
        (GREY, "is not binary (lossy compression?): it is thresholded at > 127"),
    ],
    ids=["white", "labels", "grey"],
)
def test_how_a_mask_prompt_was_read_is_said(tmp_path, small_config, small_params, pixels, note):
    save_checkpoint(tmp_path / "weights", small_config, small_params)
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "image.png")
    mask = tmp_path / "prompt.png"
    Image.fromarray(pixels).save(mask)
    said = io.StringIO()
    console = Console(file=said, width=1000)
    weights, out = str(tmp_path / "weights"), tmp_path / "out"
    predict_files(tmp_path / "image.png", weights, out, mask=mask, console=console)
    notes = [line for line in said.getvalue().splitlines() if "prompt.png" in line]
    assert notes == ([f"note: {mask} {note}"] if note else [])
