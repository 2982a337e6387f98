"""One mesh or another, the same training: on virtual devices, in processes of their own."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from samjax import peft
from samjax.config import Config
from samjax.data.prompts import PromptConfig
from samjax.models import MSam
from samjax.models.msam import msam_params
from samjax.peft import MethodConfig
from samjax.tasks import parse
from samjax.training import loop, sharding
from samjax.training.loop import prepare
from samjax.training.sharding import BatchLayout, make_mesh, shardings

SIDE = 128
TASKS = ("segmentation:3:cross_entropy", "depth:1:masked_l1", "normals:3:cosine")
PROMPTS = PromptConfig(none=0.0, box=1.0)
CONFIGS = {
    "lora": Config(method=MethodConfig("lora", dropout=0.1), batch_size=16, accumulate=2),
    "sam_parser": Config(method=MethodConfig("sam_parser"), batch_size=8),
    "nas_lora": Config(method=MethodConfig("nas_lora"), batch_size=16, stages=("1:all:split",)),
    "ta_lora": Config(
        method=MethodConfig("ta_lora", rank=4, rank_task=2), batch_size=8, tasks=TASKS
    ),
}
# How many devices share a copy, of eight.
MESHES = {"8x1": 1, "1x8": 8, "2x4": 4}


@pytest.fixture(autouse=True)
def small_leaves_are_split(monkeypatch):
    monkeypatch.setattr(sharding, "SPLIT_BYTES", 1024)


def batch(size: int) -> dict:
    rng = np.random.default_rng(3)
    mask = np.zeros((size, SIDE, SIDE), bool)
    for i in range(size):
        mask[i, 20 + i : 90, 30 : 110 - 3 * i] = True
    box = np.stack([[[30, 20 + i], [109 - 3 * i, 89]] for i in range(size)]).astype(np.float32)
    image = rng.integers(0, 255, (size, SIDE, SIDE, 3), np.uint8)
    return {
        "image": np.where(mask[..., None], image // 3, image),
        "input_size": np.tile(np.int32([SIDE, SIDE]), (size, 1)),
        "mask": mask,
        "coords": box,
        "labels": np.tile(np.int32([2, 3]), (size, 1)),
        "truth": {
            "segmentation": np.where(mask, 2, 1).astype(np.int32),
            "depth": np.where(mask, 2.0, 3.0).astype(np.float32)[:, None],
            "normals": np.tile(np.float32([0, 0, 1])[:, None, None], (size, 1, SIDE, SIDE)),
        },
    }


@pytest.fixture(scope="module")
def setting(small_model, small_params):
    """`setting(method)` are its model, its spec and its variables.

    All that trains is moved. At first the rows of a dense task are alike, and so are its channels:
    a direction's gradient is then so steep where they cross zero that a change of the weights by
    1e-7 moves it by a hundredth, on one device as well.
    """

    def build(method: str):
        config, model, params = CONFIGS[method], small_model, small_params
        if config.tasks:
            model = MSam(model.config, tasks=parse(config.tasks))
            params = msam_params(params, model)
        spec, rng = config.spec(), np.random.default_rng(5)
        base = {"params": params, "peft": peft.attach(spec, model, params, jax.random.key(0))}

        def move(leaf, trains):
            noise = 0.05 * rng.normal(size=leaf.shape).astype(np.float32)
            return np.asarray(leaf) + noise if trains else np.asarray(leaf)

        return model, spec, jax.tree.map(move, base, peft.trainable(spec, model, base))

    return build


@pytest.fixture(scope="module")
def trained(setting):
    """`trained(method, mesh)`: losses of three steps, Adam's first moments after the first, what
    trains before and after them, and the program.
    """
    known = {}

    def train(method: str, mesh):
        if (method, mesh) in known:
            return known[method, mesh]
        config, (model, spec, base) = CONFIGS[method], setting(method)
        layout = BatchLayout(mesh, config.batch_size)
        trainer = prepare(config, model, spec, base, 8, mesh)
        state = trainer.state
        states, losses = [jax.device_get(state)], []
        inputs = layout.place(batch(config.batch_size))
        step = trainer.step(trainer.spans[0].stage).lower(state, trainer.frozen, inputs).compile()
        for _ in range(3):
            state, logs = step(state, trainer.frozen, inputs)
            losses.append(float(logs["loss"]))
            states.append(jax.device_get(state))
        moments = [
            leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(states[1].opt_state)
            if "mu" in jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        ]
        first, last = (jax.tree.leaves(s.train) for s in (states[0], states[-1]))
        result = losses, moments, first, last, step
        if mesh.size == 1:  # which each mesh is compared with
            known[method, mesh] = result
        return result

    return train


def distance(some, others) -> float:
    """Of all leaves together."""
    pairs = zip(some, others, strict=True)
    return sum(np.sum(np.square(a - b, dtype=np.float64)) for a, b in pairs) ** 0.5


def gathers(step) -> list[tuple[str, np.ndarray]]:
    """What XLA says of each all-gather of a program, and its groups of devices, a row each."""
    found = []
    for line in step.as_text().splitlines():
        if re.search(r" all-gather(-start)?\(", line):
            found.append((line.strip(), groups_of(line)))
    return found


def groups_of(line: str) -> np.ndarray:
    """XLA writes groups as axes of a mesh, or as a transposed and reshaped range."""

    def devices(sides: str, order: str | None) -> np.ndarray:
        shape = [int(n) for n in sides.split(",")]
        ids = np.arange(np.prod(shape)).reshape(shape)
        return ids.transpose([int(n) for n in order.split(",")]) if order else ids

    ordered = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if plain := re.search(rf"replica_groups=\[(\d+),(\d+)\]<={ordered}", line):
        return devices(plain[3], plain[4]).reshape(int(plain[1]), int(plain[2]))
    mesh = re.search(
        rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\({ordered}\))? \{{(.*?)\}}", line
    )
    assert mesh, f"unknown groups: {line}"
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    sizes = tuple(axes.values())
    ids = devices(mesh[2] or str(np.prod(sizes)), mesh[3]).reshape(sizes)
    along = [list(axes).index(name) for name in re.findall(r"'(\w+)'", mesh[4])]
    ids = np.moveaxis(ids, along, range(len(along)))
    return ids.reshape(int(np.prod([sizes[i] for i in along])), -1).T


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("method", CONFIGS)
def test_eight_devices_train_as_one(trained, method, shape):
    if jax.device_count() == 1:
        pytest.skip("run by test_on_eight_devices")
    fsdp = MESHES[shape]
    losses, moments, first, last, _ = trained(method, make_mesh(devices=jax.devices()[:1]))
    ours, our_moments, our_first, our_last, step = trained(method, make_mesh(fsdp))
    np.testing.assert_allclose(ours, losses, rtol=1e-5)
    assert distance(first, our_first) == 0
    # The first gradient; then parameters, where Adam makes more of it: the step of a gradient that
    # is zero but for its rounding is as long as any.
    assert distance(moments, our_moments) < 2e-5 * distance(moments, [np.zeros(1)] * len(moments))
    assert distance(last, our_last) < 1e-2 * distance(first, last)
    # Split weights come together along fsdp; along data, nothing is gathered.
    everything = gathers(step)
    over_data = [
        what for what, groups in everything if not (groups // fsdp == groups[:, :1] // fsdp).all()
    ]
    if method == "ta_lora":
        # But for what enters the neck's 3 x 3 convolution, and its gradient: `vmap` over the tasks
        # joins them with the images to one axis, tasks first, which no sharding can describe.
        neck = [what for what in over_data if "/neck_2/" in what]
        assert len(neck) == (0 if shape == "1x8" else 2)
        over_data = [what for what in over_data if what not in neck]
        if shape == "2x4" and over_data:
            pytest.xfail(
                "where weights are split, too, XLA cuts the tasks' decoders by channels and "
                "gathers their tokens over data: right, and more is moved than must be"
            )
    assert not over_data
    assert fsdp == 1 or any(groups.shape[1] == fsdp for _, groups in everything)


def on_eight_devices(select: str) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-x", "-m", "", "-k", select, __file__]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-3000:]


def test_on_eight_devices():
    on_eight_devices("train_as_one and (lora-2x4 or whole_and_split) and not nas and not ta")


@pytest.mark.slow
def test_every_method_and_mesh_on_eight_devices():
    on_eight_devices("train_as_one")


def test_whole_and_split():
    """By size and path alone, without data: as one may ask for devices that are not there."""
    if jax.device_count() == 1:
        pytest.skip("run by test_on_eight_devices")
    mesh = make_mesh(4)
    shape = jax.ShapeDtypeStruct

    def tree(leaf):
        return {"params": {"a": leaf}, "peft": {"a": leaf}, "mu": [leaf]}

    large = shardings(tree(shape((8, 256, 6), jnp.float32)), mesh)
    split = PartitionSpec(None, "fsdp")
    assert large["params"]["a"].spec == large["mu"][0].spec == split
    assert large["peft"]["a"].spec == PartitionSpec()
    for leaf in (shape((8, 8), jnp.float32), shape((257, 257), jnp.float32), shape((), jnp.int32)):
        found = shardings(tree(leaf), mesh)
        assert all(s.spec == PartitionSpec() for s in jax.tree.leaves(found))
    alone = shardings(tree(shape((8, 256, 6), jnp.float32)), make_mesh(1))
    assert all(s.is_fully_replicated for s in jax.tree.leaves(alone))


def test_what_devices_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"fsdp 3 does not divide the 8 devices: .* 1, 2, 4, 8$"):
        Config(fsdp=3).check_devices(8)
    with pytest.raises(
        ValueError, match=r"^batch_size 12 makes 12 images at a time, .* multiple of"
    ):
        Config(batch_size=12).check_devices(8)
    with pytest.raises(ValueError, match="with accumulate 2 makes 4 images at a time, which the 8"):
        Config(batch_size=8, accumulate=2).check_devices(8)
    with pytest.raises(ValueError, match="in two halves makes 4 images at a time, which the 8"):
        Config(
            batch_size=8, method=MethodConfig("nas_lora"), stages=("1:all:split",)
        ).check_devices(8)
    Config(batch_size=16, accumulate=2, fsdp=4).check_devices(8)


def test_a_plan_needs_shapes_alone(small_model):
    """What is compiled ahead of time is what a run compiles."""
    config = CONFIGS["sam_parser"]
    spec = config.spec()
    params = small_model.init_params_shapes()
    records = jax.eval_shape(lambda p: peft.attach(spec, small_model, p, jax.random.key(0)), params)
    mesh = make_mesh()
    trainer, _ = loop.plan(config, small_model, spec, {"params": params, "peft": records}, 8, mesh)
    leaves = jax.tree.leaves((trainer.state, trainer.frozen))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding for leaf in leaves)
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.rows(mesh)), batch(8)
    )
    step = trainer.step(trainer.spans[0].stage)
    state, logs = jax.eval_shape(step, trainer.state, trainer.frozen, inputs)
    assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, trainer.state)
    assert logs["loss"].shape == ()
