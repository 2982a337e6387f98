"""CityScapes, from small files in the layout of its archives and in MTAN's, to samples."""

import io
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from samjax.data.builders.cityscapes_archives import SIZE
from samjax.data.builders.prepare import prepare
from samjax.data.dense import open_dense
from samjax.tasks import CITYSCAPES, Task

NAMES = {
    "train": [
        "aachen/aachen_000000_000019",
        "aachen/aachen_000001_000019",
        "ulm/ulm_000000_000019",
    ],
    "val": ["lindau/lindau_000000_000019"],
}
# Twice the samples' size, so that resizing shows.
LARGE = (2 * SIZE[0], 2 * SIZE[1])
ENDINGS = {
    "leftImg8bit": "_leftImg8bit.png",
    "gtFine": "_gtFine_labelIds.png",
    "disparity": "_disparity.png",
}
# Of `cityscapesscripts/helpers/labels.py`: (id, trainId, categoryId) of what is evaluated.
LABELS = [
    (7, 0, 1), (8, 1, 1), (11, 2, 2), (12, 3, 2), (13, 4, 2), (17, 5, 3), (19, 6, 3), (20, 7, 3),
    (21, 8, 4), (22, 9, 4), (23, 10, 5), (24, 11, 6), (25, 12, 6), (26, 13, 7), (27, 14, 7),
    (28, 15, 7), (31, 16, 7), (32, 17, 7), (33, 18, 7),
]  # fmt: skip


def quiet():
    return Console(file=io.StringIO(), soft_wrap=True)


def file_of(root, kind, split, name):
    return root / kind / split / (name + ENDINGS[kind])


def write_official(root):
    """What the three archives hold, of what samples are made; ids in blocks of 2 by 2."""
    for split, names in NAMES.items():
        for i, name in enumerate(names):
            rng = np.random.default_rng(i)
            ids = rng.integers(0, 34, SIZE, np.uint8).repeat(2, 0).repeat(2, 1)
            disparity = rng.integers(0, 32258, SIZE, np.uint16).repeat(2, 0).repeat(2, 1)
            image = rng.integers(0, 256, (*SIZE, 3), np.uint8).repeat(2, 0).repeat(2, 1)
            kinds = {"leftImg8bit": image, "gtFine": ids, "disparity": disparity}
            for kind, pixels in kinds.items():
                file = file_of(root, kind, split, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)
    # Which are there, too.
    (root / "gtFine/train/ulm/ulm_000000_000019_gtFine_polygons.json").write_text("{}")
    hidden = file_of(root, "leftImg8bit", "test", "bonn/bonn_000000_000019")
    hidden.parent.mkdir(parents=True)
    Image.new("RGB", LARGE[::-1]).save(hidden)


def zip_archives(official, root):
    for kind in ENDINGS:
        with zipfile.ZipFile(root / f"{kind}_trainvaltest.zip", "w") as archive:
            archive.writestr("README", "of the archive")
            for file in sorted((official / kind).rglob("*")):
                archive.write(file, file.relative_to(official))


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    root = tmp_path_factory.mktemp("official")
    write_official(root)
    return root


@pytest.fixture(scope="module")
def data_dir(official, tmp_path_factory):
    """Of archives."""
    archives, root = tmp_path_factory.mktemp("archives"), tmp_path_factory.mktemp("tfds")
    zip_archives(official, archives)
    assert prepare("cityscapes", root, archives, quiet()).splits == {"train": 3, "test": 1}
    return root


