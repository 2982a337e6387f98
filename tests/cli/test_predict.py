"""`samjax predict`: what it writes is what the predictor gives."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import samjax
from samjax.data.images import read_image

HEIGHT, WIDTH = 40, 48  # of the image
POINTS = ("--point", "20,15,1", "--point", "3.5,30,0")
BOX = ("--box", "10,8,30,25")
PROMPTS = {
    "no prompt": ((), {}),
    "a point": (POINTS[:2], {"point_coords": [[20, 15]], "point_labels": [1]}),
    "points": (POINTS, {"point_coords": [[20, 15], [3.5, 30]], "point_labels": [1, 0]}),
    "a box": (BOX, {"box": [10, 8, 30, 25]}),
    "the whole image": (("--box", "0,0,48,40"), {"box": [0, 0, 48, 40]}),
    "points and a box": (
        (*POINTS, *BOX),
        {"point_coords": [[20, 15], [3.5, 30]], "point_labels": [1, 0], "box": [10, 8, 30, 25]},
    ),
}


@pytest.fixture(scope="module")
def predictor(files, small_model, small_params):
    predictor = samjax.SamPredictor(small_model, small_params)
    predictor.set_image(read_image(files / "image.png"))
    return predictor


@pytest.mark.parametrize(("arguments", "prompt"), PROMPTS.values(), ids=PROMPTS)
def test_predict_answers_the_prompt(predict, tmp_path, predictor, arguments, prompt):
    result = predict(tmp_path / "out", *arguments, "--save-logits")
    arrays = {key: np.array(value) for key, value in prompt.items()}
    masks, iou, low_res = predictor.predict(**arrays, multimask_output=False)
    assert result.out.count("\n") == 1
    assert result.json["masks"] == [str(tmp_path / "out/mask_0_0.png")]
    assert np.array_equal(result.masks, masks)
    np.testing.assert_allclose(result.json["iou_predictions"], iou[None], rtol=1e-5)
    assert read_image(Path(result.json["overlay"])).shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_allclose(result.logits["low_res_logits"], low_res[None], atol=1e-5)


def test_predict_several_boxes_and_masks(predict, tmp_path, predictor):
    boxes = np.array([[10, 8, 30, 25], [0, 0, 48, 40], [5, 5, 20, 20]])
    flags = [part for box in boxes for part in ("--box", ",".join(map(str, box)))]
    result = predict(tmp_path, *flags, "--multimask", "--save-logits")
    names = [f"mask_{i}_{j}.png" for i in range(3) for j in range(3)]
    assert result.json["masks"] == [str(tmp_path / name) for name in names]
    assert sorted(os.listdir(tmp_path)) == [
        "logits.npz",
        *names,
        "overlay.png",
    ]
    masks, iou, low_res = predictor.predict_boxes(boxes, multimask_output=True)
    assert np.array_equal(result.masks, masks.reshape(9, HEIGHT, WIDTH))
    logits = result.logits
    assert {key: array.shape for key, array in logits.items()} == {
        "low_res_logits": (3, 3, 32, 32),
        "iou_predictions": (3, 3),
        "image_embeddings": (1, 32, 8, 8),
    }
    assert all(array.dtype == np.float32 for array in logits.values())
    np.testing.assert_allclose(logits["low_res_logits"], low_res, atol=1e-5)
    np.testing.assert_allclose(logits["iou_predictions"], iou, atol=1e-5)
    assert np.array_equal(logits["image_embeddings"], predictor.get_image_embedding())


def test_predict_at_another_size(predict, tmp_path):
    result = predict(tmp_path, *BOX, "--image-size", "64", "--save-logits")
    assert result.masks.shape == (1, HEIGHT, WIDTH)
    assert result.logits["image_embeddings"].shape == (1, 32, 4, 4)


def write_cmyk(path, rgb, low):
    inks = [*np.moveaxis(255 - rgb, -1, 0), low[..., 0] // 4]
    Image.merge("CMYK", [Image.fromarray(ink) for ink in inks]).save(path)


def write_grey(path, rgb, low):
    Image.fromarray(rgb[..., 0] * np.uint16(256) + low[..., 0]).save(path)


def write_rgb_of_16_bits(path, rgb, low):
    """A PNG; Pillow reads such files and writes none."""
    rows = (rgb * np.uint16(256) + low).astype(">u2").reshape(HEIGHT, -1)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )


def in_8_bits(path):
    """Pillow's own conversion of a file to RGB; of 16 bits in grey it has none but arithmetic."""
    with Image.open(path) as image:
        if image.mode.startswith("I"):
            image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
        return image.convert("RGB")


