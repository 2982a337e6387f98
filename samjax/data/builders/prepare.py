"""`samjax data prepare`: from an archive, downloaded or at hand, to records that a run reads."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
from pathlib import Path

import tensorflow_datasets as tfds
from rich.console import Console

from samjax.data.builders import builder_class, configuration, prepared_folder
from samjax.download import fetch
from samjax.terminal import progress_on

_logger = logging.getLogger("samjax")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A dataset that can be read."""

    folder: Path
    # The number of samples of each official split; a dataset without such is all `train`.
    splits: dict[str, int]
    bytes: int
    # Whether it was prepared before.
    reused: bool


def prepare(name: str, data_dir: Path, manual_dir: Path | None, console: Console) -> Prepared:
    """Builds a dataset in TFDS's folder `data_dir`, unless it is there already.

    `manual_dir` holds the archives or their extracted folders; left out, archives are downloaded
    where that takes no person. TFDS builds in a folder of another name, which it removes on an
    error or an interrupt and renames at the end.

    Raises ValueError for an unknown name or settings and for files that are not the dataset's,
    FileNotFoundError where an archive must be got by hand, `samjax.download.DownloadError`.
    """
    cls = builder_class(name)
    folder = prepared_folder(name, data_dir)
    reused = folder.is_dir()
    if not reused:
        _build(name, data_dir, manual_dir, console)
    info = tfds.builder_from_directory(folder).info
    splits = {split: found.num_examples for split, found in info.splits.items()}
    pairs = sum(splits.values())
    if cls.NUM_PAIRS is not None and pairs != cls.NUM_PAIRS:
        _logger.warning(
            "%s holds %s pairs, but %s has %s: to build it of other files, delete that folder",
            *(folder, pairs, name, cls.NUM_PAIRS),
        )
    return Prepared(folder, splits, int(info.dataset_size), reused)


def _build(name: str, data_dir: Path, manual_dir: Path | None, console: Console) -> None:
    cls = builder_class(name)
    if manual_dir is not None and not manual_dir.is_dir():
        raise FileNotFoundError(f"there is no folder {manual_dir}: --manual-dir is one with files")
    # The second is TFDS's own place for files that were fetched by hand.
    files = manual_dir or data_dir / "downloads" / "manual"
    is_missing = cls.find(files) is None
    if is_missing and (manual_dir or not cls.downloads()):
        hint = "" if manual_dir else ", or pass --manual-dir with the folder where it is"
        raise FileNotFoundError(cls.missing(files) + hint)
    console.print(f"{cls.TITLE}\nlicense: {cls.LICENSE}\nplease cite:\n{cls.CITATION}")
    for archive in cls.downloads() if is_missing else ():
        if archive.find(files) is None and archive.url and archive.file:
            fetch(archive.url, files / archive.file, archive.size, archive.checksum, console)
    builder = cls(data_dir=data_dir, config=configuration(name))
    builder.track = progress_on(console)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS says there what is said here
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=files))
