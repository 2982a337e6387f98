"""The streams: element i is the batch of step i, epochs reshuffle, evaluation keeps the order."""

import numpy as np
import pytest
from PIL import Image

from samjax.data.augment import NO_AUGMENTATION, AugmentConfig
from samjax.data.folder import FolderSource
from samjax.data.pipeline import (
    batches_from,
    eval_batches,
    train_batches,
)
from samjax.data.prompts import PromptConfig, box_of, central_point, moves_of
from samjax.data.sources import Sample
from samjax.preprocess import Frame, prepare_image, prepare_mask

COUNT = 7
PROMPTS = PromptConfig(none=1.0, box=1.0, points=1.0)


class ListSource:
    """Samples in memory, of various sizes; the last one's mask is empty."""

    def __init__(self, count=COUNT):
        rng = np.random.default_rng(0)
        self.samples = []
        for i in range(count):
            height, width = 30 + 3 * i, 44 - 2 * i
            mask = np.zeros((height, width), bool)
            if i < count - 1:
                mask[5:20, 4 : 12 + i] = True
            image = rng.integers(0, 256, (height, width, 3), np.uint8)
            self.samples.append(Sample(f"s{i}", image, mask))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def stream(source=None, seed=0, batch_size=2, augment=None, prompts=PROMPTS, image_size=32):
    return train_batches(
        source or ListSource(),
        frame=Frame(image_size, image_size),
        batch_size=batch_size,
        seed=seed,
        prompts=prompts,
        augment=augment or AugmentConfig(vertical_flip=True),
    )


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        np.testing.assert_array_equal(value, second[key], err_msg=key)


def test_batches_have_static_shapes_and_dtypes():
    dataset = stream(batch_size=3)
    expected = {
        "image": ((3, 32, 32, 3), np.uint8),
        "input_size": ((3, 2), np.int32),
        "mask": ((3, 32, 32), np.bool_),
        "coords": ((3, PROMPTS.slots, 2), np.float32),
        "labels": ((3, PROMPTS.slots), np.int32),
        "index": ((3,), np.int32),
    }
    for i in range(6):
        batch = dataset[i]
        assert {k: (v.shape, v.dtype.type) for k, v in batch.items()} == expected
        for image, mask, (height, width) in zip(
            batch["image"], batch["mask"], batch["input_size"], strict=True
        ):
            assert max(height, width) == 32
            assert not image[height:].any() and not image[:, width:].any()
            assert not mask[height:].any() and not mask[:, width:].any()


def test_every_epoch_is_another_permutation():
    dataset = stream(batch_size=1)
    epochs = [[int(dataset[e * COUNT + i]["index"][0]) for i in range(COUNT)] for e in range(4)]
    for order in epochs:
        assert sorted(order) == list(range(COUNT))
    assert len({tuple(order) for order in epochs}) > 1


def test_augmentation_and_prompts_are_new_in_every_epoch():
    dataset = stream(ListSource(1), batch_size=1, augment=AugmentConfig())
    assert any(not np.array_equal(dataset[0]["image"], dataset[i]["image"]) for i in (1, 2))


def test_element_i_depends_on_the_seed_and_i_alone():
    first, second = stream(), stream()
    backwards = {i: second[i] for i in (11, 5, 0, 3)}
    for i in sorted(backwards):
        assert_equal(first[i], backwards[i])
    other = stream(seed=1)
    assert any(not np.array_equal(first[i]["index"], other[i]["index"]) for i in range(4))


def test_rows_do_not_depend_on_the_batch_size():
    small, large = stream(batch_size=1), stream(batch_size=4)
    rows = [small[i] for i in range(4, 8)]
    assert_equal({k: np.concatenate([row[k] for row in rows]) for k in rows[0]}, large[1])


@pytest.mark.parametrize("start", [0, 5])
def test_reading_ahead_keeps_order_and_values(start):
    dataset = stream()
    batches = list(batches_from(dataset, start, 12, num_threads=3, buffer=2))
    assert len(batches) == 12 - start
    for i, batch in enumerate(batches, start):
        assert_equal(batch, dataset[i])


