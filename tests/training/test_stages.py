"""Stages: what a text means, which steps they get, and what trains in each."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from samjax import peft
from samjax.config import Config
from samjax.method_text import with_method
from samjax.models import Sam, SamConfig, VitConfig
from samjax.peft import MethodConfig
from samjax.training.loop import _note_memory, prepare
from samjax.training.memory import StepMemory
from samjax.training.stages import Stage, parse, spans
from samjax.training.step import OptimizerConfig, make_optimizer

SIDE = 32
ALL = frozenset({"weights", "arch", "decoder"})
SETTINGS = MethodConfig(method="nas_lora", rank=2)
NAMES = sorted(ALL)


@pytest.mark.parametrize(
    ("text", "stage"),
    [
        ("0.3:weights+decoder", Stage(0.3, frozenset({"weights", "decoder"}))),
        ("2:all", Stage(2.0, ALL)),
        ("1:arch+weights:split", Stage(1.0, frozenset({"weights", "arch"}), True)),
    ],
)
def test_texts(text, stage):
    assert parse(text) == stage


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights", "no share"),
        ("0:weights", "no share"),
        ("nan:weights", "no share"),
        ("1:weight", "no group 'weight'; the nearest is weights"),
        ("1:", "no group ''"),
        ("1:all:halves", "the only option is split"),
        ("1:arch:split", "split needs arch and another group"),
        ("1:weights:split", "split needs arch and another group"),
    ],
)
def test_bad_texts(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_steps_of_stages():
    stages = [parse(text) for text in ("0.3:weights", "0.4:all", "0.3:weights")]
    assert [(s.start, s.stop) for s in spans(stages, 10, ALL)] == [(0, 3), (3, 7), (7, 10)]
    assert [(s.start, s.stop) for s in spans(stages, 3, ALL)] == [(0, 1), (1, 2), (2, 3)]
    # However small its share, a stage has a step.
    tiny = [parse(text) for text in ("1:all", "1e-9:arch", "1e-9:weights")]
    assert [(s.start, s.stop) for s in spans(tiny, 10, ALL)] == [(0, 8), (8, 9), (9, 10)]
    assert spans([], 7, {"weights"})[0].stage.groups == {"weights"}
    with pytest.raises(ValueError, match="3 stages need as many steps, and the run has 2"):
        spans(stages, 2, ALL)
    with pytest.raises(ValueError, match="stage 1 trains arch, and the method has decoder and we"):
        spans([parse("1:arch")], 5, {"weights", "decoder"})


def test_halves_need_both_an_architecture_and_weights():
    with pytest.raises(ValueError, match="stage 1 keeps halves of the data apart, and one of them"):
        spans([parse("1:all:split")], 5, {"weights", "decoder"})
    assert spans([parse("1:all:split")], 5, ALL)[0].stage.split
    # What a run does not have does not count.
    assert spans([parse("1:all")], 5, {"weights", "arch"})[0].stage.groups == {"weights", "arch"}


def test_stages_belong_to_their_method():
    config = Config(method=SETTINGS, stages=("1:all",))
    assert with_method(config, "nas_lora").stages == ("1:all",)
    assert with_method(config, "lora").stages is None
    text = "nas_pc_lora:stages=0.5:weights+decoder/0.5:all:split,rank=8"
    assert with_method(config, text).stages == ("0.5:weights+decoder", "0.5:all:split")
    with pytest.raises(ValueError, match="no group 'x'"):
        with_method(config, "nas_lora:stages=1:x").parsed_stages()


def test_three_stages_are_torchs_optimisers():
    """AdamW with warm-up and cosine where weights train, Adam with DARTS's settings for a."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = {name: rng.normal(size=(3, 2)).astype(np.float32) for name in ("weights", "arch")}
    settings = OptimizerConfig(weight_decay=0.1, warmup=0.25, clip=1e9, arch_learning_rate=0.02)
    stages = [("weights",)] * 3 + [("weights", "arch")] * 4 + [("weights",)] * 2
    trained = {"weights": 9, "arch": 4}
    labels = {name: name for name in start}
    peak, warmup = 0.01, round(0.25 * 9)

    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    adamw = torch.optim.AdamW([theirs["weights"]], lr=peak, weight_decay=0.1)
    adam = torch.optim.Adam([theirs["arch"]], lr=0.02, betas=(0.5, 0.999), weight_decay=1e-3)
    ours = jax.tree.map(jnp.asarray, start)
    state = make_optimizer(settings, trained, labels, peak, stages[0]).init(ours)
    for i, active in enumerate(stages):
        grads = {name: rng.normal(size=(3, 2)).astype(np.float32) for name in start}
        optimizer = make_optimizer(settings, trained, labels, peak, active)
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, grads), state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, own in (("weights", adamw), ("arch", adam)):
            if name in active:
                theirs[name].grad = torch.tensor(grads[name])
                if name == "weights":
                    rise, fall = i / warmup, (i - warmup) / (9 - warmup)
                    share = rise if i < warmup else 0.5 * (1 + np.cos(np.pi * fall))
                    own.param_groups[0]["lr"] = peak * share
                own.step()
            np.testing.assert_allclose(ours[name], theirs[name].detach().numpy(), atol=1e-6)


