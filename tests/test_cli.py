"""The command line, verb by verb, on a small checkpoint and a folder of tiny images."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import samjax
from samjax import cli
from samjax.data.images import read_image
from samjax.weights import read_weights, save_checkpoint
from weights_convert import from_params, read_tensors

VERBS = ("weights", "convert", "predict", "data", "check-data", "train", "eval", "params", "merge")
SIZE = (40, 48)  # height, width of every image

EXPERIMENT = '''"""A run of three steps."""

from samjax.config import Config


def config():
    return Config(steps=3, batch_size=2, eval_batch_size=2, gallery=2, log_every=1)
'''


@dataclasses.dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self):
        """The object on the last line of stdout."""
        assert self.code == 0, self.err
        return json.loads(self.out.splitlines()[-1])


def call(*arguments):
    """`samjax ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code or 0
    return Result(code, out.getvalue(), err.getvalue())


def spawn(*arguments):
    """`samjax ARGUMENTS` in its own process."""
    command = [sys.executable, "-m", "samjax.cli", *map(str, arguments)]
    # Tyro draws boxes on UTF-8 only: not in `call`.
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, encoding="utf-8", timeout=300
    )
    return Result(done.returncode, done.stdout, done.stderr)


def assert_refused(result, message):
    assert result.code != 0
    assert not result.out
    assert result.err.startswith("samjax: ") and result.err.endswith("\n")
    assert result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err
    assert message in result.err


def draw(index):
    """A bright ellipse on noise, and its mask."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    (cy, cx), (ry, rx) = rng.uniform(12, 28, 2), rng.uniform(6, 11, 2)
    mask = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
    image = rng.integers(0, 60, (*SIZE, 3)) + 150 * mask[..., None]
    return image.astype(np.uint8), mask


def write_folder(folder, indices):
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for index in indices:
        image, mask = draw(index)
        Image.fromarray(image).save(folder / f"images/{index}.png")
        Image.fromarray(mask).save(folder / f"masks/{index}.png")


@pytest.fixture(scope="module")
def files(tmp_path_factory, small_config, small_params):
    """A folder with checkpoints, data, experiments, an image, and things that are none of these."""
    root = tmp_path_factory.mktemp("cli")
    save_checkpoint(root / "small", small_config, small_params)
    # Of the same shape, as another model and with other numbers.
    save_checkpoint(root / "named", dataclasses.replace(small_config, name="named"), small_params)
    changed = jax.tree.map(lambda leaf: leaf * np.float32(1.01), small_params)
    save_checkpoint(root / "changed", small_config, changed)
    write_folder(root / "data/train", range(5))
    write_folder(root / "data/test", range(5, 8))
    write_folder(root / "empty", ())
    Image.fromarray(draw(5)[0]).save(root / "image.png")
    (root / "none.png").write_text("no image")
    (root / "none.safetensors").write_text("no weights")
    (root / "tiny.py").write_text(EXPERIMENT)
    (root / "broken.py").write_text("def config():\n    return 1 / 0\n")
    (root / "without.py").write_text("x = 1\n")
    (root / "used").mkdir()
    (root / "used/notes.txt").write_text("mine")
    return root


@pytest.fixture(scope="module")
def trained(files):
    """What `samjax train` says; the run is in `files / "run"`."""
    data = ("--weights", files / "small", "--data", files / "data")
    return call("train", files / "tiny.py", *data, "--out", files / "run", "--json")


@pytest.fixture(scope="module")
def predictor(small_model, small_params):
    predictor = samjax.SamPredictor(small_model, small_params)
    predictor.set_image(draw(5)[0])
    return predictor


def predict(files, out, *arguments, weights="small"):
    options = ("--weights", files / weights, "--out", out, "--json")
    return call("predict", files / "image.png", *options, *arguments)


def read_masks(result):
    return np.stack([read_image(file)[..., 0] for file in map(Path, result.json["masks"])]) > 127


def read_logits(result):
    with np.load(result.json["logits"]) as arrays:
        return arrays["low_res_logits"]


# Help


def test_the_help_shows_an_example_of_each_verb():
    for flag in ("-h", "--help"):
        result = call(flag)
        assert result.code == 0 and not result.err
        for verb in VERBS:
            assert f"samjax {verb} " in result.out
    assert call().code != 0


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_with_an_example(verb):
    result = call(verb, "--help")
    assert result.code == 0 and not result.err
    assert f"Example: samjax {verb} " in result.out


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_the_help_of_an_experiment(files, verb):
    result = call(verb, files / "tiny.py", "--help")
    assert result.code == 0
    text = " ".join(result.out.replace("│", " ").split())
    assert text.count("A run of three steps.") == 1 and "Example: samjax" in text
    for flag in ("--weights", "--data", "--image-size", "--method", "--learning-rate"):
        assert f" {flag} " in text
    assert "(default: 3)" in text  # as the experiment says
    # Tyro gives a setting without a comment that of the setting above it.
    for comment in (
        "Parts that a batch is cut into",
        "Peak learning rate of the mask decoder",
        "The mixture of prompts in training",
    ):
        assert text.count(comment) == 1


# Params


@pytest.mark.parametrize(("method", "adapter"), [("lora", 147456), ("decoder", 0)])
def test_params_of_vit_b(method, adapter):
    result = call("params", "--model", "vit_b", "--method", method, "--json")
    assert result.json == {
        "total": 93735472,
        "adapter": adapter,
        "decoder": 4058340,
        "trainable": adapter + 4058340,
    }
    assert result.out.count("\n") == 1 and "4,058,340" in result.err


def test_params_without_the_decoder():
    arguments = ("--model", "vit_t", "--rank", "8", "--no-train-decoder", "--json")
    counts = call("params", *arguments).json
    assert counts["decoder"] == 0 and counts["trainable"] == counts["adapter"] > 0
    twice = call("params", *arguments, "--rank", "16").json
    assert twice["adapter"] == 2 * counts["adapter"]


# Convert


def test_convert_a_checkpoint_to_meta_and_to_another(files, tmp_path, small_config, small_params):
    result = call("convert", files / "small", tmp_path / "copy", "--json")
    assert result.json == {"model": "small", "dst": str(tmp_path / "copy"), "to": "samjax"}
    assert result.out.count("\n") == 1
    config, params = read_weights(tmp_path / "copy")
    assert config == small_config
    jax.tree.map(np.testing.assert_array_equal, params, small_params)

    meta = tmp_path / "small.safetensors"
    assert call("convert", files / "small", meta, "--to", "meta").code == 0
    expected, tensors = from_params(small_params, small_config), read_tensors(meta)
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[key], expected[key]) for key in expected)


def test_convert_there_and_back(asset, tmp_path):
    source, back = asset("weights/mobile_sam.safetensors"), tmp_path / "back.safetensors"
    assert call("convert", source, tmp_path / "there", "--json").json["model"] == "vit_t"
    assert call("convert", tmp_path / "there", back, "--to", "meta").code == 0
    expected, tensors = read_tensors(source), read_tensors(back)
    dropped = expected.keys() - tensors.keys()
    assert all("num_batches_tracked" in key or "head" in key for key in dropped)
    assert all(np.array_equal(tensors[key], expected[key]) for key in tensors)


# Predict


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


@pytest.mark.parametrize(("arguments", "prompt"), PROMPTS.values(), ids=PROMPTS)
def test_predict_answers_the_prompt(files, tmp_path, predictor, arguments, prompt):
    result = predict(files, tmp_path / "out", *arguments, "--save-logits")
    arrays = {key: np.array(value) for key, value in prompt.items()}
    masks, iou, low_res = predictor.predict(**arrays, multimask_output=False)
    assert result.out.count("\n") == 1
    assert result.json["masks"] == [str(tmp_path / "out/mask_0_0.png")]
    assert np.array_equal(read_masks(result), masks)
    np.testing.assert_allclose(result.json["iou_predictions"], iou[None], rtol=1e-5)
    assert read_image(Path(result.json["overlay"])).shape == (*SIZE, 3)
    with np.load(result.json["logits"]) as logits:
        np.testing.assert_allclose(logits["low_res_logits"], low_res[None], atol=1e-5)


def test_predict_several_boxes_and_masks(files, tmp_path, predictor):
    boxes = np.array([[10, 8, 30, 25], [0, 0, 48, 40], [5, 5, 20, 20]])
    flags = [part for box in boxes for part in ("--box", ",".join(map(str, box)))]
    result = predict(files, tmp_path, *flags, "--multimask", "--save-logits")
    names = [f"mask_{i}_{j}.png" for i in range(3) for j in range(3)]
    assert result.json["masks"] == [str(tmp_path / name) for name in names]
    assert sorted(os.listdir(tmp_path)) == [
        "logits.npz",
        *names,
        "overlay.png",
    ]
    masks, iou, low_res = predictor.predict_boxes(boxes, multimask_output=True)
    assert np.array_equal(read_masks(result), masks.reshape(9, *SIZE))
    with np.load(tmp_path / "logits.npz") as logits:
        assert {key: logits[key].shape for key in logits.files} == {
            "low_res_logits": (3, 3, 32, 32),
            "iou_predictions": (3, 3),
            "image_embeddings": (1, 32, 8, 8),
        }
        assert all(logits[key].dtype == np.float32 for key in logits.files)
        np.testing.assert_allclose(logits["low_res_logits"], low_res, atol=1e-5)
        np.testing.assert_allclose(logits["iou_predictions"], iou, atol=1e-5)
        assert np.array_equal(logits["image_embeddings"], predictor.get_image_embedding())


def test_predict_at_another_size(files, tmp_path):
    result = predict(files, tmp_path, *BOX, "--image-size", "64", "--save-logits")
    assert read_masks(result).shape == (1, *SIZE)
    with np.load(tmp_path / "logits.npz") as logits:
        assert logits["image_embeddings"].shape == (1, 32, 4, 4)


def test_predict_without_json_is_for_people(files, tmp_path):
    options = ("--weights", files / "small", "--out", tmp_path)
    result = call("predict", files / "image.png", *options, *BOX)
    assert result.code == 0
    assert f"masks: {tmp_path / 'mask_0_0.png'}\n" in result.out
    assert "{" not in result.out


def test_streams_of_a_process(files, trained, tmp_path):
    """The adapter is announced on stderr, and nothing beside it; the result is on stdout."""
    options = ("--weights", files / "small", "--adapter", files / "run/adapter.safetensors")
    arguments = (files / "image.png", *options, "--out", tmp_path)
    result = spawn("predict", *arguments, "--json")
    assert result.out.count("\n") == 1 and result.json["masks"] == [str(tmp_path / "mask_0_0.png")]
    assert result.err.count("\n") == 1 and "adapter.safetensors: lora for small" in result.err
    assert_refused(spawn("predict", *arguments, "--box", "9,9,9,9"), "box must be")
    message = "--pont, 1,2,3; Perhaps you meant: --point"
    assert_refused(spawn("predict", *arguments, "--pont", "1,2,3"), message)


# Train, eval, merge


def test_train_leaves_a_run(files, trained):
    run, summary = files / "run", trained.json
    assert trained.out.count("\n") == 1
    for text in (
        "small at 128 px",
        "5 training and 3 test images",
        "training",
        "(prompt: none): dice",
    ):
        assert text in trained.err
    assert {"before", "after", "adapter", "gallery", "seconds_per_step"} <= summary.keys()
    for when in ("before", "after"):
        assert {"dice", "iou"} <= summary[when].keys()
        assert all(0 <= value <= 1 for value in summary[when].values())
        rows = (run / f"eval_{when}.csv").read_text().splitlines()
        assert len(rows) == 4 and rows[0].startswith("name,")
    assert summary["steps"] == 3 and summary["seconds_per_step"] > 0
    assert summary["adapter"] == str(run / "adapter.safetensors")
    assert summary["gallery"] == str(run / "gallery.png")
    picture = read_image(run / "gallery.png")
    assert picture.shape[1] > 4 * 256  # image, truth, before, after
    assert json.loads((run / "summary.json").read_text()) == summary
    config = json.loads((run / "config.json").read_text())
    assert config["steps"] == 3 and config["weights"] == str(files / "small")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert not [name for name in os.listdir(run) if name.endswith(".tmp")]


def test_a_finished_run_is_not_trained_again(files, trained):
    data = ("--weights", files / "small", "--data", files / "data", "--out", files / "run")
    again = call("train", files / "tiny.py", *data, "--resume", "--json")
    assert again.json == trained.json
    assert "finished already" in again.err
    assert_refused(call("train", files / "tiny.py", *data), "is not empty; pass --resume")
    other = call("train", files / "tiny.py", *data, "--resume", "--seed", "1")
    assert_refused(other, "seed was 0 and is now 1")


def test_eval_of_a_run(files, trained, tmp_path):
    result = call("eval", files / "run", "--json")
    assert result.out.count("\n") == 1
    assert result.json["images"] == 3 and result.json["csv"] == str(
        files / "run/eval_test_none.csv"
    )
    after = (files / "run/eval_after.csv").read_text().splitlines()
    rows = (files / "run/eval_test_none.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == [row.split(",")[0] for row in after]
    for key, value in trained.json["after"].items():
        assert abs(result.json[key] - value) < 1e-4
    elsewhere = call("eval", files / "run", "--csv", tmp_path / "a.csv", "--json")
    assert elsewhere.json["csv"] == str(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().splitlines() == rows


def test_eval_of_an_experiment_is_before_training(files, trained):
    data = ("--weights", files / "small", "--data", files / "data")
    result = call("eval", files / "tiny.py", *data, "--split", "test", "--json").json
    assert result["images"] == 3 and result["csv"] is None
    for key, value in trained.json["before"].items():
        assert abs(result[key] - value) < 1e-4


def test_merged_weights_predict_as_the_adapter(files, trained, tmp_path):
    adapter = ("--adapter", files / "run/adapter.safetensors")
    merged = ("--weights", files / "small", *adapter)
    result = call("merge", tmp_path / "merged", *merged, "--json")
    written = {"model": "small", "dst": str(tmp_path / "merged"), "to": "samjax"}
    difference = result.json["max_difference"]
    assert result.json == {**written, "max_difference": difference}
    assert difference.keys() == {"embedding", "logits"}
    assert all(0 <= value <= 1e-4 for value in difference.values())
    assert "merged and adapted model differ at most by" in result.err
    separate = predict(files, tmp_path / "a", *adapter, *BOX, "--save-logits")
    one = predict(files, tmp_path / "b", *BOX, "--save-logits", weights=tmp_path / "merged")
    base = predict(files, tmp_path / "c", *BOX, "--save-logits")
    assert np.array_equal(read_masks(one), read_masks(separate))
    logits = [read_logits(result) for result in (separate, one, base)]
    assert np.abs(logits[1] - logits[0]).max() <= 1e-3 * logits[0].std()
    assert np.abs(logits[2] - logits[0]).max() > 1e-3 * logits[0].std()
    assert_refused(call("merge", tmp_path / "merged", *merged), "exists already")

    meta = tmp_path / "merged.safetensors"
    result = call("merge", meta, *merged, "--to", "meta", "--no-verify", "--json")
    assert result.json == {"model": "small", "dst": str(meta), "to": "meta"}
    config, params = read_weights(tmp_path / "merged")
    expected, tensors = from_params(params, config), read_tensors(meta)
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[key], expected[key]) for key in expected)
    assert read_weights(meta)[0] == config
    assert call("merge", tmp_path / "hf", *merged, "--to", "hf", "--no-verify").code == 0
    assert read_weights(tmp_path / "hf")[0].image_size == config.image_size


@pytest.mark.parametrize("verb", ["predict", "merge"])
@pytest.mark.parametrize(
    ("weights", "message"),
    [("named", "trained in small, and these weights are named"), ("changed", "other weights")],
)
def test_an_adapter_of_other_weights(files, trained, tmp_path, verb, weights, message):
    options = ("--weights", files / weights, "--adapter", files / "run/adapter.safetensors")
    target = {"predict": (files / "image.png", "--out", tmp_path / "o"), "merge": (tmp_path / "o",)}
    assert_refused(call(verb, *target[verb], *options), message)
    assert not os.listdir(tmp_path)


# Errors


PREDICT = "predict {files}/image.png --weights {files}/small --out {out}"
TRAIN = "train {files}/tiny.py --weights {files}/small --data {files}/data --out {out}"
REFUSED = {
    # What is typed.
    "frobnicate": "unknown verb 'frobnicate'; samjax has weights, convert, predict",
    "predict": "Missing from samjax predict: PATH, --weights STR, --out PATH",
    "train": "samjax train needs an experiment file, such as",
    "eval": "samjax eval needs an experiment file",
    PREDICT + " --pont 1,2,3": "--pont, 1,2,3; Perhaps you meant: --point",
    TRAIN + " --lerning-rate 1": "Perhaps you meant: --learning-rate",
    "params --metod lora": "Perhaps you meant: --method",
    PREDICT + " --image-size x": "Error parsing --image-size",
    "convert {files}/small {out} --to onnx": "invalid choice 'onnx' for argument '--to'",
    # Prompts.
    PREDICT + " --point 1,2": "--point takes X,Y,LABEL, numbers with commas, not '1,2'",
    PREDICT + " --point a,b,1": "--point takes X,Y,LABEL",
    PREDICT + " --point nan,1,1": "points must be finite",
    PREDICT + " --point 1,2,2": "labels must be 1 (inside the object) or 0 (outside)",
    PREDICT + " --point 1,2,0.5": "labels must be 1 (inside the object) or 0 (outside)",
    PREDICT + " --point 1,41,1": "outside the image, which is 48 pixels wide and 40 high",
    PREDICT + " --point -1,2,1": "outside the image",
    PREDICT + " --box 1,2,3": "--box takes X0,Y0,X1,Y1",
    PREDICT + " --box 30,8,10,25": "box must be (x0, y0, x1, y1) with x1 > x0",
    PREDICT + " --box 0,0,49,40": "outside the image",
    PREDICT + " --box 0,0,9,9 --box 30,8,10,25": "x1 > x0",
    PREDICT + " --box 0,0,9,9 --box 5,5,9,9 --point 1,2,1": "2 boxes are 2 prompts",
    # Files.
    PREDICT.replace("image.png", "absent.png"): "no image file at",
    PREDICT.replace("image.png", "none.png"): "cannot be decoded as an image",
    PREDICT.replace("/small", "/absent"): "absent; check the path",
    PREDICT.replace("/small", "/none.safetensors"): "none.safetensors",
    PREDICT.replace("/small", "/data"): "is no samjax checkpoint",
    PREDICT.replace("{out}", "{files}/none.png"): "is a file; choose a folder with --out",
    PREDICT + " --adapter {files}/absent": "absent",
    PREDICT + " --adapter {files}/none.safetensors": "none.safetensors",
    PREDICT + " --image-size 100": "not a positive multiple of 16",
    "convert {files}/absent {out}": "absent; check the path",
    "convert {files}/small {files}/used": "exists already",
    "convert {files}/small {out} --to meta": "must end in .safetensors",
    "convert {files}/small {out}/deep/er": "create it",
    "merge {out} --weights {files}/small --adapter {files}/absent": "absent",
    # Runs.
    "params --model vit_x": "unknown model 'vit_x'; known are vit_b",
    "params --method frob": "unknown method 'frob'; this samjax knows lora, decoder",
    "params --segments qx": "segments must name some of q, k and v",
    TRAIN + " --method frob": "unknown method 'frob'",
    TRAIN + " --model vit_b": "it holds small, not vit_b; pass --model small",
    TRAIN + " --model vit_x": "unknown model 'vit_x'",
    PREDICT + " --model medsam": "it holds small, not medsam; pass --model small",
    "convert {files}/small {out} --model vit_x": "no model is called 'vit_x'; known are vit_b",
    TRAIN + " --image-size 100": "the nearest that is: 96",
    TRAIN + " --batch-size 3 --accumulate 2": "accumulate 2 does not divide batch_size 3",
    TRAIN + " --resume": "nothing to resume",
    TRAIN.replace("{out}", "{files}/used"): "is not empty",
    TRAIN.replace("{files}/data", "{files}/empty"): "holds no image files",
    TRAIN.replace("{files}/data", "{files}/absent"): "does not exist",
    TRAIN.replace("--data {files}/data", ""): "no data: pass --data",
    TRAIN.replace("--weights {files}/small", ""): "no weights: pass --weights",
    TRAIN.replace("tiny.py", "absent.py"): "no experiment file at",
    TRAIN.replace("tiny.py", "broken.py"): "broken.py fails with ZeroDivisionError",
    TRAIN.replace("tiny.py", "without.py"): "defines no function config()",
    "eval {files}/absent": "no run folder and no experiment file at",
    "eval {files}/used": "is no run folder",
    "eval {files}/tiny.py --weights {files}/small --data {files}/data --split validation": (
        "has no split 'validation'"
    ),
    "eval {files}/tiny.py --csv {out}/deep/er.csv": "create it",
}


@pytest.mark.parametrize("line", REFUSED)
def test_errors_are_one_sentence_and_write_nothing(files, tmp_path, line):
    before = sorted(os.listdir(files))
    arguments = line.format(files=files, out=tmp_path / "out").split()
    assert_refused(call(*arguments), REFUSED[line])
    assert not os.listdir(tmp_path) and sorted(os.listdir(files)) == before
    assert os.listdir(files / "used") == ["notes.txt"]


def test_a_traceback_on_request(files, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMJAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"broken\.py fails") as caught:
        call("train", files / "broken.py", "--out", tmp_path / "out")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
