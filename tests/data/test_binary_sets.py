"""The binary sets of Conv-LoRA and NAS-LoRA, from small files in their official layouts."""

import dataclasses
import io
import shutil
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from samjax.config import Config
from samjax.data.augment import NO_AUGMENTATION
from samjax.data.builders import builder_class
from samjax.data.builders.archives import Archive
from samjax.data.builders.prepare import prepare
from samjax.data.prompts import PromptConfig
from samjax.data.sources import open_source
from samjax.data.walk import untracked
from samjax.peft import MethodConfig
from samjax.run import train
from samjax.weights import save_checkpoint


class Files:
    """A dataset's files, as published, and what they show."""

    def __init__(self, root):
        self.root = root
        self.images: dict[tuple[str, str], np.ndarray] = {}
        self.masks: dict[tuple[str, str], np.ndarray] = {}

    def add(self, split, image, mask, mode="L"):
        """Writes noise and a rectangle to two paths; the sample's name is the image's stem."""
        number = len(self.images)
        rng = np.random.default_rng(number)
        height, width = 20 + number, 31 - number
        marked = np.zeros((height, width), bool)
        marked[4 : 9 + number, 5:12] = True
        name = image.rpartition("/")[2].rpartition(".")[0]
        self.write(image, rng.integers(0, 256, (height, width, 3), np.uint8))
        self.write(mask, encoded(marked, mode))
        with Image.open(self.root / image) as written:
            self.images[split, name] = np.asarray(written.convert("RGB"))
        self.masks[split, name] = marked

    def write(self, path, pixels):
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        made = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        made.save(file)

    def zip(self, *folders):
        """Packs folders into archives of their names, or of the name after a colon."""
        for told in folders:
            folder, _, file = told.partition(":")
            with zipfile.ZipFile(self.root / (file or f"{folder}.zip"), "w") as archive:
                archive.writestr(f"__MACOSX/{folder}/._1.png", b"macOS")
                for path in sorted((self.root / folder).rglob("*")):
                    archive.write(path, path.relative_to(self.root))
            shutil.rmtree(self.root / folder)


def encoded(marked, mode):
    """A mask as the sets have them: black and white, nearly so, in colours, of 16 bits."""
    grey = np.where(marked, 255, 0).astype(np.uint8)
    if mode == "noisy":  # what JPEG leaves
        noise = np.random.default_rng(1).integers(0, 60, marked.shape, np.uint8)
        return np.where(marked, 255 - noise, noise)
    if mode == "I;16":
        return np.where(marked, 65535 - 99, 257 * 60).astype(np.uint16)
    if mode == "P":
        image = Image.fromarray(marked.astype(np.uint8), "P")
        image.putpalette([0, 0, 0, 100, 0, 0])
        return image
    return Image.fromarray(grey).convert(mode)


def cvc_clinicdb(files):
    for i in range(1, 11):
        original, truth = (f"CVC-ClinicDB/{kind}/{i}.tif" for kind in ("Original", "Ground Truth"))
        files.add("all", original, truth)


def isic2017(files):
    for split, place in (("train", "Training"), ("validation", "Validation"), ("test", "Test_v2")):
        images, masks = f"ISIC-2017_{place}_Data", f"ISIC-2017_{place}_Part1_GroundTruth"
        for _ in range(2):
            name = f"ISIC_{len(files.images):07}"
            files.add(split, f"{images}/{name}.jpg", f"{masks}/{name}_segmentation.png")
            files.write(f"{images}/{name}_superpixels.png", np.zeros((20, 31), np.uint8))
        (files.root / images / f"{images}_metadata.csv").write_text("image_id\n")
        files.zip(images, masks)


def camo(files):
    root = "CAMO-V.1.0-CVIU2019"
    for split, place in (("train", "Train"), ("test", "Test")):
        for mode in ("noisy", "RGB", "RGBA", "P", "I;16", "1"):
            name = f"camourflage_{len(files.images):05}"
            files.add(split, f"{root}/Images/{place}/{name}.jpg", f"{root}/GT/{name}.png", mode)
    files.zip(root)


