"""NYUv2 as a dataset of TFDS: built from a folder in MTAN's layout, it has the folder's samples."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from rich.console import Console

from samjax.data.builders.prepare import prepare
from samjax.data.dense import DenseDataset, open_dense
from samjax.data.dense_tfds import DenseTfds
from samjax.data.sources import open_source
from samjax.tasks import NYUV2, Task

SIZE = (10, 14)
COUNTS = {"train": 11, "val": 3}


def write(root):
    """A folder as MTAN has it; labels of 64 bits, 2 before 10, unknown pixels."""
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for folder in ("image", "label", "depth", "normal"):
            (root / split / folder).mkdir(parents=True)
        for i in range(count):
            normals = rng.normal(size=(*SIZE, 3))
            normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
            normals[0] = 0
            arrays = {
                "image": rng.integers(0, 256, (*SIZE, 3)) / 255,
                "label": rng.integers(-1, 13, SIZE).astype(np.float64),
                "depth": rng.random((*SIZE, 1), np.float32) * 9,
                "normal": normals,
            }
            for folder, array in arrays.items():
                np.save(root / split / folder / f"{i}.npy", array)


def quiet():
    return Console(file=io.StringIO(), soft_wrap=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("files") / "nyuv2"
    write(root)
    return root


@pytest.fixture(scope="module")
def data_dir(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    assert prepare("nyuv2", root, folder, quiet()).splits == {"train": 11, "test": 3}
    return root


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("tasks", [NYUV2, NYUV2[:1], NYUV2[:0:-1]])
def test_samples_are_those_of_the_folder(folder, data_dir, monkeypatch, split, tasks):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    expected = open_dense(str(folder), split, tasks)
    source = open_dense("tfds:nyuv2", split, tasks)
    assert isinstance(source, DenseDataset) and isinstance(source, DenseTfds)
    assert source.names == expected.names and len(source) == len(expected)
    source.check_sizes()
    for index in reversed(range(len(source))):
        got, wanted = source[index], expected[index]
        assert got.name == wanted.name and got.image.dtype == np.uint8
        np.testing.assert_array_equal(got.image, wanted.image)
        assert list(got.truth) == list(wanted.truth) == [task.name for task in tasks]
        for name, array in wanted.truth.items():
            assert got.truth[name].dtype == array.dtype
            np.testing.assert_array_equal(got.truth[name], array)


def test_tfds_reads_it_too(folder, data_dir):
    records = tfds.builder_from_directory(data_dir / "nyuv2" / "1.0.0").as_data_source("test")
    image = np.load(folder / "val" / "image" / "2.npy")
    np.testing.assert_array_equal(records[2]["image"], np.round(image * 255))
    depth = np.load(folder / "val" / "depth" / "2.npy")
    np.testing.assert_array_equal(records[2]["depth"], depth)
    labels = np.load(folder / "val" / "label" / "2.npy")
    np.testing.assert_array_equal(records[2]["segmentation"], labels)


NO_TENSORFLOW = """
import sys
from samjax import cli
from samjax.data.dense import open_dense
from samjax.tasks import NYUV2
assert "tensorflow_datasets" not in sys.modules, "slows down every command"
assert cli.main(["data", "prepare", "nyuv2", "--manual-dir", sys.argv[1], "--json"]) == 0
open_dense("tfds:nyuv2", "test", NYUV2).check_sizes()
assert "tensorflow" not in sys.modules
"""


def test_the_command_without_tensorflow_and_without_warnings(folder, tmp_path):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "tensorflow.py").write_text("raise ImportError('not to be imported')")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", NO_TENSORFLOW, str(folder.parent)],
        env={
            **os.environ,
            "TFDS_DATA_DIR": str(tmp_path),
            "PYTHONPATH": str(tmp_path / "packages"),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["splits"] == {"train": 11, "test": 3} and not result["reused"]
    for said in ("@inproceedings", "writing train", "writing test", "has 1449", "tfds:nyuv2"):
        assert said in done.stderr


def test_what_is_missing_is_told(folder, data_dir, tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"no train/image and val/image.*github.com/lorenmt"
    ):
        prepare("nyuv2", tmp_path, tmp_path, quiet())
    with pytest.raises(FileNotFoundError, match=r"manual holds no .*--manual-dir"):
        prepare("nyuv2", tmp_path, None, quiet())
    with pytest.raises(FileNotFoundError, match="run `samjax data prepare nyuv2`"):
        DenseTfds("nyuv2", "train", NYUV2, data_dir=tmp_path)
    with pytest.raises(
        ValueError, match="'normal'; the nearest is normals, it has depth, normals, "
    ):
        DenseTfds("nyuv2", "train", [Task("normal", 3, "cosine")], data_dir=data_dir)
    few = DenseTfds("nyuv2", "train", [Task("segmentation", 7, "cross_entropy")], data_dir=data_dir)
    with pytest.raises(ValueError, match=r"0 \(segmentation\) has the value .* the classes 0 to 6"):
        few.check_sizes()
    with pytest.raises(ValueError, match=r"0 \(depth\) is \[10, 14, 1\], and task depth needs"):
        DenseTfds("nyuv2", "test", [Task("depth", 3, "cosine")], data_dir=data_dir).check_sizes()
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    with pytest.raises(ValueError, match="no validation"):
        open_dense("tfds:nyuv2", "validation", NYUV2)
    with pytest.raises(ValueError, match="nyuv2 has dense tasks and no masks"):
        open_source("tfds:nyuv2", "train")


def test_masks_are_no_dense_task(tmp_path):
    root = tmp_path / "Kvasir-SEG"
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
        Image.new("L", (9, 8), 255).save(root / kind / "a.jpg")
    prepare("kvasir_seg", tmp_path, root, quiet())
    with pytest.raises(ValueError, match="kvasir_seg has masks and no dense tasks"):
        DenseTfds("kvasir_seg", "train", NYUV2, data_dir=tmp_path)


def test_a_folder_that_cannot_be_read_leaves_nothing(tmp_path):
    root = tmp_path / "files"
    write(root)
    np.save(root / "train" / "depth" / "4.npy", np.full((*SIZE, 1), np.nan))
    with pytest.raises(ValueError, match=r"train/depth/4.npy has values that are not finite"):
        prepare("nyuv2", tmp_path, root, quiet())
    assert list((tmp_path / "nyuv2").iterdir()) == []
    (root / "val" / "normal" / "1.npy").unlink()
    with pytest.raises(ValueError, match=r"task normals: .* has no file for 1 of .*val/image"):
        prepare("nyuv2", tmp_path, root, quiet())
