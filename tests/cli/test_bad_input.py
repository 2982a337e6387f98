"""What is wrong is told in one sentence, before work, and nothing is written."""

import json
import os
import shutil

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

PREDICT = "predict {files}/image.png --weights {files}/small --out {out}"
TRAIN = "train {files}/tiny.py --weights {files}/small --data {files}/data --out {out}"
EVAL = "eval {files}/tiny.py --weights {files}/small --data {files}/data"
CONVERT = "convert {files}/small {out}"
MERGE = "merge {out} --weights {files}/small --adapter {files}/absent"

TYPED = {
    "frobnicate": "unknown verb 'frobnicate'; the nearest is ",
    "trian": "the nearest is train, and samjax has weights, convert, predict",
    "predict": "Missing from samjax predict: PATH, --weights STR, --out PATH",
    "train": "samjax train needs an experiment file, such as",
    "eval": "samjax eval needs an experiment file",
    PREDICT + " --pont 1,2,3": "--pont, 1,2,3; Perhaps you meant: --point",
    TRAIN + " --lerning-rate 1": "Perhaps you meant: --learning-rate",
    "params --metod lora": "Perhaps you meant: --method",
    PREDICT + " --image-size x": "Error parsing --image-size",
    CONVERT + " --to onnx": "invalid choice 'onnx' for argument '--to'",
}
PROMPTS = {
    PREDICT + " --point 1,2": "--point takes X,Y,LABEL, numbers with commas, not '1,2'",
    PREDICT + " --point a,b,1": "--point takes X,Y,LABEL",
    PREDICT + " --point nan,1,1": "points must be finite",
    PREDICT + " --point 1,-inf,1": "points must be finite",
    PREDICT + " --point 1,2,2": "labels must be 1 (inside the object) or 0 (outside)",
    PREDICT + " --point 1,2,0.5": "labels must be 1 (inside the object) or 0 (outside)",
    PREDICT + " --point 1,2,nan": "labels must be 1 (inside the object) or 0 (outside)",
    PREDICT + " --point 1,41,1": "outside the image, which is 48 pixels wide and 40 high",
    PREDICT + " --point -1,2,1": "outside the image",
    PREDICT + " --box 1,2,3": "--box takes X0,Y0,X1,Y1",
    PREDICT + " --box 30,8,10,25": "box must be (x0, y0, x1, y1) with x1 > x0",
    PREDICT + " --box 0,0,49,40": "outside the image",
    PREDICT + " --box 0,nan,9,9": "box must be four finite numbers",
    PREDICT + " --box 0,0,inf,9": "box must be four finite numbers",
    PREDICT + " --box 0,0,9,9 --box 30,8,10,25": "x1 > x0",
    PREDICT + " --box 0,0,9,9 --box 5,5,9,9 --point 1,2,1": "2 boxes are 2 prompts",
    PREDICT + " --mask {bad}/small.png": "small.png is 30x20 pixels (width x height), but",
    PREDICT + " --mask {files}/none.png": "cannot be decoded as an image",
    PREDICT + " --mask {files}/absent.png": "no mask file at",
    PREDICT + " --mask {files}": "is a folder; give the file of the mask",
}
IMAGES = {
    PREDICT.replace("image.png", "absent.png"): "no image file at",
    PREDICT.replace("image.png", "data"): "data is a folder; give the file of the image",
    PREDICT.replace("image.png", "none.png"): "(it is in no format that Pillow knows): replace it",
    PREDICT.replace("{files}/image.png", "{bad}/empty.png"): "(it is empty): replace it",
    PREDICT.replace("{files}/image.png", "{bad}/cut.png"): "cut.png cannot be decoded as an image",
}
DATA = {
    TRAIN.replace("{files}/data", "{files}/empty"): "holds no image files",
    TRAIN.replace("{files}/data", "{files}/absent"): "does not exist",
    TRAIN.replace("{files}/data", "{files}/none.png"): "none.png is no JSON",
    TRAIN.replace("--data {files}/data", ""): "no data: pass --data",
    TRAIN.replace("{files}/data", "{bad}/unreadable"): "3.png cannot be decoded as an image",
    TRAIN.replace("{files}/data", "{bad}/sizes"): "masks/6.png is 30x20 pixels (width x height), ",
    EVAL.replace("{files}/data", "{bad}/sizes"): "masks/6.png is 30x20 pixels (width x height), ",
    EVAL + " --split validation": "has no split 'validation'",
}
WEIGHTS = {
    PREDICT.replace("/small", "/absent"): "absent; check the path",
    PREDICT.replace("/small", "/none.safetensors"): "none.safetensors",
    PREDICT.replace("/small", "/data"): "is no samjax checkpoint",
    PREDICT + " --adapter {files}/absent": "no adapter file at",
    PREDICT + " --adapter {files}/none.safetensors": "none.safetensors",
    PREDICT + " --adapter {bad}/vit_b.safetensors": "is no samjax adapter",
    "convert {files}/absent {out}": "absent; check the path",
    MERGE: "no adapter file at",
    TRAIN.replace("--weights {files}/small", ""): "no weights: pass --weights",
    # Of another model than is said, or of one that is not said.
    "params --model vit_x": "unknown model 'vit_x'; known are vit_b",
    CONVERT + " --model vit_x": "no model is called 'vit_x'; known are vit_b",
    TRAIN + " --model vit_x": "unknown model 'vit_x'",
    TRAIN + " --model vit_b": "it holds small, not vit_b; pass --model small",
    PREDICT + " --model medsam": "it holds small, not medsam; pass --model small",
    "convert {bad}/vit_t.safetensors {out} --model vit_b": "it holds vit_t, not vit_b; pass",
    PREDICT.replace("{files}/small", "{bad}/vit_b.safetensors"): (
        "it has the architecture of vit_b and medsam, whose preprocessing differs; pass "
        "--model vit_b or --model medsam"
    ),
    TRAIN.replace("{files}/small", "{bad}/vit_b.safetensors"): "--model vit_b or --model medsam",
    "convert {bad}/vit_b.safetensors {out}": "--model vit_b or --model medsam",
    "convert {bad}/vit_b.safetensors {out} --model medsam": "the tensors do not fit medsam: ",
}
SETTINGS = {
    PREDICT + " --image-size 500": "not a positive multiple of 16, the patch size of small; the",
    PREDICT + " --image-size 0": "not a positive multiple of 16",
    PREDICT + " --image-size 128 100": "image_size 100 is not a positive multiple of 16",
    TRAIN + " --image-size 500": "the nearest that is: 496",
    TRAIN + " --batch-size 3 --accumulate 2": "accumulate 2 does not divide batch_size 3",
    TRAIN + " --method frob": "unknown method 'frob'",
    "params --method dorra": "unknown method 'dorra'; the nearest is dora, and this samjax knows",
    "params --targets x": "invalid choice 'x'",
    "params --rank 10000": "LoRA: rank 10000 is more than image_encoder/blocks_0/attn/qkv can have",
    TRAIN + " --rank 100": "LoRA: rank 100 is more than image_encoder/blocks_0/attn/qkv can have",
    "params --rank 0": "rank must be at least 1, not 0",
    "params --experts 3": "method 'lora' has no setting experts: it has rank, alpha, targets",
    "params --method ssf --rank 3": "method 'ssf' has no setting rank: it has no settings",
    "params --method decoder --decoder none": "'decoder' trains nothing when decoder is none",
    "params --method last_k --blocks 13": "vit_b has 12; choose 1 to 12",
    "params --method dora --targets conv": "DoRA is defined for linear layers alone",
    "params --method conv_lora --targets decoder": "targets must name some of qkv, q, k, v, proj",
    "params --method sam_parser --recipe code --train both": "recipe 'code' trains the whole neck",
    TRAIN.replace("tiny.py", "absent.py"): "no experiment file at",
    TRAIN.replace("tiny.py", "broken.py"): "broken.py fails with ZeroDivisionError",
    TRAIN.replace("tiny.py", "without.py"): "defines no function config()",
    "eval {files}/absent": "no run folder and no experiment file at",
    "eval {files}/used": "is no run folder",
    "eval {bad}/run": "unknown setting optimizer.lerning_rate; the nearest is optimizer.learning_r",
    TRAIN.replace("{out}", "{bad}/run") + " --resume": "run/config.json cannot be read: unknown",
    TRAIN + " --resume": "nothing to resume",
}
PLACES = {
    # Taken.
    PREDICT.replace("{out}", "{files}/none.png"): "is a file; choose a folder with --out",
    TRAIN.replace("{out}", "{files}/none.png"): "is a file; choose a folder with --out",
    TRAIN.replace("{out}", "{files}/used"): "is not empty; pass --resume",
    CONVERT.replace("{out}", "{files}/used"): "exists already",
    MERGE.replace("{out}", "{files}/used"): "exists already",
    EVAL + " --csv {files}/used": "is a folder; choose a file with --csv",
    # Under a file.
    PREDICT.replace("{out}", "{files}/none.png/a/b"): "none.png is no folder that you may write",
    TRAIN.replace("{out}", "{files}/none.png/a/b"): "none.png is no folder that you may write",
    CONVERT.replace("{out}", "{files}/none.png/a"): "none.png is no folder that you may write",
    MERGE.replace("{out}", "{files}/none.png/a"): "none.png is no folder that you may write",
    EVAL + " --csv {files}/none.png/a.csv": "none.png is no folder that you may write",
    # In no folder, or with another ending.
    CONVERT + "/deep/er": "create it",
    EVAL + " --csv {out}/deep/er.csv": "create it",
    CONVERT + " --to meta": "must end in .safetensors",
}
REFUSED = TYPED | PROMPTS | IMAGES | DATA | WEIGHTS | SETTINGS | PLACES
READ_ONLY = (
    PREDICT,
    PREDICT + "/a/b",
    TRAIN + "/a",
    CONVERT + "/a",
    CONVERT + "/a.safetensors --to meta",
    MERGE.replace("{out}", "{out}/a"),
    EVAL + " --csv {out}/a.csv",
)


