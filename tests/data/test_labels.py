"""Folders of label images: masks and objects by value, classes, and what holds no labels."""

import numpy as np
import pytest
from PIL import Image

from samjax.data.images import read_labels
from samjax.data.labels import LabelSource
from samjax.data.sources import Dataset

WHOLE = (1.0, 0.0, 0.0)
LABELS = np.array([[0, 1, 1, 7], [0, 0, 7, 255]], np.uint8)


def write_pair(root, name, labels, folder="labels"):
    for kind, pixels in (("images", np.zeros((*labels.shape, 3), np.uint8)), (folder, labels)):
        (root / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / kind / f"{name}.png")


@pytest.fixture(params=["labels", "masks"])
def dataset(request, tmp_path):
    write_pair(tmp_path, "a", LABELS, request.param)
    write_pair(tmp_path, "b", np.zeros((2, 4), np.uint8), request.param)
    write_pair(tmp_path, "c", np.full((2, 4), 7, np.uint8), request.param)
    return tmp_path


def opened(root, objects="together", classes=(), split="train"):
    return LabelSource(root, split, fractions=WHOLE, objects=objects, classes=classes)


def complaint(root, *args, **options):
    with pytest.raises(ValueError) as caught:
        opened(root, *args, **options)
    return str(caught.value)


def test_together_is_whatever_is_labelled(dataset):
    source = opened(dataset)
    assert isinstance(source, Dataset) and source.names == ("a", "b", "c")
    source.check_sizes()
    np.testing.assert_array_equal(source[0].mask, LABELS > 0)
    assert not source[1].mask.any() and source[2].mask.all()


def test_each_label_is_a_sample(dataset):
    source = opened(dataset, "each")
    assert source.names == ("a#1", "a#7", "a#255", "c#7") and len(source) == 4
    for index, label in enumerate((1, 7, 255)):
        assert source[index].name == source.names[index]
        np.testing.assert_array_equal(source[index].mask, LABELS == label)
    assert source[3].mask.all()
    source.check_sizes()


def soft_mask(side=80):
    """A disk, whose edge has shades between black and white."""
    y, x = np.mgrid[:side, :side] - side / 2
    return np.clip(128 * (side / 4 - np.hypot(y, x)), 0, 255).astype(np.uint8)


def test_soft_masks_are_not_objects(tmp_path):
    shades = len(np.unique(soft_mask())) - 1
    assert shades > 10
    write_pair(tmp_path, "a", LABELS, "masks")
    write_pair(tmp_path, "b", soft_mask(), "masks")
    for classes in ((), ("255",)):
        message = complaint(tmp_path, "each", classes)
        assert "masks/b.png looks like a mask with soft edges" in message
        assert f"of which each of {shades} shades would be an object" in message
        assert "rename masks/ to labels/; if not, use objects together" in message
    assert opened(tmp_path, classes=("255",)).names == ("a", "b")
    # In labels/ they are what that folder's name says.
    (tmp_path / "masks").rename(tmp_path / "labels")
    assert len(opened(tmp_path, "each")) == 3 + shades


@pytest.mark.parametrize(("folder", "notices"), [("masks", 1), ("labels", 0)])
def test_black_and_white_masks_are_one_object_each_with_one_notice(
    tmp_path, caplog, folder, notices
):
    for name in "abc":
        write_pair(tmp_path, name, np.array([[0, 255], [255, 0]], np.uint8), folder)
    assert opened(tmp_path, "each").names == ("a#255", "b#255", "c#255")
    said = [record.getMessage() for record in caplog.records if record.name == "samjax"]
    assert len(said) == notices
    assert all("a.png is black and white: all of it is one object" in message for message in said)


def test_classes_choose_labels_and_leave_void_out(dataset):
    source = opened(dataset, classes=("1", "7"))
    assert source.names == ("a", "b", "c")
    np.testing.assert_array_equal(source[0].mask, (LABELS == 1) | (LABELS == 7))
    assert opened(dataset, "each", ("7",)).names == ("a#7", "c#7")


