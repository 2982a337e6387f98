"""The work of `samjax predict`: an image file in, mask files out."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from samjax.data.images import read_image, read_mask
from samjax.files import check_writable, made_folder, write_beside
from samjax.loading import load, load_adapted
from samjax.models import ImageSize
from samjax.predictor import SamPredictor
from samjax.prompting import Prompt, check_prompt
from samjax.viz import overlay


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

    All are written or none. Raises OSError or ValueError with one sentence.
    """
    _check_file(image_path, "image")
    if mask is not None:
        _check_file(mask, "mask")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose a folder with --out")
    check_writable(out)
    image = read_image(image_path)
    size = (image.shape[0], image.shape[1])
    prompts = _prompts(points, boxes, mask, size, console)
    for prompt in prompts:
        # Before any weights are read, which may take long.
        check_prompt(prompt, size)
    predictor = open_predictor(weights, adapter, image_size, model)
    predictor.set_image(image)
    masks, iou, low_res = predictor.predict_prompts(prompts, multimask)

    images = {
        f"mask_{i}_{j}.png": mask.astype(np.uint8) * 255
        for i, prompt_masks in enumerate(masks)
        for j, mask in enumerate(prompt_masks)
    }
    result: dict[str, Any] = {
        "masks": [str(out / name) for name in images],
        "iou_predictions": [[float(v) for v in row] for row in iou],
        "overlay": str(out / "overlay.png"),
    }
    for name, pixels in images.items():
        if not pixels.any():
            console.print(f"note: {out / name} is empty")
    images["overlay.png"] = image
    for prompt_masks, scores in zip(masks, iou, strict=True):
        best = prompt_masks[int(np.argmax(scores))]
        images["overlay.png"] = overlay(images["overlay.png"], best)
    arrays: dict[str, np.ndarray] = {}
    if save_logits:
        result["logits"] = str(out / "logits.npz")
        arrays = {
            "low_res_logits": low_res,
            "iou_predictions": iou,
            "image_embeddings": predictor.get_image_embedding(),
        }
    _write(out, images, arrays)
    return result


def _write(out: Path, images: dict[str, np.ndarray], arrays: dict[str, np.ndarray]) -> None:
    """Writes PNGs by their names and, where there are arrays, logits.npz: all of them or none."""
    with made_folder(out), contextlib.ExitStack() as stack:
        for name, pixels in images.items():
            temporary = stack.enter_context(write_beside(out / name))
            Image.fromarray(pixels).save(temporary, format="PNG")
        if arrays:
            temporary = stack.enter_context(write_beside(out / "logits.npz"))
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **arrays)


def _check_file(path: Path, what: str) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the file of the {what}")
    if not path.is_file():
        raise FileNotFoundError(f"no {what} file at {path}")


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
    console: Console,
) -> list[Prompt]:
    """Several boxes are several prompts; all else belongs to one."""
    if len(boxes) > 1 and (points or mask):
        raise ValueError(
            f"{len(boxes)} boxes are {len(boxes)} prompts, and points or a mask beside them would "
            "belong to none: give these with one box, or the boxes alone"
        )
    table = np.array(points).reshape(-1, 3)
    coords, labels = (table[:, :2], table[:, 2]) if points else (None, None)
    given = None if mask is None else _read_prompt(mask, size, console)
    return [Prompt(coords, labels, box, given) for box in boxes or [None]]


def _read_prompt(mask: Path, size: tuple[int, int], console: Console) -> np.ndarray:
    """The mask prompt in a file; says where it was not simply black and white."""
    given, notice = read_mask(mask)
    if given.shape != size:
        raise ValueError(
            f"the mask {mask} is {given.shape[1]}x{given.shape[0]} pixels (width x height), but "
            f"the image is {size[1]}x{size[0]}"
        )
    if notice:
        console.print(f"note: {mask} {notice}")
    return given
