"""`samjax predict`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from tyro.conf import Positional, UseAppendAction

from samjax.arguments import Outcome, numbers, parse


@dataclasses.dataclass(frozen=True)
class Predict:
    """Predicts masks for an image, or dense tasks.

    Without points, boxes and a mask there is no prompt: for adapters that were trained so. Points,
    one box and a mask together are one prompt; several boxes are several prompts. With --task, an
    adapter of dense tasks predicts maps of the whole image: segmentation, depth, normals.

    Example: samjax predict photo.jpg --weights sam_vit_b --box 40,30,210,180 --out masks
    """

    image: Positional[Path]
    """An image file."""
    weights: str
    """A samjax checkpoint, a .pth or .safetensors file, or a name of `samjax weights list`."""
    out: Path
    """The folder to write masks and the overlay, or a picture and an array of each task, to; files
    of the same names are replaced."""
    model: str | None = None
    """What the weights are, such as vit_b or medsam, where several models have the same tensors."""
    adapter: Path | None = None
    """An adapter file that `samjax train` wrote for these weights."""
    task: str | None = None
    """Of an adapter of dense tasks: the name of one, or all."""
    point: UseAppendAction[tuple[str, ...]] = ()
    """X,Y,LABEL in pixels; label 1 is the object, 0 the background. May be repeated."""
    box: UseAppendAction[tuple[str, ...]] = ()
    """X0,Y0,X1,Y1 in pixels; edges may lie on the image's. May be repeated."""
    mask: Path | None = None
    """An image file of the image's own size, white on what is roughly the object."""
    multimask: bool = False
    """Three masks per prompt instead of one."""
    image_size: int | tuple[int, int] | None = None
    """The model's input in pixels: a side, or height and width; left out, the adapter's, or the
    model's own."""
    save_logits: bool = False
    """Write logits.npz: low_res_logits, iou_predictions, image_embeddings; with --task, each task's
    maps as the model gives them."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""

    def run(self, console: Console) -> dict[str, Any]:
        """Writes mask_*.png and overlay.png, or TASK.png and TASK.npy."""
        from samjax.predict_files import predict_files, predict_task_files

        if self.task is not None:
            self._check_no_prompt()
            return predict_task_files(
                self.image,
                self.weights,
                self.out,
                self.adapter,
                self.task,
                model=self.model,
                image_size=self.image_size,
                save_logits=self.save_logits,
            )
        return predict_files(
            self.image,
            self.weights,
            self.out,
            model=self.model,
            adapter=self.adapter,
            points=[numbers(text, "--point", ("X", "Y", "LABEL")) for text in self.point],
            boxes=[numbers(text, "--box", ("X0", "Y0", "X1", "Y1")) for text in self.box],
            mask=self.mask,
            multimask=self.multimask,
            image_size=self.image_size,
            save_logits=self.save_logits,
            console=console,
        )

    def _check_no_prompt(self) -> None:
        """Raises ValueError for what belongs to masks beside --task."""
        for flag in ("point", "box", "mask", "multimask"):
            if getattr(self, flag):
                raise ValueError(
                    f"--task predicts maps of the whole image, and --{flag} is for masks: leave "
                    "one of them out"
                )


def run(argv: list[str], console: Console) -> Outcome:
    """Reads the arguments and runs the verb."""
    args = parse(Predict, argv, "samjax predict", None, None)
    return args.run(console), args.json
