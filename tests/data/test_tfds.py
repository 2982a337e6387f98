"""Datasets of TFDS, from files laid out as Kvasir-SEG's archive to samples, without TensorFlow."""

import dataclasses
import functools
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from rich.console import Console

from samjax import cli
from samjax.config import Config
from samjax.data import builders
from samjax.data.builders.archives import Archive
from samjax.data.builders.image_mask import ImageMaskBuilder
from samjax.data.builders.kvasir_seg import KvasirSeg
from samjax.data.builders.layouts import Folders, Layout
from samjax.data.builders.prepare import prepare
from samjax.data.folder import FolderSource
from samjax.data.sources import Dataset, open_source
from samjax.data.tfds import TfdsSource
from samjax.run_folder import with_absolute_paths

NAMES = [f"cju{i:02}" for i in range(20)]
ORIENTATION, ROTATED = 0x0112, 6


def write_official(root):
    """Kvasir-SEG/{images,masks}/*.jpg as published: JPEG, masks too, sizes that differ."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (root / "Kvasir-SEG" / kind).mkdir(parents=True)
    for i, name in enumerate(NAMES):
        height, width = 24 + i, 33 + 2 * i
        exif = Image.Exif()
        if i == 3:
            exif[ORIENTATION] = ROTATED
        mask = np.zeros((height, width, 3), np.uint8)
        mask[5:17, 6 : 12 + i] = 255
        for kind, pixels in (
            ("images", rng.integers(0, 256, (height, width, 3), np.uint8)),
            ("masks", mask),
        ):
            file = root / "Kvasir-SEG" / kind / f"{name}.jpg"
            Image.fromarray(pixels).save(file, exif=exif)
    (root / "Kvasir-SEG" / "kavsir_bboxes.json").write_text("{}")


def zip_folder(root):
    with zipfile.ZipFile(root / "kvasir-seg.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/Kvasir-SEG/._images", b"macOS")
        for file in sorted((root / "Kvasir-SEG").rglob("*")):
            archive.write(file, file.relative_to(root))
    return root / "kvasir-seg.zip"


def quiet():
    return Console(file=io.StringIO(), soft_wrap=True)


def build(data_dir, manual_dir):
    return prepare("kvasir_seg", data_dir, manual_dir, quiet())


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    root = tmp_path_factory.mktemp("official")
    write_official(root)
    return root


@pytest.fixture(scope="module")
def archive(official, tmp_path_factory):
    """A folder that holds the archive only."""
    root = tmp_path_factory.mktemp("archive")
    return zip_folder(official).rename(root / "kvasir-seg.zip").parent


@pytest.fixture(scope="module")
def data_dir(archive, tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    prepared = build(root, archive)
    assert prepared.splits == {"train": len(NAMES)} and not prepared.reused
    return root


def assert_same(one, other):
    assert one.name == other.name
    np.testing.assert_array_equal(one.image, other.image)
    np.testing.assert_array_equal(one.mask, other.mask)


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("options", [{}, {"seed": 5, "fractions": (0.5, 0.25, 0.25)}])
def test_splits_and_samples_are_those_of_the_folder(official, data_dir, split, options):
    expected = FolderSource(official / "Kvasir-SEG", split, **options)
    source = TfdsSource("kvasir_seg", split, data_dir=data_dir, **options)
    assert isinstance(source, Dataset)
    assert source.names == expected.names and len(source) == len(expected)
    for index in reversed(range(len(source))):
        assert_same(source[index], expected[index])
    source.check_sizes()


def test_pixels_are_those_of_the_files_and_masks_are_thresholded_at_127(official, data_dir):
    source = TfdsSource("kvasir_seg", "train", fractions=(1.0, 0.0, 0.0), data_dir=data_dir)
    assert source.names == tuple(NAMES)
    for sample in source:
        image, mask = (
            np.asarray(Image.open(official / "Kvasir-SEG" / kind / f"{sample.name}.jpg"))
            for kind in ("images", "masks")
        )
        if sample.name == NAMES[3]:  # turned by 90 degrees
            image, mask = np.rot90(image, -1), np.rot90(mask, -1)
        np.testing.assert_array_equal(sample.image, image)
        np.testing.assert_array_equal(sample.mask, mask[..., 0] > 127)
        assert len(np.unique(mask)) > 2 and sample.mask.any()  # JPEG has blurred the edges


def test_tfds_reads_it_too(official, data_dir):
    builder = tfds.builder_from_directory(data_dir / "kvasir_seg" / "1.0.0")
    records = builder.as_data_source("train")
    assert [record["name"].decode() for record in records] == NAMES
    image = Image.open(official / "Kvasir-SEG" / "images" / f"{NAMES[7]}.jpg")
    np.testing.assert_array_equal(records[7]["image"], np.asarray(image))
    assert "research" in builder.info.redistribution_info.license
    assert builder.info.citation.startswith("@inproceedings{jha2020kvasir")


def test_notices_are_said_once_and_name_the_sample(data_dir, caplog):
    source = TfdsSource("kvasir_seg", "train", data_dir=data_dir)
    for _ in source:
        pass
    assert len(caplog.messages) == 1
    assert f"{source.names[0]} (mask) is not binary" in caplog.messages[0]


NO_TENSORFLOW = """
import sys
from samjax import cli
from samjax.data.sources import open_source
assert "tensorflow_datasets" not in sys.modules, "slows down every command"
assert cli.main(["data", "prepare", "kvasir_seg", "--manual-dir", sys.argv[1], "--json"]) == 0
source = open_source("tfds:kvasir_seg", "validation")
print(source[1].image.shape)
assert "tensorflow" not in sys.modules
"""


def test_the_command_and_the_source_without_tensorflow_and_without_warnings(archive, tmp_path):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "tensorflow.py").write_text("raise ImportError('not to be imported')")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", NO_TENSORFLOW, str(archive)],
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
    result, shape = done.stdout.splitlines()
    assert shape.endswith(", 3)")
    folder = tmp_path / "kvasir_seg" / "1.0.0"
    assert json.loads(result) == {
        "dataset": "kvasir_seg",
        "path": str(folder),
        "splits": {"train": len(NAMES)},
        "bytes": tfds.builder_from_directory(folder).info.dataset_size,
        "reused": False,
    }
    for said in ("license: for research", "@inproceedings", "writing train", "has 1000"):
        assert said in done.stderr


@pytest.mark.parametrize("where", [".", "Kvasir-SEG"])
def test_the_extracted_folder_serves_too(official, data_dir, tmp_path, where, monkeypatch):
    monkeypatch.chdir(official / where)
    build(tmp_path, Path("."))
    for index in (0, 5):
        assert_same(
            TfdsSource("kvasir_seg", "train", data_dir=tmp_path)[index],
            TfdsSource("kvasir_seg", "train", data_dir=data_dir)[index],
        )


def test_a_second_call_says_that_it_is_prepared(data_dir, capsys):
    folder = data_dir / "kvasir_seg" / "1.0.0"
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    options = ["--data-dir", str(data_dir), "--manual-dir", "no/such/folder"]
    assert cli.main(["data", "prepare", "kvasir_seg", *options]) == 0
    said = capsys.readouterr()
    assert "kvasir_seg was prepared before" in said.err and "reused: True" in said.out
    assert f"TFDS_DATA_DIR={data_dir} samjax train" in said.err
    assert before == {file: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_the_list(data_dir, tmp_path, capsys):
    assert cli.main(["data", "list", "--data-dir", str(data_dir), "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)["datasets"]["kvasir_seg"]
    assert entry["pairs"] == 1000 and "research" in entry["license"]
    assert entry["path"] == str(data_dir / "kvasir_seg" / "1.0.0")
    assert cli.main(["data", "list", "--data-dir", str(tmp_path)]) == 0
    header, *lines, _ = capsys.readouterr().out.splitlines()
    assert f"in {tmp_path}" in header and len(lines) == len(builders.DATASETS)
    assert not any(line.startswith("prepared") for line in lines)
    assert cli.main(["data", "list", "--data-dir", str(data_dir)]) == 0
    assert f"\nprepared {len(NAMES):>6}  kvasir_seg" in capsys.readouterr().out


def test_names_of_datasets_stay_as_they_are_in_a_run(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    config = with_absolute_paths(Config(data="tfds:kvasir_seg"))
    assert config.data == "tfds:kvasir_seg"
    assert len(open_source(config.data, "train")) == 16
    with pytest.raises(ValueError, match="masks without objects"):
        open_source(config.data, "train", objects="each")


# Interruptions and refusals


def assert_nothing_is_prepared(data_dir):
    with pytest.raises(FileNotFoundError, match="samjax data prepare kvasir_seg"):
        TfdsSource("kvasir_seg", "train", data_dir=data_dir)


@pytest.mark.parametrize("stage", ["unpacking", "checking", "writing"])
def test_an_interrupted_build_leaves_nothing(archive, tmp_path, monkeypatch, stage):
    def track(items, title, total):
        for i, item in enumerate(items):
            if title.startswith(stage) and i == 4:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch:
        patch.setattr("samjax.data.builders.prepare.progress_on", lambda console: track)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, archive)
    assert list((tmp_path / "kvasir_seg").iterdir()) == []
    assert_nothing_is_prepared(tmp_path)
    assert build(tmp_path, archive).splits == {"train": len(NAMES)}


def test_a_killed_build_is_not_taken_for_a_finished_one(archive, tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from rich.console import Console\n"
        "from samjax.data.builders import prepare as module\n"
        "def track(items, title, total):\n"
        "    for i, item in enumerate(items):\n"
        "        yield item if i < 9 or title != 'writing train' else os._exit(9)\n"
        "module.progress_on = lambda console: track\n"
        "module.prepare('kvasir_seg', Path(sys.argv[1]), Path(sys.argv[2]), Console(stderr=True))"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(archive)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 9, done.stderr
    assert_nothing_is_prepared(tmp_path)
    assert not build(tmp_path, archive).reused


def test_what_is_wrong_with_the_files_is_said_before_anything_is_prepared(tmp_path):
    def complaint(files):
        with pytest.raises((ValueError, OSError)) as caught:
            build(tmp_path / "data", files)
        assert_nothing_is_prepared(tmp_path / "data")
        return str(caught.value)

    said = complaint(tmp_path)
    assert f"{tmp_path} holds neither kvasir-seg.zip nor Kvasir-SEG/" in said
    assert "https://datasets.simula.no/kvasir-seg/" in said
    archive = tmp_path / "kvasir-seg.zip"
    archive.write_bytes(b"<html>not found</html>")
    assert f"{archive} is broken" in complaint(tmp_path)
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("CVC-ClinicDB/Original/1.tif", b"")
    assert f"{archive} holds no folder Kvasir-SEG" in complaint(tmp_path)

    # In what was unpacked, files are named as those of the archive.
    write_official(tmp_path / "files")
    files = tmp_path / "files" / "Kvasir-SEG"
    (files / "masks" / f"{NAMES[0]}.jpg").unlink()
    zip_folder(tmp_path / "files").replace(archive)
    said = complaint(tmp_path)
    assert f"{archive}/Kvasir-SEG/images has images without a mask: '{NAMES[0]}" in said
    Image.new("L", (7, 5)).save(files / "masks" / f"{NAMES[0]}.jpg")
    zip_folder(tmp_path / "files").replace(archive)
    assert f"{archive}/Kvasir-SEG/masks/{NAMES[0]}.jpg is 7x5" in complaint(tmp_path)
    whole = archive.read_bytes()  # the directory is at its end
    for place in (900, 2000):
        archive.write_bytes(whole[:place] + bytes(300) + whole[place + 300 :])
        assert f"{archive} is broken (" in complaint(tmp_path)


def test_names_and_splits_that_are_not_there(data_dir):
    with pytest.raises(
        ValueError, match="unknown dataset 'kvasir'; the nearest is kvasir_seg, samjax has"
    ):
        open_source("tfds:kvasir", "train")
    with pytest.raises(ValueError, match="split must be one of"):
        TfdsSource("kvasir_seg", "all", data_dir=data_dir)
    for arguments in (["prepare"], ["list", "kvasir_seg"]):
        assert cli.main(["data", *arguments]) == 1


@pytest.fixture
def url(archive):
    """Where a server on this machine has the archive."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(archive))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/kvasir-seg.zip"
        server.shutdown()