@pytest.fixture(scope="module")
def bad(tmp_path_factory, files):
    """A folder of files that are nearly right."""
    root = tmp_path_factory.mktemp("bad")
    (root / "empty.png").write_bytes(b"")
    picture = (files / "image.png").read_bytes()
    (root / "cut.png").write_bytes(picture[: len(picture) // 2])
    Image.new("L", (30, 20)).save(root / "small.png")
    for name in ("sizes", "unreadable"):
        shutil.copytree(files / "data", root / name)
    shutil.copy(root / "small.png", root / "sizes/test/masks/6.png")
    shutil.copy(root / "empty.png", root / "unreadable/train/images/3.png")
    (root / "run").mkdir()
    (root / "run/config.json").write_text(json.dumps({"optimizer": {"lerning_rate": 1e-3}}))
    # By these tensors alone a file is taken for one of these models.
    for name, tensor, shape in (
        ("vit_b", "pos_embed", (1, 1, 1, 768)),
        ("vit_t", "patch_embed.seq.0.c.weight", (32, 3, 3, 3)),
    ):
        tensors = {
            "mask_decoder.iou_token.weight": np.zeros((1, 256), np.float32),
            f"image_encoder.{tensor}": np.zeros(shape, np.float32),
        }
        safetensors.numpy.save_file(tensors, root / f"{name}.safetensors")
    return root


def contents(*roots):
    """What there is: each folder, and each file with its size and the time that it was written."""
    paths = (path for root in roots for path in root.rglob("*") if "__pycache__" not in path.parts)
    stats = {path: path.lstat() for path in paths}
    return {p: p.is_dir() or (stat.st_size, stat.st_mtime_ns) for p, stat in stats.items()}


@pytest.mark.parametrize(("line", "message"), REFUSED.items(), ids=REFUSED)
def test_errors_are_one_sentence_and_write_nothing(
    call, assert_refused, files, bad, tmp_path, line, message
):
    before = contents(files, bad)
    arguments = line.format(files=files, bad=bad, out=tmp_path / "out").split()
    assert_refused(call(*arguments), message)
    assert contents(files, bad) == before and not os.listdir(tmp_path)


@pytest.mark.parametrize("line", READ_ONLY)
def test_folders_that_are_read_only(call, assert_refused, files, tmp_path, line):
    (tmp_path / "out").mkdir(mode=0o555)
    if os.access(tmp_path / "out", os.W_OK):
        pytest.skip("this user, root perhaps, may write to read-only folders")
    arguments = line.format(files=files, out=tmp_path / "out").split()
    assert_refused(call(*arguments), "out is no folder that you may write; choose another")
    assert not os.listdir(tmp_path / "out")


@pytest.mark.parametrize("verb", ["predict", "merge"])
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("named", "trained in small, and these weights are named"),
        ("changed", "other weights"),
        ("other", "trained in small, and these weights are other, which is built differently"),
    ],
)
def test_an_adapter_of_other_weights(
    call, assert_refused, files, trained, tmp_path, verb, weights, message
):
    options = ("--weights", files / weights, "--adapter", files / "run/adapter.safetensors")
    target = {"predict": (files / "image.png", "--out", tmp_path / "o"), "merge": (tmp_path / "o",)}
    assert_refused(call(verb, *target[verb], *options), message)
    assert not os.listdir(tmp_path)


def test_a_traceback_on_request(call, files, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMJAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"broken\.py fails") as caught:
        call("train", files / "broken.py", "--out", tmp_path / "out")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
