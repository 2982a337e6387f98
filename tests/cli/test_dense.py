"""The verbs on an adapter of dense tasks."""

import os

import jax
import numpy as np
import pytest

import samjax
from samjax import peft
from samjax.data.images import read_image
from samjax.hashes import params_sha256

SIZE = (40, 48)  # of the image
NAMES = ("segmentation", "depth", "normals", "edges")


@pytest.fixture(scope="module")
def adapter(dense, small_params, tmp_path_factory):
    spec, model, variables = dense
    path = tmp_path_factory.mktemp("dense") / "dense.safetensors"
    peft.save(path, spec, model, variables, params_sha256(small_params), {"method": "ta_lora"})
    return path


def test_predict_writes_pictures_and_arrays(files, predict, adapter, tmp_path):
    result = predict(tmp_path, "--adapter", adapter, "--task", "all", "--save-logits")
    assert result.json == {
        "pictures": {name: str(tmp_path / f"{name}.png") for name in NAMES},
        "arrays": {name: str(tmp_path / f"{name}.npy") for name in NAMES},
        "logits": str(tmp_path / "logits.npz"),
    }
    names = [f"{name}.{kind}" for name in NAMES for kind in ("npy", "png")]
    assert sorted(os.listdir(tmp_path)) == sorted(["logits.npz", *names])
    predictor = samjax.TaskPredictor(*samjax.load_adapted(files / "small", adapter))
    expected = predictor.predict(read_image(files / "image.png"))
    arrays = {name: np.load(tmp_path / f"{name}.npy") for name in NAMES}
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_allclose(array, expected[name], atol=1e-5)
    pictures = {name: read_image(tmp_path / f"{name}.png") for name in NAMES}
    for name in ("segmentation", "normals", "edges"):
        assert pictures[name].shape == (*SIZE, 3)
    classes = arrays["segmentation"]
    colors = {tuple(color) for color in pictures["segmentation"].reshape(-1, 3)}
    assert len(np.unique(classes)) == len(colors) > 1
    rgb = (arrays["normals"] + 1) * 127.5
    assert np.abs(pictures["normals"] - rgb).max() <= 0.5 + 1e-4
    # A scale stands beside numbers, from dark to light.
    assert pictures["depth"].shape[0] == SIZE[0] and pictures["depth"].shape[1] > SIZE[1]
    depth, left = arrays["depth"], pictures["depth"][:, : SIZE[1]].astype(int).sum(-1)
    assert left[depth == depth.max()].min() > left[depth == depth.min()].max()
    shapes = {name: array.shape for name, array in result.logits.items()}
    assert shapes == {name: (c, 32, 32) for name, c in zip(NAMES, (5, 1, 3, 1), strict=True)}


def test_predict_one_task_at_another_size(predict, adapter, tmp_path):
    options = ("--adapter", adapter, "--task", "normals", "--image-size", "64")
    assert predict(tmp_path, *options).code == 0
    assert sorted(os.listdir(tmp_path)) == ["normals.npy", "normals.png"]
    assert np.load(tmp_path / "normals.npy").shape == (*SIZE, 3)


@pytest.fixture(scope="module")
def merged(call, files, adapter, tmp_path_factory):
    """`samjax merge --task all`, as `(folder, result)`; in the folder merged/ and rests/."""
    root = tmp_path_factory.mktemp("merge")
    options = ("--weights", files / "small", "--adapter", adapter, "--task", "all", "--no-verify")
    arguments = (root / "merged", *options, "--rest", root / "rests", "--json")
    return root, call("merge", *arguments)


def test_merged_for_all_tasks(predict, adapter, merged, tmp_path):
    """Weights for each task, and an adapter beside those of several channels."""
    root, result = merged
    assert result.json["dst"] == str(root / "merged") and list(result.json["tasks"]) == list(NAMES)
    assert sorted(os.listdir(root / "merged")) == sorted(NAMES)
    assert sorted(os.listdir(root / "rests")) == ["normals.safetensors", "segmentation.safetensors"]
    maps = ("--adapter", adapter, "--task", "all", "--save-logits")
    expected = predict(tmp_path / "together", *maps).logits
    for name in NAMES:
        assert result.json["tasks"][name]["dst"] == str(root / "merged" / name)
        rest, own = root / "rests" / f"{name}.safetensors", ()
        if rest.exists():
            own = ("--adapter", rest, "--task", name)
        weights = root / "merged" / name
        logits = predict(tmp_path / name, *own, "--save-logits", weights=weights).logits
        found = logits[name] if own else logits["low_res_logits"][0]
        np.testing.assert_allclose(found, expected[name], atol=1e-4 * expected[name].std())
    base = predict(tmp_path / "base", "--save-logits").logits["low_res_logits"][0]
    assert np.abs(base - expected["depth"]).max() > expected["depth"].std()