def test_reading_far_into_the_stream():
    dataset = stream()
    (batch,) = batches_from(dataset, 10**7, 10**7 + 1)
    assert_equal(batch, dataset[10**7])
    assert list(batches_from(dataset, 3, 3)) == []
    with pytest.raises(ValueError, match="start"):
        batches_from(dataset, 3, 2)


def test_without_augmentation_the_batch_is_the_prepared_sample():
    source = ListSource()
    dataset = stream(
        source, augment=NO_AUGMENTATION, prompts=PromptConfig(none=0.0, box=1.0, box_jitter=0.0)
    )
    for i in range(4):
        batch = dataset[i]
        for row, index in enumerate(batch["index"]):
            sample = source[index]
            image, input_size = prepare_image(sample.image, Frame(32, 32))
            np.testing.assert_array_equal(batch["image"][row], image)
            np.testing.assert_array_equal(batch["input_size"][row], input_size)
            np.testing.assert_array_equal(
                batch["mask"][row], prepare_mask(sample.mask, Frame(32, 32))
            )
            if sample.mask.any():
                height, width = sample.mask.shape
                scale = np.tile(input_size[::-1] / (width, height), 2)
                np.testing.assert_allclose(
                    batch["coords"][row].ravel(), box_of(sample.mask) * scale, rtol=1e-6
                )
                assert batch["labels"][row].tolist() == [2, 3]
            else:
                assert batch["labels"][row].tolist() == [-2, -2]


def test_prepare_mask_resizes_like_the_image():
    mask = np.zeros((8, 16), bool)
    mask[2:6, 4:8] = True
    large = np.zeros((32, 32), bool)
    large[4:12, 8:16] = True
    np.testing.assert_array_equal(prepare_mask(mask, Frame(32, 32)), large)
    np.testing.assert_array_equal(prepare_mask(large[:16], Frame(16, 16))[:8], mask)


@pytest.mark.parametrize("frame", [Frame(256, 256), Frame(128, 256), Frame(256, 256, "stretch")])
@pytest.mark.parametrize("side", [1, 3, 6])
def test_prepare_mask_keeps_the_smallest_objects(frame, side):
    height, width = frame.resized_shape(270, 1920)
    for place in range(64):
        mask = np.zeros((270, 1920), bool)
        top, left = 4 * place % (270 - side + 1), 30 * place % (1920 - side + 1)
        mask[top : top + side, left : left + side] = True
        prepared = prepare_mask(mask, frame)
        rows, columns = np.nonzero(prepared)
        assert rows.size
        # Every pixel of it covers a part of the object.
        assert ((rows + 1) * 270 > top * height).all()
        assert (rows * 270 < (top + side) * height).all()
        assert ((columns + 1) * 1920 > left * width).all()
        assert (columns * 1920 < (left + side) * width).all()
    assert not prepare_mask(np.zeros((270, 1920), bool), frame).any()


OUTWARD = PromptConfig(none=0.0, box=1.0, box_jitter=0.0, box_outward=3)


def outward_moves(batch, row, sample):
    """By how much each edge lies outside of the mask's box, in pixels of the input."""
    scale = batch["input_size"][row][::-1] / sample.mask.shape[::-1]
    tight = box_of(sample.mask).reshape(2, 2) * scale
    return (tight - batch["coords"][row])[0].tolist() + (batch["coords"][row] - tight)[1].tolist()


def test_boxes_are_moved_by_whole_pixels_of_the_input():
    """The objects of two images of unlike scale lie three pixels and more from their edges."""
    source = ListSource(4)
    dataset = stream(source, augment=NO_AUGMENTATION, prompts=OUTWARD, batch_size=3, image_size=64)
    seen = set()
    for i in range(40):
        batch = dataset[i]
        for row, index in enumerate(batch["index"]):
            if index == 3:  # has no object
                assert batch["labels"][row].tolist() == [-2, -2]
                continue
            moves = outward_moves(batch, row, source[index])
            np.testing.assert_allclose(moves, np.round(moves), atol=1e-5)
            seen |= {(edge, round(move)) for edge, move in enumerate(moves)}
    assert seen == {(edge, move) for edge in range(4) for move in range(4)}
    again = stream(source, augment=NO_AUGMENTATION, prompts=OUTWARD, batch_size=3, image_size=64)
    assert_equal(dataset[7], again[7])


