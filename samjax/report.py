"""report.md of a run: what was trained, what it brought, and which images it fails on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.filesize import decimal

from samjax.config import Config
from samjax.evaluation.evaluate import Evaluation
from samjax.files import write_beside

NAME = "report.md"
# Images in the list of the worst.
_WORST = 5


def write_report(
    out: Path,
    config: Config,
    summary: Mapping[str, Any],
    counts: Mapping[str, int],
    titles: Mapping[str, str],
    conditions: str,
) -> None:
    """Writes report.md beside the evaluations of a finished run, which it reads.

    `counts` are the images of each split, `titles` and `conditions` those of the run's problem.
    """
    before, after = (Evaluation.read_csv(out / f"eval_{when}.csv") for when in ("before", "after"))
    height, width = summary["input_size"]
    images = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    lines = [
        f"# {out.name}",
        "",
        f"- method: {config.method.method}, {summary['trainable']:,} trained numbers "
        f"({summary['beside_decoder']:,} beside the mask decoder)",
        f"- weights: {config.weights} at {height} x {width} px, {config.dtype}",
        f"- data: {config.data} ({images} images)",
        f"- training: {summary['steps']:,} steps of {config.batch_size} images"
        f"{_seconds(summary['seconds_per_step'])}, seed {config.seed}; the state after step "
        f"{summary['kept_step']:,} is kept",
        f"- adapter: {Path(summary['adapter']).name}, {decimal(summary['file_bytes'])}",
        f"- {summary['device']}, {summary['date']}",
        "",
        f"## The {config.test_split} split, {conditions}",
        "",
        "| | before | after | change |",
        "|---|---|---|---|",
        *(
            f"| {titles.get(name, name)} | {before.mean[name]:.4f} | {value:.4f} | "
            f"{_change(config, before, after, name)} |"
            for name, value in after.mean.items()
        ),
        "",
        "± is the standard error of a mean change over images: another test split of this size "
        "would give another change, by about so much.",
        "",
        *_worst(config, before, after, titles),
        "![image, truth, before, after](gallery.png)",
        "",
    ]
    with write_beside(out / NAME) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f", {seconds:.3g} s each"


def _change(config: Config, before: Evaluation, after: Evaluation, name: str) -> str:
    """The gain of a metric; of a mean over samples with its standard error."""
    change = f"{after.mean[name] - before.mean[name]:+.4f}"
    images = [x.rpartition("#")[0] if config.objects == "each" else x for x in after.names]
    count = len(set(images))
    if name in after.of_set or count < 2:
        return change
    changes = after.per_image[name] - before.per_image[name]
    # What errs in one object of an image may err in the others: images, not objects, are drawn.
    _, image = np.unique(images, return_inverse=True)
    of_images = np.bincount(image, changes - changes.mean())
    error = np.sqrt(count / (count - 1) * np.square(of_images).sum()) / len(changes)
    return f"{change} ± {error:.4f}"


def _worst(
    config: Config, before: Evaluation, after: Evaluation, titles: Mapping[str, str]
) -> list[str]:
    """The images that are worst after training, by the metric that validations compare.

    Nothing, where that is one of the set alone.
    """
    name, more_is_better = config.best
    if name not in after.per_image:
        return []
    values = after.per_image[name]
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(values[known] if more_is_better else -values[known], kind="stable")]
    title = titles.get(name, name)
    return [
        f"## Where it is worst, by {title}",
        "",
        "| image | before | after |",
        "|---|---|---|",
        *(
            f"| {after.names[i].replace('|', '/')} | {before.per_image[name][i]:.3f} | "
            f"{values[i]:.3f} |"
            for i in order[:_WORST]
        ),
        "",
    ]
