"""A whole run in a folder: evaluate, train, evaluate again, and leave what a user takes away.

config.json          the run's config
metrics.jsonl        one line every few steps
step_memory.json     what a step needs of memory, as its compiler counts it
checkpoints/         trained leaves and optimiser state, for --resume
eval_before.csv, eval_after.csv   the metrics of each test image
adapter.safetensors  every trained leaf
gallery.png          image, truth, before, after
report.md            what was trained, what it brought, and which images are worst
summary.json         what `samjax train --json` prints

A `.lock` file keeps other processes out while one works in the folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from samjax import peft as peft_lib
from samjax.allocator import release_freed_memory
from samjax.config import Config
from samjax.data.sources import Dataset
from samjax.evaluation.evaluate import Evaluation
from samjax.files import read_record, write_json, writing
from samjax.hashes import params_sha256
from samjax.hosts import any_process, is_first, on_first, on_host
from samjax.loading import load, load_adapted
from samjax.lock import run_lock
from samjax.models import MODELS, Sam
from samjax.models.flash import check_attention, computes
from samjax.peft.architecture import left_out
from samjax.problems import problem_of
from samjax.report import write_report
from samjax.run_folder import ADAPTER, check_folder, check_out, with_absolute_paths
from samjax.run_inputs import check_inputs, inputs_of, tell_other_images, trunk_of
from samjax.terminal import progress_bar, progress_on
from samjax.training.loop import STEP_MEMORY, check_stages, fit
from samjax.training.sharding import place
from samjax.training.trunk import Trunk, plan_trunk
from samjax.viz import save_png

BEFORE = "eval_before.csv"

_KINDS = {"train": "training", "validation": "validation", "test": "test"}


def open_data(config: Config, split: str, console: Console) -> Dataset:
    """One split of the run's data. Raises ValueError where it cannot be used."""
    return problem_of(config).open(split, progress_on(console))


def open_sources(config: Config, console: Console) -> dict[str, Dataset]:
    """The splits that a run of `config` needs. Raises ValueError where one cannot be used."""
    sources = {"train": open_data(config, "train", console)}
    if config.validate_every is not None:
        sources["validation"] = _open_validation(config, console)
    sources["test"] = open_data(config, config.test_split, console)
    for source in sources.values():
        source.check_sizes()
    return sources


def open_model(config: Config, adapter: Path | None = None) -> tuple[Sam, Any]:
    """The run's model and its variables, with an adapter in place where one is given.

    Raises FileNotFoundError, or ValueError where the weights are not what the run asks for.
    """
    if adapter is not None:
        model, params, peft = load_adapted(
            _weights(config), adapter, config.image_size, **_options(config)
        )
        return model.clone(remat=config.remat), {"params": params, "peft": peft}
    model, params = problem_of(config).build(*open_base(config))
    return model, {"params": params}


def open_base(config: Config) -> tuple[Sam, Any]:
    """SAM and its parameters, before the run's problem makes its model of them; raises as above."""
    model, params = load(_weights(config), config.image_size, **_options(config))
    return model.clone(remat=config.remat), params


def _weights(config: Config) -> str:
    if not config.weights:
        raise ValueError("no weights: pass --weights FILE, a SAM checkpoint")
    if config.model != "auto" and config.model not in MODELS:
        raise ValueError(f"unknown model {config.model!r}; known are auto, {', '.join(MODELS)}")
    return config.weights


def _options(config: Config) -> dict[str, Any]:
    check_attention(config.attention, config.dtype, jax.default_backend())
    model = None if config.model == "auto" else config.model
    return {"model": model, "attention": config.attention, "dtype": config.dtype}


def _evaluate_with_bar(
    config: Config, model: Sam, variables: Any, source: Dataset, console: Console, title: str
) -> Evaluation:
    with progress_bar(console) as bar:
        task = bar.add_task(title, total=len(source), note="compiling")

        def advance(count: int) -> None:
            bar.update(task, advance=count, note="")

        found = problem_of(config).evaluate(model, variables, source, advance)
    release_freed_memory()
    return found


def evaluate_run(
    run: Path, config: Config, split: str, console: Console, adapter: Path | None = None
) -> Evaluation:
    """Evaluates a finished run's model on one split of its data; see `finished_run_config`.

    `adapter` is another than the run's own, such as one derived from it.
    """
    return _evaluate(config, split, console, run, adapter or run / ADAPTER)