def test_boxes_of_an_evaluation_are_moved_alike_each_time():
    source, frame = ListSource(4), Frame(64, 64)

    def batches(count=4, **settings):
        settings = {"frame": frame, "batch_size": count, "prompts_for": "box"} | settings
        return list(eval_batches(source, **settings))

    (batch,) = batches(outward=3, seed=5)
    for row in range(3):
        moves = outward_moves(batch, row, source[row])
        np.testing.assert_allclose(moves, moves_of(f"s{row}", 5, 3), atol=1e-5)
    one_by_one = batches(1, outward=3, seed=5)
    np.testing.assert_array_equal(
        batch["coords"], np.concatenate([b["coords"] for b in one_by_one])
    )
    (other,) = batches(outward=3, seed=6)
    assert (batch["coords"] != other["coords"]).any()
    (points,), (plain,) = batches(prompts_for="point", outward=3), batches(prompts_for="point")
    np.testing.assert_array_equal(points["coords"], plain["coords"])


def test_no_prompts_have_no_slots():
    assert stream(prompts=PromptConfig())[0]["coords"].shape == (2, 0, 2)


def test_processes_share_an_evaluation():
    """The second one has no image in the last batch, and fills it up as the first does."""

    def batches(rows):
        settings = {"frame": Frame(32, 32), "batch_size": 4, "prompts_for": "box"}
        return list(eval_batches(ListSource(5), **settings, rows=rows))

    whole = batches(None)
    assert [batch["done"] for batch in whole] == [4, 1]
    for rows in ([0, 1], [2, 3]):
        for one, own in zip(whole, batches(rows), strict=True):
            assert own["names"] == [one["names"][row] for row in rows]
            assert own["done"] == one["done"]
            for key in ("image", "coords", "valid", "index"):
                np.testing.assert_array_equal(one[key][rows], own[key])


@pytest.mark.parametrize(("kind", "slots"), [("none", 0), ("box", 2), ("point", 2)])
def test_evaluation_keeps_the_order_and_fills_the_last_batch(kind, slots):
    source = ListSource()
    batches = list(eval_batches(source, frame=Frame(32, 32), batch_size=3, prompts_for=kind))
    assert [batch["valid"].tolist() for batch in batches] == [
        [True] * 3,
        [True] * 3,
        [True, False, False],
    ]
    names = [name for batch in batches for name in batch["names"]]
    assert names == [f"s{i}" for i in range(COUNT)] + ["s6"] * 2
    for number, batch in enumerate(batches):
        assert batch["image"].shape == (3, 32, 32, 3) and batch["coords"].shape == (3, slots, 2)
        assert batch["coords"].dtype == np.float32 and batch["labels"].dtype == np.int32
        assert batch["input_size"].dtype == np.int32
        for row in range(3):
            sample = source[min(3 * number + row, COUNT - 1)]
            np.testing.assert_array_equal(batch["truth"][row], sample.mask)
            np.testing.assert_array_equal(
                batch["image"][row], prepare_image(sample.image, Frame(32, 32))[0]
            )
            scale = batch["input_size"][row][::-1] / sample.mask.shape[::-1]
            if not sample.mask.any():
                assert batch["labels"][row].tolist() == [-2] * slots
            elif kind == "box":
                corners = box_of(sample.mask).reshape(2, 2) * scale
                np.testing.assert_allclose(batch["coords"][row], corners, rtol=1e-6)
                assert batch["labels"][row].tolist() == [2, 3]
            elif kind == "point":
                point = central_point(sample.mask) * scale
                np.testing.assert_allclose(batch["coords"][row], [point, (0, 0)], rtol=1e-6)
                assert batch["labels"][row].tolist() == [1, -1]