@pytest.mark.parametrize(
    ("name", "mode", "write"),
    [
        ("cmyk.tif", "CMYK", write_cmyk),
        ("cmyk.jpg", "CMYK", write_cmyk),
        ("grey.png", "I;16", write_grey),
        ("grey.tif", "I;16", write_grey),
        ("rgb.png", "RGB", write_rgb_of_16_bits),
    ],
)
def test_predict_on_other_inks_and_depths(predict, files, tmp_path, name, mode, write):
    path, rgb = tmp_path / name, read_image(files / "image.png")
    low = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    write(path, rgb, low)
    with Image.open(path) as image:
        assert image.mode == mode
    in_8_bits(path).save(tmp_path / "8_bits.png")
    if mode != "CMYK":
        original = rgb if mode == "RGB" else rgb[..., :1]
        assert np.abs(np.asarray(in_8_bits(path)).astype(int) - original).max() <= 1
    ours, theirs = (
        predict(tmp_path / Path(image).stem, *BOX, "--save-logits", image=image)
        for image in (path, tmp_path / "8_bits.png")
    )
    outside = ~(ours.masks | theirs.masks)[0]
    pictures = [read_image(Path(r.json["overlay"]))[outside].astype(int) for r in (ours, theirs)]
    assert outside.any() and np.abs(pictures[0] - pictures[1]).max() <= 1
    logits, expected = (result.logits["low_res_logits"] for result in (ours, theirs))
    assert np.abs(logits - expected).max() <= 1e-3 * expected.std()


def test_predict_replaces_its_own_files_alone(predict, tmp_path, predictor):
    for name in ("mask_0_0.png", "mask_7_0.png", "notes.txt"):
        (tmp_path / name).write_text("earlier")
    result = predict(tmp_path, *BOX)
    masks, _, _ = predictor.predict(box=np.array([10, 8, 30, 25]), multimask_output=False)
    assert np.array_equal(result.masks, masks)
    names = ["mask_0_0.png", "mask_7_0.png", "notes.txt", "overlay.png"]
    assert sorted(os.listdir(tmp_path)) == names
    assert all((tmp_path / name).read_text() == "earlier" for name in names[1:3])


def test_predict_without_json_is_for_people(call, files, tmp_path):
    options = ("--weights", files / "small", "--out", tmp_path)
    result = call("predict", files / "image.png", *options, *BOX)
    assert result.code == 0
    assert f"masks: {tmp_path / 'mask_0_0.png'}\n" in result.out
    assert "{" not in result.out


def test_streams_of_a_process(spawn, assert_refused, files, trained, tmp_path):
    """The adapter is announced on stderr, and nothing beside it; the result is on stdout."""
    options = ("--weights", files / "small", "--adapter", files / "run/adapter.safetensors")
    arguments = (files / "image.png", *options, "--out", tmp_path)
    result = spawn("predict", *arguments, "--json")
    assert result.out.count("\n") == 1 and result.json["masks"] == [str(tmp_path / "mask_0_0.png")]
    assert result.err.count("\n") == 1 and "adapter.safetensors: lora at 2 sites, " in result.err
    assert_refused(spawn("predict", *arguments, "--box", "9,9,9,9"), "box must be")
    message = "--pont, 1,2,3; Perhaps you meant: --point"
    assert_refused(spawn("predict", *arguments, "--pont", "1,2,3"), message)
