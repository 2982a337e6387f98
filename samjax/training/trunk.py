"""The skipped trunk: what comes before all that trains is computed once for each image.

Where no augmentation changes images, the part of the encoder before the first leaf that trains and
the first site that is adapted gives the same for an image in every epoch. It is computed before
training, kept on disk in bfloat16 (`samjax.data.features`), and training starts from there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.filesize import decimal

from samjax.config import Config
from samjax.data.features import FeatureStore, Images, check_array_record, images_of
from samjax.data.pipeline import batches_from, prepare_input
from samjax.data.sources import Dataset
from samjax.hashes import params_sha256
from samjax.models import Sam
from samjax.peft import PeftSpec, as_computed
from samjax.peft.cut import Cut, find_cut, params_before
from samjax.terminal import Interrupted, progress_bar, progress_on
from samjax.training import memory

# Of what an encoder computes, and of how features are stored: another number, other features.
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Trunk:
    """What a run computes once for each image."""

    # The encoder's point up to which it is computed.
    point: str
    images: Images
    store: FeatureStore

    def features(self, sample: int) -> np.ndarray:
        """The features (h, w, c), bfloat16, of a sample's image; ValueError where damaged."""
        return self.store.read(self.images.of_sample[sample])

    def compute(
        self, model: Sam, params: Any, source: Dataset, batch_size: int, console: Console
    ) -> None:
        """Computes what is missing on disk, so many images at a time.

        Of several processes one computes, the others wait for it. Raises Interrupted on Ctrl-C:
        whole shards stay. Raises OSError where the disk refuses, ValueError where an image cannot
        be read.
        """
        store, done = self.store, 0
        # On a device once, not with every batch.
        kept = as_computed({"params": params}, model.dtype)["params"]
        before = jax.device_put(params_before(model, kept, self.point))
        try:
            with store.locked(console), progress_bar(console) as bar:
                shards = store.missing()
                samples = [self.images.samples[i] for s in shards for i in store.images_in(s)]
                task = bar.add_task("computing features", total=len(samples), note="compiling")

                def rows() -> Iterator[np.ndarray]:
                    for row in _encoded(model, before, self.point, source, samples, batch_size):
                        bar.update(task, advance=1, note="")
                        yield row

                features = rows()
                for shard in shards:
                    store.write(shard, features)
                    done += len(store.images_in(shard))
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped after the features of {done} images, which are kept; the same command "
                "with --resume goes on"
            ) from None


def _encoded(
    model: Sam, params: Any, point: str, source: Dataset, samples: list[int], batch_size: int
) -> Iterator[np.ndarray]:
    """The features of samples' images, in order."""

    @jax.jit
    def encode(params: Any, image: Any, input_size: Any) -> Any:
        x = model.apply({"params": params}, image, input_size, point, method="encode_to")
        return x.astype(jnp.bfloat16)

    def load(sample: int) -> dict[str, Any]:
        return prepare_input(source[int(sample)].image, model.config.frame)

    filled = samples + samples[-1:] * (-len(samples) % batch_size)
    batches = grain.MapDataset.source(filled).map(load).batch(batch_size)
    left = len(samples)
    for batch in batches_from(batches, 0, len(filled) // batch_size):
        with memory.exhaustion():
            rows = np.asarray(encode(params, batch["image"], batch["input_size"]))
        yield from rows[:left]
        left -= len(rows)


def plan_trunk(
    config: Config,
    model: Sam,
    spec: PeftSpec,
    params: Any,
    source: Dataset,
    console: Console,
    known: str | None = None,
) -> Trunk | None:
    """What a run computes once for each image, and says so with what disk it takes; None: nothing.

    It is `config.cache_features` that decides; of a run that is resumed, the point that it trains
    from, `known`, "" where it trains from images: so that a resumed run is the same run. Nothing is
    computed. Raises ValueError where nothing comes before what trains, and OSError where features
    that are asked for do not fit on the disk; RuntimeError where the system cannot store any.
    """
    asked = config.cache_features == "on" or bool(known)
    if known == "" or config.cache_features == "off" or config.image_changes:
        return None
    cut = find_cut(spec, model)
    if not asked and not _is_worth_it(cut, config, len(source)):
        return None
    if not cut.before:
        raise ValueError(
            f"cache_features on has nothing to compute, since {cut.because} trains or is adapted, "
            "which is where the encoder begins: leave cache_features out"
        )
    try:
        check_array_record()
        trunk = _trunk(config, model, cut, params, source, console)
        missing = trunk.store.missing()
        need = trunk.store.bytes_of(missing)
        free = trunk.store.free_bytes() if missing else 0
        # Without being asked, at most half of what is free.
        if need > (free if asked else free // 2):
            # A run that has begun with features goes on with them.
            other = "" if known else ", or set cache_features to off"
            raise OSError(
                f"the features of {trunk.store.count} images take {decimal(need)} in "
                f"{trunk.store.folder}, where {decimal(free)} are free: free some, set "
                f"SAMJAX_CACHE to a folder elsewhere{other}"
            )
    except (OSError, RuntimeError) as error:
        if asked:
            raise
        console.print(f"notice: training starts from images, not from cached features: {error}")
        return None
    where = f"the encoder's features before {cut.point} of {trunk.store.count} images"
    if missing:
        console.print(
            f"{where} are computed once: {decimal(need)} in {trunk.store.folder}, where "
            f"{decimal(free)} are free"
        )
    else:
        console.print(f"{where} are in {trunk.store.folder}")
    return trunk


def _is_worth_it(cut: Cut, config: Config, num_images: int) -> bool:
    """Whether half of the encoder is skipped, and each image is seen twice."""
    seen = config.num_steps(num_images) * config.batch_size
    return 2 * cut.before >= cut.parts and seen >= 2 * num_images


def _trunk(
    config: Config, model: Sam, cut: Cut, params: Any, source: Dataset, console: Console
) -> Trunk:
    images = images_of(source, progress_on(console))
    before = params_before(model, params, cut.point)
    height, width = model.config.frame.shape
    image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.uint8)
    size = jax.ShapeDtypeStruct((1, 2), jnp.int32)

    def encode(params: Any, image: Any, size: Any) -> Any:
        return model.apply({"params": params}, image, size, cut.point, method="encode_to")

    shape = jax.eval_shape(encode, before, image, size).shape[1:]
    contents = {
        "version": _VERSION,
        "model": model.config.to_json(),
        "dtype": config.dtype,
        "point": cut.point,
        "weights": params_sha256(before),
        "images": images.sha256,
        "count": len(images.samples),
        "shape": list(shape),
    }
    return Trunk(cut.point, images, FeatureStore(contents, len(images.samples), shape))
