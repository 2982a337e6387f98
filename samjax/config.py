"""One frozen dataclass that describes a whole run; an experiment file returns one.

An experiment is a Python file with `config() -> Config`. Its docstring tells what it reproduces.
It may also have `prepare(config, console)`, which fetches what the run needs. A file that is a
table of a paper has `table()` (`samjax.tables.table`), with or without `config`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from jax.sharding import Mesh
from rich.console import Console

from samjax.config_checks import check
from samjax.data.augment import AugmentConfig
from samjax.data.dense_augment import DenseAugmentConfig
from samjax.data.prompts import PromptConfig
from samjax.evaluation.metrics import DEFAULT, METRICS
from samjax.files import read_record
from samjax.models.attention import AttentionKind
from samjax.peft.method_config import MethodConfig
from samjax.peft.spec import PeftSpec, Rule, Train
from samjax.tasks import Task
from samjax.tasks import parse as parse_tasks
from samjax.training.losses import LossConfig
from samjax.training.sharding import check_batch, check_fsdp, make_mesh
from samjax.training.stages import Stage
from samjax.training.stages import parse as parse_stage
from samjax.training.step import OptimizerConfig

_FLAT = tyro.conf.arg(name="")


@dataclasses.dataclass(frozen=True)
class Config:
    """A fine-tuning run: model, data, method, optimisation, evaluation."""

    # A samjax checkpoint, a .pth or .safetensors file, or a name that `samjax weights list` shows.
    weights: str = ""
    # A folder of images and masks or label images, a COCO dataset (its folder or its JSON), or
    # tfds:NAME, which `samjax data prepare NAME` built; see `samjax.data.folder` and
    # `samjax.data.coco` for the layouts.
    data: str = ""
    # Whether all that is marked in an image is one mask, or each object (COCO's annotations, the
    # values of label images) is a sample of its own, whose prompt is drawn from that object.
    objects: Literal["together", "each"] = "together"
    # What counts as an object: categories by name, also those of tfds:NAME, or values in label
    # images; left out, all.
    classes: tuple[str, ...] = ()
    # What the weights are, such as vit_b or vit_t; "auto" tells it from them, which is an error
    # where models differ in their preprocessing alone, as vit_b and medsam do.
    model: str = "auto"
    # The model's input in pixels: a side, or height and width; left out, the model's own.
    image_size: int | tuple[int, int] | None = None
    # Shares of train, validation and test, where the data folder has no splits of its own.
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    # What draws these shares; `seed` does not, so that runs of several seeds have one test split.
    split_seed: int = 0
    # What a run is measured on before and after training; validation for benchmarks that are.
    test_split: Literal["test", "validation"] = "test"
    # Dense tasks instead of masks, predicted for each pixel: nyuv2, cityscapes or pascal_context,
    # or tasks NAME:CHANNELS:LOSS or NAME:CHANNELS:LOSS:WEIGHT, such as depth:1:masked_l1; losses
    # are cross_entropy, mask_classification (a semantic head: segmentation:12:mask_classification),
    # balanced_bce, masked_l1 and cosine. See `samjax.data.dense` for the data.
    tasks: tuple[str, ...] = ()
    # Weights of the tasks' losses: their own, or learnt (Kendall et al. 2018).
    task_weighting: Literal["fixed", "uncertainty"] = "fixed"
    # Tasks that are trained in a step, drawn anew for each, all equally often; left out, all.
    tasks_per_step: int | None = None
    method: Annotated[MethodConfig, _FLAT] = MethodConfig()
    optimizer: Annotated[OptimizerConfig, _FLAT] = OptimizerConfig()
    # Stages of training, each SHARE:GROUPS (of weights, arch, decoder, or all), such as
    # 0.3:weights+decoder, with :split where architecture and weights see a half of the data each;
    # left out, those of the method; 1:all is one in which everything trains.
    stages: tuple[str, ...] | None = None
    # What training minimises; the kinds are in `samjax.training.losses`.
    loss: LossConfig = LossConfig()
    # The mixture of prompts in training: weights of no prompt, a jittered box, points.
    prompts: PromptConfig = PromptConfig()
    # Random changes of images and masks in training.
    augment: AugmentConfig = AugmentConfig()
    # Random changes of images with dense tasks in training.
    dense_augment: DenseAugmentConfig = DenseAugmentConfig()
    # The prompt in evaluation: none, or the truth's box, or its most central point; left out, the
    # kind that weighs most in training.
    eval_prompt: Literal["none", "box", "point"] | None = None
    # Each edge of an evaluation's box moves outward by a whole number of pixels of the model's
    # input from 0 to this, which split_seed and the sample's name alone draw: all runs with one
    # input size have the same boxes.
    eval_box_outward: int = 0
    # What an evaluation measures of masks, by the names in docs/metrics.md; left out, dice, iou,
    # s_measure, mean_e_measure, weighted_f_measure and mae. Dense tasks have the metrics of their
    # losses.
    metrics: tuple[str, ...] = ()
    # Passes over the training split; `steps` takes precedence where it is given.
    epochs: float = 10.0
    # Optimiser steps in all.
    steps: int | None = None
    # Images a step, of all devices together, which share them in equal parts.
    batch_size: int = 4
    # Parts that a batch is cut into to save memory; must divide batch_size.
    accumulate: int = 1
    # Images a step of evaluation; at least one on each device.
    eval_batch_size: int = 4
    # Devices that share one copy of the large weights, and of what the optimiser keeps of those
    # that train; must divide the devices. With 1 each has all of them, which is faster.
    fsdp: int = 1
    # Seed of shuffling, augmentation, prompts, adapter initialisation and dropout.
    seed: int = 0
    # Compute dtype; parameters, softmax, norms and losses are float32 in either.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # Attention of the ViT's global blocks; chunked never holds all scores, and neither do the
    # kernels: cudnn (GPUs, in bfloat16; from Hopper on) and splash (TPUs). Maps that a kernel does
    # not take are chunked.
    attention: AttentionKind = "chunked"
    # What the backward pass computes again instead of keeping: nothing, or the inside of each block
    # of the encoder.
    remat: Literal["none", "blocks"] = "none"
    # Whether what the encoder makes of each image before anything trains or is adapted is computed
    # once and kept on disk (`samjax.data.features` says where). auto: where no augmentation changes
    # images, that is half of the encoder or more, each image is seen twice, and the disk has room.
    cache_features: Literal["auto", "on", "off"] = "auto"
    # Steps between two lines of metrics.jsonl.
    log_every: int = 10
    # Steps between two checkpoints.
    checkpoint_every: int = 100
    # Steps between two evaluations on the validation split; left out, there are none.
    validate_every: int | None = None
    # What validations compare: one of the metrics; of dense tasks TASK/METRIC, such as
    # depth/absolute_error. Left out, the first of the metrics, or of the first task's.
    best_metric: str | None = None
    # The state that becomes the adapter: the last one, or the one of the best validation.
    keep: Literal["last", "best"] = "last"
    # Validations in a row without a new best after which the run ends early; left out, it does not.
    patience: int | None = None
    # Test images in the gallery.
    gallery: int = 6

    def __post_init__(self) -> None:
        check(self)

    def parsed_tasks(self) -> tuple[Task, ...]:
        """The dense tasks; () where the run learns masks."""
        return parse_tasks(self.tasks)

    def spec(self) -> PeftSpec:
        """What adapts and what trains."""
        spec = self.method.spec(len(self.parsed_tasks()))
        if self.task_weighting == "fixed":
            return spec
        return PeftSpec((*spec.rules, Rule("log_variance/*", Train(group="decoder"))))

    @property
    def measured(self) -> tuple[str, ...]:
        """What an evaluation measures of masks."""
        return tuple(dict.fromkeys(self.metrics)) or DEFAULT

    @property
    def best(self) -> tuple[str, bool]:
        """The metric that validations compare, and whether more of it is better."""
        tasks = {task.name: task for task in self.parsed_tasks()}
        if not tasks:
            name = self.best_metric or self.measured[0]
            return name, METRICS[name].more
        first = next(iter(tasks.values()))
        name = self.best_metric or f"{first.name}/{next(iter(first.metrics))}"
        task, _, metric = name.partition("/")
        return name, tasks[task].metrics[metric]

    @property
    def image_changes(self) -> tuple[str, ...]:
        """The settings of augmentation by which training changes images."""
        name, augment = "augment", self.augment
        if self.tasks:
            name, augment = "dense_augment", self.dense_augment
        return tuple(f"{name}.{setting}" for setting in augment.changing)

    def num_steps(self, num_images: int) -> int:
        """Optimiser steps for a training split of `num_images`."""
        if self.steps is not None:
            return self.steps
        return max(1, round(self.epochs * num_images / self.batch_size))

    @property
    def images_at_a_time(self) -> int:
        """Of a batch, what goes through the model at once."""
        split = any(stage.split for stage in self.parsed_stages())
        return self.batch_size // self.accumulate // (2 if split else 1)

    def check_devices(self, devices: int) -> None:
        """Raises ValueError where so many devices cannot share this run's batches and weights."""
        check_fsdp(self.fsdp, devices)
        what = f"batch_size {self.batch_size}"
        if self.accumulate > 1:
            what += f" with accumulate {self.accumulate}"
        if any(stage.split for stage in self.parsed_stages()):
            what = f"{what} in two halves"
        check_batch(self.images_at_a_time, what, devices)

    def num_devices(self) -> int:
        """How many of the devices here the run takes: the most that share its batches evenly.

        Of several processes, all: raises ValueError where these cannot, or where `fsdp` devices
        cannot.
        """
        have = jax.device_count()
        if jax.process_count() > 1:
            self.check_devices(have)
            return have
        check_fsdp(self.fsdp, have)
        self.check_devices(self.fsdp)
        counts = range(self.fsdp, have + 1, self.fsdp)
        return max(count for count in counts if self.images_at_a_time % count == 0)

    def mesh(self) -> Mesh:
        """The devices that the run takes."""
        return make_mesh(self.fsdp, jax.devices()[: self.num_devices()])

    def parsed_stages(self) -> tuple[Stage, ...]:
        """The stages of the run; () where everything trains all the time."""
        texts = self.method.stages if self.stages is None else self.stages
        return tuple(parse_stage(text) for text in texts)

    @property
    def evaluation_prompt(self) -> Literal["none", "box", "point"]:
        """The kind of prompt that the run is evaluated with."""
        if self.eval_prompt is not None:
            return self.eval_prompt
        weights = {
            "none": self.prompts.none,
            "box": self.prompts.box,
            "point": self.prompts.points,
        }
        return max(weights, key=weights.__getitem__)

    @property
    def learning_rate(self) -> float:
        """Peak learning rate of what the method trains; of method decoder, that of the decoder."""
        if self.method.method == "decoder":
            return self.optimizer.decoder_learning_rate
        return self.optimizer.learning_rate or self.method.learning_rate

    def resolved(self) -> dict[str, Any]:
        """`to_json` with the method's own values where its settings are left out."""
        data = self.to_json()
        data["method"] = self.method.resolved()
        data["optimizer"]["learning_rate"] = self.learning_rate
        data["metrics"] = () if self.tasks else self.measured
        data["best_metric"] = self.best[0]
        data["stages"] = self.method.stages if self.stages is None else self.stages
        return data

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; `from_json` is its inverse."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Config:
        """Rebuilds a config, one of an older samjax too. Raises ValueError for what is none."""
        try:
            return _rebuild(Config, _of_this_version(data))
        except TypeError as error:
            raise ValueError(f"not a config of this samjax: {error}") from None