def sbu_shadow(files):
    for split, place in (("train", "SBUTrain4KRecoveredSmall"), ("test", "SBU-Test")):
        for i in range(2):
            images, masks = (f"SBU-shadow/{place}/Shadow{kind}" for kind in ("Images", "Masks"))
            files.add(split, f"{images}/lssd{i}.jpg", f"{masks}/lssd{i}.png")
    files.write("SBU-shadow/SBU-Test/ShadowImages/lonely.jpg", np.zeros((9, 9, 3), np.uint8))
    files.zip("SBU-shadow")


def leaf_disease(files):
    tables(files, "leaf_disease_segmentation", {"train": "train", "val": "validation"}, "test")


def tables(files, name, splits, *tests):
    """Conv-LoRA's archive of a set: paths in CSV files."""
    for place, split in {**splits, **dict.fromkeys(tests, "test")}.items():
        rows = [",image,label"]
        for i in range(2):
            image, mask = f"{place}/images/{place}{i}.jpg", f"{place}/masks/{place}{i}.png"
            files.add(split, f"{name}/{image}", f"{name}/{mask}")
            rows.append(f"{i},{image},{mask}")
        (files.root / name / f"{place}.csv").write_text("\n".join(rows) + "\n")
    files.zip(name)


def massachusetts_roads(files):
    for split, place in (("train", "train"), ("validation", "valid"), ("test", "test")):
        for i in range(2):
            name = f"{10078660 + i}_15"
            images, masks = f"mass_roads/{place}/sat", f"mass_roads/{place}/map"
            files.add(split, f"{images}/{name}.tiff", f"{masks}/{name}.tif", ("L", "RGB")[i])


def polyp(files):
    for name in ("cju0qkwl35piu", "1", "2"):
        image, mask = (f"TrainDataset/{kind}/{name}.png" for kind in ("image", "mask"))
        files.add("train", image, mask, "noisy")
    for test, names in {"Kvasir": ("cju1b75x6", "cju1bm8"), "CVC-ClinicDB": ("7",)}.items():
        for name in names:
            image, mask = (f"TestDataset/{test}/{kind}/{name}.png" for kind in ("images", "masks"))
            files.add("test", image, mask, "noisy")
    files.write("TestDataset/CVC-300/images/149.png", np.zeros((9, 9, 3), np.uint8))
    files.zip("TrainDataset", "TestDataset")


OFFICIAL = {
    write.__name__: write
    for write in (
        cvc_clinicdb,
        isic2017,
        camo,
        sbu_shadow,
        leaf_disease,
        massachusetts_roads,
        polyp,
    )
}


def quiet():
    return Console(file=io.StringIO(), soft_wrap=True)


def build(name, files):
    return prepare(name, files.root / "tfds", files.root, quiet())


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return Files(tmp_path)


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


@pytest.mark.parametrize("name", OFFICIAL)
def test_prepared_and_read_back(files, name, caplog):
    OFFICIAL[name](files)
    prepared = build(name, files)
    assert sum(prepared.splits.values()) == len(files.images)
    assert f"pairs, but {name} has" in caplog.text
    caplog.clear()
    assert_read_back(f"tfds:{name}", files)
    assert not caplog.messages  # thresholds are known and nothing is guessed
    assert "tensorflow" not in sys.modules


def test_parts_of_a_test_split(files):
    polyp(files)
    build("polyp", files)
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
    tables(files, archive, {"train": "train", "val": "validation"}, *tests)
    assert set(build(name, files).splits) == {"train", "validation", "test"}
    assert_read_back(f"tfds:{name}", files)


def test_what_may_be_left_out_is_told(files, caplog):
    sbu_shadow(files)
    build("sbu_shadow", files)
    folder = files.root / "SBU-shadow.zip" / "SBU-shadow" / "SBU-Test" / "ShadowImages"
    assert f"{folder} has images without a mask: 'lonely.jpg'; they are left out" in caplog.text


def test_other_layouts_of_a_dataset(files):
    for split, place in (("train", "train"), ("validation", "val"), ("test", "test")):
        files.add(split, f"tiff/{place}/1.tiff", f"tiff/{place}_labels/1.tif")
    files.zip("tiff:massachusetts-roads-dataset.zip")
    build("massachusetts_roads", files)
    assert_read_back("tfds:massachusetts_roads", files)


