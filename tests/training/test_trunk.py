"""The skipped trunk: training from features is training from images, and when it is done."""

import dataclasses
import io
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from rich.console import Console

from samjax import peft
from samjax.config import Config
from samjax.data.augment import NO_AUGMENTATION, AugmentConfig
from samjax.data.dense_augment import DenseAugmentConfig
from samjax.data.features import FeatureStore
from samjax.data.folder import FolderSource
from samjax.data.prompts import PromptConfig
from samjax.peft import MethodConfig
from samjax.problems import problem_of
from samjax.run import train
from samjax.terminal import Interrupted
from samjax.training import trunk as trunk_module
from samjax.training.loop import fit
from samjax.training.trunk import plan_trunk

BOXES = PromptConfig(none=0.0, box=1.0, points=0.0)
# Of losses: how far bfloat16 rounds one number.
NOISE = 2**-9
UNCHANGED = Config(
    augment=NO_AUGMENTATION,
    dense_augment=DenseAugmentConfig(flip=False, scales=(1.0,)),
    prompts=BOXES,
    method=MethodConfig("decoder"),
    steps=8,
    batch_size=2,
    eval_batch_size=2,
    log_every=1,
    gallery=1,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def source(experiment):
    """Seven images."""
    return FolderSource(experiment.parent / "data", "train")


@pytest.fixture(scope="module")
def shallow(small_model, tiny_model, draw_params):
    """A ViT and a TinyViT with their parameters, by name; of the decoder one layer, to compile."""

    def build(model):
        model = model.clone(config=dataclasses.replace(model.config, decoder_depth=1))
        return model, draw_params(model)

    return {"vit": build(small_model), "tiny_vit": build(tiny_model)}


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=1000)


def plan(config, sam, params, source, console, known=None):
    """The model, its parameters as the problem has them, and the trunk."""
    model, params = problem_of(config).build(sam, params)
    found = plan_trunk(config, model, config.spec(), params, source, console, known)
    return model, params, found


def trained(config, sam, params, source, out, validate=None):
    """Trains in the folder `out`; the losses of all steps, what was trained, and the trunk."""
    console = Console(file=io.StringIO())
    model, params, trunk = plan(config, sam, params, source, console)
    spec = config.spec()
    variables = {"params": params, "peft": peft.attach(spec, model, params, jax.random.key(0))}
    if trunk is not None:
        trunk.compute(model, jax.device_put(params), source, config.eval_batch_size, console)
    out.mkdir(exist_ok=True)
    fitted = fit(config, model, spec, variables, source, out, console, validate, trunk)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], fitted.variables, trunk


@pytest.mark.parametrize("kind", ["vit", "tiny_vit"])
@pytest.mark.parametrize(
    ("method", "point"),
    [
        (MethodConfig("decoder"), "embedding"),
        (MethodConfig("sam_parser"), "neck"),
        (MethodConfig("last_k", blocks=1), "blocks_1 layers_3/blocks_0"),
    ],
    ids=lambda value: getattr(value, "method", ""),
)
def test_losses_are_those_of_images(kind, method, point, shallow, source, tmp_path):
    config = dataclasses.replace(UNCHANGED, method=method, steps=4)
    found = {}
    for setting in ("off", "on"):
        config = dataclasses.replace(config, cache_features=setting)
        found[setting] = trained(config, *shallow[kind], source, tmp_path / setting)
    assert found["off"][2] is None and found["on"][2].point in point.split()
    np.testing.assert_allclose(found["on"][0], found["off"][0], rtol=NOISE)
    assert found["on"][0] != found["off"][0]  # bfloat16 does show


@pytest.mark.parametrize("per_step", [None, 1])
def test_losses_of_several_tasks_are_those_of_images(per_step, shallow, scenes, tmp_path):
    settings = {"rank": 4, "rank_task": 2, "first_block": 1, "norms": False}
    config = dataclasses.replace(
        UNCHANGED,
        tasks=("segmentation:3:cross_entropy", "depth:1:masked_l1"),
        tasks_per_step=per_step,
        method=MethodConfig("ta_lora", **settings),
        steps=4,
    )
    found = {}
    for setting in ("off", "on"):
        config = dataclasses.replace(config, cache_features=setting)
        found[setting] = trained(config, *shallow["vit"], scenes, tmp_path / setting)
    assert found["on"][2].point == "blocks_1"
    np.testing.assert_allclose(found["on"][0], found["off"][0], rtol=NOISE)


def test_a_run_that_is_interrupted_in_training_resumes_to_the_bit(shallow, source, tmp_path):
    config = dataclasses.replace(UNCHANGED, cache_features="on", validate_every=3)
    arguments = config, *shallow["vit"], source

    def stop_at_five(variables):
        os.kill(os.getpid(), signal.SIGINT)
        return {"dice": 0.5}

    whole = trained(*arguments, tmp_path / "whole", lambda _: {"dice": 0.5})
    with pytest.raises(Interrupted):
        trained(*arguments, tmp_path / "cut", stop_at_five)
    resumed = trained(*arguments, tmp_path / "cut", lambda _: {"dice": 0.5})
    assert resumed[0] == whole[0] and len(whole[0]) == 8
    jax.tree.map(np.testing.assert_array_equal, resumed[1], whole[1])


def test_a_shard_that_is_damaged_in_training_is_told(shallow, source, tmp_path, monkeypatch):
    config = dataclasses.replace(UNCHANGED, cache_features="on")

    def read(self, image):
        raise ValueError("00000-of-00001.array_record is damaged (x): delete it")

    monkeypatch.setattr(FeatureStore, "read", read)
    with pytest.raises(ValueError, match=r"is damaged .x.: delete it; training is saved up to"):
        trained(config, *shallow["vit"], source, tmp_path)


