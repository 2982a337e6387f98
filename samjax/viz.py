"""Pictures: masks over images, and the gallery of before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

from samjax.files import write_beside

TRUTH_COLOR = (64, 200, 64)
MASK_COLOR = (255, 140, 0)


def overlay(
    image: UInt8[np.ndarray, "h w 3"],
    mask: Bool[np.ndarray, "h w"],
    color: tuple[int, int, int] = MASK_COLOR,
) -> UInt8[np.ndarray, "h w 3"]:
    """The image with the mask tinted and outlined."""
    tinted = image.astype(np.float32)
    tinted[mask] = 0.55 * tinted[mask] + 0.45 * np.array(color, np.float32)
    padded = np.pad(mask, 1, mode="edge")
    eroded = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    tinted[mask & ~eroded] = color
    return tinted.round().astype(np.uint8)


def gallery(
    rows: Sequence[Sequence[UInt8[np.ndarray, "h w 3"]]],
    titles: Sequence[str],
    captions: Sequence[Sequence[str]] | None = None,
    cell: int = 256,
) -> Image.Image:
    """A grid of pictures under column titles; each is fitted into `cell` pixels.

    A row is as high as its highest picture. `captions`, one per picture, stand in the lower left
    corner of its cell.
    """
    gap, head = 6, 26
    fitted = [[_fitted(picture, cell) for picture in row] for row in rows]
    heights = [max(picture.height for picture in row) for row in fitted]
    width = len(titles) * (cell + gap) + gap
    canvas = Image.new("RGB", (width, sum(heights) + (len(rows) + 1) * gap + head), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=15)
    for j, title in enumerate(titles):
        draw.text((gap + j * (cell + gap) + cell / 2, head / 2 + 2), title, "black", font, "mm")
    y = head + gap
    for i, row in enumerate(fitted):
        for j, picture in enumerate(row):
            x = gap + j * (cell + gap)
            canvas.paste(picture, (x, y))
            if captions and captions[i][j]:
                at = (x + 5, y + heights[i] - 6)
                draw.text(
                    at, captions[i][j], "white", font, "ls", stroke_width=2, stroke_fill="black"
                )
        y += heights[i] + gap
    return canvas


def _fitted(picture: UInt8[np.ndarray, "h w 3"], cell: int) -> Image.Image:
    image = Image.fromarray(picture)
    scale = cell / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(size, Image.Resampling.BILINEAR)


def save_png(image: Image.Image, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    with write_beside(path) as temporary:
        image.save(temporary, format="PNG")
