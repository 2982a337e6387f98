"""Datasets of label images, from files laid out as their archives to samples."""

import tarfile
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import ExifTags, Image

from samjax.data.builders.voc2012 import Voc2012
from samjax.data.labels import LabelSource
from samjax.data.sources import Dataset, open_source
from samjax.data.tfds_objects import ObjectRecords

SIZE = (20, 26)
COLOURS = np.array([[0, 0, 0], [255, 0, 0], [255, 255, 255]], np.uint8)


def save(file, pixels, palette=False):
    """Writes a picture, or a label image, with a palette whose colours say nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image = image.convert("L")
        image.putpalette([value for i in range(256) for value in (255 - i, 7, i)])
    image.save(file)


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)


def labels_of(*classes, void=False):
    """A label image with a block of 6 x 5 for each class."""
    labels = np.zeros(SIZE, np.uint8)
    for i, value in enumerate(classes):
        labels[2:8, 6 * i + 1 : 6 * i + 6] = value
    if void:
        labels[12:16] = 255
    return labels


# Trans10K

V1 = {
    "train": {"1": labels_of(1), "2": labels_of(2, 1)},
    "validation": {"easy/3": labels_of(2), "hard/4": labels_of()},
    "test": {"easy/5": labels_of(1), "hard/6": labels_of(1, 2)},
}
V2 = {
    "train": {"1": labels_of(1), "2": labels_of(11, 7)},
    "validation": {"3": labels_of(4)},
    "test": {"4": labels_of(7), "5": labels_of(7, 2)},
}


def write_v1(root):
    for split, images in V1.items():
        for name, labels in images.items():
            part, stem = f"{split}/{name}".rsplit("/", 1)
            save(root / part / "images" / f"{stem}.jpg", picture(int(stem)))
            save(root / part / "masks" / f"{stem}_mask.png", COLOURS[labels])


def write_v2(root):
    for split, images in V2.items():
        for name, labels in images.items():
            save(root / split / "images" / f"{name}.jpg", picture(int(name)))
            if name == "1":  # says that it is to be turned, and the mask is of what is stored
                exif = Image.Exif()
                exif[ExifTags.Base.Orientation] = 6
                Image.fromarray(picture(1)).save(root / split / "images/1.jpg", exif=exif)
            is_palette = name in "24"
            save(root / split / "masks_12" / f"{name}_mask.png", labels, is_palette)


TRANS10K = {"trans10k_v1": (write_v1, V1), "trans10k_v2": (write_v2, V2)}


@pytest.fixture(scope="module")
def trans10k(tmp_path_factory, build):
    root = tmp_path_factory.mktemp("trans10k")
    for name, (write, truth) in TRANS10K.items():
        folder = root / {"trans10k_v1": "Trans10K", "trans10k_v2": "anywhere"}[name]
        write(folder)
        prepared = build(name, root / "tfds", root if name == "trans10k_v1" else folder)
        assert prepared.splits == {split: len(images) for split, images in truth.items()}
    return root


@pytest.mark.parametrize("name", TRANS10K)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_trans10k_has_what_was_written(trans10k, name, split):
    truth = TRANS10K[name][1][split]
    source = ObjectRecords(name, split, data_dir=trans10k / "tfds")
    assert isinstance(source, Dataset) and source.names == tuple(truth)
    source.check_sizes()
    for sample, labels in zip(source, truth.values(), strict=True):
        np.testing.assert_array_equal(sample.mask, labels > 0)
    each = ObjectRecords(name, split, objects="each", data_dir=trans10k / "tfds")
    expected = {
        f"{image}#{value}": labels == value
        for image, labels in truth.items()
        for value in np.unique(labels[labels > 0])
    }
    assert each.names == tuple(expected)
    for sample, mask in zip(each, expected.values(), strict=True):
        np.testing.assert_array_equal(sample.mask, mask)
    builder = tfds.builder_from_directory(trans10k / "tfds" / name / "1.0.0")
    decoded = builder.as_data_source(split, decoders={"labels": tfds.decode.SkipDecoding()})
    assert len(builder.info.metadata["classes"]) == (3 if name == "trans10k_v1" else 12)
    assert [record["name"].decode() for record in decoded] == list(truth)


def test_samples_are_those_of_a_folder_of_label_images(trans10k, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(trans10k / "tfds"))
    for name, labels in V2["train"].items():
        save(tmp_path / "train/labels" / f"{name}.png", labels)
        pixels = np.asarray(Image.open(trans10k / "anywhere/train/images" / f"{name}.jpg"))
        save(tmp_path / "train/images" / f"{name}.png", pixels)
    for objects in ("together", "each"):
        for names, values in (((), ()), (("shelf", "cup"), ("1", "7"))):
            expected = LabelSource(tmp_path, "train", objects=objects, classes=values)
            source = open_source("tfds:trans10k_v2", "train", objects=objects, classes=names)
            assert source.names == expected.names
            for got, wanted in zip(source, expected, strict=True):
                np.testing.assert_array_equal(got.image, wanted.image)
                np.testing.assert_array_equal(got.mask, wanted.mask)


@pytest.mark.parametrize("name", TRANS10K)
def test_a_step_on_the_classes_of_trans10k(trans10k, name, train_one_step):
    source = ObjectRecords(name, "train", objects="each", data_dir=trans10k / "tfds")
    assert train_one_step(source) > 0


def test_classes_that_are_not_there(trans10k):
    def complaint(**options):
        with pytest.raises(ValueError) as caught:
            ObjectRecords("trans10k_v2", data_dir=trans10k / "tfds", **options)
        return str(caught.value)

    assert "no category 'cups'; the nearest is 'cup'" in complaint(split="train", classes=("cups",))
    assert "has no category 'background'" in complaint(split="train", classes=("background",))
    message = complaint(split="validation", classes=("cup",))
    assert message.endswith("has no objects of the classes 'cup' in the split 'validation'")


def test_faults_of_trans10k_are_named(tmp_path, build):
    def complaint(name, folder):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            build(name, tmp_path / "tfds", folder)
        assert list((tmp_path / "tfds").glob(f"{name}/*")) == []
        return str(caught.value)

    assert "holds no Trans10K/: get Trans10K from https" in complaint("trans10k_v1", tmp_path)
    write_v1(tmp_path / "Trans10K")
    write_v2(tmp_path / "v2")
    mask = tmp_path / "Trans10K/test/hard/masks/6_mask.png"
    save(mask, np.full((*SIZE, 3), 9, np.uint8))
    assert f"{mask} has at x 0, y 0 a colour that is no" in complaint("trans10k_v1", tmp_path)
    mask.unlink()
    message = complaint("trans10k_v1", tmp_path)
    assert "lacks 'test/hard/masks/6_mask.png', which" in message
    save(mask, COLOURS[labels_of(1)])
    images = tmp_path / "Trans10K/test/hard/images"
    save(images / "6.png", picture(6))
    assert "two images of the names of 'test/hard/images/6.jpg'" in complaint(
        "trans10k_v1", tmp_path
    )
    (images / "6.png").unlink()
    save(mask.with_name("7_mask.png"), COLOURS[labels_of(1)])
    message = complaint("trans10k_v1", tmp_path)
    assert f"{images} lacks the images of 'test/hard/masks/7_mask.png'" in message
    (tmp_path / "Trans10K/test/hard").rename(tmp_path / "hard")
    assert "Trans10K/test/hard/images holds no images" in complaint("trans10k_v1", tmp_path)

    mask = tmp_path / "v2/validation/masks_12/3_mask.png"
    save(mask, labels_of(12), palette=True)
    assert f"{mask} holds the class 12, but classes are 0 to 11" in complaint(
        "trans10k_v2", tmp_path / "v2"
    )
    save(mask, labels_of(3)[1:])
    assert f"{mask} is 26x19 pixels (width x height), but" in complaint(
        "trans10k_v2", tmp_path / "v2"
    )
    (tmp_path / "v2/test/images/5.jpg").write_bytes(b"<html>404</html>")
    save(mask, labels_of(3))
    message = complaint("trans10k_v2", tmp_path / "v2")
    assert "v2/test/images/5.jpg cannot be decoded as an image" in message
    (tmp_path / "v2/validation/images/3.jpg").rename(tmp_path / "v2/validation/images/9.jpg")
    assert "lacks 'validation/masks_12/9_mask.png'" in complaint("trans10k_v2", tmp_path / "v2")


# PASCAL VOC 2012

VOC = {"train": ("2007_000032", "2007_000039"), "val": ("2007_000033",)}
# Classes and instances of each image: two persons and a car; a cat; a person, whose second
# instance lies partly on void and on background.
VOC_CLASSES = {
    "2007_000032": labels_of(15, 15, 7, void=True),
    "2007_000039": labels_of(8),
    "2007_000033": labels_of(15, 15, void=True),
}
VOC_OBJECTS = {
    "2007_000032": labels_of(1, 2, 3, void=True),
    "2007_000039": labels_of(1),
    "2007_000033": labels_of(1, 2, void=True),
}
VOC_OBJECTS["2007_000033"][6:13, 7:12] = 2


def write_voc(root):
    folder = root / "VOCdevkit/VOC2012"
    for split, names in VOC.items():
        (folder / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            save(folder / "JPEGImages" / f"{name}.jpg", picture(1))
            save(folder / "SegmentationClass" / f"{name}.png", VOC_CLASSES[name], True)
            save(folder / "SegmentationObject" / f"{name}.png", VOC_OBJECTS[name], True)
    save(folder / "JPEGImages/2008_000001.jpg", picture(2))  # without segmentation
    # Another year beside it, as who has both extracts them.
    (root / "VOCdevkit/VOC2007/ImageSets/Segmentation").mkdir(parents=True)
    (root / "VOCdevkit/VOC2007/ImageSets/Segmentation/train.txt").write_text("000001\n")
    return folder


@pytest.fixture(scope="module", params=["tar", "VOCdevkit", "VOC2012"])
def voc(request, tmp_path_factory, build):
    root = tmp_path_factory.mktemp("voc")
    folder = write_voc(root / "files")
    if request.param == "tar":
        folder = root
        with tarfile.open(root / "VOCtrainval_11-May-2012.tar", "w") as archive:
            archive.add(root / "files/VOCdevkit", "VOCdevkit")
    elif request.param == "VOCdevkit":
        folder = root / "files"
    assert build("voc2012", root / "tfds", folder).splits == {"train": 2, "test": 1}
    return root


@pytest.mark.parametrize(("split", "alias"), [("train", "train"), ("test", "val")])
def test_voc_has_what_was_written(voc, split, alias):
    records = tfds.builder_from_directory(voc / "tfds/voc2012/1.0.0").as_data_source(
        split, decoders={"labels": tfds.decode.SkipDecoding()}
    )
    expected = {}
    for name, record in zip(VOC[alias], records, strict=True):
        file = voc / "files/VOCdevkit/VOC2012/SegmentationClass" / f"{name}.png"
        assert record["labels"] == file.read_bytes()
        for value in range(1, VOC_OBJECTS[name][VOC_OBJECTS[name] < 255].max() + 1):
            expected[f"{name}#{value}"] = VOC_OBJECTS[name] == value
    each = ObjectRecords("voc2012", split, objects="each", data_dir=voc / "tfds")
    assert each.names == tuple(expected)
    for sample, mask in zip(each, expected.values(), strict=True):
        np.testing.assert_array_equal(sample.mask, mask)
    together = ObjectRecords("voc2012", split, data_dir=voc / "tfds")
    assert together.names == VOC[alias]
    for sample in together:
        values = VOC_OBJECTS[sample.name]
        np.testing.assert_array_equal(sample.mask, (values > 0) & (values < 255))
    jpeg = voc / "files/VOCdevkit/VOC2012/JPEGImages" / f"{together.names[0]}.jpg"
    np.testing.assert_array_equal(together[0].image, np.asarray(Image.open(jpeg)))


def test_classes_of_voc_are_those_under_the_instances(voc):
    def names(split, *classes):
        options = {"objects": "each", "classes": classes, "data_dir": voc / "tfds"}
        return ObjectRecords("voc2012", split, **options).names

    assert names("train", "person") == ("2007_000032#1", "2007_000032#2")
    assert names("train", "car", "cat") == ("2007_000032#3", "2007_000039#1")
    assert names("test", "person") == ("2007_000033#1", "2007_000033#2")
    with pytest.raises(ValueError, match="no split 'validation', only train, test"):
        names("validation")


def test_a_step_on_objects_of_voc(voc, train_one_step):
    source = ObjectRecords("voc2012", "train", objects="each", data_dir=voc / "tfds")
    assert train_one_step(source) > 0


def test_faults_of_voc_are_named(tmp_path, build):
    folder = write_voc(tmp_path)

    def complaint():
        with pytest.raises(ValueError) as caught:
            build("voc2012", tmp_path / "tfds", tmp_path)
        return str(caught.value)

    file = folder / "SegmentationObject/2007_000039.png"
    save(file, labels_of(0, 1), True)
    assert "SegmentationObject/2007_000039.png holds the object 1, which has no" in complaint()
    file.unlink()
    message = complaint()
    assert "VOC2012 lacks 'SegmentationObject/2007_000039.png', which" in message
    assert "ImageSets/Segmentation/train.txt needs" in message
    (folder / "ImageSets/Segmentation/val.txt").rename(tmp_path / "val.txt")
    save(file, labels_of(1), True)
    assert "lacks 'ImageSets/Segmentation/val.txt'" in complaint()


def test_the_message_tells_what_to_get(tmp_path):
    said = Voc2012.missing(tmp_path)
    assert said.startswith(f"{tmp_path} holds no VOCtrainval_11-May-2012.tar nor VOCdevkit/: get ")
    assert [archive.file for archive in Voc2012.downloads()] == ["VOCtrainval_11-May-2012.tar"]


# WHU building


@pytest.fixture(scope="module")
def whu(tmp_path_factory, build):
    root = tmp_path_factory.mktemp("whu")
    name = "3. The cropped aerial image tiles and raster labels.zip"
    with zipfile.ZipFile(root / name, "w") as archive:
        for tile, split in enumerate(("train", "train", "val", "test")):
            mask = labels_of(*([255] * tile))
            mask[8:10, 6] = 255 if tile else 0  # touches by corners only
            for kind, pixels in (("image", picture(tile)), ("label", mask)):
                save(root / "files" / kind / f"{tile}.tif", pixels)
                inner = f"3. The cropped image tiles and raster labels/{split}/{kind}/{tile}.tif"
                archive.write(root / "files" / kind / f"{tile}.tif", inner)
    assert build("whu_building", root / "tfds", root).splits == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }
    return root


@pytest.mark.parametrize(("split", "tiles"), [("train", (0, 1)), ("val", (2,)), ("test", (3,))])
def test_buildings_are_connected_parts(whu, split, tiles):
    together = ObjectRecords("whu_building", split, data_dir=whu / "tfds")
    assert together.names == tuple(map(str, tiles))
    for sample in together:
        mask = np.asarray(Image.open(whu / "files/label" / f"{sample.name}.tif")) == 255
        np.testing.assert_array_equal(sample.mask, mask)
    each = ObjectRecords("whu_building", split, objects="each", data_dir=whu / "tfds")
    for tile in tiles:
        own = [sample.mask for sample in each if sample.name.startswith(f"{tile}#")]
        assert sorted(mask.sum() for mask in own) == ([2] + [30] * tile if tile else [])
        assert not own or np.sum(own, axis=0).max() == 1


def test_a_step_on_buildings(whu, train_one_step):
    source = ObjectRecords("whu_building", "test", objects="each", data_dir=whu / "tfds")
    assert train_one_step(source) > 0
