"""Datasets of COCO's JSON, from files laid out as their archives to samples."""

import functools
import hashlib
import http.server
import json
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from samjax.data.builders.archives import Archive
from samjax.data.builders.coco2017 import Coco2017
from samjax.data.builders.nwpu_vhr10 import NwpuVhr10
from samjax.data.coco import CocoSource
from samjax.data.sources import Dataset, open_source
from samjax.data.tfds_objects import ObjectRecords

# pycocotools 2.0.11 with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HEIGHT, WIDTH = 20, 30
BOX = [[4, 2, 14, 2, 14, 12, 4, 12]]
TRIANGLE = [[10.5, 5, 28, 9.25, 16, 18]]
RUNS = {"size": [HEIGHT, WIDTH], "counts": [40, 100, HEIGHT * WIDTH - 140]}
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
# Of each image: category, segmentation, whether it is a crowd.
TRAIN = {
    "000000000009": [(3, BOX, 0), (7, TRIANGLE, 0), (7, RUNS, 1)],
    "000000000025": [(3, TRIANGLE, 0)],
    "000000000030": [],
}
VAL = {"000000000139": [(7, BOX, 0)]}


def content(images, categories=CATEGORIES, first_id=1000):
    entries = [
        (i, category, shape, crowd)
        for i, own in enumerate(images.values())
        for category, shape, crowd in own
    ]
    return {
        "images": [
            {"id": i, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH}
            for i, name in enumerate(images)
        ],
        "annotations": [
            {
                "id": first_id + i,
                "image_id": at,
                "category_id": category,
                "segmentation": shape,
                "iscrowd": crowd,
                "bbox": [0, 0, 1, 1],
            }
            for i, (at, category, shape, crowd) in enumerate(entries)
        ],
        "categories": categories,
    }