def test_a_run_says_where_its_features_are_and_goes_on_with_them(
    experiment, tmp_path, cache, console, monkeypatch
):
    """Interrupted while they are computed, it ends as if it had not been; a second run has them."""
    config = dataclasses.replace(
        UNCHANGED,
        weights=str(experiment.parent / "weights"),
        data=str(experiment.parent / "data"),
    )
    write = FeatureStore.write

    def interrupted(self, shard, features):
        next(features)
        raise KeyboardInterrupt

    monkeypatch.setattr(FeatureStore, "write", interrupted)
    with pytest.raises(Interrupted, match=r"features of 0 images.*--resume goes on"):
        train(config, tmp_path / "run", resume=False, console=console)
    assert not list(cache.glob("*/*.array_record"))
    monkeypatch.setattr(FeatureStore, "write", write)
    train(config, tmp_path / "run", resume=True, console=console)
    said = console.file.getvalue()
    assert said.count("the encoder's features before embedding of 7 images are computed once:") == 2
    assert json.loads((tmp_path / "run/inputs.json").read_text())["trunk"] == "embedding"
    train(config, tmp_path / "again", resume=False, console=console)
    (folder,) = cache.iterdir()
    assert f"the encoder's features before embedding of 7 images are in {folder}" in (
        console.file.getvalue()
    )
    for name in ("adapter.safetensors", "eval_after.csv"):
        runs = [(tmp_path / run / name).read_bytes() for run in ("run", "again")]
        assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("changes", "point"),
    [
        ({}, "embedding"),
        ({"cache_features": "off"}, None),
        ({"steps": 6}, None),  # twelve images of seven: not each twice
        ({"steps": 6, "cache_features": "on"}, "embedding"),
        ({"augment": AugmentConfig()}, None),
        ({"augment": dataclasses.replace(NO_AUGMENTATION, color_jitter=0.1)}, None),
        ({"dense_augment": DenseAugmentConfig()}, "embedding"),  # not that of masks
        ({"method": MethodConfig("sam_parser")}, "neck"),
        ({"method": MethodConfig("lora")}, None),
        ({"method": MethodConfig("lora"), "cache_features": "on"}, "blocks_0"),
        ({"method": MethodConfig("last_k", blocks=1)}, "blocks_1"),
    ],
)
def test_when_features_are_cached(changes, point, small_model, small_params, source, console):
    config = dataclasses.replace(UNCHANGED, **changes)
    _, _, trunk = plan(config, small_model, small_params, source, console)
    assert (trunk.point if trunk else None) == point
    assert ("computed once" in console.file.getvalue()) == (point is not None)


def test_a_resumed_run_does_what_it_did(small_model, small_params, source, console):
    arguments = small_model, small_params, source, console
    assert plan(UNCHANGED, *arguments, known="")[2] is None
    few = dataclasses.replace(UNCHANGED, steps=1)
    assert plan(few, *arguments)[2] is None
    assert plan(few, *arguments, known="embedding")[2].point == "embedding"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"augment": dataclasses.replace(NO_AUGMENTATION, flip=True)}, "augment.flip"),
        ({"augment": dataclasses.replace(NO_AUGMENTATION, scale_crop=0.1)}, "augment.scale_crop"),
        ({"tasks": ("nyuv2",), "dense_augment": DenseAugmentConfig(False)}, "dense_augment.scales"),
    ],
)
def test_an_augmentation_that_changes_images_is_named(settings, named):
    with pytest.raises(ValueError, match=f"cache_features on needs .*, and {named} changes them"):
        dataclasses.replace(UNCHANGED, cache_features="on", **settings)


def test_nothing_to_compute_is_told(small_model, small_params, source, console):
    config = dataclasses.replace(UNCHANGED, cache_features="on", method=MethodConfig("full"))
    message = "nothing to compute, since image_encoder/patch_embed/.* trains or is adapted"
    with pytest.raises(ValueError, match=message):
        plan(config, small_model, small_params, source, console)


def test_the_disk_is_asked_before(small_model, small_params, source, console, cache, monkeypatch):
    usage = shutil.disk_usage(cache.parent.parent)
    arguments = small_model, small_params, source, console
    need = plan(UNCHANGED, *arguments)[2].store.bytes_of([0])

    def free(count):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=count))

    on = dataclasses.replace(UNCHANGED, cache_features="on")
    free(need + 1)
    assert plan(on, *arguments)[2] is not None
    assert plan(UNCHANGED, *arguments)[2] is None  # more than half of it
    assert "notice: training starts from images" in console.file.getvalue()
    free(need - 1)
    with pytest.raises(OSError, match=r"the features of 7 images take .* in .*: free some, set"):
        plan(on, *arguments)
    assert not cache.exists()


def test_a_system_without_array_record(small_model, small_params, source, console, monkeypatch):
    def missing():
        raise RuntimeError("cached features need array_record, which does not work here")

    monkeypatch.setattr(trunk_module, "check_array_record", missing)
    assert plan(UNCHANGED, small_model, small_params, source, console)[2] is None
    assert "notice: training starts from images" in console.file.getvalue()
    with pytest.raises(RuntimeError, match="array_record"):
        on = dataclasses.replace(UNCHANGED, cache_features="on")
        plan(on, small_model, small_params, source, console)