def test_the_archive_is_downloaded_and_verified(archive, url, tmp_path, monkeypatch):
    def publish(*published):
        archive = Archive("Kvasir-SEG", "kvasir-seg.zip", *published)
        layout = dataclasses.replace(KvasirSeg.LAYOUTS[0], archives=(archive,))
        monkeypatch.setattr(KvasirSeg, "LAYOUTS", (layout,))

    content = (archive / "kvasir-seg.zip").read_bytes()
    publish(url, len(content), "0" * 64)
    with pytest.raises(RuntimeError, match="sha256"):
        build(tmp_path, None)
    assert_nothing_is_prepared(tmp_path)
    digest = hashlib.sha256(content).hexdigest()
    publish(url, len(content), digest)
    assert build(tmp_path, None).splits == {"train": len(NAMES)}
    publish(None, None, None)
    with pytest.raises(FileNotFoundError, match=r"manual holds neither .* or pass --manual-dir"):
        build(tmp_path / "other", None)


# What other datasets will need of the base


class TwoParts(ImageMaskBuilder, skip_registration=True):
    """A dataset with official splits, in folders of their own."""

    VERSION = tfds.core.Version("2.1.0")
    TITLE = LICENSE = CITATION = "of the test"
    HOMEPAGE = "https://example.org"
    NUM_PAIRS = 3
    LAYOUTS = (
        Layout(
            "two.zip from https://example.org",
            (Archive("two", "two.zip"),),
            {
                split: Folders(f"two/{split}/images", f"two/{split}/masks")
                for split in ("train", "test")
            },
        ),
    )


