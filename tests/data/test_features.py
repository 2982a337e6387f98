"""Features on disk: what tells images apart, whole shards from damaged ones, and who computes."""

import io
import os
import threading
import time

import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from samjax.data.features import CONTENTS, FeatureStore, images_of
from samjax.data.folder import FolderSource
from samjax.data.labels import LabelSource

COUNT, SHAPE = 40, (3, 5, 4)  # three shards, the last of eight
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(COUNT, *SHAPE)).astype(ml_dtypes.bfloat16)
SILENT = Console(file=io.StringIO())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def new_store(**changes):
    return FeatureStore({"weights": "a", "point": "neck", **changes}, COUNT, SHAPE)


def filled(store):
    """The store, after what is missing has been computed."""
    with store.locked(SILENT):
        for shard in store.missing():
            store.write(shard, (FEATURES[i] for i in store.images_in(shard)))
    return store


def shards_of(store):
    return sorted(store.folder.glob("*.array_record"))


def test_what_was_written_is_read(cache):
    store = new_store()
    assert store.missing() == [0, 1, 2] and not cache.exists()
    filled(store)
    again = new_store()
    assert again.missing() == [] and again.folder.parent == cache
    for i in (39, 0, 16, 15, 7):
        np.testing.assert_array_equal(again.read(i), FEATURES[i])
        assert again.read(i).dtype == ml_dtypes.bfloat16
    sizes = sum(file.stat().st_size for file in shards_of(store))
    assert FEATURES.nbytes < sizes <= store.bytes_of([0, 1, 2])


@pytest.mark.parametrize("changes", [{"weights": "b"}, {"point": "embedding"}, {"images": "c"}])
def test_other_contents_are_another_folder(changes):
    filled(new_store())
    assert new_store(**changes).missing() == [0, 1, 2]


def truncated(file):
    file.write_bytes(file.read_bytes()[:-100])


def emptied(file):
    file.write_bytes(b"")


def of_another_count(file):
    file.write_bytes(file.with_name("00002-of-00003.array_record").read_bytes())


def of_another_shape(file):
    other = FeatureStore({"another": "one"}, COUNT, (3, 5, 8))
    with other.locked(SILENT):
        other.write(1, iter(np.zeros((COUNT, 3, 5, 8), ml_dtypes.bfloat16)))
    file.write_bytes(shards_of(other)[0].read_bytes())


def removed(file):
    file.unlink()


@pytest.mark.parametrize(
    "damage", [truncated, emptied, of_another_count, of_another_shape, removed]
)
def test_a_shard_that_is_not_whole_is_computed_anew(damage):
    store = filled(new_store())
    times = {file.name: file.stat().st_mtime_ns for file in shards_of(store)}
    damage(shards_of(store)[1])
    assert new_store().missing() == [1]
    again = filled(new_store())
    assert again.missing() == []
    np.testing.assert_array_equal(again.read(20), FEATURES[20])
    kept = {file.name: file.stat().st_mtime_ns for file in shards_of(store)}
    assert [name for name in times if times[name] != kept[name]] == ["00001-of-00003.array_record"]


def test_a_foreign_folder_is_emptied():
    """Of another cache that was copied to this one's place, whole shards do not count."""
    store, other = new_store(), filled(new_store(weights="b"))
    other.folder.rename(store.folder)
    assert store.missing() == [0, 1, 2]
    with store.locked(SILENT):
        assert shards_of(store) == [] and store.missing() == [0, 1, 2]


@pytest.mark.parametrize("text", ["{", "[]", '{"weights": "a"}'])
def test_damaged_contents_empty_the_folder(text):
    store = filled(new_store())
    (store.folder / CONTENTS).write_text(text)
    assert new_store().missing() == [0, 1, 2]
    assert filled(new_store()).missing() == []


def test_bits_that_flip_are_found_when_they_are_read():
    store = filled(new_store())
    file = shards_of(store)[1]
    data = bytearray(file.read_bytes())
    place = data.index(FEATURES[20].tobytes())
    data[place + 3] ^= 1
    file.write_bytes(data)
    again = new_store()
    np.testing.assert_array_equal(again.read(19), FEATURES[19])
    with pytest.raises(ValueError, match=r"00001-of-00003.array_record is damaged .*delete it"):
        again.read(20)


def test_what_a_killed_process_leaves_is_removed():
    store = filled(new_store())
    leftover = store.folder / ".00001-of-00003.array_record.0a1b.tmp"
    leftover.write_bytes(b"half")
    with store.locked(SILENT):
        assert leftover.exists()  # somebody may be writing it
    long_ago = time.time() - 2 * 3600
    os.utime(leftover, (long_ago, long_ago))
    with store.locked(SILENT):
        assert not leftover.exists() and store.missing() == []


def test_an_interrupted_shard_leaves_nothing():
    def stopped():
        yield FEATURES[0]
        raise KeyboardInterrupt

    store = new_store()
    with store.locked(SILENT):
        with pytest.raises(KeyboardInterrupt):
            store.write(0, stopped())
        assert sorted(file.name for file in store.folder.iterdir()) == [".lock", CONTENTS]


def test_a_full_disk_is_one_sentence(files_end_at):
    large = FeatureStore({"large": True}, 16, (100, 100, 4))
    with large.locked(SILENT):
        features = iter(np.ones((16, 100, 100, 4), ml_dtypes.bfloat16))
        message = r"array_record cannot be written \(.*File too large.*\): free space there"
        with pytest.raises(OSError, match=message), files_end_at(500_000):
            large.write(0, features)
        assert shards_of(large) == [] and not list(large.folder.glob(".*.tmp"))


def test_others_wait_for_who_computes():
    console = Console(file=io.StringIO(), width=500)
    first, second = new_store(), new_store()
    order = []

    def wait():
        with second.locked(console):
            order.append(("second", second.missing()))

    with first.locked(SILENT):
        thread = threading.Thread(target=wait)
        thread.start()
        while "waiting for it" not in console.file.getvalue():
            time.sleep(0.01)
        for shard in first.missing():
            first.write(shard, (FEATURES[i] for i in first.images_in(shard)))
        order.append(("first", first.missing()))
    thread.join()
    assert order == [("first", []), ("second", [])]


@pytest.fixture
def data(tmp_path):
    """Four images, of which the last two are alike; label images of two objects each."""
    for kind in ("images", "labels"):
        (tmp_path / "train" / kind).mkdir(parents=True)
    for i in range(4):
        pixels = np.full((8, 8, 3), 20 * min(i, 2), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train/images" / f"{i}.png")
        labels = np.zeros((8, 8), np.uint8)
        labels[:2], labels[4:] = 1, 2
        Image.fromarray(labels).save(tmp_path / "train/labels" / f"{i}.png")
    return tmp_path


def test_images_are_told_apart_by_their_bytes(data):
    images = images_of(LabelSource(data, "train"))
    assert images.samples == (0, 1, 2) and images.of_sample == (0, 1, 2, 2)
    each = images_of(LabelSource(data, "train", objects="each"))
    assert each.samples == (0, 2, 4) and each.of_sample == (0, 0, 1, 1, 2, 2, 2, 2)
    assert each.sha256 == images.sha256
    Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(data / "train/images/1.png")
    assert images_of(LabelSource(data, "train")).sha256 != images.sha256


def test_a_copy_elsewhere_has_the_same_images(data, tmp_path):
    (data / "train/labels").rename(data / "train/masks")
    before = images_of(FolderSource(data, "train"))
    (data / "train").rename(tmp_path / "val")
    assert images_of(FolderSource(data, "validation")) == before
