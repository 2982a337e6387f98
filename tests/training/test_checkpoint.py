"""Damage to the checkpoints of a run: refused in one sentence, or without any effect."""

import errno
import json
import random
import shutil

import jax
import numpy as np
import pytest

from samjax.hashes import sealed
from samjax.training.checkpoint import Best, Checkpoints
from samjax.training.step import TrainState

STEPS = {1: {"dice": 0.5}, 2: {"dice": 0.25}, 3: None}
BEST = Best(1, {"dice": 0.5})


def make_state(step: int) -> TrainState:
    moments = np.random.default_rng(step).random((2, 500)).astype(np.float32)
    return TrainState(np.int32(step), {"a": np.full(3, step, np.float32), "b": None}, (moments,))


def assert_equal(state, step):
    for ours, theirs in zip(*map(jax.tree.leaves, (state, make_state(step))), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# Where Orbax fails on damaged metadata, reads that it began go on and find their event loop closed:
# now and then Python tells of it when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder)
    for step, metrics in STEPS.items():
        checkpoints.save(make_state(step), metrics)
    checkpoints.close()
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """`copy(name)` is a folder with the three checkpoints."""
    return lambda name="c": shutil.copytree(saved, tmp_path / name)


def read(folder):
    """The best checkpoint, the newest state and the best one."""
    checkpoints = Checkpoints(folder)
    try:
        best = checkpoints.best()
        newest = checkpoints.restore(make_state(0))
        return best, newest, best and checkpoints.restore(make_state(0), best.step)
    finally:
        checkpoints.close()


def mutate(folder, rng: random.Random) -> str:
    """Flips a bit of a file, or cuts or removes it."""
    file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    content, kind = bytearray(file.read_bytes()), rng.choice(["flip", "flip", "cut", "remove"])
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif kind == "cut":
        file.write_bytes(content[: rng.randrange(len(content))])
    else:
        file.unlink()
    return f"{kind} {file.relative_to(folder)}"


def test_what_a_mutation_does(copy, capfd, tmp_path):
    refused = 0
    for seed in range(48):
        folder = copy(str(seed))
        what = mutate(folder, random.Random(seed))
        try:
            best, newest, kept = read(folder)
        except ValueError as error:
            where = f"in {folder} is damaged: delete that folder, {folder}/{what.split()[1][0]}, "
            assert where in str(error) and "--resume goes on from the one before" in str(error)
            refused += 1
        else:
            assert best == BEST, what
            assert_equal(newest, 3)
            assert_equal(kept, 1)
    assert 10 < refused < 40
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("step", [3, 1])
def test_no_flip_in_the_data_passes(copy, step):
    """Orbax writes every leaf into one file and checks no sum over it."""
    folder = copy()
    files = [path for path in (folder / str(step)).rglob("*") if path.is_file()]
    data = max(files, key=lambda path: path.stat().st_size)
    whole, rng = data.read_bytes(), random.Random(step)
    for _ in range(8):
        content = bytearray(whole)
        content[rng.randrange(500, len(content) - 500)] ^= 1 << rng.randrange(8)  # not in a header
        data.write_bytes(content)
        with pytest.raises(ValueError, match=f"checkpoint of step {step} in .* is damaged"):
            read(folder)
    data.write_bytes(whole)
    assert read(folder)[0] == BEST


def test_without_the_damaged_folder_the_one_before_goes_on(copy):
    folder = copy()
    (folder / "3" / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoint of step 3 in .* is damaged"):
        read(folder)
    shutil.rmtree(folder / "3")
    best, newest, _ = read(folder)
    assert best == BEST
    assert_equal(newest, 2)
    shutil.rmtree(folder / "1")
    assert read(folder)[0] == Best(2, {"dice": 0.25})


@pytest.mark.parametrize("step", [3, 1])
def test_a_record_of_another_checkpoint(copy, step):
    folder = copy()
    file = folder / str(step) / "_CHECKPOINT_METADATA"
    metadata = json.loads(file.read_text())
    record = {key: value for key, value in metadata["custom_metadata"].items() if key != "sha256"}
    for change in (record | {"metrics": {"dice": 0.9}}, sealed(record | {"step": 2}), None):
        file.write_text(json.dumps(metadata | {"custom_metadata": change}))
        with pytest.raises(ValueError, match=f"checkpoint of step {step} in .* is damaged"):
            read(folder)


def test_a_half_deleted_one_that_nobody_needs(copy):
    """A kill leaves it while Orbax deletes; here, what is left has no record any more."""
    folder = copy()
    (folder / "2" / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(folder / "2" / "state" / "d")
    best, newest, _ = read(folder)
    assert best == BEST
    assert_equal(newest, 3)


def test_a_disk_that_cannot_be_read_is_no_damage(copy, monkeypatch):
    checkpoints = Checkpoints(copy())

    def fail(step, expected):
        raise OSError(errno.EIO, "of the disk")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._ocp, "load", fail)
        with pytest.raises(OSError, match=r"step 3 in .* cannot be read \(Input/output error\)"):
            checkpoints.restore(make_state(0))
    assert_equal(checkpoints.restore(make_state(0)), 3)
    checkpoints.close()


def test_a_save_that_fails_for_another_reason_than_the_disk(copy, monkeypatch):
    checkpoints = Checkpoints(copy())

    def fail(*args, **kwargs):
        raise TypeError("a mistake of the program")

    monkeypatch.setattr(checkpoints._ocp, "save", fail)
    with pytest.raises(TypeError, match="a mistake of the program"):
        checkpoints.save(make_state(4))
    checkpoints.close()