def test_plural_folders_and_folders_within_themselves(files):
    polyp(files)
    for archive in ("TrainDataset", "TestDataset"):
        with zipfile.ZipFile(files.root / f"{archive}.zip") as opened:
            opened.extractall(files.root / archive)
        (files.root / f"{archive}.zip").unlink()
    inner = files.root / "TrainDataset" / "TrainDataset"
    (inner / "image").rename(inner / "images")
    (inner / "mask").rename(inner / "masks")
    build("polyp", files)
    assert_read_back("tfds:polyp", files)


# What is missing


@pytest.mark.parametrize("name", OFFICIAL)
def test_each_archive_that_is_missing_is_named(files, name):
    with pytest.raises(FileNotFoundError, match="https://") as caught:
        build(name, files)
    assert str(files.root) in str(caught.value)
    OFFICIAL[name](files)
    published = [path for path in files.root.iterdir() if path.name != "tfds"]
    for path in published:
        away = path.rename(files.root.parent / path.name)
        with pytest.raises(FileNotFoundError, match=path.name) as caught:
            build(name, files)
        others = {other.name for other in published} - {path.name}
        said = str(caught.value).partition(": get")[0]
        assert not [other for other in others if other in said]
        assert "\n" not in str(caught.value)
        away.rename(path)


@pytest.mark.parametrize("name", OFFICIAL)
def test_each_folder_that_is_missing_is_named(files, name):
    OFFICIAL[name](files)
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
            build(name, files)
        assert place.name in str(caught.value) and "\n" not in str(caught.value)
        away.rename(place)
    build(name, files)


def test_the_license_and_the_citation_are_shown(files):
    cvc_clinicdb(files)
    console = quiet()
    prepare("cvc_clinicdb", files.root / "tfds", files.root / "CVC-ClinicDB", console)
    said = console.file.getvalue()
    assert "license: for research and education only" in said and "@article{bernal2015wm" in said


# Damaged files


def rewrite(archive, change):
    """Writes an archive anew with `change(name, data)` in the place of each member's bytes."""
    with zipfile.ZipFile(archive) as opened:
        members = {name: opened.read(name) for name in opened.namelist()}
    with zipfile.ZipFile(archive, "w") as opened:
        for name, data in members.items():
            if (changed := change(name, data)) is not None:
                opened.writestr(name, changed)


def refused(name, files, match):
    with pytest.raises(ValueError, match=match) as caught:
        build(name, files)
    assert "\n" not in str(caught.value) and not (files.root / "tfds" / name / "1.0.0").exists()


MASK = "CAMO-V.1.0-CVIU2019/GT/camourflage_00007.png"


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data[: len(data) // 2], f"{MASK} cannot be decoded"),
        (lambda data: b"", f"{MASK} cannot be decoded .*empty"),
        (lambda data: png(np.zeros((8, 9), np.uint8)), f"{MASK} is 9x8 pixels"),
        (lambda data: None, "Test has images without a mask: 'camourflage_00007.jpg'"),
    ],
)
def test_a_mask_in_an_archive_that_cannot_be_used_is_named(files, change, match):
    camo(files)
    archive = files.root / "CAMO-V.1.0-CVIU2019.zip"
    rewrite(archive, lambda name, data: change(data) if name == MASK else data)
    refused("camo", files, rf"{archive}.*{match}")


def test_masks_that_mark_nothing_are_refused(files):
    camo(files)
    archive = files.root / "CAMO-V.1.0-CVIU2019.zip"

    def empty(name, data):
        if not name.endswith(".png") or "/GT/" not in name:
            return data
        with Image.open(io.BytesIO(data)) as mask:
            return png(np.zeros((mask.height, mask.width), np.uint8))

    rewrite(archive, empty)
    refused("camo", files, rf"no mask in {archive}.*/GT marks anything")


def test_damaged_archives_are_named(files):
    camo(files)
    archive = files.root / "CAMO-V.1.0-CVIU2019.zip"
    whole = archive.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:3000] + bytes(99) + whole[3099:], b"<html>"):
        archive.write_bytes(broken)
        refused("camo", files, f"{archive} is broken")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize("member", ["CAMO/../../evil.png", "/CAMO/evil.png", "CAMO/..\\evil.png"])