def test_a_bad_file_is_named_through_the_threads(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        Image.fromarray(np.ones((8, 8), np.uint8)).save(tmp_path / kind / "good.png")
    (tmp_path / "images" / "bad.png").write_bytes(b"not a picture")
    Image.fromarray(np.ones((8, 8), np.uint8)).save(tmp_path / "masks" / "bad.png")
    source = FolderSource(tmp_path, "train", fractions=(1.0, 0.0, 0.0))
    with pytest.raises(ValueError, match=r"bad\.png cannot be decoded"):
        list(eval_batches(source, frame=Frame(8, 8), batch_size=2, prompts_for="none"))
    with pytest.raises(ValueError, match=r"bad\.png cannot be decoded"):
        list(batches_from(stream(source, image_size=8), 0, 2))


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="batch_size"):
        stream(batch_size=0)
    with pytest.raises(ValueError, match="seed"):
        stream(seed=-1)
    with pytest.raises(ValueError, match="no samples"):
        eval_batches(ListSource(0), frame=Frame(8, 8), batch_size=1, prompts_for="none")


@pytest.mark.parametrize("shares", [[[0, 1, 2], [3, 4, 5]], [[0, 3], [1, 4], [2, 5]]])
def test_processes_share_one_stream(shares):
    source = ListSource(7)

    def batches(**share):
        settings = {"seed": 5, "prompts": PROMPTS, "augment": AugmentConfig(rotate90=True)}
        dataset = train_batches(source, frame=Frame(32, 32), batch_size=6, **settings, **share)
        return list(batches_from(dataset, 0, 4))

    whole = batches()
    for rows in shares:
        for one, own in zip(whole, batches(rows=rows), strict=True):
            for key, value in one.items():
                np.testing.assert_array_equal(value[rows], own[key])


def halves(prompts, **options):
    """Batches of four out of eight images that are kept apart in two halves."""
    return train_batches(
        ListSource(8),
        frame=Frame(32, 32),
        batch_size=4,
        seed=3,
        prompts=prompts,
        augment=NO_AUGMENTATION,
        split=True,
        **options,
    )


@pytest.mark.parametrize("shares", [[None], [[0, 1], [2, 3]]])
def test_halves_of_the_data_take_turns_in_the_rows(shares):
    """Whole epochs of each half, and no image in both, for any number of processes."""

    def indices(rows):
        dataset = halves(PROMPTS, rows=rows)
        return np.stack([dataset[i]["index"] for i in range(6)])

    # Six batches of four rows: each half of four images is seen three times.
    every = np.concatenate([indices(rows) for rows in shares], axis=1)
    np.testing.assert_array_equal(every, indices(None))
    first, second = every[:, ::2], every[:, 1::2]
    for half in (first, second):
        values, times = np.unique(half, return_counts=True)
        assert len(values) == 4 and (times == 3).all()
        epochs = half.reshape(3, 4)
        assert all(len(set(epoch)) == 4 for epoch in epochs)
    assert not set(first.ravel()) & set(second.ravel())


def test_halves_draw_for_themselves():
    """Images of the two that stand beside each other are not cropped and turned alike."""

    def boxes(jitter):
        dataset = halves(PromptConfig(none=0.0, box=1.0, box_jitter=jitter))
        return np.concatenate([dataset[i]["coords"] for i in range(4)])

    shifts = boxes(0.2) - boxes(0.0)
    assert np.abs(shifts).max() > 0
    assert not any(np.allclose(a, b) for a, b in zip(shifts[::2], shifts[1::2], strict=True))


def test_halves_need_even_batches():
    for size, samples in ((3, 8), (2, 1)):
        with pytest.raises(ValueError, match="give an even batch_size"):
            train_batches(
                ListSource(samples),
                frame=Frame(32, 32),
                batch_size=size,
                seed=0,
                prompts=PROMPTS,
                augment=NO_AUGMENTATION,
                split=True,
            )