def evaluate_weights(config: Config, split: str, console: Console) -> Evaluation:
    """Evaluates a run's weights as they are, without training, on one split of its data."""
    return _evaluate(config, split, console, None, None)


def _for_this_machine(config: Config) -> Config:
    """The config of a run that was trained on other devices, for an evaluation on these."""
    fsdp = config.fsdp if jax.device_count() % config.fsdp == 0 else 1
    here = computes(config.attention, config.dtype, jax.default_backend())
    attention = config.attention if here else "chunked"
    return dataclasses.replace(config, fsdp=fsdp, attention=attention)


def _evaluate(
    config: Config, split: str, console: Console, run: Path | None, adapter: Path | None
) -> Evaluation:
    if run is not None:
        config = _for_this_machine(config)
    # Devices are chosen by the training batch, which is of no interest here: one for all of them.
    config = dataclasses.replace(config, batch_size=config.batch_size * jax.device_count())
    config.num_devices()
    source = open_data(config, split, console)
    source.check_sizes()
    if run is not None:

        def open_train() -> Dataset:
            return open_data(config, "train", console)

        tell_other_images(run, config.data, split, source, open_train, console)
    model, variables = open_model(config, adapter)
    variables = peft_lib.as_computed(variables, model.dtype)
    return _evaluate_with_bar(config, model, variables, source, console, f"evaluating {split}")


def train(
    config: Config, out: Path, *, resume: bool, console: Console, before_in: Path | None = None
) -> dict[str, Any]:
    """Runs `config` in the folder `out` and returns the summary.

    `before_in` is the folder of a run that differs in its method or optimiser alone and has been
    evaluated before training, which is then not done again.

    Of several processes all make this call; the first one writes, and all return the summary. What
    can be checked is checked before anything is written. Raises FileExistsError for a folder
    in use without `resume`, ValueError for a config that cannot be, RuntimeError where another
    process trains in `out`, OSError where `out` cannot be written, and
    `samjax.terminal.Interrupted` when the user stops the run: its state is saved.
    """
    config = with_absolute_paths(config)
    devices = config.num_devices()
    if devices < jax.device_count():
        console.print(
            f"{devices} of the {jax.device_count()} devices train: no more of them share "
            f"batch_size {config.batch_size} in equal parts"
        )
    on_first(lambda: check_out(config, out, resume))

    def finished() -> dict[str, Any] | None:
        if not resume or not (out / "summary.json").is_file():
            return None
        return read_record(out / "summary.json", "delete it, and --resume writes it anew")

    if (summary := on_first(finished)) is not None:
        console.print(f"{out} is finished already")
        return summary
    spec, problem = config.spec(), problem_of(config)
    sources = open_sources(config, console)
    sam, params = open_base(config)
    base_sha256 = params_sha256(params)
    model, params = problem.build(sam, params)
    report = peft_lib.report(spec, model)
    check_stages(config, model, spec, len(sources["train"]))
    if notice := left_out(spec, model):
        console.print(notice)
    console.print(f"{model.config.name} at {model.config.frame} px, {config.weights}")
    console.print(str(report))
    *counts, last = (f"{len(source)} {_KINDS[name]}" for name, source in sources.items())
    console.print(f"{', '.join(counts)} and {last} images, {config.data}")
    known = on_first(lambda: trunk_of(out)) if resume else None
    trunk = plan_trunk(config, model, spec, params, sources["train"], console, known)
    if any_process(trunk is None):  # such as one whose disk is full
        trunk = None
    inputs = inputs_of(sources, base_sha256, trunk.point if trunk else "")
    on_first(lambda: check_inputs(out, inputs, config))
    known_before = None
    if before_in is not None:
        check_inputs(before_in, inputs, config)
        known_before = Evaluation.read_csv(before_in / BEFORE)
        if known_before.mean.keys() != problem.titles.keys():  # an older samjax measured less
            known_before = None
    base = place(peft_lib.start(spec, model, params, jax.random.key(config.seed)), config.mesh())

    def begin(stack: contextlib.ExitStack) -> None:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        stack.enter_context(run_lock(out))
        check_folder(config, out, resume)  # another run may have come and gone since
        write_json(out / "config.json", config.to_json())  # first: it makes this a run folder
        write_json(out / "inputs.json", inputs)

    with contextlib.ExitStack() as stack:
        on_first(lambda: begin(stack))
        if trunk is not None:
            # With the host's weights: each process does this by itself.
            trunk.compute(model, params, sources["train"], config.eval_batch_size, console)
        summary = _train(
            config, out, spec, model, base, base_sha256, sources, console, known_before, trunk
        )
        summary |= {
            "trainable": report.trainable,
            "beside_decoder": report.trainable - report.decoder,
            "input_size": list(model.config.frame.shape),
            "device": jax.devices()[0].device_kind,
            "date": datetime.date.today().isoformat(),
        }

        def finish() -> None:
            counts = {name: len(source) for name, source in sources.items()}
            write_report(out, config, summary, counts, problem.titles, problem.conditions)
            write_json(out / "summary.json", summary)  # last: it makes this a finished run

        on_first(finish)
        return summary