def test_members_that_lead_out_of_the_folder_are_refused(tmp_path, kind, member):
    file = tmp_path / f"set.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as opened:
            opened.writestr(member, b"evil")
    else:
        with tarfile.open(file, "w:gz") as opened:
            opened.addfile(tarfile.TarInfo(member), io.BytesIO())
    with pytest.raises(ValueError, match=f"{file} has a member .*evil.png' that leads out of it"):
        Archive("CAMO", file.name).unpack(file, tmp_path / "to", untracked)
    assert [path.name for path in tmp_path.rglob("*.*")] == [file.name]


def test_tar_archives(tmp_path):
    file = tmp_path / "set.tar.gz"
    with tarfile.open(file, "w:gz") as opened:
        info = tarfile.TarInfo("./data/CAMO/GT/1.png")
        info.size = 3
        opened.addfile(info, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("data/CAMO/GT/2.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        opened.addfile(link)
    archive = Archive("CAMO", file.name)
    root = archive.unpack(file, tmp_path / "to", untracked)
    assert root == tmp_path / "to" / "CAMO"
    assert [path.name for path in root.rglob("*.png")] == ["1.png"]
    assert (root / "GT" / "1.png").read_bytes() == b"abc"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=f"{file} is broken"):
        archive.unpack(file, tmp_path / "again", untracked)


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ("image,mask\ntrain/images/train0.jpg,x\n", "no label"),
        ("image,label\n", "lists no images"),
        ("image,label\ntrain/images/gone.jpg,train/masks/train0.png\n", "gone.jpg, which is not"),
        ("image,label\n../../secret.jpg,train/masks/train0.png\n", "secret.jpg, which is not"),
    ],
)
def test_tables_that_do_not_fit_their_files_are_named(files, table, match):
    (files.root.parent / "secret.jpg").write_bytes(b"")
    leaf_disease(files)
    archive = files.root / "leaf_disease_segmentation.zip"
    rewrite(archive, lambda name, data: table if name.endswith("/train.csv") else data)
    refused("leaf_disease", files, rf"{archive}/leaf_disease_segmentation/train.csv .*{match}")


def test_names_that_are_not_unique_are_refused(files):
    massachusetts_roads(files)
    files.write("mass_roads/train/sat/10078660_15.jpg", np.zeros((9, 9, 3), np.uint8))
    refused("massachusetts_roads", files, "sat has several files of one name: '10078660_15.jpg'")
    polyp(files)
    archive = files.root / "TestDataset.zip"
    with zipfile.ZipFile(archive, "a") as opened:
        for kind in ("images", "masks"):
            twin = opened.read(f"TestDataset/Kvasir/{kind}/cju1bm8.png")
            opened.writestr(f"TestDataset/CVC-ClinicDB/{kind}/cju1bm8.png", twin)
    refused("polyp", files, rf"{archive}.*Kvasir.*{archive}.*CVC-ClinicDB.* have one name")


# Training


@pytest.fixture(scope="module")
def weights(tmp_path_factory, small_model, small_params):
    path = tmp_path_factory.mktemp("weights") / "small"
    save_checkpoint(path, small_model.config, small_params)
    return path


@pytest.mark.parametrize("data", ["polyp/kvasir", "isic2017", "massachusetts_roads"])
def test_a_step_of_training(files, data, weights):
    name = data.partition("/")[0]
    OFFICIAL[name](files)
    build(name, files)
    config = Config(
        weights=str(weights),
        data=f"tfds:{data}",
        augment=NO_AUGMENTATION,
        prompts=PromptConfig(none=1.0, box=0.0, points=0.0),
        method=MethodConfig("decoder"),
        cache_features="off",
        steps=1,
        batch_size=2,
        eval_batch_size=2,
        gallery=1,
    )
    summary = train(config, files.root / "run", quiet())
    assert summary["steps"] == 1 and (files.root / "run" / "adapter.safetensors").is_file()
    assert dataclasses.asdict(config)["data"] == f"tfds:{data}"
