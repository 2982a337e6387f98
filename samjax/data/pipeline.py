"""From a source of samples to batches of model input: an endless stream for training, a pass for
evaluation.

The training stream is a pure function of the seed and the global step: shuffling and random changes
come before each process takes its rows, so that the stream is the same for any number of them, and
to resume is to start at another step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, Literal

import grain
import numpy as np
from jaxtyping import Float32, Int, Int32

from samjax.data.augment import AugmentConfig
from samjax.data.augment import augment as augment_sample
from samjax.data.prompts import (
    POSITIVE,
    PromptConfig,
    box_of,
    central_point,
    encode_prompt,
    move_outward,
    moves_of,
    pad_prompt,
    sample_prompt,
)
from samjax.data.sources import Sample, Source
from samjax.preprocess import Frame, prepare_image, prepare_mask, scale_coords

Batch = dict[str, Any]
EVAL_SLOTS = {"none": 0, "box": 2, "point": 2}


# What an image encoder has made of a sample's image so far, (th, tw, tc), by its position.
Features = Callable[[int], np.ndarray]


def prepare_sample(
    sample: Sample,
    coords: Float32[np.ndarray, "n 2"],
    labels: Int32[np.ndarray, " n"],
    frame: Frame,
    features: np.ndarray | None = None,
    moves: Int[np.ndarray, "4"] | None = None,
) -> Batch:
    """One sample as the model takes it, for training and evaluation alike.

    `coords` are pixels of the sample's image, and `moves` those of the model's input by which the
    edges of a box move outward (`samjax.data.prompts.move_outward`). Returns what `prepare_input`
    does; coords (n, 2) float32 in pixels of the model's input; labels (n,) int32.
    """
    scaled = scale_coords(coords, sample.mask.shape, frame).astype(np.float32)
    if moves is not None:
        scaled = move_outward(scaled, labels, moves, frame.resized_shape(*sample.mask.shape))
    return {**prepare_input(sample.image, frame, features), "coords": scaled, "labels": labels}


def prepare_input(image: np.ndarray, frame: Frame, features: np.ndarray | None = None) -> Batch:
    """What the encoder takes of an image.

    That is image (fh, fw, 3) uint8, padded below and to the right, or where there are `features`
    these in its place; and input_size (2,) int32, (height, width) before padding.
    """
    if features is not None:
        input_size = np.array(frame.resized_shape(*image.shape[:2]), np.int32)
        return {"features": features, "input_size": input_size}
    prepared, input_size = prepare_image(image, frame)
    return {"image": prepared, "input_size": input_size}


def train_batches(
    source: Source,
    *,
    frame: Frame,
    batch_size: int,
    seed: int,
    prompts: PromptConfig,
    augment: AugmentConfig,
    features: Features | None = None,
    split: bool = False,
    rows: Sequence[int] | None = None,
) -> grain.MapDataset:
    """The endless stream of training batches; element i is the batch of step i.

    Each is a dict of numpy arrays: image, or in its place the `features` of an `augment` that
    changes no image, input_size, coords and labels as `prepare_sample` gives them, mask (fh, fw)
    bool as `samjax.preprocess.prepare_mask` does and index () int32, the position in the source,
    all with a leading batch axis. The other arguments are those of `training_stream`.
    """

    def load(index: int, rng: np.random.Generator) -> Batch:
        sample = source[index]
        sample = Sample(sample.name, *augment_sample(rng, sample.image, sample.mask, augment))
        coords, labels = sample_prompt(rng, sample.mask, prompts)
        given = None if features is None else features(index)
        moves = rng.integers(0, prompts.box_outward + 1, 4) if prompts.box_outward else None
        prepared = prepare_sample(sample, coords, labels, frame, given, moves)
        return {**prepared, "mask": prepare_mask(sample.mask, frame)}

    return training_stream(
        load,
        source,
        batch_size=batch_size,
        seed=seed,
        split=split,
        rows=rows,
    )


def training_stream(
    load: Callable[[int, np.random.Generator], Batch],
    source: Sized,
    *,
    batch_size: int,
    seed: int,
    split: bool = False,
    rows: Sequence[int] | None = None,
) -> grain.MapDataset:
    """The endless stream of batches of what `load(position, rng)` makes of a source's samples.

    The source is shuffled anew in every epoch, and a batch may reach from one epoch into the next.
    Element i does not depend on what was read before it. Arrays get a leading batch axis, and
    index, the position in the source, is added.

    With `split` the samples are cut into two halves once, by the seed, and rows come from one and
    the other in turn; each half is shuffled in its own epochs.

    `batch_size` is that of all processes together. Of several, each names the `rows` of the batch
    that it holds, in order (with `split` in pairs of an even one and the next), and reads only
    these: the same as they are in the whole batch.
    """
    check_batch(source, batch_size)
    if split and (len(source) < 2 or batch_size % 2):
        raise ValueError(
            f"two halves of {len(source)} samples cannot fill a batch of {batch_size} in equal "
            "parts; give an even batch_size"
        )
    rows = range(batch_size) if rows is None else rows
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), but is {seed}")

    def load_indexed(index: int, rng: np.random.Generator) -> Batch:
        return {**load(int(index), rng), "index": np.int32(index)}

    def stream(
        positions: grain.MapDataset, size: int, rows: Sequence[int], seed: int = seed
    ) -> grain.MapDataset:
        # The random map comes after the repetition, so that an image is changed anew in every
        # epoch. As many epochs as leave every length of the chain an index-sized integer.
        epochs = 2**62 // len(source)
        endless = positions.seed(seed).shuffle().repeat(epochs).random_map(load_indexed)
        if len(rows) == size:
            return endless
        return grain.MapDataset.mix([endless[row::size] for row in rows])  # which takes turns

    if not split:
        return stream(grain.MapDataset.range(len(source)), batch_size, rows).batch(len(rows))
    order = np.random.default_rng(seed).permutation(len(source))
    halves = (np.sort(half).tolist() for half in np.array_split(order, 2))
    # Seeds of their own: else rows of the two would have the same order, crops and prompts.
    seeds = np.random.SeedSequence(seed).generate_state(2).tolist()
    own_rows = [row // 2 for row in rows[::2]]
    streams = [
        stream(grain.MapDataset.source(half), batch_size // 2, own_rows, own)
        for half, own in zip(halves, seeds, strict=True)
    ]
    return grain.MapDataset.mix(streams).batch(len(rows))


def batches_from(
    dataset: grain.MapDataset, start: int, stop: int, num_threads: int = 2, buffer: int = 4
) -> Iterator[Batch]:
    """Elements start, ..., stop - 1 in order, read ahead by threads, at most `buffer` of them."""
    if not 0 <= start <= stop:
        raise ValueError(f"start and stop must satisfy 0 <= start <= stop, not {start} and {stop}")
    if start == stop:
        return iter(())
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffer)
    return iter(dataset[start:stop].to_iter_dataset(options))


def eval_batches(
    source: Source,
    *,
    frame: Frame,
    batch_size: int,
    prompts_for: Literal["none", "box", "point"],
    outward: int = 0,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    num_threads: int = 2,
) -> Iterator[Batch]:
    """One pass over the source in order, the same each time.

    Each batch has image, input_size, coords and labels as `prepare_sample` gives them with a
    leading batch axis, and what `one_pass` adds; truths are (h, w) bool masks of the original
    sizes. `prompts_for` chooses no prompt, the box of the truth, or its most central point; an
    empty truth has no prompt. The edges of a box move outward by 0 to `outward` pixels of the
    model's input, which are a function of `seed` and the sample's name.
    """
    check_batch(source, batch_size)
    if prompts_for not in EVAL_SLOTS:
        raise ValueError(f"prompts_for must be none, box or point, but is {prompts_for!r}")

    def load(index: int) -> Batch:
        sample = source[index]
        coords, labels = pad_prompt(*_truth_prompt(sample, prompts_for), EVAL_SLOTS[prompts_for])
        moves = moves_of(sample.name, seed, outward) if outward else None
        prepared = prepare_sample(sample, coords, labels, frame, moves=moves)
        return {**prepared, "truth": sample.mask, "name": sample.name}

    return one_pass(load, source, batch_size, rows, num_threads)


def one_pass(
    load: Callable[[int], Batch],
    source: Sized,
    batch_size: int,
    rows: Sequence[int] | None = None,
    num_threads: int = 2,
) -> Iterator[Batch]:
    """Batches of what `load(position)` makes of a source's samples, in order.

    Arrays are stacked; truth and name stay lists, truth and names. index (b,) are the samples'
    positions. The last batch is filled up by repeating the last sample; valid (b,) bool is False
    there. `batch_size` and `rows` are as in `training_stream`; done is how many samples of all
    processes' this batch makes.
    """
    check_batch(source, batch_size)
    count, rows = len(source), range(batch_size) if rows is None else rows
    starts = range(0, count, batch_size)
    places = [start + row for start in starts for row in rows]

    def load_indexed(place: int) -> Batch:
        index = min(int(place), count - 1)
        return {**load(index), "index": np.int32(index), "valid": np.bool_(place < count)}

    dataset = grain.MapDataset.source(places).map(load_indexed)
    samples = batches_from(dataset, 0, len(places), num_threads, buffer=16)
    return (
        {**_collate([next(samples) for _ in rows]), "done": min(batch_size, count - start)}
        for start in starts
    )


def _collate(group: list[Batch]) -> Batch:
    arrays = [key for key in group[0] if key not in ("truth", "name")]
    return {
        **{key: np.stack([sample[key] for sample in group]) for key in arrays},
        "truth": [sample["truth"] for sample in group],
        "names": [sample["name"] for sample in group],
    }


def _truth_prompt(sample: Sample, kind: str) -> tuple[np.ndarray, np.ndarray]:
    if kind == "none" or not sample.mask.any():
        return encode_prompt(None, None, None)
    if kind == "box":
        return encode_prompt(None, None, box_of(sample.mask))
    return encode_prompt(central_point(sample.mask)[None], [POSITIVE], None)


def check_batch(source: Sized, batch_size: int) -> None:
    """Raises ValueError for a batch of nothing."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but is {batch_size}")
    if not len(source):
        raise ValueError("the source holds no samples")
