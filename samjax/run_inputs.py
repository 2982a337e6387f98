"""inputs.json of a run folder: the weights and images that a run is made of, to know them again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from samjax.config import Config
from samjax.data.sources import Dataset
from samjax.files import read_record

_NAME = "inputs.json"
_HASHES = ("train", "validation", "test", "weights")


def inputs_of(sources: dict[str, Dataset], base_sha256: str, trunk: str) -> dict[str, Any]:
    """What inputs.json holds: the hashes of each split's names and of the weights, what the
    training images are called, and from which point of the encoder training starts.
    """
    hashes = {name: _names_sha256(source) for name, source in sources.items()}
    return {
        **hashes,
        "weights": base_sha256,
        "trunk": trunk,
        "train_names": list(sources["train"].names),
    }


def check_inputs(out: Path, inputs: dict[str, Any], config: Config) -> None:
    """Raises ValueError where a resumed run would go on with other weights or images."""
    file = out / _NAME
    if not file.is_file():
        return
    stored = _read_inputs(file)
    changed = [name for name in _HASHES if stored.get(name) != inputs.get(name)]
    if changed:
        what = config.weights if "weights" in changed else f"the {changed[0]} images"
        raise ValueError(
            f"cannot resume {out}: {what} changed since it started; restore them, or start anew in "
            "another folder"
        )


def trunk_of(out: Path) -> str | None:
    """The point of the encoder from which a run trains, "" without features; None for no run.

    Without its record, a run that has begun counts as one without features, as those of an older
    samjax are.
    """
    file = out / _NAME
    if file.is_file():
        return _read_inputs(file).get("trunk", "")
    return "" if (out / "checkpoints").is_dir() else None


def tell_other_images(
    run: Path,
    data: str,
    split: str,
    source: Dataset,
    open_train: Callable[[], Dataset],
    console: Console,
) -> None:
    """Says where a split is not the one that the run had, and may hold what it was trained on.

    A split that the run did not have stands and falls with its training split, which `open_train`
    opens in `data` as it is now.
    """
    file = run / _NAME
    if not file.is_file():
        return
    stored = _read_inputs(file)
    if split in stored:
        same = stored[split] == _names_sha256(source)
    else:
        same = stored.get("train") == _names_sha256(open_train())
    if same:
        return
    console.print(
        f"notice: these {split} images are not those of the run, by their names: {data} "
        "holds others now, or is another folder"
    )
    trained = set(stored.get("train_names", ())).intersection(source.names)
    if trained and split != "train":
        console.print(
            f"warning: {len(trained)} of these {len(source)} images have names of images that the "
            "run was trained on: what they measure is no test"
        )


def _read_inputs(file: Path) -> dict[str, Any]:
    mend = "put a copy of it there, or delete it: then nothing tells whether images have changed"
    return read_record(file, mend)


def _names_sha256(source: Dataset) -> str:
    return hashlib.sha256("\n".join(source.names).encode()).hexdigest()