def test_merged_for_a_task_of_one_channel(call, files, adapter, merged, tmp_path):
    """It is what merging all tasks writes of it; here the merge is verified."""
    options = ("--weights", files / "small", "--adapter", adapter, "--task", "depth", "--json")
    result = call("merge", tmp_path / "merged", *options)
    assert result.json["task"] == "depth"
    assert all(0 <= value <= 1e-4 for value in result.json["max_difference"].values())
    assert_same_weights(tmp_path / "merged", merged[0] / "merged/depth")


def test_merged_for_a_task_of_several_channels(call, files, adapter, merged, tmp_path):
    rest = tmp_path / "rest.safetensors"
    options = ("--weights", files / "small", "--adapter", adapter, "--task", "normals")
    options = (*options, "--rest", rest, "--no-verify", "--json")
    result = call("merge", tmp_path / "merged", *options)
    assert result.json["rest"] == str(rest) and result.json["rest_numbers"] > 0
    assert peft.read(rest).adapter_bytes == 0
    assert_same_weights(tmp_path / "merged", merged[0] / "merged/normals")
    assert rest.read_bytes() == (merged[0] / "rests/normals.safetensors").read_bytes()


def assert_same_weights(one, other):
    """Of two checkpoints."""
    (_, ours), (_, theirs) = (samjax.load(path) for path in (one, other))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_merged_for_all_tasks_as_files(call, files, adapter, tmp_path):
    options = ("--weights", files / "small", "--adapter", adapter, "--task", "all", "--no-verify")
    options = (*options, "--rest", tmp_path / "rests", "--to", "meta")
    assert call("merge", tmp_path / "merged", *options).code == 0
    names = [f"{name}.safetensors" for name in sorted(NAMES)]
    assert sorted(os.listdir(tmp_path / "merged")) == names


def test_merging_all_tasks_leaves_nothing_where_one_fails(
    call, files, adapter, tmp_path, monkeypatch
):
    from samjax import weights

    write = weights.write_weights

    def fail(path, *arguments):
        if path.name == "normals":
            raise OSError(f"{path} cannot be written")
        write(path, *arguments)

    monkeypatch.setattr(weights, "write_weights", fail)
    options = ("--weights", files / "small", "--adapter", adapter, "--task", "all", "--no-verify")
    result = call("merge", tmp_path / "merged", *options, "--rest", tmp_path / "rests")
    assert result.code == 1 and result.err.splitlines()[-1].endswith("normals cannot be written")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def masks(small_model, small_params, tmp_path_factory):
    """The file of an adapter for masks."""
    spec = peft.MethodConfig("lora").spec()
    records = peft.attach(spec, small_model, small_params, jax.random.key(0))
    variables = {"params": small_params, "peft": records}
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    peft.save(path, spec, small_model, variables, params_sha256(small_params), {"method": "lora"})
    return path


def test_what_is_refused(call, predict, assert_refused, files, adapter, masks, tmp_path):
    out = tmp_path / "out"
    all_of_them = "dense.safetensors is an adapter of dense tasks, segmentation, depth, normals, "
    no_tasks = "is an adapter for masks and has no tasks: leave out --task"

    def refused(message, *options):
        assert_refused(predict(out, *options), message)

    # Weights that there are not: all this is said before they are read.
    def refused_early(message, *options):
        assert_refused(predict(out, *options, weights="absent"), message)

    refused_early("no task 'dept'; the nearest is depth", "--adapter", adapter, "--task", "dept")
    refused_early(f"{all_of_them}edges: choose one with --task, or", "--adapter", adapter)
    refused_early(no_tasks, "--adapter", masks, "--task", "all")
    refused_early("--task needs --adapter", "--task", "all")
    for flag in (("--box", "1,1,9,9"), ("--point", "1,1,1"), ("--mask", "x"), ("--multimask",)):
        message = f"and {flag[0]} is for masks: leave one of them out"
        refused_early(message, "--adapter", adapter, "--task", "depth", *flag)
    refused(
        "not a positive multiple of 16",
        "--adapter",
        adapter,
        "--task",
        "depth",
        "--image-size",
        "9",
    )

    def merge_refused(message, file, *options):
        arguments = ("--weights", files / "absent", "--adapter", file, *options)
        assert_refused(call("merge", out, *arguments), message)

    merge_refused(f"{all_of_them}edges: choose one with --task", adapter)
    merge_refused(no_tasks, masks, "--task", "depth")
    merge_refused("no task 'egdes'; the nearest is edges", adapter, "--task", "egdes")
    merge_refused("normals has 3 channels, and SAM has the row", adapter, "--task", "normals")
    all_tasks = ("--task", "all")
    merge_refused("of one; with --rest FOLDER, its rows and its decoder", adapter, *all_tasks)
    merge_refused(no_tasks, masks, *all_tasks)
    merge_refused("out exists already; choose another --rest", adapter, *all_tasks, "--rest", out)
    merge_refused("there is no directory", adapter, *all_tasks, "--rest", out / "rests")

    convert = ("convert-adapter", adapter, out, "--weights", files / "absent", "--to", "peft")
    assert_refused(call(*convert), "and dense tasks have one each: `samjax merge --task NAME")
    assert_refused(call("arch", adapter), "dense.safetensors")
    assert list(tmp_path.iterdir()) == []
