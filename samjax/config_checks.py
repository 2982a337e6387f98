"""Which configs cannot be: each check says in one sentence what is wrong and what to change."""

from __future__ import annotations

import difflib
import math
import types
from typing import TYPE_CHECKING, Literal, Union, get_args, get_origin, get_type_hints

from samjax.evaluation.metrics import METRICS, check_metrics
from samjax.peft.recipes import RECIPES

if TYPE_CHECKING:
    from samjax.config import Config

_AT_LEAST_ONE = (
    "tasks_per_step",
    "batch_size",
    "accumulate",
    "eval_batch_size",
    "fsdp",
    "log_every",
    "checkpoint_every",
    "validate_every",
    "patience",
)


def check(config: Config) -> None:
    """Raises ValueError for settings that cannot be, or do not go together."""
    _check_choices(config)
    _check_numbers(config)
    _check_validation(config)
    _check_tasks(config)
    _check_metrics(config)
    _check_data(config)
    _check_batches(config)


def _check_choices(config: Config) -> None:
    """Raises ValueError for a value that its setting does not have.

    The command line checks flags; this is for experiment files and `config.json`.
    """
    for name, hint in get_type_hints(type(config)).items():
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        choices = [x for kind in kinds if get_origin(kind) is Literal for x in get_args(kind)]
        value = getattr(config, name)
        if choices and value not in choices and not (value is None and type(None) in kinds):
            nearest = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{name} must be one of {', '.join(choices)}, not {value!r}; the nearest is "
                f"{nearest}"
            )


def _check_numbers(config: Config) -> None:
    for name in _AT_LEAST_ONE:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), not {config.seed}")
    if not math.isfinite(config.epochs):
        raise ValueError(f"epochs must be finite, not {config.epochs}; --steps sets the steps")
    if any(x is not None and not x > 0 for x in (config.steps, config.epochs, config.gallery)):
        raise ValueError(
            f"steps, epochs and gallery must be positive, and are {config.steps}, {config.epochs} "
            f"and {config.gallery}"
        )


def _check_validation(config: Config) -> None:
    if config.validate_every is not None:
        if config.test_split == "validation":
            raise ValueError(
                "with test_split validation a run is measured on what its validations choose by: "
                "leave out validate_every, or test_split"
            )
        return
    if config.keep == "best":
        raise ValueError("keep best compares validations: set validate_every, or keep last")
    if config.patience is not None:
        raise ValueError("patience counts validations: set validate_every, or leave it out")


def _check_tasks(config: Config) -> None:
    tasks = config.parsed_tasks()
    if not tasks and config.task_weighting != "fixed":
        raise ValueError("task_weighting weighs dense tasks: name them with tasks")
    if not tasks and RECIPES[config.method.method].dense:
        config.method.spec()  # which says so
    heads = [task.name for task in tasks if task.loss == "mask_classification"]
    if heads and config.method.decoder == "none":
        raise ValueError(
            f"task {heads[0]}: with decoder none its semantic head does not train, and knows "
            "no classes: leave decoder out"
        )
    if tasks and (config.objects == "each" or config.classes):
        raise ValueError("dense tasks have no objects: leave out objects and classes")
    if not tasks and config.tasks_per_step is not None:
        raise ValueError("tasks_per_step draws dense tasks: name them with tasks")
    if config.tasks_per_step is not None and config.tasks_per_step > len(tasks):
        raise ValueError(
            f"tasks_per_step is {config.tasks_per_step}, and there are {len(tasks)} dense tasks: "
            "draw fewer, or leave it out to train all"
        )
    if tasks and (config.eval_prompt is not None or config.eval_box_outward):
        raise ValueError("dense tasks take no prompt: leave out eval_prompt and eval_box_outward")
    if tasks and config.metrics:
        raise ValueError("dense tasks have the metrics of their losses: leave out metrics")


def _check_metrics(config: Config) -> None:
    check_metrics(config.metrics)
    if "image_iou" in config.metrics and config.objects != "each":
        raise ValueError(
            "the metric image_iou is a mean over the objects of each image: set objects each, or "
            "take iou"
        )
    tasks = config.parsed_tasks()
    known = [f"{task.name}/{metric}" for task in tasks for metric in task.metrics]
    known = known or list(config.measured)
    if config.best_metric is None or config.best_metric in known:
        return
    if not tasks and config.best_metric in METRICS:
        raise ValueError(
            f"best_metric {config.best_metric} is not measured: add it to metrics, or take one of "
            f"{', '.join(known)}"
        )
    nearest = difflib.get_close_matches(config.best_metric, known, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"best_metric must be one of {', '.join(known)}, not {config.best_metric!r}; the "
        f"nearest is {nearest}"
    )


def _check_data(config: Config) -> None:
    """What training sees of images and prompts, and evaluation of prompts."""
    if config.cache_features == "on" and config.image_changes:
        raise ValueError(
            f"cache_features on needs images that no epoch changes, and "
            f"{config.image_changes[0]} changes them: turn that off, or leave cache_features out"
        )
    if config.objects == "each" and (config.prompts.none or config.evaluation_prompt == "none"):
        raise ValueError(
            "with objects each a prompt must tell which object is meant: set prompts.none to 0 "
            "and prompts.box or prompts.points to 1, and no eval_prompt none"
        )
    if config.eval_box_outward < 0:
        raise ValueError(f"eval_box_outward must not be negative, but is {config.eval_box_outward}")
    if config.eval_box_outward and config.evaluation_prompt != "box":
        raise ValueError(
            f"eval_box_outward moves boxes, and the evaluation's prompt is "
            f"{config.evaluation_prompt}: set eval_prompt box, or leave it out"
        )


def _check_batches(config: Config) -> None:
    if config.batch_size % config.accumulate:
        raise ValueError(
            f"accumulate {config.accumulate} does not divide batch_size {config.batch_size}"
        )
    if (
        any(stage.split for stage in config.parsed_stages())
        and (config.batch_size // config.accumulate) % 2
    ):
        raise ValueError(
            "a stage with split takes half of each batch from each half of the data: choose an "
            f"even number of images, not {config.batch_size // config.accumulate} at a time"
        )
