"""Folders, zips and tars as the same files by the same names."""

import io
import tarfile
import zipfile

import pytest

from samjax.data.builders.members import Members

FILES = {"set/train/a.txt": b"first", "set/train/b.bin": bytes(3000), "set/c.txt": b""}
HIDDEN = {"__MACOSX/set/._c.txt": b"x", "set/.DS_Store": b"x"}


def write_folder(root):
    for name, content in {**FILES, **HIDDEN}.items():
        file = root / "folder" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return root / "folder"


def write_zip(root):
    with zipfile.ZipFile(root / "files.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("set/", b"")
        for name, content in {**FILES, **HIDDEN}.items():
            archive.writestr(name, content)
    return root / "files.zip"


def write_tar(root):
    with tarfile.open(root / "files.tar", "w") as archive:
        for name, content in {**FILES, **HIDDEN}.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("set/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return root / "files.tar"


@pytest.mark.parametrize("write", [write_folder, write_zip, write_tar])
def test_each_kind_holds_the_same_files(tmp_path, write):
    place = write(tmp_path)
    members = Members(place)
    assert members.names == sorted(FILES)
    assert {name: members.read(name) for name in members.names} == FILES
    assert members.path("set/c.txt") == place / "set/c.txt"
    part = members.below("train")
    assert part is not None and part.names == ["c.txt", "train/a.txt", "train/b.bin"]
    assert part.under("train").read("a.txt") == b"first"
    assert part.under("train").path("a.txt") == place / "set/train/a.txt"
    assert members.below("set/train/a.txt").names == sorted(FILES)
    assert members.below("rain") is None and members.below("test") is None


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_what_is_broken_is_named(tmp_path, write):
    place = write(tmp_path)
    whole = place.read_bytes()
    place.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=rf"{place.name} is broken \(.*get the archive again"):
        Members(place)
    place.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ValueError, match=rf"{place.name}.* is broken \("):
        Members(place).read("set/train/b.bin")
