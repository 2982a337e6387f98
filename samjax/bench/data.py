"""The input pipeline alone, beside what the training step consumes, and each of its parts."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from rich.console import Console

from samjax.bench import machine
from samjax.bench.inputs import model_config, random_params
from samjax.bench.programs import DoesNotFit
from samjax.bench.rounds import check_rounds, ratios, take_turns
from samjax.bench.steps import open_step, training_config
from samjax.bench.tables import spread
from samjax.config import Config
from samjax.data.augment import augment
from samjax.data.pipeline import batches_from, prepare_sample
from samjax.data.prompts import sample_prompt
from samjax.data.sources import Dataset, Sample, open_source
from samjax.models import Sam
from samjax.preprocess import Frame, prepare_mask
from samjax.problems import problem_of

# What the pipeline does with each sample, in order.
PARTS = ("decode", "augment", "prompts", "resize")
# Images that a round takes through the pipeline, at least.
_IMAGES = 16


def measure(
    data: str | None,
    size: tuple[int, int],
    model_name: str,
    image_size: int | None,
    method: str,
    batch_size: int,
    rounds: int,
    console: Console,
) -> dict[str, Any]:
    """Times the pipeline over the training split of `data`, the step of `method`, and the parts.

    Without `data` images of `size` (height, width) are made up. Each of the three runs alone, in
    turns. Parts are seconds an image in one thread. Raises ValueError for data, a model, a method
    or a size that cannot be, and RuntimeError where the step does not fit into memory.
    """
    model = Sam(model_config(model_name, image_size))
    check_rounds(rounds)
    config = training_config(method, batch_size)
    if min(size) < 16:
        raise ValueError(f"size must be at least 16 pixels, not {min(size)}")
    with _source(data, size) as source:
        load = machine.facts(console)
        try:
            step = open_step(model, config, jax.device_put(random_params(model)))
            pipeline = _pipeline(config, model, source)
            parts = _Parts(config, model.config.frame, source)
            calls = {"pipeline": pipeline, "step": step.run, "parts": parts.run}
            seconds = take_turns(calls, rounds, console)
        except DoesNotFit as error:
            raise RuntimeError(f"a step {error}: lower --batch-size or --image-size") from None
        images = len(source)
    batches = _batches(batch_size)
    fed = [taken / (batches * batch_size) for taken in seconds["pipeline"]]
    consumed = [taken / batch_size for taken in seconds["step"]]
    found = parts.medians(rounds)
    return {
        **load,
        "data": data,
        "images": images,
        "size": None if data else list(size),
        "model": model_name,
        "image_size": list(model.config.frame.shape),
        "method": method,
        "batch_size": batch_size,
        "rounds": rounds,
        "pipeline_images_per_second": 1 / statistics.median(fed),
        "step_images_per_second": 1 / statistics.median(consumed),
        # How many times what the step consumes.
        **ratios(consumed, fed),
        "all_seconds": {"pipeline": seconds["pipeline"], "step": seconds["step"]},
        "parts": found,
        "bottleneck": max(found, key=found.__getitem__),
    }


def _batches(batch_size: int) -> int:
    """How many batches a round takes through the pipeline."""
    return -(-_IMAGES // batch_size)


def _pipeline(config: Config, model: Sam, source: Dataset) -> Callable[[], float]:
    """Reads the next batches as training does, and returns the seconds of them all."""
    dataset = problem_of(config).batches(model, source, split=False)
    count = _batches(config.batch_size)
    starts = itertools.count(step=count)

    def run() -> float:
        first = next(starts)
        start = time.perf_counter()
        for _ in batches_from(dataset, first, first + count):
            pass
        return time.perf_counter() - start

    return run


class _Parts:
    """The parts of the pipeline, one after another, in one thread."""

    def __init__(self, config: Config, frame: Frame, source: Dataset) -> None:
        self._config, self._frame, self._source = config, frame, source
        self._rng = np.random.default_rng(config.seed)
        self._positions = itertools.cycle(range(len(source)))
        self._seconds: dict[str, list[float]] = {part: [] for part in PARTS}

    def run(self) -> float:
        """Takes some images through all parts and notes the seconds an image of each."""
        total = dict.fromkeys(PARTS, 0.0)
        for position in itertools.islice(self._positions, _IMAGES):
            for part, seconds in self._sample(position).items():
                total[part] += seconds
        for part, seconds in total.items():
            self._seconds[part].append(seconds / _IMAGES)
        return sum(total.values())

    def _sample(self, position: int) -> dict[str, float]:
        """One image, as `samjax.data.pipeline.train_batches` loads it."""
        rng, clock = self._rng, [time.perf_counter()]

        def tick() -> None:
            clock.append(time.perf_counter())

        sample = self._source[position]
        tick()
        changed = augment(rng, sample.image, sample.mask, self._config.augment)
        sample = Sample(sample.name, *changed)
        tick()
        coords, labels = sample_prompt(rng, sample.mask, self._config.prompts)
        tick()
        prepare_sample(sample, coords, labels, self._frame)
        prepare_mask(sample.mask, self._frame)
        tick()
        spans = (after - before for before, after in itertools.pairwise(clock))
        return dict(zip(PARTS, spans, strict=True))

    def medians(self, rounds: int) -> dict[str, float]:
        """Of the last `rounds`, by part."""
        return {part: statistics.median(s[-rounds:]) for part, s in self._seconds.items()}


@contextlib.contextmanager
def _source(data: str | None, size: tuple[int, int]) -> Iterator[Dataset]:
    """The training split of the data, or of a folder of images that is gone afterwards."""
    if data is not None:
        yield open_source(data, "train")
        return
    with tempfile.TemporaryDirectory(prefix="samjax-bench-") as folder:
        _make_up(Path(folder), size)
        # All of it: the samples are alike.
        yield open_source(folder, "train", fractions=(1.0, 0.0, 0.0))


def _make_up(root: Path, size: tuple[int, int]) -> None:
    """JPEGs as smooth as photographs, with a mask of an ellipse each, as PNG."""
    rng = np.random.default_rng(0)
    height, width = size
    rows, columns = (np.linspace(-1, 1, side) for side in size)
    for name in ("images", "masks"):
        (root / name).mkdir()
    for i in range(_IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noisy = pixels + rng.integers(-8, 9, pixels.shape, np.int16)
        image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
        image.save(root / "images" / f"{i}.jpg", quality=90)
        y, x, radius = *rng.uniform(-0.3, 0.3, 2), rng.uniform(0.3, 0.6)
        mask = (rows[:, None] - y) ** 2 + (columns - x) ** 2 < radius**2
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")


def caption(result: Mapping[str, Any]) -> str:
    """What was measured, where, and whether the pipeline keeps up."""
    (height, width), of = result["image_size"], result["data"]
    if of is None:
        of = f"made-up JPEGs of {result['size'][0]} x {result['size'][1]} px"
    return (
        f"{machine.described(result)}; {result['images']} images of {of}; {result['method']} in "
        f"{result['model']} at {height} x {width} px, float32, batch {result['batch_size']}; "
        f"median of {result['rounds']} rounds at load {result['load']:.1f}. The pipeline feeds "
        f"{result['ratio']:.3g} times what the step consumes; most of its time goes to "
        f"{result['bottleneck']}."
    )


def rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table, its head first."""
    total = sum(result["parts"].values())
    return [
        ("what", "images/s", "step = 1", "least to most", "of the pipeline's work"),
        (
            "pipeline",
            f"{result['pipeline_images_per_second']:.4g}",
            f"{result['ratio']:.3g}",
            spread(result["ratio_range"]),
            "100%",
        ),
        *(
            (f"{part}, one thread", f"{1 / seconds:.4g}", "-", "-", f"{seconds / total:.0%}")
            for part, seconds in result["parts"].items()
        ),
        ("step", f"{result['step_images_per_second']:.4g}", "1", "-", "-"),
    ]
