"""What becomes of the data that a user names."""

import json

import numpy as np
import pytest
from PIL import Image

from samjax.data.coco import CocoSource
from samjax.data.folder import FolderSource
from samjax.data.images import image_size, read_image
from samjax.data.labels import LabelSource
from samjax.data.sources import open_source
from samjax.data.walk import walk

WHOLE = (1.0, 0.0, 0.0)


def write(file, pixels=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ones((4, 4), np.uint8) if pixels is None else pixels).save(file)


def write_json(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": 1, "file_name": "a.png", "height": 4, "width": 4}]
    annotation = {"id": 1, "image_id": 1, "segmentation": {"size": [4, 4], "counts": [4, 12]}}
    file.write_text(json.dumps({"images": images, "annotations": [annotation]}))


def opened(root, **options):
    return open_source(str(root), "train", fractions=WHOLE, **options)


@pytest.mark.parametrize(
    ("files", "options", "kind"),
    [
        (["masks/a.png"], {}, FolderSource),
        (["masks/a.png"], {"objects": "each"}, LabelSource),
        (["masks/a.png"], {"classes": ("1",)}, LabelSource),
        (["labels/a.png"], {}, LabelSource),
        (["annotations.json"], {}, CocoSource),
        (["annotations.json"], {"objects": "each"}, CocoSource),
        # As Kvasir-SEG has it: boxes, which are no COCO.
        (["masks/a.png", "boxes.json"], {}, FolderSource),
    ],
)
def test_what_lies_there_decides(tmp_path, files, options, kind):
    write(tmp_path / "images/a.png")
    for name in files:
        (write_json if name.endswith("json") else write)(tmp_path / name)
    source = opened(tmp_path, **options)
    assert type(source) is kind
    source.check_sizes()
    assert source[0].mask.sum() in (12, 16) and source.names == (source[0].name,)


def test_split_folders_of_labels(tmp_path):
    write(tmp_path / "train/images/a.png")
    write(tmp_path / "train/labels/a.png")
    assert type(opened(tmp_path)) is LabelSource


def test_data_that_cannot_be_used(tmp_path):
    def complaint(data, split="train"):
        with pytest.raises(ValueError) as caught:
            open_source(data, split)
        return str(caught.value)

    assert "pass --data" in complaint("")
    assert "does not exist" in complaint(str(tmp_path / "nowhere"))
    assert "nor COCO annotations" in complaint(str(tmp_path))
    assert "train, validation, test" in complaint(str(tmp_path), "tets")
    (tmp_path / "photo.zip").write_bytes(b"PK\x80")
    assert "is no JSON" in complaint(str(tmp_path / "photo.zip"))


def test_images_without_pixels_or_that_are_none(tmp_path):
    write(tmp_path / "a.bmp")
    content = bytearray((tmp_path / "a.bmp").read_bytes())
    content[18:22] = bytes(4)  # its width
    for name, bad in (("width.bmp", bytes(content)), ("empty.png", b""), ("page.jpg", b"<html>")):
        (tmp_path / name).write_bytes(bad)
        for read in (read_image, image_size):
            with pytest.raises(ValueError, match=f"{name} cannot be decoded as an image"):
                read(tmp_path / name)


def test_cmyk_and_16_bits_in_coco(tmp_path):
    write_json(tmp_path / "annotations.json")
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17
    expected = np.repeat(grey[..., None], 3, -1)
    for image in (Image.fromarray(grey).convert("CMYK"), Image.fromarray(grey.astype("u2") * 257)):
        (tmp_path / "images").mkdir(exist_ok=True)
        image.save(tmp_path / "images/a.png", format="TIFF")
        np.testing.assert_array_equal(opened(tmp_path)[0].image, expected)


def test_walk_keeps_the_order_and_raises_the_first_error():
    seen = []

    def track(items, title, total):
        assert (title, total) == ("dividing", 50)
        for item in items:
            seen.append(item)
            yield item

    assert list(walk(lambda n: n * n, range(50), "dividing", track)) == [n * n for n in range(50)]
    assert seen == [n * n for n in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(walk(lambda n: 1 // (n - 3), range(50), "dividing"))
