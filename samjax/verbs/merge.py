"""`samjax merge`."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from tyro.conf import Positional

from samjax.arguments import Outcome, parse
from samjax.tasks import ALL, Task, find


@dataclasses.dataclass(frozen=True)
class Merge:
    """Folds an adapter into the weights that it was trained on.

    Of an adapter of dense tasks, --task NAME chooses one. A task of one channel, such as depth,
    becomes weights of SAM whose single mask without a prompt is the task's map. Of one of several
    channels the image encoder goes into the weights, beside SAM's own decoder, and the task's rows
    and decoder into --rest, an adapter for them. --task all does so for each task: DST is a folder
    of what --task NAME writes, by the tasks' names, and so is --rest.

    Example: samjax merge --weights mobile_sam.pt --adapter adapter.safetensors merged
    """

    dst: Positional[Path]
    """Where to write; must not exist. With --task all, a folder."""
    weights: str
    """The weights that the adapter was trained on."""
    adapter: Path
    """An adapter file."""
    to: Literal["samjax", "meta", "hf"] = "samjax"
    """samjax: a checkpoint folder; meta: a .safetensors file for PyTorch; hf: a folder for
    transformers' SamModel."""
    rest: Path | None = None
    """Where what cannot fold into a layer, or is not in SAM, goes: an adapter for the merged
    weights, as small as it gets; with --task all, a folder of these. Left out, an adapter that
    needs it is refused."""
    task: str | None = None
    """Of an adapter of dense tasks: the name of the one to merge for, or all."""
    model: str | None = None
    """What the weights are, such as vit_b or medsam; left out, the adapter knows it."""
    verify: bool = True
    """Run the adapted and the merged model on a test image and compare them."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""

    def run(self, console: Console) -> dict[str, Any]:
        """Writes the merged weights, and the rest where there is one."""
        from samjax import peft
        from samjax.files import check_parent
        from samjax.loading import load_with

        self._check_destination()
        if self.rest is not None:
            check_parent(self.rest)
            if self.rest.exists() or self.rest.absolute() == self.dst.absolute():
                raise FileExistsError(f"{self.rest} exists already; choose another --rest")
        file = peft.read(self.adapter)
        tasks = self._tasks(file)
        adapted = load_with(self.weights, file, str(self.adapter), model=self.model)
        self._check_destination(adapted[0].config)
        if self.task == ALL:
            result = self._merge_tasks(console, file, tasks, *adapted)
        else:
            merge = self._merge_task if tasks else self._merge
            result = merge(console, file, *adapted)
        console.print(f"{self.adapter} merged into {self.weights}; written to {self.dst}")
        return result

    def _check_destination(self, config: Any = None) -> None:
        from samjax.weights import check_destination

        folder_of_files = self.task == ALL and self.to == "meta"  # which has no suffix
        check_destination(self.dst, "samjax" if folder_of_files else self.to, config)

    def _tasks(self, file: Any) -> tuple[Task, ...]:
        """The tasks to merge for; () for masks. Raises ValueError where they cannot be."""
        if self.task is None:
            if not file.tasks:
                return ()
            names = ", ".join(task.name for task in file.tasks)
            raise ValueError(
                f"{self.adapter} is an adapter of dense tasks, {names}: choose one with --task, or "
                f"--task {ALL}"
            )
        if not file.tasks:
            raise ValueError(
                f"{self.adapter} is an adapter for masks and has no tasks: leave out --task"
            )
        tasks = file.tasks if self.task == ALL else (find(file.tasks, self.task),)
        wide = next((task for task in tasks if task.channels > 1), None)
        if wide is not None and self.rest is None:
            where = "FOLDER" if self.task == ALL else "FILE"
            raise ValueError(
                f"{wide.name} has {wide.channels} channels, and SAM has the row and the mask of "
                f"one; with --rest {where}, its rows and its decoder become an adapter for the "
                "merged weights"
            )
        return tasks

    def _merge(
        self, console: Console, file: Any, model: Any, params: Any, records: Any
    ) -> dict[str, Any]:
        """Of an adapter for masks."""
        from samjax import peft

        folded = peft.collapse(file.spec, model, params, records)
        if folded.reasons and self.rest is None:
            path, reason = next(iter(folded.reasons.items()))
            raise peft.NotMergeable(
                f"{path}: {reason}; with --rest FILE, what cannot fold becomes an adapter for the "
                "merged weights"
            )
        result = self._result(model)
        if self.verify:
            differences = peft.verify_merge(model, params, records, folded.params, folded.peft)
            result["max_difference"] = _tell(differences, console)
        if folded.reasons and self.rest is not None:
            variables = {"params": folded.params, "peft": folded.peft}
            left = {"spec": folded.spec, "model": model, "variables": variables}
            self._write(model, folded.params, {**left, "metadata": file.metadata})
            result |= self._describe_rest(console, model, params, records, folded)
        else:
            self._write(model, folded.params)
            self._tell_no_rest(console)
        return result

    def _merge_tasks(
        self,
        console: Console,
        file: Any,
        tasks: tuple[Task, ...],
        model: Any,
        params: Any,
        records: Any,
    ) -> dict[str, Any]:
        """Of an adapter of dense tasks, for each of them."""
        from samjax.files import new_folder

        results = {}
        suffix = ".safetensors" if self.to == "meta" else ""
        with contextlib.ExitStack() as stack:
            stack.enter_context(new_folder(self.dst))
            if self.rest is not None and any(task.channels > 1 for task in tasks):
                stack.enter_context(new_folder(self.rest))
            for task in tasks:
                console.print(f"{task.name}:")
                alone = dataclasses.replace(
                    self,
                    task=task.name,
                    dst=self.dst / f"{task.name}{suffix}",
                    rest=self.rest and self.rest / f"{task.name}.safetensors",
                )
                results[task.name] = alone._merge_task(console, file, model, params, records)
        return {**self._result(model), "task": ALL, "tasks": results}

    def _merge_task(
        self, console: Console, file: Any, model: Any, params: Any, records: Any
    ) -> dict[str, Any]:
        """Of an adapter of dense tasks."""
        from samjax import peft
        from samjax.loading import load

        assert self.task is not None
        # Of these the prompt encoder stays, which a model of dense tasks does not have.
        _, base = load(self.weights, model=model.config.name)
        one = peft.one_task(model, params, records, base, self.task)
        result = {**self._result(model), "task": self.task}
        if self.verify:
            differences = peft.verify_task_merge(
                model, params, records, self.task, one.model, one.params
            )
            result["max_difference"] = _tell(differences, console)
        if one.spec is None or self.rest is None:
            self._write(model, one.sam_params)
            self._tell_no_rest(console)
            return result
        variables = {"params": one.params, "peft": {}}
        left = {"spec": one.spec, "model": one.model, "variables": variables}
        metadata = {**file.metadata, "method": "decoder"}
        self._write(model, one.sam_params, {**left, "metadata": metadata})
        counts = peft.report(one.spec, one.model)
        console.print(
            f"the rows and the decoder of {self.task}, {counts.trainable:,} numbers, are in "
            f"{self.rest}, for the merged weights, whose own mask decoder is SAM's"
        )
        return {**result, "rest": str(self.rest), "rest_numbers": counts.trainable}

    def _result(self, model: Any) -> dict[str, Any]:
        return {"model": model.config.name, "dst": str(self.dst), "to": self.to}

    def _write(self, model: Any, params: Any, left: dict[str, Any] | None = None) -> None:
        """Writes the merged weights, and to --rest what is `left` of the adapter: both or none."""
        from samjax import peft
        from samjax.hashes import params_sha256
        from samjax.weights import write_weights

        if left is not None and self.rest is not None:
            peft.save(self.rest, base_sha256=params_sha256(params), **left)
        try:
            write_weights(self.dst, model.config, params, self.to)
        except BaseException:
            if left is not None and self.rest is not None:
                self.rest.unlink()  # which is of no use without them
            raise

    def _tell_no_rest(self, console: Console) -> None:
        if self.rest is not None:
            console.print(f"all of it folds: there is no rest, and {self.rest} is not written")

    def _describe_rest(
        self, console: Console, model: Any, params: Any, records: Any, folded: Any
    ) -> dict[str, Any]:
        """Says in numbers what stays."""
        from samjax import peft

        costs = peft.encoding_flops(model, params, records, folded)
        counts = peft.report(folded.spec, model)
        sites, total = len(folded.reasons), len(peft.deltas(records))
        console.print(
            f"{sites} of {total} sites stay, {counts.adapter:,} numbers, in {self.rest}, for the "
            f"merged weights: encoding an image takes {costs['rest']:.4f} of the plain model's "
            f"FLOPs, and took {costs['adapted']:.4f}"
        )
        for reason, paths in _by_reason(folded.reasons).items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            console.print(f"{paths[0]}{more}: {reason}")
        return {
            "rest": str(self.rest),
            "rest_sites": sites,
            "rest_numbers": counts.adapter,
            "encoding_flops": costs,
        }


def _tell(differences: dict[str, float], console: Console) -> dict[str, float]:
    """Says how close merged and adapted model are."""
    console.print(
        "merged and adapted model differ at most by "
        + ", ".join(f"{value:.1e} ({name})" for name, value in differences.items())
        + " of the outputs' deviation"
    )
    return differences


def _by_reason(reasons: dict[str, str]) -> dict[str, list[str]]:
    """The sites of each reason."""
    return {
        reason: [path for path, other in reasons.items() if other == reason]
        for reason in dict.fromkeys(reasons.values())
    }


def run(argv: list[str], console: Console) -> Outcome:
    """Reads the arguments and runs the verb."""
    args = parse(Merge, argv, "samjax merge", None, None)
    return args.run(console), args.json
