"""Images with label images, whose values are the classes of a dense task.

A folder has the layouts of `samjax.data.folder`, with `labels/` in the place of `masks/`:
`ROOT/{train,validation,test}/{images,labels}/`, or the flat `ROOT/{images,labels}/`, which is split
by seed. A label image has one channel of 8 or 16 bits, or a palette, whose indices count and whose
colours do not. 255 is where a pixel does not count, so that there are at most 255 classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from samjax.data.dense import DenseSample, checked_truth
from samjax.data.dense_folder import IMAGES
from samjax.data.folder import LABELS, Pair, check_pairs, has_labels, has_masks, open_pairs
from samjax.data.images import ImageFile, image_size, read_image, read_labels
from samjax.data.labels import VOID
from samjax.data.splits import DEFAULT_FRACTIONS, Fractions, split_folders
from samjax.data.walk import walk
from samjax.tasks import CLASSES, Task


def is_labelled(root: Path) -> bool:
    """Whether a folder has label images, and is none of `samjax.data.dense_folder`.

    Raises ValueError for one of masks, which are no label images of classes.
    """
    folders = [folder for found in split_folders(root).values() for folder in found]
    if any((folder / IMAGES).is_dir() for folder in folders):
        return False  # labels/ and masks/ may be tasks of these names
    if has_masks(root) and not has_labels(root):
        raise ValueError(
            f"{root} has masks/, of objects without a class: put label images of a dense task into "
            f"{LABELS}/"
        )
    return has_labels(root)


class DenseLabels:
    """One split of a folder, read by position; see above for the layout."""

    def __init__(
        self,
        root: str | Path,
        split: str,
        tasks: Sequence[Task],
        seed: int = 0,
        fractions: Fractions = DEFAULT_FRACTIONS,
    ) -> None:
        """Lists files; reads none.

        Raises ValueError as `samjax.data.folder.FolderSource` does, and for tasks that are not one
        of classes.
        """
        root = Path(root).expanduser()
        if len(tasks) > 1:
            raise ValueError(
                f"{root} has one label image an image, and there are the tasks "
                f"{' and '.join(task.name for task in tasks)}: name one of them"
            )
        (self._task,) = tasks
        check_labels_task(self._task, root)
        self._pairs = open_pairs(root, split, seed, fractions, (LABELS,))
        self.names: tuple[str, ...] = tuple(pair.name for pair in self._pairs)

    def check_sizes(self) -> None:
        """Reads the headers of images, and all label images. Raises as reading does."""
        check_pairs(self._pairs)

        def check(pair: Pair) -> None:
            read_classes(pair.truth, self._task, image_size(pair.image))

        for _ in walk(check, self._pairs, "checking classes"):
            pass

    def __len__(self) -> int:
        """The number of samples."""
        return len(self._pairs)

    def __getitem__(self, index: int) -> DenseSample:
        """The sample at a position. Raises ValueError, naming the file, where it cannot be used."""
        pair = self._pairs[index]
        image = read_image(pair.image)
        truth = read_classes(pair.truth, self._task, image.shape[:2])
        return DenseSample(pair.name, image, {self._task.name: truth})

    def image_file(self, index: int) -> Path:
        """The file of a sample's image."""
        return self._pairs[index].image


def check_labels_task(task: Task, where: str | Path) -> None:
    """Raises ValueError for a task that label images cannot be the truths of."""
    if task.loss not in CLASSES:
        raise ValueError(
            f"task {task.name}: the label images of {where} hold classes, and {task.loss} has "
            f"none: choose {', '.join(CLASSES)}"
        )
    if task.classes > VOID:
        raise ValueError(
            f"task {task.name} has {task.classes} classes, and label images have at most {VOID}, "
            f"since {VOID} marks pixels that do not count"
        )


def read_classes(file: ImageFile, task: Task, size: tuple[int, ...]) -> Int[np.ndarray, "h w"]:
    """The truth in a label image, of an image of (h, w) `size`, -1 where a pixel does not count.

    Raises ValueError, naming the file, for what is no such truth.
    """
    return checked_truth(read_labels(file), task, size, file, VOID)
