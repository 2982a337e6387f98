"""The work of `samjax predict`: an image file in, mask files out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from samjax.data.images import read_image, read_mask
from samjax.files import write_beside
from samjax.loading import load, load_adapted
from samjax.models import ImageSize
from samjax.predictor import SamPredictor
from samjax.prompting import Prompt, check_prompt
from samjax.viz import overlay, save_png


def predict_files(
    image_path: Path,
    weights: str,
    out: Path,
    *,
    model: str | None = None,
    adapter: Path | None = None,
    points: Sequence[Sequence[float]] = (),
    boxes: Sequence[Sequence[float]] = (),
    mask: Path | None = None,
    multimask: bool = False,
    image_size: ImageSize | None = None,
    save_logits: bool = False,
    console: Console,
) -> dict[str, Any]:
    """Writes mask_PROMPT_MASK.png, overlay.png and, on request, logits.npz into `out`.

    Raises FileNotFoundError, or ValueError with one sentence, before anything is written.
    """
    if not image_path.is_file():
        raise FileNotFoundError(f"no image file at {image_path}")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose a folder with --out")
    image = read_image(image_path)
    size = (image.shape[0], image.shape[1])
    prompts = _prompts(points, boxes, mask, size)
    for prompt in prompts:
        # Before any weights are read, which may take long.
        check_prompt(prompt, size)
    predictor = open_predictor(weights, adapter, image_size, model)
    predictor.set_image(image)
    masks, iou, low_res = predictor.predict_prompts(prompts, multimask)

    out.mkdir(parents=True, exist_ok=True)
    files = []
    for i, prompt_masks in enumerate(masks):
        for j, mask in enumerate(prompt_masks):
            files.append(str(out / f"mask_{i}_{j}.png"))
            save_png(Image.fromarray(mask.astype(np.uint8) * 255), Path(files[-1]))
            if not mask.any():
                console.print(f"note: {files[-1]} is empty")
    picture = image
    for prompt_masks, scores in zip(masks, iou, strict=True):
        picture = overlay(picture, prompt_masks[int(np.argmax(scores))])
    save_png(Image.fromarray(picture), out / "overlay.png")
    result: dict[str, Any] = {
        "masks": files,
        "iou_predictions": [[float(v) for v in row] for row in iou],
        "overlay": str(out / "overlay.png"),
    }
    if save_logits:
        result["logits"] = str(out / "logits.npz")
        with write_beside(out / "logits.npz") as temporary, open(temporary, "wb") as file:
            np.savez_compressed(
                file,
                low_res_logits=low_res,
                iou_predictions=iou,
                image_embeddings=predictor.get_image_embedding(),
            )
    return result


def open_predictor(
    weights: str, adapter: Path | None, image_size: ImageSize | None, model: str | None
) -> SamPredictor:
    """A predictor, with an adapter in place where one is given; see `samjax.load`."""
    if adapter is None:
        return SamPredictor(*load(weights, image_size, model=model))
    return SamPredictor(*load_adapted(weights, adapter, image_size, model=model))


def _prompts(
    points: Sequence[Sequence[float]],
    boxes: Sequence[Sequence[float]],
    mask: Path | None,
    size: tuple[int, int],
) -> list[Prompt]:
    """Several boxes are several prompts; all else belongs to one."""
    if len(boxes) > 1 and (points or mask):
        raise ValueError(
            f"{len(boxes)} boxes are {len(boxes)} prompts, and points or a mask beside them would "
            "belong to none: give these with one box, or the boxes alone"
        )
    table = np.array(points).reshape(-1, 3)
    coords, labels = (table[:, :2], table[:, 2]) if points else (None, None)
    given = None if mask is None else read_mask(mask)[0]
    if given is not None and given.shape != size:
        raise ValueError(
            f"the mask {mask} is {given.shape[1]}x{given.shape[0]} pixels (width x height), but "
            f"the image is {size[1]}x{size[0]}"
        )
    return [Prompt(coords, labels, box, given) for box in boxes or [None]]
