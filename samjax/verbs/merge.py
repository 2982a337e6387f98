"""`samjax merge`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from tyro.conf import Positional

from samjax.arguments import Outcome, parse


@dataclasses.dataclass(frozen=True)
class Merge:
    """Folds an adapter into the weights that it was trained on.

    Example: samjax merge --weights mobile_sam.pt --adapter adapter.safetensors merged
    """

    dst: Positional[Path]
    """Where to write; must not exist."""
    weights: str
    """The weights that the adapter was trained on."""
    adapter: Path
    """An adapter file."""
    to: Literal["samjax", "meta", "hf"] = "samjax"
    """samjax: a checkpoint folder; meta: a .safetensors file for PyTorch; hf: a folder for
    transformers' SamModel."""
    rest: Path | None = None
    """Where what cannot fold into a layer goes: an adapter for the merged weights, as small as it
    gets. Left out, such an adapter is refused."""
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
        from samjax.hashes import params_sha256
        from samjax.loading import load_adapted
        from samjax.weights import check_destination, write_weights

        check_destination(self.dst, self.to)
        if self.rest is not None:
            check_parent(self.rest)
            if self.rest.exists():
                raise FileExistsError(f"{self.rest} exists already; choose another --rest")
        model, params, records = load_adapted(self.weights, self.adapter, model=self.model)
        check_destination(self.dst, self.to, model.config)
        file = peft.read(self.adapter)
        folded = peft.collapse(file.spec, model, params, records)
        if folded.reasons and self.rest is None:
            path, reason = next(iter(folded.reasons.items()))
            raise peft.NotMergeable(
                f"{path}: {reason}; with --rest FILE, what cannot fold becomes an adapter for the "
                "merged weights"
            )
        result: dict[str, Any] = {"model": model.config.name, "dst": str(self.dst), "to": self.to}
        if self.verify:
            differences = peft.verify_merge(model, params, records, folded.params, folded.peft)
            console.print(
                "merged and adapted model differ at most by "
                + ", ".join(f"{value:.1e} ({name})" for name, value in differences.items())
                + " of the outputs' deviation"
            )
            result["max_difference"] = differences
        if folded.reasons and self.rest is not None:
            variables = {"params": folded.params, "peft": folded.peft}
            base = params_sha256(folded.params)
            peft.save(self.rest, folded.spec, model, variables, base, file.metadata)
            try:
                write_weights(self.dst, model.config, folded.params, self.to)
            except BaseException:
                self.rest.unlink()  # which is of no use without them
                raise
            result |= self._describe_rest(console, model, params, records, folded)
        else:
            write_weights(self.dst, model.config, folded.params, self.to)
            if self.rest is not None:
                console.print(f"all of it folds: there is no rest, and {self.rest} is not written")
        console.print(f"{self.adapter} merged into {self.weights}; written to {self.dst}")
        return result

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
