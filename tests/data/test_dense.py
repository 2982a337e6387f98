"""Folders of dense tasks, and changes that keep their geometry true."""

import numpy as np
import pytest

from samjax.data.dense import DenseFolder, DenseSample
from samjax.data.dense_augment import DenseAugmentConfig, augment_dense
from samjax.tasks import NYUV2, Task

SIZE = (12, 16)
RNG = np.random.default_rng(0)


def write(root, split="train", count=11):
    """A split as MTAN has it, with unknown pixels."""
    normals = RNG.normal(size=(count, *SIZE, 3)).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals[:, 0] = 0
    data = {
        "image": RNG.random((count, *SIZE, 3), np.float32),
        "label": RNG.integers(-1, 13, (count, *SIZE)).astype(np.int8),
        "depth": (RNG.random((count, *SIZE, 1)) * 9).astype(np.float32),
        "normal": normals,
    }
    for name, arrays in data.items():
        (root / split / name).mkdir(parents=True)
        for i, array in enumerate(arrays):
            np.save(root / split / name / f"{i}.npy", array)
    return data


def test_a_folder_is_read_as_it_is_laid_out(tmp_path):
    data = write(tmp_path)
    write(tmp_path, "val", 2)
    source = DenseFolder(tmp_path, "train", NYUV2)
    assert source.names == tuple(map(str, range(11)))  # 2 before 10
    sample = source[10]
    np.testing.assert_array_equal(sample.image, np.round(data["image"][10] * 255))
    np.testing.assert_array_equal(sample.truth["segmentation"], data["label"][10])
    np.testing.assert_array_equal(sample.truth["depth"], data["depth"][10])
    np.testing.assert_array_equal(sample.truth["normals"], data["normal"][10])
    assert sample.truth["segmentation"].dtype == np.int32
    assert len(DenseFolder(tmp_path, "test", NYUV2[:1])) == 2


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*image"):
        DenseFolder(tmp_path, "train", NYUV2)
    write(tmp_path)
    with pytest.raises(ValueError, match="splits train and test, not validation"):
        DenseFolder(tmp_path, "validation", NYUV2)
    with pytest.raises(ValueError, match=r"there is no folder .*edges"):
        DenseFolder(tmp_path, "train", [Task("edges", 2, "cross_entropy")])
    (tmp_path / "train/depth/3.npy").unlink()
    with pytest.raises(ValueError, match=r"task depth: .* has no file for 3 and 0 more images"):
        DenseFolder(tmp_path, "train", NYUV2)


@pytest.mark.parametrize(
    ("folder", "array", "message"),
    [
        ("label", np.full(SIZE, 13), "has the value 13, and task segmentation has the classes 0"),
        ("label", np.full(SIZE, 0.5), "has the value 0.5"),
        ("label", np.zeros((3, 4)), r"is \[3, 4\], and its image is \[12, 16\]"),
        ("depth", np.zeros((*SIZE, 2)), r"is \[12, 16, 2\], and task depth needs \[12, 16, 1\]"),
        ("depth", np.full(SIZE, np.nan), "not finite"),
        ("depth", np.full(SIZE, -1.0), "values below 0"),
        ("normal", np.full((*SIZE, 3), 1.0), "neither 1 nor 0"),
        ("image", np.zeros(SIZE), r"and an image is \(height, width, 3\)"),
        ("image", np.full((*SIZE, 3), 2.0), r"outside \[0, 1\]"),
    ],
)
def test_arrays_that_cannot_be(tmp_path, folder, array, message):
    write(tmp_path, count=1)
    np.save(tmp_path / f"train/{folder}/0.npy", array)
    source = DenseFolder(tmp_path, "train", NYUV2)
    with pytest.raises(ValueError, match=message):
        source[0]


def test_a_file_that_is_no_array_is_named(tmp_path):
    write(tmp_path, count=1)
    (tmp_path / "train/depth/0.npy").write_bytes(b"\x93NUMPY no")
    with pytest.raises(ValueError, match=r"depth/0.npy cannot be read as an array"):
        DenseFolder(tmp_path, "train", NYUV2)[0]


def plane(slope=(0.3, 0.1), shape=(60, 80)):
    """A depth map, its pixels' places as "classes", and directions that tell left from right."""
    rows, columns = np.indices(shape)
    depth = (5 + slope[0] * rows + slope[1] * columns)[..., None].astype(np.float32)
    normals = np.stack([columns / 80, rows / 60, np.zeros(shape)], -1).astype(np.float32)
    image = np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)
    labels = (rows * 80 + columns).astype(np.int32)
    truth = {"segmentation": labels, "depth": depth, "normals": normals}
    return DenseSample("a", image, truth)


TASKS = (Task("segmentation", 60 * 80, "cross_entropy"), *NYUV2[1:])


def test_a_mirror_turns_directions_around():
    sample = plane()
    config = DenseAugmentConfig(scales=(1.0,))
    seen = set()
    for seed in range(8):
        got = augment_dense(np.random.default_rng(seed), sample, TASKS, config)
        flipped = bool(got.image[0, 0, 0])
        seen.add(flipped)
        order = slice(None, None, -1 if flipped else 1)
        sign = np.float32([-1 if flipped else 1, 1, 1])
        np.testing.assert_array_equal(got.image, sample.image[:, order])
        np.testing.assert_array_equal(got.truth["depth"], sample.truth["depth"][:, order])
        np.testing.assert_array_equal(
            got.truth["normals"], sample.truth["normals"][:, order] * sign
        )
    assert seen == {True, False}


def test_what_is_enlarged_is_nearer():
    """Each pixel of the truths is a pixel of before, the same in all of them."""
    sample = plane()
    config = DenseAugmentConfig(flip=False, scales=(1.5,))
    got = augment_dense(np.random.default_rng(0), sample, TASKS, config)
    rows, columns = np.divmod(got.truth["segmentation"], 80)
    assert np.ptp(rows) == 39
    assert np.ptp(columns) == 52
    np.testing.assert_allclose(
        got.truth["depth"], sample.truth["depth"][rows, columns] / 1.5, rtol=1e-6
    )
    np.testing.assert_array_equal(got.truth["normals"], sample.truth["normals"][rows, columns])
    # The image goes along, to a pixel.
    assert np.abs(got.image[..., 1].astype(int) - rows).max() <= 1
    assert np.abs(got.image[..., 0].astype(int) - columns).max() <= 1


def test_changes_are_a_function_of_the_generator():
    sample = plane()
    one, other = (
        augment_dense(np.random.default_rng(5), sample, TASKS, DenseAugmentConfig())
        for _ in range(2)
    )
    np.testing.assert_array_equal(one.image, other.image)
    with pytest.raises(ValueError, match="scales must be 1 or more"):
        DenseAugmentConfig(scales=(0.5,))
