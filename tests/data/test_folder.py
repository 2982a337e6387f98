"""Folders of images and masks: pairing, splits, decoding and complaints."""

import logging

import numpy as np
import pytest
from PIL import Image

from samjax.data.folder import FolderSource
from samjax.data.images import read_image, read_mask
from samjax.data.sources import Dataset


def write(file, array, mode=None, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(np.asarray(array))
    (image.convert(mode) if mode else image).save(file, **options)


def write_pair(folder, stem, image=None, mask=None, image_ext="png", mask_ext="png"):
    image = np.full((4, 6, 3), 7, np.uint8) if image is None else image
    mask = np.eye(4, 6, dtype=np.uint8) * 255 if mask is None else mask
    write(folder / "images" / f"{stem}.{image_ext}", image)
    write(folder / "masks" / f"{stem}.{mask_ext}", mask)


def only_sample(root):
    return FolderSource(root, "train", fractions=(1.0, 0.0, 0.0))[0]


def complaint(root, split="train", **options):
    with pytest.raises(ValueError) as caught:
        FolderSource(root, split, **options)
    return str(caught.value)


@pytest.mark.parametrize("folder", ["validation", "val"])
@pytest.mark.parametrize("asked", ["validation", "val"])
def test_split_folders(tmp_path, folder, asked):
    write_pair(tmp_path / "train", "a")
    write_pair(tmp_path / folder, "b", image_ext="JPG", mask_ext="png")
    write_pair(tmp_path / folder, "a.1")
    (tmp_path / folder / "images" / "._b.JPG").write_bytes(b"macOS")
    (tmp_path / folder / "images" / "Thumbs.db").write_bytes(b"Windows")
    source = FolderSource(tmp_path, asked)
    assert isinstance(source, Dataset)
    assert source.names == ("a.1", "b") and len(source) == 2
    assert source[1].name == "b"
    np.testing.assert_array_equal(source[0].mask, np.eye(4, 6, dtype=bool))
    assert "'test'" in complaint(tmp_path, "test")
    assert "train, validation, test" in complaint(tmp_path, "tets")


def test_flat_split_is_a_partition_that_depends_on_stems_and_seed_only(tmp_path, monkeypatch):
    stems = [f"s{i:02}" for i in range(20)]
    for stem in stems:
        write_pair(tmp_path, stem)
    splits = [FolderSource(tmp_path, split, seed=3).names for split in ("train", "val", "test")]
    assert [len(names) for names in splits] == [16, 2, 2]
    assert sorted(sum(splits, ())) == stems
    # Golden: the split must not change with numpy's generators or between releases.
    assert splits[1:] == [("s04", "s18"), ("s12", "s15")]
    assert FolderSource(tmp_path, "test", seed=4).names != splits[2]
    backwards = type(tmp_path).iterdir
    monkeypatch.setattr(type(tmp_path), "iterdir", lambda self: reversed(list(backwards(self))))
    assert FolderSource(tmp_path, "train", seed=3).names == splits[0]


def test_flat_split_refuses_an_empty_share_and_wrong_fractions(tmp_path):
    write_pair(tmp_path, "a")
    assert "'test'" in complaint(tmp_path, "test") and "1 images" in complaint(tmp_path, "test")
    assert "sum to 1" in complaint(tmp_path, fractions=(0.5, 0.1, 0.1))
    assert "not negative" in complaint(tmp_path, fractions=(1.2, -0.1, -0.1))


def test_pairing_is_checked_at_construction(tmp_path):
    assert "does not exist" in complaint(tmp_path / "nowhere")
    assert "neither images/" in complaint(tmp_path)
    (tmp_path / "images").mkdir()
    assert str(tmp_path / "masks") not in complaint(tmp_path)  # images/ comes first: it is empty
    assert "no image files" in complaint(tmp_path)
    for stem in "abcde":
        write(tmp_path / "images" / f"{stem}.png", np.zeros((2, 2), np.uint8))
    assert str(tmp_path / "masks") in complaint(tmp_path)
    write(tmp_path / "masks" / "e.png", np.zeros((2, 2), np.uint8))
    write(tmp_path / "masks" / "e_mask.png", np.zeros((2, 2), np.uint8))
    message = complaint(tmp_path)
    assert "images without a mask: 'a.png', 'b.png', 'c.png' and 1 more" in message
    assert "masks without an image: 'e_mask.png'" in message
    write(tmp_path / "images" / "a.jpg", np.zeros((2, 2), np.uint8))
    assert "several files of one name: 'a.jpg', 'a.png'" in complaint(tmp_path)


def test_ambiguous_layouts_are_refused(tmp_path):
    write_pair(tmp_path / "val", "a")
    write_pair(tmp_path / "validation", "a")
    assert "validation and val for the split" in complaint(tmp_path, "val")
    write_pair(tmp_path, "a")
    assert "keep one of the two layouts" in complaint(tmp_path)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "RGB", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = np.kron([[0, 255], [255, 0]], np.ones((4, 4))).astype(np.uint8)
    write_pair(tmp_path, "a", mask=grey, image=grey)
    file = tmp_path / "images" / "a.png"
    file.unlink()
    write(file.with_suffix(".tif"), grey, mode)
    image = only_sample(tmp_path).image
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.repeat(grey[..., None], 3, -1))