def test_samples_are_made_of_the_archives(official, data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    nineteen = [Task("segmentation", 19, "cross_entropy")]
    seven_of, nineteen_of = np.full(34, -1), np.full(34, -1)
    for own, train, category in LABELS:
        seven_of[own], nineteen_of[own] = category - 1, train
    for split, folder in (("train", "train"), ("test", "val")):
        source, other = (open_dense("tfds:cityscapes", split, t) for t in (CITYSCAPES, nineteen))
        assert source.names == tuple(name.rpartition("/")[2] for name in NAMES[folder])
        source.check_sizes()
        for index, name in enumerate(NAMES[folder]):
            sample = source[index]
            files = (file_of(official, kind, folder, name) for kind in ENDINGS)
            image, ids, disparity = (np.asarray(Image.open(file)) for file in files)
            assert sample.image.shape == (*SIZE, 3)
            small = Image.fromarray(image).resize(SIZE[::-1], Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(sample.image, small)
            np.testing.assert_array_equal(sample.truth["segmentation"], seven_of[ids[::2, ::2]])
            np.testing.assert_array_equal(
                other[index].truth["segmentation"], nineteen_of[ids[::2, ::2]]
            )
            expected = disparity[::2, ::2, None] / 65535
            np.testing.assert_allclose(sample.truth["disparity"], expected, rtol=1e-6)
    with pytest.raises(ValueError, match="'segmentation'; the nearest is segmentation_"):
        open_dense("tfds:cityscapes", "train", [Task("segmentation", 13, "cross_entropy")])


@pytest.mark.parametrize("extracted", ["{}", "{0}_trainvaltest/{0}"])
def test_extracted_archives_serve_too(official, data_dir, tmp_path, monkeypatch, extracted):
    root = tmp_path / "cityscapes"
    for kind in ENDINGS:
        shutil.copytree(official / kind, root / extracted.format(kind))
    prepare("cityscapes", tmp_path / "tfds", root.parent, quiet())
    samples = []
    for folder in (data_dir, tmp_path / "tfds"):
        monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
        samples.append(open_dense("tfds:cityscapes", "train", CITYSCAPES)[1])
    one, other = samples
    assert one.name == other.name == "aachen_000001_000019"
    np.testing.assert_array_equal(one.image, other.image)
    for task in CITYSCAPES:
        np.testing.assert_array_equal(one.truth[task.name], other.truth[task.name])


def write_mtan(root):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(2):
            arrays = {
                "image": rng.random((8, 16, 3)),
                "label_2": rng.integers(-1, 2, (8, 16)),
                "label_7": rng.integers(-1, 7, (8, 16)),
                "label_19": rng.integers(-1, 19, (8, 16)),
                "depth": rng.random((8, 16, 1)).astype(np.float32) / 2,
            }
            for kind, array in arrays.items():
                (root / split / kind).mkdir(parents=True, exist_ok=True)
                np.save(root / split / kind / f"{i}.npy", array)


def test_mtans_folder_serves_too(tmp_path, monkeypatch):
    write_mtan(tmp_path / "cityscapes")
    prepare("cityscapes", tmp_path / "tfds", tmp_path, quiet())
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    for classes in (7, 19):
        tasks = [Task("segmentation", classes, "cross_entropy"), CITYSCAPES[1]]
        for split in ("train", "test"):
            expected = open_dense(str(tmp_path / "cityscapes"), split, tasks)
            source = open_dense("tfds:cityscapes", split, tasks)
            assert source.names == expected.names == ("0", "1")
            np.testing.assert_array_equal(source[1].image, expected[1].image)
            for name, array in expected[1].truth.items():
                np.testing.assert_array_equal(source[1].truth[name], array)


def test_what_is_missing_or_wrong_in_mtans_folder(tmp_path):
    root = tmp_path / "cityscapes"
    write_mtan(root)

    def complaint():
        with pytest.raises(ValueError) as caught:
            prepare("cityscapes", tmp_path / "tfds", root, quiet())
        assert list((tmp_path / "tfds" / "cityscapes").iterdir()) == []
        return str(caught.value)

    file = root / "val/label_19/1.npy"
    np.save(file, np.full((8, 16), 19))
    assert (
        f"{file} has the value 19, and task segmentation_19 has the classes 0 to 18" in complaint()
    )
    np.save(file, np.zeros((16, 8), int))
    said = complaint()
    assert f"{file} is [16, 8], and task segmentation_19 needs [8, 16]" in said
    np.save(file, np.zeros((8, 16)))
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file} cannot be read as an array" in complaint()
    shutil.rmtree(file.parent)
    assert "task segmentation_19: " in (said := complaint()) and "no folder label_19" in said


def test_what_is_missing_or_wrong_in_archives(official, tmp_path):
    root = tmp_path / "cityscapes"
    root.mkdir()

    def complaint(kind=ValueError):
        with pytest.raises(kind) as caught:
            prepare("cityscapes", tmp_path / "tfds", root, quiet())
        return str(caught.value)

    said = complaint(FileNotFoundError)
    assert "holds no archive of CityScapes, nor train/image and val/image as MTAN" in said
    assert (
        "register at https://www.cityscapes-dataset.com, get leftImg8bit_trainvaltest.zip" in said
    )
    shutil.copytree(official, root, dirs_exist_ok=True)
    name = NAMES["val"][0]
    labels, disparity = (file_of(root, kind, "val", name) for kind in ("gtFine", "disparity"))
    whole = labels.read_bytes()
    Image.new("L", LARGE[::-1], 34).save(labels)
    assert f"{labels} has the value 34, above 33" in complaint()
    Image.new("L", SIZE[::-1], 7).save(labels)
    assert f"{labels} is [128, 256], and its image is [256, 512]" in complaint()
    labels.write_bytes(whole[: len(whole) // 2])
    assert f"{labels} cannot be decoded as an image" in complaint()
    labels.write_bytes(whole)
    disparity.unlink()
    said = complaint()
    assert f"{root}/disparity has no val/{name}_disparity.png: get disparity_trainvaltest" in said
    shutil.rmtree(root / "leftImg8bit/val")
    assert f"{root}/leftImg8bit has no images of val/" in complaint()
    shutil.rmtree(root / "disparity")
    said = complaint(FileNotFoundError)
    assert "holds no disparity_trainvaltest.zip, or what was extracted of it" in said
    archive = root / "disparity_trainvaltest.zip"
    archive.write_bytes(b"no archive")
    assert f"{archive} is broken (" in complaint()
    assert list((tmp_path / "tfds" / "cityscapes").iterdir()) == []