def _train(
    config: Config,
    out: Path,
    spec: peft_lib.PeftSpec,
    model: Sam,
    base: Any,
    base_sha256: str,
    sources: dict[str, Dataset],
    console: Console,
    known_before: Evaluation | None,
    trunk: Trunk | None,
) -> dict[str, Any]:
    """The run itself, in a folder that is this process's; no part that is done is repeated."""

    problem = problem_of(config)

    def evaluation(variables: Any, when: str, known: Evaluation | None = None) -> dict[str, float]:
        """Means of the test split: evaluated, or read, where an interrupted run has done so."""
        path, test = out / f"eval_{when}.csv", sources["test"]
        if not on_first(path.is_file):
            title = f"evaluating {when}"
            new = known or _evaluate_with_bar(config, model, variables, test, console, title)
            on_first(lambda: new.write_csv(path))

        def read() -> dict[str, float]:
            try:
                result = Evaluation.read_csv(path)
                if result.names != test.names:
                    raise ValueError
                return result.mean
            except ValueError:
                raise ValueError(
                    f"{path} is damaged: delete it, and --resume evaluates again"
                ) from None

        means = on_first(read)
        console.print(
            f"{config.test_split} {when} ({problem.conditions}): "
            + ", ".join(f"{k} {v:.4f}" for k, v in means.items())
        )
        return means

    def validate(variables: Any) -> dict[str, float]:
        return problem.evaluate(model, variables, sources["validation"], briefly=True).mean

    before = evaluation(base, "before", known_before)
    fitted = fit(
        config,
        model,
        spec,
        base,
        sources["train"],
        out,
        console,
        validate if "validation" in sources else None,
        trunk,
    )
    after = evaluation(fitted.variables, "after")

    metadata = {
        "method": config.method.method,
        **problem.metadata,
        "steps": fitted.kept_step,
    }
    # What the file holds; frozen leaves stay where they are.
    trained = peft_lib.trainable(spec, model, fitted.variables)
    variables = jax.tree.map(
        lambda leaf, trains: on_host(leaf) if trains else leaf, fitted.variables, trained
    )

    def save() -> dict[str, int]:
        adapter = peft_lib.save(out / ADAPTER, spec, model, variables, base_sha256, metadata)
        return {
            "adapter_bytes": adapter.adapter_bytes,
            "model_bytes": adapter.model_bytes,
            "file_bytes": (out / ADAPTER).stat().st_size,
        }

    sizes = on_first(save)
    picture = out / "gallery.png"
    versions = {"before": base, "after": fitted.variables}
    drawn = problem.draw(model, versions, sources["test"])
    on_first(lambda: save_png(drawn, picture))
    summary = {
        "before": before,
        "after": after,
        "adapter": str(out / ADAPTER),
        **sizes,
        "gallery": str(picture),
        "steps": fitted.steps,
        "kept_step": fitted.kept_step,
        "seconds_per_step": fitted.seconds_per_step,
    }
    if is_first() and (out / STEP_MEMORY).is_file():  # runs of older versions have none
        memory = read_record(out / STEP_MEMORY, "delete it")
        summary |= {"step_bytes": memory["bytes"], "step_bytes_from": memory["origin"]}
    if fitted.best is not None:
        summary["best_validation"] = {"step": fitted.best.step, **fitted.best.metrics}
    return summary


def _open_validation(config: Config, console: Console) -> Dataset:
    try:
        return open_data(config, "validation", console)
    except ValueError as error:
        raise ValueError(f"{error}; validate_every needs this split, or leave it out") from None