def test_transparent_palette_does_not_warn(tmp_path):
    write_pair(tmp_path, "a")
    palette = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6)).convert("P")
    write(tmp_path / "images" / "a.png", palette, transparency=bytes(range(24)))
    assert only_sample(tmp_path).image[3, 5].tolist() == [23, 23, 23]


def test_sixteen_bits_scale_by_257(tmp_path):
    values = np.array([[0, 257, 300, 65535]], np.uint16)
    write_pair(tmp_path, "a", image=values, mask=np.ones((1, 4), np.uint8))
    assert only_sample(tmp_path).image[0, :, 0].tolist() == [0, 1, 1, 255]


@pytest.mark.parametrize("array", [np.full((1, 4), 70000, np.int32), np.ones((1, 4), np.float32)])
def test_pixels_without_a_known_range_are_refused(tmp_path, array):
    write_pair(tmp_path, "a", array, np.ones((1, 4), np.uint8), image_ext="tiff")
    with pytest.raises(ValueError, match=r"a\.tiff.*8 or 16 bits"):
        only_sample(tmp_path)


def test_exif_orientation_is_applied(tmp_path):
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, 8:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown after a quarter turn clockwise
    write_pair(tmp_path, "a", mask=np.ones((16, 8), np.uint8))
    write(tmp_path / "images" / "a.png", image, exif=exif)
    np.testing.assert_array_equal(only_sample(tmp_path).image, np.rot90(image, -1))


@pytest.mark.parametrize(
    ("values", "expected", "notice"),
    [
        ([0, 1, 1], [0, 1, 1], None),
        ([0, 255, 0], [0, 1, 0], None),
        ([0, 9, 9], [0, 1, 1], None),
        ([0, 0, 0], [0, 0, 0], None),
        ([255, 255, 255], [1, 1, 1], None),
        ([0, 1, 2, 3], [0, 1, 1, 1], "label image"),
        ([0] * 20 + [127, 128] + [255] * 20, [0] * 21 + [1] * 21, "not binary"),
        ([254, 255, 254], [1, 1, 1], "not binary"),
        (np.array([0, 1, 900], np.uint16), [0, 1, 1], "label image"),
    ],
)
def test_masks_become_boolean(tmp_path, caplog, values, expected, notice):
    values = np.asarray(values, getattr(values, "dtype", np.uint8))[None]
    write_pair(tmp_path, "a", np.zeros((*values.shape, 3), np.uint8), values)
    with caplog.at_level(logging.INFO, "samjax"):
        mask = only_sample(tmp_path).mask
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask[0], np.array(expected, bool))
    messages = [record.getMessage() for record in caplog.records if record.name == "samjax"]
    assert [notice in message for message in messages] == ([True] if notice else [])


def test_jpeg_masks_are_thresholded_with_one_notice(tmp_path, caplog):
    truth = np.zeros((32, 48), bool)
    truth[5:21, 7:30] = True
    image = np.zeros((32, 48, 3), np.uint8)
    for stem in "abc":
        write_pair(tmp_path, stem, image, truth.astype(np.uint8) * 255, mask_ext="jpg")
    source = FolderSource(tmp_path, "train", fractions=(1.0, 0.0, 0.0))
    with caplog.at_level(logging.INFO, "samjax"):
        for sample in (source[0], source[1], source[2], source[0]):
            np.testing.assert_array_equal(sample.mask, truth)
    assert len([record for record in caplog.records if record.name == "samjax"]) == 1
    assert caplog.records[0].levelno == logging.WARNING


def test_jpeg_speckle_is_not_a_label_image(tmp_path):
    values = np.random.default_rng(0).integers(0, 5, (16, 16)).astype(np.uint8)
    write_pair(tmp_path, "a", np.zeros((16, 16, 3), np.uint8), values, mask_ext="jpg")
    assert not only_sample(tmp_path).mask.any()


def test_colour_and_transparent_masks(tmp_path):
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("L")
    palette.putpalette([0, 0, 0, 128, 0, 0, 64, 0, 192])  # as in VOC: 128 alone would be "lossy"
    colours = np.array([[[0, 0, 0], [0, 0, 255], [255, 0, 0]]], np.uint8)
    alpha = np.array([[[255, 255, 255, 0], [255, 255, 255, 255], [255, 255, 255, 255]]], np.uint8)
    for stem, mask in (("a", palette), ("b", colours), ("c", alpha)):
        write_pair(tmp_path, stem, np.zeros((1, 3, 3), np.uint8), mask)
    source = FolderSource(tmp_path, "train", fractions=(1.0, 0.0, 0.0))
    for position in range(3):
        assert source[position].mask.tolist() == [[False, True, True]], source.names[position]