def pictures(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(images):
        pixels = np.random.default_rng(i).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.jpg")


def write_coco(root):
    """COCO's folders, as they are extracted."""
    for part, images in (("train2017", TRAIN), ("val2017", VAL)):
        pictures(root / part, images)
        file = root / "annotations" / f"instances_{part}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content(images)))


def zip_part(root, folder, archive, into):
    with zipfile.ZipFile(into / archive, "w") as opened:
        opened.writestr(f"{folder}/", b"")
        for file in sorted((root / folder).iterdir()):
            opened.write(file, f"{folder}/{file.name}")


def pixels_of(shape):
    """A mask as pycocotools makes it."""
    parts = shape if isinstance(shape, list) else [shape]
    runs = coco_mask.frPyObjects(parts, HEIGHT, WIDTH)
    return coco_mask.decode(runs).any(axis=-1)


def assert_written(name, split, images, data_dir, first_id=1000):
    """What a split holds is what was written, mask by mask."""
    together = ObjectRecords(name, split, data_dir=data_dir)
    assert isinstance(together, Dataset) and together.names == tuple(images)
    together.check_sizes()
    for sample, own in zip(together, images.values(), strict=True):
        masks = [pixels_of(shape) for _, shape, _ in own]
        union = np.any(masks, axis=0) if masks else np.zeros((HEIGHT, WIDTH), bool)
        np.testing.assert_array_equal(sample.mask, union)
    entries = [(image, *entry) for image, own in images.items() for entry in own]
    expected = {
        f"{image}#{first_id + i}": pixels_of(shape)
        for i, (image, _, shape, is_crowd) in enumerate(entries)
        if not is_crowd
    }
    each = ObjectRecords(name, split, objects="each", data_dir=data_dir)
    assert each.names == tuple(expected)
    for sample, mask in zip(each, expected.values(), strict=True):
        np.testing.assert_array_equal(sample.mask, mask)


# COCO 2017


@pytest.fixture(scope="module", params=["zips", "folders"])
def coco(request, tmp_path_factory, build):
    root = tmp_path_factory.mktemp("coco")
    files = root / "files"
    write_coco(files)
    if request.param == "zips":
        for archive in Coco2017.ARCHIVES:
            zip_part(files, archive.folder, archive.file, root)
    prepared = build("coco2017", root / "tfds", root if request.param == "zips" else files)
    assert prepared.splits == {"train": 3, "test": 1}
    return root


def test_coco_has_what_was_written(coco):
    assert_written("coco2017", "train", TRAIN, coco / "tfds")
    assert_written("coco2017", "test", VAL, coco / "tfds")


def test_a_step_on_objects_of_coco(coco, train_one_step):
    source = ObjectRecords("coco2017", "train", objects="each", data_dir=coco / "tfds")
    assert train_one_step(source) > 0


@pytest.mark.parametrize("objects", ["together", "each"])
@pytest.mark.parametrize("classes", [(), ("dog",), ("cat", "dog")])
def test_samples_are_those_of_the_json(coco, monkeypatch, objects, classes):
    monkeypatch.setenv("TFDS_DATA_DIR", str(coco / "tfds"))
    expected = CocoSource(coco / "files", "train", objects=objects, classes=classes)
    source = open_source("tfds:coco2017", "train", objects=objects, classes=classes)
    assert source.names == expected.names
    for index, (got, wanted) in enumerate(zip(source, expected, strict=True)):
        assert got.name == wanted.name
        np.testing.assert_array_equal(got.image, wanted.image)
        np.testing.assert_array_equal(got.mask, wanted.mask)
        assert source.image_file(index).getvalue() == expected.image_file(index).read_bytes()


def test_faults_of_coco_are_named(tmp_path, build):
    def complaint():
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            build("coco2017", tmp_path / "tfds", tmp_path)
        assert list((tmp_path / "tfds").glob("coco2017/*")) == []
        return str(caught.value)

    write_coco(tmp_path)
    file = tmp_path / "annotations/instances_val2017.json"

    def change(**changes):
        file.write_text(json.dumps({**content(VAL), **changes}))

    change(annotations=[{**content(VAL)["annotations"][0], "category_id": 99}])
    assert f"in {file} annotation 1000 of '000000000139.jpg' has the category_id 99" in complaint()
    change(categories=CATEGORIES[1:])
    assert f"{file} has other categories than the other splits" in complaint()
    change(images=[{**content(VAL)["images"][0], "width": 31}])
    message = complaint()
    assert "val2017/000000000139.jpg is 30x20 pixels" in message and "at 31x20" in message
    change()
    (tmp_path / "val2017/000000000139.jpg").unlink()
    message = complaint()
    assert "1 of the images that" in message and "000000000139.jpg'; get train2017.zip" in message
    file.unlink()
    assert f"{file} is missing: get train2017.zip" in complaint()
    (tmp_path / "val2017").rmdir()
    assert "holds no val2017.zip nor val2017/: get train2017.zip, val" in complaint()
    (tmp_path / "val2017.zip").write_bytes(b"<html>not found</html>")
    assert "val2017.zip is broken" in complaint()


def test_a_damaged_zip_is_named(tmp_path, build):
    write_coco(tmp_path / "files")
    for archive in Coco2017.ARCHIVES:
        zip_part(tmp_path / "files", archive.folder, archive.file, tmp_path)
    file = tmp_path / "val2017.zip"
    whole = file.read_bytes()
    file.write_bytes(whole[:300] + bytes(200) + whole[500:])
    with pytest.raises(ValueError, match=r"val2017\.zip/val2017/000000000139\.jpg is broken"):
        build("coco2017", tmp_path / "tfds", tmp_path)


def test_archives_that_are_missing_are_downloaded(tmp_path, build, monkeypatch):
    manual = tmp_path / "tfds/downloads/manual"
    for folder in (tmp_path / "files", tmp_path / "served", manual):
        folder.mkdir(parents=True)
    write_coco(tmp_path / "files")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        archives = []
        for archive in Coco2017.ARCHIVES:
            zip_part(tmp_path / "files", archive.folder, archive.file, tmp_path / "served")
            served = tmp_path / "served" / archive.file
            url = f"http://127.0.0.1:{server.server_port}/{archive.file}"
            digest = hashlib.sha256(served.read_bytes()).hexdigest()
            size = served.stat().st_size
            archives.append(Archive(archive.folder, archive.file, url, size, digest))
        # What is there already, here extracted, is not downloaded.
        (tmp_path / "files/val2017").rename(manual / "val2017")
        (tmp_path / "served/val2017.zip").unlink()
        monkeypatch.setattr(Coco2017, "ARCHIVES", tuple(archives))
        assert build("coco2017", tmp_path / "tfds", None).splits == {"train": 3, "test": 1}
        server.shutdown()


# NWPU VHR-10

POSITIVE = {f"{i:03}": [(1 + i % 2, BOX if i % 3 else TRIANGLE, 0)] for i in range(1, 11)}
VHR = [{"id": 1, "name": "airplane"}, {"id": 2, "name": "ship"}]


def write_nwpu(root, json_beside):
    pictures(root / "NWPU VHR-10 dataset/positive image set", POSITIVE)
    pictures(root / "NWPU VHR-10 dataset/negative image set", ["001"])
    file = root / ("" if json_beside else "NWPU VHR-10 dataset") / "annotations.json"
    file.write_text(json.dumps(content(POSITIVE, VHR, first_id=0)))


@pytest.fixture(scope="module", params=["zip", "folder", "images"])
def nwpu(request, tmp_path_factory, build):
    root = tmp_path_factory.mktemp("nwpu")
    write_nwpu(root, json_beside=request.param == "zip")
    found = root / "NWPU VHR-10 dataset" if request.param == "images" else root
    if request.param == "zip":
        with zipfile.ZipFile(root / "NWPU VHR-10 dataset.zip", "w") as archive:
            for file in (root / "NWPU VHR-10 dataset").rglob("*.jpg"):
                archive.write(file, file.relative_to(root))
        (root / "NWPU VHR-10 dataset").rename(root / "elsewhere")
    assert build("nwpu_vhr10", root / "tfds", found).splits == {"train": 10}
    return root


def test_nwpu_is_split_70_to_30(nwpu):
    options = {"data_dir": nwpu / "tfds", "fractions": (0.7, 0.0, 0.3)}
    names = [ObjectRecords("nwpu_vhr10", split, **options).names for split in ("train", "test")]
    assert list(map(len, names)) == [7, 3] and sorted(sum(names, ())) == sorted(POSITIVE)
    other = ObjectRecords("nwpu_vhr10", "test", seed=1, **options)
    assert set(other.names) != set(names[1])
    each = ObjectRecords("nwpu_vhr10", "test", objects="each", classes=("ship",), **options)
    for sample in each:
        (category, shape, _) = POSITIVE[sample.name.split("#")[0]][0]
        assert category == 2
        np.testing.assert_array_equal(sample.mask, pixels_of(shape))


def test_nwpu_has_what_was_written(nwpu):
    whole = {"data_dir": nwpu / "tfds", "fractions": (1.0, 0.0, 0.0)}
    source = ObjectRecords("nwpu_vhr10", "train", objects="each", **whole)
    assert source.names == tuple(f"{name}#{i}" for i, name in enumerate(POSITIVE))
    for sample, ((_, shape, _),) in zip(source, POSITIVE.values(), strict=True):
        np.testing.assert_array_equal(sample.mask, pixels_of(shape))


def test_a_step_on_objects_of_nwpu(nwpu, train_one_step):
    source = ObjectRecords("nwpu_vhr10", "train", objects="each", data_dir=nwpu / "tfds")
    assert train_one_step(source) > 0


def test_what_is_missing_of_nwpu_is_told(tmp_path):
    said = NwpuVhr10.missing(tmp_path)
    assert "no positive image set/ nor NWPU VHR-10 dataset.zip and no annotations.json: get" in said
    write_nwpu(tmp_path, json_beside=True)
    assert NwpuVhr10.find(tmp_path) == tmp_path
    (tmp_path / "annotations.json").unlink()
    assert NwpuVhr10.find(tmp_path) is None
    said = NwpuVhr10.missing(tmp_path)
    assert said.startswith(f"{tmp_path} holds no annotations.json: get the images from https://hf")


# SSDD

SHIPS = {
    "train": {"000002": [(1, BOX, 0), (1, TRIANGLE, 0)], "000003": [(1, BOX, 0)]},
    "test": {"000001": [(1, TRIANGLE, 0)]},
}


def write_ssdd(root, style):
    folder = root / "Official-SSDD-OPEN" / style / "coco_style"
    for split, images in SHIPS.items():
        pictures(folder / "images" / split, images)
        file = folder / "annotations" / f"{split}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content(images, [{"id": 1, "name": "ship"}])))
    return folder


@pytest.fixture(scope="module", params=["PSeg_SSDD", "BBox_RBox_PSeg_SSDD", "style"])
def ssdd(request, tmp_path_factory, build):
    root = tmp_path_factory.mktemp("ssdd")
    folder = write_ssdd(root, "PSeg_SSDD" if request.param == "style" else request.param)
    # Boxes alone are not taken.
    (root / "Official-SSDD-OPEN/BBox_SSDD/coco_style/annotations").mkdir(parents=True)
    (root / "Official-SSDD-OPEN/BBox_SSDD/coco_style/annotations/train.json").write_text("{}")
    prepared = build("ssdd", root / "tfds", folder if request.param == "style" else root)
    assert prepared.splits == {"train": 2, "test": 1}
    return root


@pytest.mark.parametrize("split", ["train", "test"])
def test_ssdd_has_what_was_written(ssdd, split):
    assert_written("ssdd", split, SHIPS[split], ssdd / "tfds")


def test_a_step_on_objects_of_ssdd(ssdd, train_one_step):
    source = ObjectRecords("ssdd", "train", objects="each", data_dir=ssdd / "tfds")
    assert train_one_step(source) > 0


def test_boxes_of_ssdd_are_not_enough(tmp_path, build):
    write_ssdd(tmp_path, "BBox_SSDD")
    with pytest.raises(ValueError, match=r"SSDD-OPEN holds no PSeg_SSDD/coco_style/annotations/tr"):
        build("ssdd", tmp_path / "tfds", tmp_path)