def test_unknown_classes_are_named_with_the_nearest(dataset):
    assert "holds the class 9; the nearest label is 7" in complaint(dataset, classes=("1", "9"))
    assert "nearest label is 1" in complaint(dataset, classes=("0",))  # the background is no class
    assert "are values, such as 1 or 7, not 'cat'" in complaint(dataset, classes=("cat",))


def test_a_class_may_be_missing_in_one_split(tmp_path):
    write_pair(tmp_path / "train", "a", LABELS)
    write_pair(tmp_path / "test", "b", np.full((2, 4), 7, np.uint8))
    source = opened(tmp_path, classes=("1",), split="test")
    assert not source[0].mask.any()
    assert "hold none of the classes '1'" in complaint(tmp_path, "each", ("1",), split="test")


def test_no_objects_at_all(tmp_path):
    write_pair(tmp_path, "a", np.zeros((2, 4), np.uint8))
    assert "hold no objects" in complaint(tmp_path, "each")
    assert "all empty" in complaint(tmp_path, classes=("1",))


def test_masks_and_labels_together_are_refused(tmp_path):
    write_pair(tmp_path, "a", LABELS, "labels")
    write_pair(tmp_path, "a", LABELS, "masks")
    assert "both masks/ and labels/" in complaint(tmp_path)


def test_sizes_must_match(tmp_path):
    write_pair(tmp_path, "a", LABELS)
    Image.new("RGB", (2, 4)).save(tmp_path / "images/a.png")
    source = opened(tmp_path, "each")
    for read in (source.check_sizes, lambda: source[0]):
        with pytest.raises(ValueError, match=r"labels.a\.png is 4x2 .*images.a\.png is 2x4"):
            read()


def palette(values):
    image = Image.fromarray(values).convert("L")
    image.putpalette([9, 9, 9] * 256)  # colours say nothing about labels
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(LABELS), LABELS),
        (palette(LABELS), LABELS),
        (Image.fromarray(LABELS > 0), LABELS > 0),
        (Image.fromarray(LABELS.astype(np.uint16) * 200), LABELS.astype(int) * 200),
        (Image.fromarray(LABELS.astype(np.int32) * 70_000), LABELS.astype(int) * 70_000),
        (Image.fromarray(np.repeat(LABELS[..., None], 3, -1)), LABELS),
        (
            Image.fromarray(np.stack([LABELS, (LABELS == 7) * np.uint8(9)], -1)),
            LABELS * (LABELS == 7),
        ),
    ],
    ids=["8 bits", "palette", "1 bit", "16 bits", "32 bits", "grey as RGB", "transparent"],
)
def test_modes_that_hold_labels(tmp_path, image, expected):
    image.save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_labels(tmp_path / "a.tif"), expected)
    source_folder = tmp_path / "data"
    write_pair(source_folder, "a", LABELS)
    (source_folder / "labels/a.png").unlink()
    image.save(source_folder / "labels/a.tif")
    present = sorted(set(np.unique(expected).tolist()) - {0})
    assert opened(source_folder, "each").names == tuple(f"a#{int(label)}" for label in present)


@pytest.mark.parametrize(
    ("pixels", "name", "message"),
    [
        (LABELS, "a.jpg", "is a JPEG, which changes labels"),
        (np.arange(24, dtype=np.uint8).reshape(2, 4, 3), "a.png", "holds colours"),
        (np.ones((2, 4), np.float32), "a.tif", "holds colours or fractions"),
        (np.full((2, 4), -1, np.int32), "a.tif", "holds the label -1"),
    ],
)
def test_files_that_hold_no_labels(tmp_path, pixels, name, message):
    Image.fromarray(pixels).save(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / name)
    Image.fromarray(pixels).convert("RGB").convert("CMYK").save(tmp_path / "cmyk.tif")
    with pytest.raises(ValueError, match="holds colours"):
        read_labels(tmp_path / "cmyk.tif")
