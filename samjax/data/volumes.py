"""CT volumes and their label volumes (NIfTI) as slices, the same however a file is stored.

A NIfTI file says by its affine which way each axis of its array goes. Here a volume becomes axial
slices from the feet up, each as radiologists look at it: from below, the front of the body at the
top and its right on the left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

import numpy as np
from jaxtyping import Float, Shaped, UInt8


@dataclasses.dataclass(frozen=True)
class VolumeFile:
    """A .nii.gz file, wherever it lies; messages call it by `path`."""

    path: Path
    open: Callable[[], AbstractContextManager[io.BufferedIOBase]]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the voxels of a volume lie: how many there are along each axis, and their affine.

    The affine takes indices to millimetres to the right, to the front and up.
    """

    shape: tuple[int, ...]
    affine: Float[np.ndarray, "4 4"]


def nibabel() -> ModuleType:
    """The package that reads NIfTI. Raises RuntimeError where it is not installed."""
    try:
        import nibabel
    except ImportError as error:
        raise RuntimeError(
            f"volumes of NIfTI need nibabel ({error}): pip install 'samjax[medical]'"
        ) from error
    return nibabel


def read_grid(file: VolumeFile) -> Grid:
    """A volume's grid, from its header. Raises ValueError for what is no volume of NIfTI."""
    with file.open() as opened, _reading(file), gzip.open(opened) as unpacked:
        header = nibabel().Nifti1Header.from_fileobj(unpacked)
        grid = Grid(tuple(header.get_data_shape()), header.get_best_affine())
    if len(grid.shape) != 3:
        raise ValueError(f"{file.path} is {list(grid.shape)}, and a volume has three axes")
    return grid


def check_same_grid(image: VolumeFile, label: VolumeFile) -> None:
    """Raises ValueError where a label's voxels are not its image's, by half a voxel or more."""
    of_image, of_label = read_grid(image), read_grid(label)
    if of_image.shape != of_label.shape:
        raise ValueError(
            f"{label.path} is {list(of_label.shape)}, and its image {image.path.name} is "
            f"{list(of_image.shape)}"
        )
    # Affines differ the most at corners.
    corners = np.stack([np.array([*c, 1]) for c in np.ndindex(2, 2, 2)])
    corners[:, :3] *= np.array(of_image.shape) - 1
    apart = np.linalg.norm(corners @ (of_image.affine - of_label.affine).T, axis=1).max()
    voxel = np.linalg.norm(of_image.affine[:3, :3], axis=0).min()
    if not apart < voxel / 2:
        raise ValueError(
            f"the affine of {label.path} puts it {apart:.3g} mm away from its image "
            f"{image.path.name}: get both again"
        )


def read_slices(file: VolumeFile) -> Shaped[np.ndarray, "slices h w"]:
    """All values of a volume, of the type that the file says, as slices from the feet up.

    Raises ValueError where the file cannot be read.
    """
    with file.open() as opened, _reading(file):
        volume = nibabel().Nifti1Image.from_bytes(gzip.decompress(opened.read()))
        # Axes go to the right, to the front and up.
        canonical = np.asanyarray(nibabel().as_closest_canonical(volume).dataobj)
    return canonical[::-1, ::-1].T


def read_label_slices(file: VolumeFile, classes: int) -> UInt8[np.ndarray, "slices h w"]:
    """A label volume as slices. Raises ValueError for values that are not 0 to `classes` - 1."""
    slices = read_slices(file)
    for values in slices:  # which takes less memory than all at once
        wrong = ~((values >= 0) & (values < classes) & (values == np.floor(values)))
        if wrong.any():
            raise ValueError(
                f"{file.path} has the value {values[wrong][0]}, and labels are whole numbers from "
                f"0 to {classes - 1}"
            )
    return slices.astype(np.uint8)


def windowed(
    hounsfield: Shaped[np.ndarray, "h w"], window: tuple[float, float], file: VolumeFile
) -> UInt8[np.ndarray, "h w"]:
    """Hounsfield units as grey: the window's lower end is 0, its upper end 255.

    Raises ValueError, naming the file, for values that are not finite.
    """
    low, high = window
    grey = (hounsfield.astype(np.float32) - low) * (255 / (high - low))
    if not np.isfinite(grey).all():
        raise ValueError(f"{file.path} has values that are not finite")
    return np.round(np.clip(grey, 0, 255)).astype(np.uint8)


@contextlib.contextmanager
def _reading(file: VolumeFile) -> Iterator[None]:
    """Of broken files nibabel and gzip raise many kinds of errors; each means the same."""
    try:
        yield
    except RuntimeError:  # no nibabel
        raise
    except Exception as error:
        raise ValueError(f"{file.path} cannot be read as NIfTI ({error}): get it again") from error
