"""Adapter files: every trained leaf, in one safetensors file that knows its base.

The header holds a JSON record: schema, method, spec, model, hash of the base weights, hash of the
tensors, what the adapter was trained on, and a hash of all this. Nothing in the file is ever
executed.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from samjax.files import write_beside
from samjax.hashes import is_sealed, params_sha256, sealed
from samjax.models.configs import SamConfig, is_of_before
from samjax.models.msam import MSam, msam_params
from samjax.models.sam import Sam
from samjax.peft.delta import DERIVED
from samjax.peft.report import report
from samjax.peft.resolve import resolve
from samjax.peft.spec import PeftSpec
from samjax.peft.trees import attach, check_sites, deltas, groups, partition, trainable
from samjax.tasks import Task, parse
from weights_convert.errors import shown

SCHEMA = 1
_KEY = "samjax"
# Of the numbers that tell whether arrays derived from the base are those of training.
_FINGERPRINT_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What an adapter file holds."""

    spec: PeftSpec
    # The model it was trained in, at the input size it was trained at.
    config: SamConfig
    base_sha256: str
    # Flat: "params/..." for leaves of the model, "peft/..." for those of records.
    tensors: dict[str, np.ndarray]
    # What else the file says: method, training prompts, ...
    metadata: dict[str, Any]
    # Of the model, where it is one of dense tasks.
    tasks: tuple[Task, ...] = ()
    # By site: `Delta.fingerprint` of records with arrays that are not in the file.
    fingerprints: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    @property
    def model(self) -> Sam:
        """The model that it was trained in."""
        return MSam(self.config, tasks=self.tasks) if self.tasks else Sam(self.config)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the records."""
        return sum(v.nbytes for k, v in self.tensors.items() if k.startswith("peft/"))

    @property
    def model_bytes(self) -> int:
        """Bytes of the model's own leaves, such as a trained mask decoder."""
        return sum(v.nbytes for k, v in self.tensors.items() if k.startswith("params/"))


