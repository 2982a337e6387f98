"""`samjax data`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from tyro.conf import Positional

from samjax.arguments import Outcome, parse
from samjax.data.builders import (
    DATASETS,
    builder_class,
    default_data_dir,
    prepared_folder,
    read_pairs,
)


@dataclasses.dataclass(frozen=True)
class Data:
    """Lists the public datasets that samjax knows by name, or prepares one of them for training.

    A prepared dataset is one of tensorflow-datasets (TFDS), in array_record form, and needs no
    TensorFlow; `--data tfds:NAME` trains on it.

    Example: samjax data prepare kvasir_seg
    """

    action: Positional[Literal["list", "prepare"]]
    """list shows all; prepare downloads one, unless it is at hand, and builds it."""
    name: Positional[str | None] = None
    """Which one to prepare; NAME:SETTING=VALUE,... where it can be made in several ways."""
    manual_dir: Path | None = None
    """A folder that holds the dataset's archive, or what was extracted of it."""
    data_dir: Path | None = None
    """Where datasets are kept; left out, $TFDS_DATA_DIR or ~/tensorflow_datasets, as in TFDS.
    Training looks there too."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""

    def run(self, console: Console) -> dict[str, Any]:
        """Prints the table or where the dataset is; with `json`, returns what it says."""
        if (self.action == "prepare") != (self.name is not None):
            raise ValueError("say `samjax data list`, or `samjax data prepare NAME`")
        data_dir = (self.data_dir or default_data_dir()).expanduser().absolute()
        if self.name is None:
            if self.json:
                return {"datasets": {name: _entry(name, data_dir) for name in DATASETS}}
            sys.stdout.write(_table(data_dir))
            return {}
        return self._prepare(self.name, data_dir, console)

    def _prepare(self, name: str, data_dir: Path, console: Console) -> dict[str, Any]:
        from samjax.data.builders.prepare import prepare

        manual_dir = self.manual_dir and self.manual_dir.expanduser()
        prepared = prepare(name, data_dir, manual_dir, console)
        before = f"was prepared before; to build it anew, delete {prepared.folder}"
        console.print(f"{name} {before if prepared.reused else 'is prepared'}")
        there = f"TFDS_DATA_DIR={data_dir} " if self.data_dir else ""
        console.print(f"use it: {there}samjax train EXPERIMENT.py --data tfds:{name}")
        return {
            "dataset": name,
            "path": str(prepared.folder),
            "splits": prepared.splits,
            "bytes": prepared.bytes,
            "reused": prepared.reused,
        }


def _entry(name: str, data_dir: Path) -> dict[str, Any]:
    cls, folder = builder_class(name), prepared_folder(name, data_dir)
    there = read_pairs(folder) if folder.is_dir() else None
    return {
        "title": cls.TITLE,
        "pairs": cls.NUM_PAIRS,
        "prepared_pairs": there,
        "homepage": cls.HOMEPAGE,
        "license": cls.LICENSE,
        "path": str(folder) if folder.is_dir() else None,
    }


def _state(entry: dict[str, Any]) -> str:
    return f"prepared {entry['prepared_pairs']:>6}" if entry["path"] else ""


def _table(data_dir: Path) -> str:
    entries = {name: _entry(name, data_dir) for name in DATASETS}
    width = max(map(len, entries))
    lines = [
        f"{_state(entry):15}  {name:{width}}  {entry['pairs'] or '':>7}  {entry['title']}"
        for name, entry in entries.items()
    ]
    header = f"{'':15}  {'NAME':{width}}  {'IMAGES':>7}  in {data_dir}"
    more = "`samjax data prepare NAME` tells the license; `samjax data list --json` has it of all"
    return "\n".join([header, *lines, more]) + "\n"


def run(argv: list[str], console: Console) -> Outcome:
    """Reads the arguments and runs the verb."""
    args = parse(Data, argv, "samjax data", None, None)
    return args.run(console), args.json