def test_official_splits_are_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(builders._CLASSES, "two_parts", "TwoParts")
    monkeypatch.setitem(sys.modules, "samjax.data.builders.two_parts", sys.modules[__name__])
    for part in ("train/images/a", "train/images/b", "test/images/c"):
        for file in (tmp_path / "two" / part, tmp_path / "two" / part.replace("images", "masks")):
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (9, 8), 255).save(file.with_suffix(".png"))
    prepared = prepare("two_parts", tmp_path, tmp_path, quiet())
    assert prepared.splits == {"train": 2, "test": 1}
    assert prepared.folder == tmp_path / "two_parts" / "2.1.0"
    sources = {
        split: TfdsSource("two_parts", split, seed=1, data_dir=tmp_path)
        for split in ("train", "test")
    }
    assert sources["train"].names == ("a", "b") and sources["test"].names == ("c",)
    assert sources["test"][0].mask.all()
    with pytest.raises(ValueError, match="no split 'validation', only train, test"):
        TfdsSource("two_parts", "validation", data_dir=tmp_path)


class Slices(ImageMaskBuilder, skip_registration=True):
    """Pictures in groups that no split divides."""

    VERSION = tfds.core.Version("1.0.0")
    TITLE = LICENSE = CITATION = "of the test"
    HOMEPAGE = "https://example.org"
    NUM_PAIRS = 30
    LAYOUTS = (
        Layout(
            "slices/", (Archive("slices"),), {"train": Folders("slices/images", "slices/masks")}
        ),
    )

    def contents(self, found):
        """All as one split; the groups have different sizes."""
        splits = super().contents(found)
        self.info.metadata["groups"] = {"train": [name[:2] for name in splits["train"].names]}
        return splits


def test_groups_are_not_divided(tmp_path, monkeypatch):
    monkeypatch.setitem(builders._CLASSES, "slices", "Slices")
    monkeypatch.setitem(sys.modules, "samjax.data.builders.slices", sys.modules[__name__])
    names = sorted(f"v{i}_{j}" for i in range(10) for j in range(1 + i % 5))
    for kind in ("images", "masks"):
        (tmp_path / "slices" / kind).mkdir(parents=True)
        for name in names:
            Image.new("L", (9, 8), 255).save(tmp_path / "slices" / kind / f"{name}.png")
    prepare("slices", tmp_path, tmp_path, quiet())
    drawn = set()
    for seed in range(4):
        options = {"seed": seed, "fractions": (0.5, 0.2, 0.3), "data_dir": tmp_path}
        splits = [TfdsSource("slices", split, **options) for split in ("train", "val", "test")]
        groups = [{name[:2] for name in split.names} for split in splits]
        assert [len(own) for own in groups] == [5, 2, 3]
        assert sorted(sum((split.names for split in splits), ())) == names
        assert all(split.names == tuple(sorted(split.names)) for split in splits)
        assert splits[2][0].name == splits[2].names[0]
        drawn.add(frozenset(groups[2]))
    assert len(drawn) == 4