def save(
    path: str | Path,
    spec: PeftSpec,
    model: Sam,
    variables: Any,
    base_sha256: str,
    metadata: dict[str, Any] | None = None,
) -> Adapter:
    """Writes every trained leaf of `variables` ({"params", "peft"}) and all of its records.

    What a record derives from the base, such as singular vectors, is left out.
    `base_sha256` is `samjax.hashes.params_sha256` of the params before training. Raises
    FileNotFoundError where the folder does not exist, ValueError for numbers that are not finite
    and for records that are not those of `spec`, such as several that were composed.
    An existing file is replaced, atomically.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
    _check_spec(path, spec, model, variables)
    trained, _ = partition(variables["params"], trainable(spec, model, variables)["params"])
    tensors = {f"params/{k}": v for k, v in _flatten(trained).items()}
    kinds = _flatten(groups(spec, model, variables)["peft"])
    tensors |= {
        f"peft/{k}": v for k, v in _flatten(variables["peft"]).items() if kinds[k] != DERIVED
    }
    # Not np.ascontiguousarray, which makes a number an array of one.
    tensors = {k: np.asarray(v, order="C") for k, v in tensors.items()}
    for key, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"{key} is not finite: {path} is not written; lower the learning rate")
    record = {
        "schema": SCHEMA,
        "spec": spec.to_json(),
        "model": model.config.to_json(),
        "base_sha256": base_sha256,
        "tensors_sha256": params_sha256(tensors),
        "metadata": metadata or {},
    }
    tasks = model.tasks if isinstance(model, MSam) else ()
    if tasks:
        record["tasks"] = [str(task) for task in tasks]
    if marks := _fingerprints(variables["peft"]):
        record["fingerprints"] = marks
    with write_beside(path) as temporary:
        save_file(tensors, temporary, {_KEY: json.dumps(sealed(record), sort_keys=True)})
    return Adapter(spec, model.config, base_sha256, tensors, metadata or {}, tasks, marks)


def _check_spec(path: Path, spec: PeftSpec, model: Sam, variables: Any) -> None:
    """Raises ValueError for records that `load` could not put together again from the spec."""
    have = variables["peft"]
    want = jax.eval_shape(lambda p: attach(spec, model, p, jax.random.key(0)), variables["params"])
    old, new = _flatten(want), _flatten(have)
    misfit = ""
    for key in sorted(old.keys() | new.keys()):
        if key not in new or key not in old:
            misfit = f"{key} is " + ("missing" if key in old else "not in its spec")
        elif (new[key].shape, new[key].dtype) != (old[key].shape, old[key].dtype):
            shapes = (f"{leaf.dtype}{list(leaf.shape)}" for leaf in (new[key], old[key]))
            misfit = "{} is {}, and {} by its spec".format(key, *shapes)
        if misfit:
            break
    else:
        # Types of records, and what in them is no array.
        ours, theirs = deltas(want), deltas(have)
        others = (p for p in ours if jax.tree.structure(ours[p]) != jax.tree.structure(theirs[p]))
        if jax.tree.structure(want) != jax.tree.structure(have):
            misfit = f"{next(others, 'a record')} has other settings than in its spec"
    if misfit:
        raise ValueError(
            f"{path} is not written, since the adapter is not what its spec makes: {misfit}; merge "
            "it into the weights, or train it with such a spec (several methods at a site are a "
            "Stack)"
        )


def read(path: str | Path) -> Adapter:
    """Reads an adapter file without a model.

    Raises FileNotFoundError, or ValueError with one sentence for a file that is no adapter, is
    damaged, or was written by a newer samjax.
    """
    path = Path(path)
    if (path / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{path} is a folder of HuggingFace's peft; make an adapter file of it with `samjax "
            "convert-adapter`"
        )
    if path.is_dir():
        raise FileNotFoundError(
            f"{path} is a folder; give the adapter file, such as adapter.safetensors in it"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    try:
        with safe_open(path, "numpy") as file:
            record = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no adapter file: {shown(error, 200)}") from None
    if not isinstance(record, dict) or "schema" not in record:
        raise ValueError(
            f"{path} is no samjax adapter (it lacks the 'samjax' header); adapters are written by "
            "`samjax train`, those of peft and SAMed become one by `samjax convert-adapter`, and "
            "weights are passed with --weights"
        )
    if record["schema"] != SCHEMA:
        raise ValueError(
            f"{path} has adapter schema {shown(record['schema'])}, and this samjax reads {SCHEMA}; "
            "install a newer samjax"
        )
    # Earlier versions of samjax wrote no such hash.
    if "sha256" in record and not is_sealed(record):
        raise ValueError(
            f"{path} is damaged: its header differs from the hash in it; copy it again"
        )
    try:
        adapter = Adapter(
            PeftSpec.from_json(record["spec"]),
            SamConfig.from_json(record["model"]),
            str(record["base_sha256"]),
            tensors,
            dict(record["metadata"]),
            parse([str(task) for task in record.get("tasks", ())]),
            {str(k): [float(x) for x in v] for k, v in record.get("fingerprints", {}).items()},
        )
        recorded = record["tensors_sha256"]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"the header of {path} cannot be read: {shown(error, 200)}") from None
    if params_sha256(tensors) != recorded:
        raise ValueError(
            f"{path} is damaged: its tensors differ from the hash in its header; copy it again"
        )
    return adapter


def apply(adapter: Adapter, model: Sam, params: Any, name: str = "the adapter") -> tuple[Any, Any]:
    """`(params, peft)` of the trained model: the base with the adapter's leaves in place.

    `params` are SAM's, for a model of dense tasks too. Raises ValueError where the adapter belongs
    to another architecture, to a model with another preprocessing, or to other weights.
    """
    _check_model(adapter.config, model.config, name)
    base = params_sha256(params)
    if base != adapter.base_sha256:
        raise ValueError(
            f"{name} was trained on other weights (sha256 {adapter.base_sha256[:12]}…, these are "
            f"{base[:12]}…); pass the weights that it was trained on, before any merge"
        )
    if isinstance(model, MSam):
        params = msam_params(params, model)
    try:
        shapes = jax.eval_shape(lambda p: attach(adapter.spec, model, p, jax.random.key(0)), params)
        mask = trainable(adapter.spec, model, {"params": params, "peft": shapes})["params"]
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{name} does not fit {model.config.name}: {shown(error, 200)}; train it again"
        ) from None
    flat_params = {"/".join(k): v for k, v in flatten_dict(params).items()}
    trained = {"/".join(k) for k, v in flatten_dict(mask).items() if v}
    expected = {f"params/{k}": flat_params[k] for k in trained}
    kinds = _flatten(groups(adapter.spec, model, {"params": params, "peft": shapes})["peft"])
    derived = {k for k, kind in kinds.items() if kind == DERIVED}
    expected |= {f"peft/{k}": v for k, v in _flatten(shapes).items() if k not in derived}
    for key in sorted(expected.keys() | adapter.tensors.keys()):
        have, want = adapter.tensors.get(key), expected.get(key)
        if have is None or want is None:
            state = "lacks" if have is None else "has a tensor that its spec does not name,"
            raise ValueError(f"{name} {state} {key}; it cannot be used")
        if have.shape != want.shape or have.dtype != want.dtype:
            raise ValueError(
                f"{name}: {key} is {have.dtype}{list(have.shape)}, expected "
                f"{want.dtype}{list(want.shape)}"
            )
    flat_params |= {k: adapter.tensors[f"params/{k}"] for k in trained}
    new_params = unflatten_dict({tuple(k.split("/")): v for k, v in flat_params.items()})
    fresh = attach(adapter.spec, model, params, jax.random.key(0)) if derived else shapes
    leaves = [
        leaf if k in derived else adapter.tensors[f"peft/{k}"]
        for k, leaf in _flatten(fresh).items()
    ]
    peft = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    check_sites(model, new_params, peft)
    _check_fingerprints(adapter, peft, name)
    return new_params, peft


def records(adapter: Adapter) -> Any:
    """The `peft` tree of an adapter file, without the weights; what it derives from them is shapes.

    Raises ValueError where the file lacks an array.
    """
    model = adapter.model
    params = model.init_params_shapes()
    shapes = jax.eval_shape(lambda p: attach(adapter.spec, model, p, jax.random.key(0)), params)
    kinds = _flatten(groups(adapter.spec, model, {"params": params, "peft": shapes})["peft"])
    leaves = []
    for key, shape in _flatten(shapes).items():
        leaf = shape if kinds[key] == DERIVED else adapter.tensors.get(f"peft/{key}")
        if leaf is None or leaf.shape != shape.shape:
            raise ValueError(f"the adapter has no peft/{key} of its spec; it cannot be used")
        leaves.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _fingerprints(peft: Any) -> dict[str, list[float]]:
    marks = {path: delta.fingerprint() for path, delta in deltas(peft).items()}
    return {path: [float(x) for x in mark] for path, mark in marks.items() if len(mark)}


def _check_fingerprints(adapter: Adapter, peft: Any, name: str) -> None:
    for path, mark in _fingerprints(peft).items():
        told = np.array(adapter.fingerprints.get(path, []))
        # "Not close", since NaN is neither above nor below.
        close = told.shape == (len(mark),) and np.abs(told - mark).max() <= _FINGERPRINT_TOLERANCE
        if not close:
            raise ValueError(
                f"{name}: what this machine derives from the weights for {path} is not what the "
                "adapter was trained with; merge it where it was trained, and use the result"
            )


def _check_model(theirs: SamConfig, ours: SamConfig, name: str) -> None:
    """Any input size will do, but nothing else may differ."""
    if theirs.architecture != ours.architecture:
        raise ValueError(
            f"{name} was trained in {shown(theirs.name)}, and these weights are {ours.name}, which "
            "is built differently; pass the weights that it was trained on"
        )
    if dataclasses.replace(theirs, image_size=0) == dataclasses.replace(ours, image_size=0):
        return
    if theirs.name != ours.name:
        raise ValueError(
            f"{name} was trained in {shown(theirs.name)}, and these weights are {ours.name}, which "
            "has the same layers but another preprocessing; pass the weights that it was trained "
            f"on, or if they are these, convert them with --model {shown(theirs.name)}"
        )
    if is_of_before(ours):
        raise ValueError(
            f"{name} does not fit these weights, which an earlier samjax converted: its "
            f"preprocessing for {ours.name} was another; convert the original weights again"
        )
    raise ValueError(
        f"{name} was trained with an earlier samjax, whose preprocessing for {ours.name} was "
        "another; train it again"
    )


def describe(adapter: Adapter, model: Sam) -> str:
    """What an adapter does to a model, in one line: method, size, and what it was trained on."""
    counts = report(adapter.spec, model)
    sites = len(resolve(adapter.spec, model).sites)
    prompts = adapter.metadata.get("trained_prompts")
    kinds = {"none": "no prompt", "box": "boxes", "points": "points"}
    drawn = [kinds[k] for k in kinds if isinstance(prompts, dict) and prompts.get(k)]
    if adapter.tasks:
        drawn = [", ".join(task.name for task in adapter.tasks)]
    return (
        f"{shown(adapter.metadata.get('method', 'adapter'))} at {sites} sites, "
        f"{counts.trainable:,} trained numbers, for {shown(adapter.config.name)}, trained at "
        f"{adapter.config.frame} px" + (f" with {' and '.join(drawn)}" if drawn else "")
    )


def load(path: str | Path, model: Sam, params: Any) -> tuple[Any, Any]:
    """`read`, then `apply`: `(params, peft)` of the trained model."""
    return apply(read(path), model, params, str(path))


def _flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path, in the order of `jax.tree.leaves`; fields of records are path components."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
