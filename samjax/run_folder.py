"""A run's folder: which runs it can take, and the config of the one in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from samjax.catalog import is_name
from samjax.config import Config, read_run_config
from samjax.data.sources import is_tfds
from samjax.files import check_writable
from samjax.lock import check_free

ADAPTER = "adapter.safetensors"

# Settings that may change when a run is resumed, since the result does not depend on them.
_FREE_ON_RESUME = frozenset({"log_every", "checkpoint_every", "eval_batch_size", "fsdp", "gallery"})


def finished_run_config(run: Path, **changes: Any) -> Config:
    """The config of a finished run, with those of `changes` (by field) that are not None.

    With other metrics it has no best one, which is about validations.
    Raises ValueError where there is no run, FileNotFoundError where it is not finished.
    """
    config = read_run_config(run)
    if not (run / ADAPTER).is_file():
        raise FileNotFoundError(f"{run} is not finished; go on with `samjax train` and --resume")
    given = {name: value for name, value in changes.items() if value is not None}
    if "metrics" in given:
        given["best_metric"] = None
    return dataclasses.replace(config, **given)


def with_absolute_paths(config: Config) -> Config:
    """The config with paths that hold from any folder, so that a run can be evaluated anywhere.

    A name of `samjax.catalog`, or of a dataset of TFDS, holds anywhere already.
    """
    absolute = {
        key: str(Path(path).expanduser().absolute())
        for key, holds_anywhere in (("weights", is_name), ("data", is_tfds))
        if (path := getattr(config, key)) and not holds_anywhere(path)
    }
    return dataclasses.replace(config, **absolute)


def check_out(config: Config, out: Path, resume: bool) -> None:
    """Raises where `out` cannot take this run: in use, read-only, or of another config."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose a folder with --out")
    check_free(out)
    check_folder(config, out, resume)
    check_writable(out)


def check_folder(config: Config, out: Path, resume: bool) -> None:
    """Raises where what is in `out` does not go with this run."""
    if not resume:
        # Hidden files are what a killed run may leave of a file that it was writing.
        if out.is_dir() and any(not file.name.startswith(".") for file in out.iterdir()):
            raise FileExistsError(f"{out} is not empty; pass --resume to go on, or another --out")
        return
    if not (out / "config.json").is_file():
        raise ValueError(f"nothing to resume: {out} holds no run; leave out --resume to start one")
    if changed := changed_setting(out, config):
        raise ValueError(f"cannot resume {out} with another config: {changed}")


def changed_setting(out: Path, config: Config) -> str | None:
    """What makes a run of `config` another than the one in `out`, in words; the first setting.

    Raises ValueError where there is no run.
    """
    old, new = (_flat(c.resolved()) for c in (read_run_config(out), with_absolute_paths(config)))
    free = _FREE_ON_RESUME
    if config.validate_every is not None:  # a metric's last bits may depend on it
        free = free - {"eval_batch_size"}
    for name in {**new, **old}:
        before, now = old.get(name), new.get(name)
        if before != now and name not in free:
            return f"{name} was {before!r} and is now {now!r}"
    return None


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in groups as GROUP.NAME."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat
