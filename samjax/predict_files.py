"""The work of `samjax predict`: an image file in; masks, or maps of dense tasks, out."""

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
from samjax.loading import load, load_with
from samjax.models import ImageSize, Sam
from samjax.peft import Adapter, read
from samjax.predictor import SamPredictor
from samjax.prompting import Prompt, check_prompt
from samjax.task_predictor import TaskPredictor
from samjax.tasks import ALL, Task, find
from samjax.viz import overlay
from samjax.viz_tasks import picture_of, range_of, with_bar


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
    if mask is not None:
        _check_file(mask, "mask")
    image = _open_image(image_path, out)
    size = (image.shape[0], image.shape[1])
    prompts = _prompts(points, boxes, mask, size, console)
    for prompt in prompts:
        # Before any weights are read, which may take long.
        check_prompt(prompt, size)
    file = None if adapter is None else read(adapter)
    if file is not None and file.tasks:
        raise ValueError(
            f"{adapter} is an adapter of dense tasks, {_named(file)}: choose one with --task, or "
            f"--task {ALL}"
        )
    predictor = SamPredictor(*_opened(weights, adapter, file, image_size, model))
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


def predict_task_files(
    image_path: Path,
    weights: str,
    out: Path,
    adapter: Path | None,
    name: str,
    *,
    model: str | None = None,
    image_size: ImageSize | None = None,
    save_logits: bool = False,
) -> dict[str, Any]:
    """Writes TASK.png and TASK.npy of one task of an adapter, or of `ALL`, into `out`.

    The array is that of `samjax.TaskPredictor.predict`; the picture of a number has its scale
    beside it. On request logits.npz holds the model's own maps (channels, h, w) by task. All are
    written or none. Raises OSError or ValueError with one sentence.
    """
    if adapter is None:
        raise ValueError("--task needs --adapter: an adapter that was trained for dense tasks")
    image = _open_image(image_path, out)
    file = read(adapter)
    if not file.tasks:
        raise ValueError(f"{adapter} is an adapter for masks and has no tasks: leave out --task")
    tasks = file.tasks if name == ALL else (find(file.tasks, name),)
    predictor = TaskPredictor(*_opened(weights, adapter, file, image_size, model))
    maps = predictor.predict_low_res(image, [task.name for task in tasks])
    values = predictor.at_size(maps, image.shape[:2])
    result: dict[str, Any] = {
        "pictures": {task.name: str(out / f"{task.name}.png") for task in tasks},
        "arrays": {task.name: str(out / f"{task.name}.npy") for task in tasks},
    }
    images = {f"{task.name}.png": _picture(task, values[task.name]) for task in tasks}
    if save_logits:
        result["logits"] = str(out / "logits.npz")
    arrays = {f"{task_name}.npy": array for task_name, array in values.items()}
    _write(out, images, maps if save_logits else {}, arrays)
    return result


def _picture(task: Task, values: np.ndarray) -> np.ndarray:
    if task.loss != "masked_l1":
        return picture_of(task, values, (0.0, 1.0))
    limits = range_of(task, values)
    return with_bar(picture_of(task, values[..., None], limits), limits)


def _open_image(image_path: Path, out: Path) -> np.ndarray:
    """The image, where there is one and `out` can be written."""
    _check_file(image_path, "image")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose a folder with --out")
    check_writable(out)
    return read_image(image_path)


def _named(file: Adapter) -> str:
    return ", ".join(task.name for task in file.tasks)


def _write(
    out: Path,
    images: dict[str, np.ndarray],
    logits: dict[str, np.ndarray],
    arrays: dict[str, np.ndarray] | None = None,
) -> None:
    """Writes PNGs and arrays by their names and logits.npz, if any: all of them or none."""
    with made_folder(out), contextlib.ExitStack() as stack:
        for name, pixels in images.items():
            temporary = stack.enter_context(write_beside(out / name))
            Image.fromarray(pixels).save(temporary, format="PNG")
        for name, array in (arrays or {}).items():
            temporary = stack.enter_context(write_beside(out / name))
            with open(temporary, "wb") as file:
                np.save(file, array)
        if logits:
            temporary = stack.enter_context(write_beside(out / "logits.npz"))
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **logits)


def _check_file(path: Path, what: str) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the file of the {what}")
    if not path.is_file():
        raise FileNotFoundError(f"no {what} file at {path}")


def _opened(
    weights: str,
    adapter: Path | None,
    file: Adapter | None,
    image_size: ImageSize | None,
    model: str | None,
) -> tuple[Sam, Any, Any]:
    """Model, params and records, of an adapter where one is given; see `samjax.load`."""
    if file is None:
        return *load(weights, image_size, model=model), None
    return load_with(weights, file, str(adapter), image_size, model=model)


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
