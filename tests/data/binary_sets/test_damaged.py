"""Datasets whose files are damaged, or are not what they are called."""

import io
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from samjax.data.builders.archives import Archive
from samjax.data.walk import untracked


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
        files.build(name)
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
    files.official("camo")
    archive = files.root / "CAMO-V.1.0-CVIU2019.zip"
    rewrite(archive, lambda name, data: change(data) if name == MASK else data)
    refused("camo", files, rf"{archive}.*{match}")


def test_masks_that_mark_nothing_are_refused(files):
    files.official("camo")
    archive = files.root / "CAMO-V.1.0-CVIU2019.zip"

    def empty(name, data):
        if not name.endswith(".png") or "/GT/" not in name:
            return data
        with Image.open(io.BytesIO(data)) as mask:
            return png(np.zeros((mask.height, mask.width), np.uint8))

    rewrite(archive, empty)
    refused("camo", files, rf"no mask in {archive}.*/GT marks anything")


def test_damaged_archives_are_named(files):
    files.official("camo")
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
    files.official("leaf_disease")
    archive = files.root / "leaf_disease_segmentation.zip"
    rewrite(archive, lambda name, data: table if name.endswith("/train.csv") else data)
    refused("leaf_disease", files, rf"{archive}/leaf_disease_segmentation/train.csv .*{match}")


def test_names_that_are_not_unique_are_refused(files):
    files.official("massachusetts_roads")
    files.write("mass_roads/train/sat/10078660_15.jpg", np.zeros((9, 9, 3), np.uint8))
    refused("massachusetts_roads", files, "sat has several files of one name: '10078660_15.jpg'")
    files.official("polyp")
    archive = files.root / "TestDataset.zip"
    with zipfile.ZipFile(archive, "a") as opened:
        for kind in ("images", "masks"):
            twin = opened.read(f"TestDataset/Kvasir/{kind}/cju1bm8.png")
            opened.writestr(f"TestDataset/CVC-ClinicDB/{kind}/cju1bm8.png", twin)
    refused("polyp", files, rf"{archive}.*Kvasir.*{archive}.*CVC-ClinicDB.* have one name")
