"""Features on disk: what an image encoder makes of each image up to a point, computed once.

    CACHE/features/KEY/              CACHE is $SAMJAX_CACHE, or ~/.cache/samjax
      contents.json                  what KEY is made of
      00000-of-00050.array_record    a record an image: its feature map in bfloat16
      .lock                          held by a process that computes

KEY is a hash of all that decides what the features are (`samjax.training.trunk`), so that a folder
cannot go stale: other weights or images are another folder. Runs share it; a folder that no run
needs any more may be deleted. Shards are written beside their place: what an interrupted process
leaves are whole shards, and the next one computes the others. A shard that is not whole, as its
own checksums and counts tell, is computed anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16
from rich.console import Console

from samjax.data.images import ImageFile
from samjax.data.sources import Dataset
from samjax.data.walk import Track, untracked, walk
from samjax.download import cache_dir
from samjax.files import check_writable, read_record, write_beside, write_json, writing
from samjax.lock import try_lock, wait_lock

CONTENTS = "contents.json"
# Many shards lose little where one is interrupted; a process may open a thousand files or so.
_LEAST_IN_SHARD, _MOST_SHARDS = 16, 256
# What array_record adds, rounded up: a share of the records, and bytes of padding for each shard.
_OVERHEAD, _PADDING = 1.02, 2**17
# Seconds after which nobody writes to a temporary file any more.
_ABANDONED = 3600


@dataclasses.dataclass(frozen=True)
class Images:
    """The different images of a source."""

    # Of each image, a sample that shows it.
    samples: tuple[int, ...]
    # Of each sample, its image: an index into `samples`.
    of_sample: tuple[int, ...]
    # The hash of all files, in order.
    sha256: str


def images_of(source: Dataset, track: Track = untracked) -> Images:
    """Tells a source's images apart by the bytes of their files, each of which is read once."""
    known: dict[str, str] = {}

    def digest(index: int) -> str:
        file = source.image_file(index)
        if str(file) not in known:
            known[str(file)] = hashlib.sha256(_bytes_of(file)).hexdigest()
        return known[str(file)]

    digests = list(walk(digest, range(len(source)), "reading images", track))
    first: dict[str, int] = {}
    for sample, own in enumerate(digests):
        first.setdefault(own, sample)
    places = {own: place for place, own in enumerate(first)}
    whole = hashlib.sha256("\n".join(first).encode()).hexdigest()
    return Images(tuple(first.values()), tuple(places[own] for own in digests), whole)


def _bytes_of(file: ImageFile) -> bytes:
    return file.read_bytes() if isinstance(file, Path) else file.getvalue()


def check_array_record() -> None:
    """Raises RuntimeError where the system has no array_record."""
    try:
        importlib.import_module("array_record.python.array_record_module")
    except ImportError as error:
        raise RuntimeError(
            f"cached features need array_record, which does not work here ({error}); it is made "
            "for Linux and macOS: elsewhere, set cache_features to off"
        ) from error


class FeatureStore:
    """The features of some images in one folder.

    `contents`, a JSON-able dict, is all that decides what they are; `count` is how many images
    there are, and `shape` that of one image's features.
    """

    def __init__(self, contents: dict[str, Any], count: int, shape: Sequence[int]) -> None:
        text = json.dumps(contents, sort_keys=True)
        self.contents, self.count, self.shape = json.loads(text), count, tuple(shape)
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        self.folder = cache_dir() / "features" / key
        self._in_shard = max(_LEAST_IN_SHARD, math.ceil(count / _MOST_SHARDS))
        self.num_shards = math.ceil(count / self._in_shard)

    @property
    def record_bytes(self) -> int:
        """Bytes of one image's features."""
        return 2 * math.prod(self.shape)

    def images_in(self, shard: int) -> range:
        """The images whose features a shard holds."""
        start = shard * self._in_shard
        return range(start, min(start + self._in_shard, self.count))

    def missing(self) -> list[int]:
        """The shards that are not there, or not whole, or of other contents than the folder's."""
        if self._is_ours():
            return [shard for shard in range(self.num_shards) if not self._is_whole(shard)]
        return list(range(self.num_shards))

    def bytes_of(self, shards: Sequence[int]) -> int:
        """Bytes on disk that shards take, rounded up."""
        images = sum(len(self.images_in(shard)) for shard in shards)
        return math.ceil(images * self.record_bytes * _OVERHEAD) + len(shards) * _PADDING

    def free_bytes(self) -> int:
        """Bytes free where the folder is, or will be. Raises OSError where it cannot be made."""
        check_writable(self.folder)
        place = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        return shutil.disk_usage(place).free

    @contextlib.contextmanager
    def locked(self, console: Console) -> Iterator[None]:
        """Holds the folder, which is made; waits, and says so, while another process does."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("ab")
        with lock:
            if not try_lock(lock.fileno()):
                console.print(f"another process computes {self.folder}; waiting for it")
                wait_lock(lock.fileno())
            for leftover in self.folder.glob(".*.tmp"):
                # Of a process that was killed; where locks do nothing, one may be at work.
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - leftover.stat().st_mtime > _ABANDONED:
                        leftover.unlink()
            if not self._is_ours():
                for file in self.folder.glob("*.array_record"):
                    file.unlink()
                write_json(self.folder / CONTENTS, self.contents)
            yield

    def write(self, shard: int, features: Iterator[np.ndarray]) -> None:
        """Writes a shard from the features of its images. Raises OSError where the disk refuses."""
        from array_record.python import array_record_module

        file = self._file(shard)
        with write_beside(file) as temporary:
            # Features are as good as random: compression would cost time and save nothing.
            options = "group_size:1,uncompressed"
            writer = array_record_module.ArrayRecordWriter(str(temporary), options)
            try:
                for _ in self.images_in(shard):
                    writer.write(next(features).astype(ml_dtypes.bfloat16).tobytes())
                writer.close()
            except RuntimeError as error:
                raise OSError(
                    f"{file} cannot be written ({error}): free space there, set SAMJAX_CACHE to "
                    "another folder, or set cache_features to off"
                ) from error

    def read(self, image: int) -> BFloat16[np.ndarray, "h w c"]:
        """The features of an image. Raises ValueError where its shard is damaged.

        Threads may read at once.
        """
        shard = image // self._in_shard
        try:
            record = self._records[image]
            if len(record) != self.record_bytes:
                raise RuntimeError(f"a record has {len(record)} bytes, not {self.record_bytes}")
        except RuntimeError as error:
            raise ValueError(
                f"{self._file(shard)} is damaged ({error}): delete it, and it is computed anew"
            ) from error
        return np.frombuffer(record, ml_dtypes.bfloat16).reshape(self.shape)

    @functools.cached_property
    def _records(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource([str(self._file(i)) for i in range(self.num_shards)])

    def _file(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}-of-{self.num_shards:05d}.array_record"

    def _is_ours(self) -> bool:
        """Whether the folder's contents are what its name says."""
        try:
            return read_record(self.folder / CONTENTS, "") == self.contents
        except (OSError, ValueError):
            return False

    def _is_whole(self, shard: int) -> bool:
        from array_record.python import array_record_module

        file = self._file(shard)
        if not file.is_file():
            return False
        try:
            with contextlib.closing(array_record_module.ArrayRecordReader(str(file))) as reader:
                if not reader.ok() or reader.num_records() != len(self.images_in(shard)):
                    return False
                return len(reader.read([0])[0]) == self.record_bytes
        except RuntimeError:
            return False