def test_sizes_must_match(tmp_path):
    write_pair(tmp_path, "a", np.zeros((4, 6, 3), np.uint8), np.zeros((6, 4), np.uint8))
    with pytest.raises(ValueError, match=r"masks.a\.png is 4x6 .*images.a\.png is 6x4"):
        only_sample(tmp_path)


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_broken_files_are_named(tmp_path, kind):
    write_pair(tmp_path, "a", np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    file = tmp_path / kind / "a.png"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=rf"{kind}.a\.png cannot be decoded"):
        only_sample(tmp_path)


def test_one_colour_on_a_transparent_ground_is_the_object(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[2:5, 3:6, 3] = 255  # black and opaque
    Image.fromarray(pixels).save(tmp_path / "m.png")
    mask, notice = read_mask(tmp_path / "m.png")
    assert mask.sum() == 9 and mask[2:5, 3:6].all() and notice is None


def test_labels_above_127_are_labels(tmp_path):
    labels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(labels).save(tmp_path / "m.png")
    mask, notice = read_mask(tmp_path / "m.png")
    assert mask.sum() == 63 and "label image" in notice


def test_low_labels_with_void_are_labels(tmp_path):
    labels = np.array([[0, 0, 1, 7, 255]], np.uint8)
    Image.fromarray(labels).save(tmp_path / "m.png")
    mask, notice = read_mask(tmp_path / "m.png")
    assert mask.tolist() == [[False, False, True, True, True]] and "label image" in notice


def test_blurred_edges_are_thresholded(tmp_path):
    pixels = np.zeros((40, 40), np.uint8)
    pixels[10:30, 10:30] = 255
    pixels[10, 10:30] = 100
    pixels[29, 10:30] = 200
    Image.fromarray(pixels).save(tmp_path / "m.png")
    mask, notice = read_mask(tmp_path / "m.png")
    assert mask.sum() == 19 * 20 and "thresholded" in notice


def test_16_bit_masks_with_blurred_edges_are_thresholded(tmp_path):
    pixels = np.zeros((40, 40), np.uint16)
    pixels[10:30, 10:30] = 65535
    pixels[10, 10:30] = 100 * 257
    pixels[29, 10:30] = 200 * 257
    Image.fromarray(pixels).save(tmp_path / "m.png")
    mask, notice = read_mask(tmp_path / "m.png")
    assert mask.sum() == 19 * 20 and "thresholded" in notice


@pytest.mark.parametrize("labels", [[0, 1, 2, 65535], [0, 24000, 24001, 33000], [0, 7, 120, 255]])
def test_16_bit_labels_are_labels(tmp_path, labels):
    Image.fromarray(np.array([labels], np.uint16)).save(tmp_path / "m.tif")
    mask, notice = read_mask(tmp_path / "m.tif")
    assert mask.tolist() == [[False, True, True, True]] and "label image" in notice


def test_a_threshold_that_a_dataset_tells_is_no_guess(tmp_path):
    grey = np.array([[0, 1, 127, 128]])
    palette = Image.fromarray(np.array([[0, 0, 1, 1]], np.uint8), "P")
    palette.putpalette([0, 0, 0, 100, 0, 0])
    files = {
        "8.png": Image.fromarray(grey.astype(np.uint8)),
        "16.tif": Image.fromarray((grey * 257).astype(np.uint16)),
        "rgb.png": Image.fromarray(np.repeat(grey[..., None], 3, 2).astype(np.uint8)),
        "palette.png": palette,
    }
    for name, image in files.items():
        image.save(tmp_path / name)
        expected = [[False, False, name == "palette.png", True]]
        mask, notice = read_mask(tmp_path / name, threshold=127)
        assert mask.tolist() == expected and notice is None


def test_dark_16_bit_images_are_named(tmp_path, caplog):
    Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(tmp_path / "i.png")
    read_image(tmp_path / "i.png")
    assert "12 bits or less" in caplog.text


def test_sizes_are_checked_from_headers(tmp_path):
    write_pair(tmp_path, "a", np.zeros((6, 4, 3), np.uint8), np.zeros((6, 4), np.uint8))
    write_pair(tmp_path, "b", np.zeros((6, 4, 3), np.uint8), np.zeros((4, 6), np.uint8))
    source = FolderSource(tmp_path, "train", fractions=(1.0, 0.0, 0.0))
    with pytest.raises(ValueError, match=r"b\.png is 6x4 pixels .* 4x6: resize"):
        source.check_sizes()