def test_half_batches_must_be_whole():
    with pytest.raises(ValueError, match="even number of images, not 3 at a time"):
        Config(method=SETTINGS, batch_size=3, stages=("1:all:split",))
    with pytest.raises(ValueError, match="not 1 at a time"):
        Config(method=SETTINGS, batch_size=4, accumulate=4, stages=("1:all:split",))


@pytest.fixture(scope="module")
def setting(draw_params):
    encoder = VitConfig(
        embed_dim=16, depth=1, num_heads=2, global_attn_indexes=(0,), pretrain_grid=2
    )
    config = SamConfig(
        "tiny", encoder, image_size=SIDE, prompt_embed_dim=16, decoder_depth=1, decoder_mlp_dim=32
    )
    model = Sam(config)
    params = jax.tree.map(jnp.asarray, draw_params(model))
    spec = SETTINGS.spec()
    tree = peft.attach(spec, model, params, jax.random.key(0))
    # B is moved, since nothing between the factors has a gradient while it is zero.
    base = {"params": params, "peft": jax.tree.map(lambda x: x + 0.1, tree)}
    return model, spec, base


def batch(seed: int = 0, size: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 255, (size, SIDE, SIDE, 3), np.uint8),
        "input_size": np.full((size, 2), SIDE, np.int32),
        "mask": rng.random((size, SIDE, SIDE)) > 0.5,
        "coords": np.zeros((size, 0, 2), np.float32),
        "labels": np.zeros((size, 0), np.int32),
    }


def train(setting, stages, steps=1, inputs=None):
    """The state before and after one step of the first stage, by group, and its logs."""
    model, spec, base = setting
    config = Config(method=SETTINGS, steps=steps, stages=stages, augment=Config().augment)
    trainer = prepare(config, model, spec, base, steps)
    labels = jax.tree.leaves(peft.groups(spec, model, base))
    before = jax.tree.map(np.array, trainer.state.train)
    step = trainer.step(trainer.spans[0].stage)
    state, logs = step(trainer.state, trainer.frozen, inputs or batch())
    trained = [name for name in labels if name in ALL]
    pairs = zip(trained, jax.tree.leaves(before), jax.tree.leaves(state.train), strict=True)
    moved = {name: [] for name in NAMES}
    for name, old, new in pairs:
        moved[name].append(np.asarray(new) - old)
    return moved, state, logs


@pytest.mark.parametrize(
    "groups", ["weights", "arch", "decoder", "weights+decoder", "arch+weights", "all"]
)
def test_only_what_a_stage_names_moves(setting, groups):
    moved, _, logs = train(setting, (f"1:{groups}",))
    assert float(logs["grad_norm"]) > 0
    for name in NAMES:
        moves = any(np.any(change) for change in moved[name])
        assert moves == (groups == "all" or name in groups.split("+"))


def test_the_state_has_one_form_in_all_stages(setting):
    states = [train(setting, (f"1:{groups}",))[1] for groups in ("weights", "arch", "all")]
    forms = {str(jax.tree.structure(state)) for state in states}
    assert len(forms) == 1


def test_split_takes_each_gradient_from_its_own_rows(setting):
    """The others' images may be anything."""
    inputs, others = batch(0), batch(1)
    rows = np.arange(4) % 2 == 0

    def mixed(keep):
        return {
            name: np.where(keep.reshape(-1, *[1] * (value.ndim - 1)), value, others[name])
            for name, value in inputs.items()
        }

    stages = ("1:all:split",)
    first, _, logs = train(setting, stages, inputs=mixed(rows))
    second, *_ = train(setting, stages, inputs=mixed(~rows))
    whole, *_ = train(setting, stages, inputs=inputs)
    assert np.isfinite(logs["arch_loss"])

    def same(a, b):
        return all(np.allclose(x, y, atol=1e-7) for x, y in zip(a, b, strict=True))

    # The norm that clips is that of all gradients together, but Adam's first step has no scale.
    assert same(first["weights"], whole["weights"]) and same(first["decoder"], whole["decoder"])
    assert same(second["arch"], whole["arch"])
    assert not same(second["weights"], whole["weights"])


def test_a_run_notes_the_memory_of_its_largest_stage(tmp_path):
    file = tmp_path / "step_memory.json"
    for needed, noted in ((5, 5), (9, 9), (7, 9)):
        _note_memory(file, StepMemory(needed, "compiler"))
        assert json.loads(file.read_text()) == {"bytes": noted, "origin": "compiler"}
