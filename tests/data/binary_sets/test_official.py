"""The binary sets of Conv-LoRA and NAS-LoRA, from small files in their official layouts."""

import io
import shutil
import sys
import zipfile

import numpy as np
import pytest
from rich.console import Console

from samjax.data.builders import builder_class
from samjax.data.builders.prepare import prepare
from samjax.data.sources import open_source

NAMES = (
    "cvc_clinicdb",
    "isic2017",
    "camo",
    "sbu_shadow",
    "leaf_disease",
    "massachusetts_roads",
    "polyp",
)


def assert_read_back(data, files):
    """Each sample of each split has the pixels that were written, and none is left out."""
    splits = {split for split, _ in files.images}
    drawn = splits == {"all"}
    seen = set()
    for split in ("train", "validation", "test") if drawn else splits:
        source = open_source(data, split)
        assert list(source.names) == sorted(source.names) or data == "tfds:polyp"
        for name, sample in zip(source.names, source, strict=True):
            key = ("all" if drawn else split, name)
            assert sample.name == name
            np.testing.assert_array_equal(sample.image, files.images[key])
            np.testing.assert_array_equal(sample.mask, files.masks[key])
            seen.add(key)
    assert seen == files.images.keys()


@pytest.mark.parametrize("name", NAMES)
def test_prepared_read_back_and_trained_on(files, name, caplog, train_one_step):
    files.official(name)
    prepared = files.build(name)
    assert sum(prepared.splits.values()) == len(files.images)
    assert f"pairs, but {name} has" in caplog.text
    caplog.clear()
    assert_read_back(f"tfds:{name}", files)
    assert np.isfinite(train_one_step(open_source(f"tfds:{name}", "train")))
    assert not caplog.messages  # thresholds are known and nothing is guessed
    assert "tensorflow" not in sys.modules


def test_parts_of_a_test_split(files):
    files.official("polyp")
    files.build("polyp")
    of_parts = [open_source(f"tfds:polyp/{part}", "test") for part in ("kvasir", "cvc_clinicdb")]
    assert [source.names for source in of_parts] == [("cju1b75x6", "cju1bm8"), ("7",)]
    assert open_source("tfds:polyp", "test").names == ("cju1b75x6", "cju1bm8", "7")
    np.testing.assert_array_equal(of_parts[1][0].mask, files.masks["test", "7"])
    assert len(open_source("tfds:polyp/kvasir", "train")) == 3
    with pytest.raises(ValueError, match="no part 'etis', only kvasir, cvc_clinicdb"):
        open_source("tfds:polyp/etis", "test")


@pytest.mark.parametrize(
    ("name", "archive", "tests"),
    [
        ("camo", "camo_sem_seg", ["test_CAMO"]),
        ("sbu_shadow", "SBU-shadow", ["test"]),  # the official archive has the same name
        ("isic2017", "isic2017", ["test"]),
        ("massachusetts_roads", "road_segmentation", ["test"]),
        ("polyp", "polyp", ["test_Kvasir", "test_CVC-ClinicDB"]),
    ],
)
def test_conv_loras_archives_have_a_validation_split(files, name, archive, tests):
    files.table(archive, {"train": "train", "val": "validation"}, *tests)
    assert set(files.build(name).splits) == {"train", "validation", "test"}
    assert_read_back(f"tfds:{name}", files)


def test_what_may_be_left_out_is_told(files, caplog):
    files.official("sbu_shadow")
    files.build("sbu_shadow")
    folder = files.root / "SBU-shadow.zip" / "SBU-shadow" / "SBU-Test" / "ShadowImages"
    assert f"{folder} has images without a mask: 'lonely.jpg'; they are left out" in caplog.text


def test_other_layouts_of_a_dataset(files):
    for split, place in (("train", "train"), ("validation", "val"), ("test", "test")):
        files.add(split, f"tiff/{place}/1.tiff", f"tiff/{place}_labels/1.tif")
    files.zip("tiff:massachusetts-roads-dataset.zip")
    files.build("massachusetts_roads")
    assert_read_back("tfds:massachusetts_roads", files)