def _of_this_version(data: Any) -> Any:
    """The settings in an older samjax's config.json, by what they are called and mean now."""
    if not isinstance(data, dict):
        return data
    # Before there was split_seed, seed drew the splits, too.
    data = {"split_seed": data.get("seed", 0), **data}
    method, optimizer = data.get("method"), data.get("optimizer")
    if isinstance(method, dict) and ("segments" in method or "train_decoder" in method):
        method = dict(method)
        segments = method.pop("segments", "qv")
        method["decoder"] = "all" if method.pop("train_decoder", True) else "none"
        if method.get("method") == "decoder":  # LoRA's defaults stood there as well
            method = {name: method[name] for name in ("method", "decoder")}
        else:
            method["targets"] = tuple(dict.fromkeys(segments))
        data["method"] = method
    # Left out, the decoder's learning rate was that of the method.
    if isinstance(optimizer, dict) and optimizer.get("decoder_learning_rate", 0) is None:
        rate = optimizer.get("learning_rate")
        if rate is None:
            rate = _rebuild(MethodConfig, data.get("method", {}), "method.").learning_rate
        data["optimizer"] = {**optimizer, "decoder_learning_rate": rate}
    return data


def _rebuild(cls: type, data: Any, inside: str = "") -> Any:
    """A dataclass from its `asdict`. Raises ValueError for a field that it has not."""
    if not isinstance(data, dict):
        raise ValueError(f"{inside.rstrip('.') or 'a config'} must hold settings by name")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for name, value in data.items():
        if name not in fields:
            nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown setting {inside}{name}; the nearest is {inside}{nearest}")
        default = fields[name].default
        if dataclasses.is_dataclass(default):
            value = _rebuild(type(default), value, f"{inside}{name}.")
        # JSON has no tuples.
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment file: its docstring, its config, and what it does before a run."""

    doc: str
    config: Config
    prepare: Callable[[Config, Console], None]


def load_experiment(path: str | Path) -> Experiment:
    """Runs an experiment file.

    Raises FileNotFoundError, or ValueError for one that fails or does not define `config`.
    """
    path = Path(path)
    module = run_file(path)
    with failures_of(path):
        config = module.config() if hasattr(module, "config") else None
    if not isinstance(config, Config):
        of_table = f"; it is a table: samjax table {path}" if hasattr(module, "table") else ""
        raise ValueError(f"{path} defines no function config() -> samjax.config.Config{of_table}")

    def prepare(config: Config, console: Console) -> None:
        if hasattr(module, "prepare"):
            with failures_of(path):
                module.prepare(config, console)

    return Experiment((module.__doc__ or "").strip(), config, prepare)


def run_file(path: Path) -> types.ModuleType:
    """Runs a Python file, which may import what lies beside it, as if Python were given it.

    Raises FileNotFoundError, or ValueError for one that fails or is no Python file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no experiment file at {path}")
    spec = importlib.util.spec_from_file_location(f"samjax_experiment_{path.stem}", path)
    if path.suffix != ".py" or spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file; an experiment defines config() -> Config")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    folder = str(path.absolute().parent)
    sys.path.insert(0, folder)
    try:
        with failures_of(path):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


@contextlib.contextmanager
def failures_of(path: Path) -> Iterator[None]:
    """An experiment is a user's program: whatever it raises is a ValueError that names its file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} fails with {type(error).__name__}: {error}") from error


def read_run_config(run: Path) -> Config:
    """The config of a run folder. Raises ValueError where it is none."""
    file = run / "config.json"
    if not file.is_file():
        raise ValueError(f"{run} is no run folder: it has no config.json")
    record = read_record(file, "put a copy of it there, or start a run in another folder")
    try:
        return Config.from_json(record)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