def test_plural_folders_and_folders_within_themselves(files):
    files.official("polyp")
    for archive in ("TrainDataset", "TestDataset"):
        with zipfile.ZipFile(files.root / f"{archive}.zip") as opened:
            opened.extractall(files.root / archive)
        (files.root / f"{archive}.zip").unlink()
    inner = files.root / "TrainDataset" / "TrainDataset"
    (inner / "image").rename(inner / "images")
    (inner / "mask").rename(inner / "masks")
    files.build("polyp")
    assert_read_back("tfds:polyp", files)


def test_an_archive_in_a_folder_that_is_called_as_it_is(files, tmp_path):
    """DIR/isic2017/isic2017.zip and the like: the folder's name does not make it the dataset."""
    files.official("leaf_disease")
    place = tmp_path / "leaf_disease_segmentation"
    place.mkdir()
    (files.root / f"{place.name}.zip").rename(place / f"{place.name}.zip")
    prepare("leaf_disease", files.root / "tfds", place, Console(file=io.StringIO()))
    assert_read_back("tfds:leaf_disease", files)


# What is missing


@pytest.mark.parametrize("name", NAMES)
def test_each_archive_that_is_missing_is_named(files, name):
    with pytest.raises(FileNotFoundError, match="https://") as caught:
        files.build(name)
    assert str(files.root) in str(caught.value)
    files.official(name)
    published = [path for path in files.root.iterdir() if path.name != "tfds"]
    for path in published:
        away = path.rename(files.root.parent / path.name)
        with pytest.raises(FileNotFoundError, match=path.name) as caught:
            files.build(name)
        others = {other.name for other in published} - {path.name}
        said = str(caught.value).partition(": get")[0]
        assert not [other for other in others if other in said]
        assert "\n" not in str(caught.value)
        away.rename(path)


@pytest.mark.parametrize("name", NAMES)
def test_each_folder_that_is_missing_is_named(files, name):
    files.official(name)
    for archive in files.root.glob("*.zip"):
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(files.root)
        archive.unlink()
    layout = builder_class(name).LAYOUTS[name == "sbu_shadow"]
    places = [path for path in {files.root / p for p in layout.paths} if path.exists()]
    assert len(places) >= 2
    for place in places:
        away = place.rename(files.root / "away")
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            files.build(name)
        assert place.name in str(caught.value) and "\n" not in str(caught.value)
        away.rename(place)
    files.build(name)


def test_archives_that_are_missing_are_downloaded(files, monkeypatch):
    files.official("isic2017")
    manual, server = files.root / "tfds" / "downloads" / "manual", files.root.parent / "server"
    fetched = []

    def fetch(url, path, size, checksum, console):
        fetched.append((url, checksum))
        shutil.move(server / path.name, path)

    monkeypatch.setattr("samjax.data.builders.prepare.fetch", fetch)
    for folder in (manual, server):
        folder.mkdir(parents=True)
    for archive in files.root.glob("*.zip"):
        archive.rename((manual if "Training" in archive.name else server) / archive.name)
    prepare("isic2017", files.root / "tfds", None, Console(file=io.StringIO()))
    assert_read_back("tfds:isic2017", files)
    assert len(fetched) == 4 and all(checksum.startswith("md5:") for _, checksum in fetched)
    url = "https://isic-challenge-data.s3.amazonaws.com/2017/ISIC-2017_Test_v2_Data.zip"
    assert url in dict(fetched)


def test_the_license_and_the_citation_are_shown(files):
    files.official("cvc_clinicdb")
    console = Console(file=io.StringIO(), soft_wrap=True)
    prepare("cvc_clinicdb", files.root / "tfds", files.root / "CVC-ClinicDB", console)
    said = console.file.getvalue()
    assert "license: for research and education only" in said and "@article{bernal2015wm" in said
