"""`samjax convert-adapter`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from tyro.conf import Positional

from samjax.arguments import Outcome, parse


@dataclasses.dataclass(frozen=True)
class ConvertAdapter:
    """Converts an adapter of HuggingFace's peft or of SAMed to samjax's, or one to peft's.

    Example: samjax convert-adapter peft_folder adapter.safetensors --weights sam_vit_b
    """

    src: Positional[Path]
    """A folder that peft wrote for transformers' SamModel, a .pth file of SAMed, or an adapter file
    of samjax."""
    dst: Positional[Path]
    """Where to write; must not exist."""
    weights: str
    """The weights that the adapter was trained on."""
    to: Literal["samjax", "peft"] = "samjax"
    """samjax: an adapter file; peft: a folder for PeftModel.from_pretrained."""
    without_decoder: bool = False
    """Take the low-rank factors alone, and none of the model's own tensors that were trained."""
    image_size: int | tuple[int, int] | None = None
    """The model's input that a foreign adapter was trained at, in pixels: a side, or height and
    width; left out, that of the weights."""
    model: str | None = None
    """What the weights are, such as vit_b or medsam; left out, an adapter of samjax knows it."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""

    def run(self, console: Console) -> dict[str, Any]:
        """Writes the converted adapter."""
        from samjax import peft
        from samjax.files import check_parent
        from samjax.hashes import params_sha256
        from samjax.loading import load, load_with
        from samjax.peft import huggingface, samed, to_huggingface
        from samjax.peft.resolve import resolve

        if self.dst.exists() or self.dst.is_symlink():
            raise FileExistsError(f"{self.dst} exists already; delete it or choose another name")
        check_parent(self.dst)
        kind = _kind(self.src)
        if kind == self.to:
            other = "peft" if kind == "samjax" else "samjax"
            raise ValueError(f"{self.src} is in the form of {kind} already; pass --to {other}")
        if kind == "samjax":
            if self.without_decoder or self.image_size:
                raise ValueError(
                    "--without-decoder and --image-size are for adapters of peft and SAMed, and "
                    f"{self.src} is samjax's; leave them out"
                )
            file = peft.read(self.src)
            to_huggingface.check_destination(self.dst, file.model)
            spec = file.spec
            model, params, records = load_with(self.weights, file, str(self.src), model=self.model)
            variables, base = {"params": params, "peft": records}, ""
        else:
            model, params = load(self.weights, self.image_size, model=self.model)
            base = params_sha256(params)
            reader = huggingface if kind == "peft" else samed
            spec, variables = reader.load(
                self.src, model, params, factors_only=self.without_decoder
            )
        result: dict[str, Any] = {
            "model": model.config.name,
            "src": str(self.src),
            "from": kind,
            "dst": str(self.dst),
            "to": self.to,
            "sites": len(resolve(spec, model).sites),
            "trained": peft.report(spec, model).trainable,
        }
        if self.to == "samjax":
            metadata = {"method": f"{kind}'s adapter", "converted_from": kind}
            peft.save(self.dst, spec, model, variables, base, metadata)
        else:
            to_huggingface.save(self.dst, spec, model, variables)
            _tell_size(model, console)
        if kind == "SAMed":
            console.print(
                "SAMed's own script trains at 512 px, on values in [0, 1] without SAM's mean and "
                "deviation: where images are prepared otherwise, train on"
            )
        console.print(
            f"{self.src} ({kind}) adapts {result['sites']} sites of {model.config.name}, "
            f"{result['trained']:,} trained numbers; written to {self.dst} for {self.to}"
        )
        return result


def _kind(src: Path) -> str:
    """Whose adapter it is. Raises FileNotFoundError, or ValueError where that cannot be told."""
    from samjax.peft.huggingface import is_peft_folder
    from samjax.peft.samed import is_samed
    from weights_convert import read_tensors
    from weights_convert.read import read_metadata

    if not src.exists():
        raise FileNotFoundError(f"there is no adapter {src}; check the path")
    if src.is_dir():
        if is_peft_folder(src):
            return "peft"
        raise ValueError(
            f"{src} is no folder of peft, it lacks adapter_config.json and adapter_model."
            "safetensors; give one that save_pretrained wrote, or a file"
        )
    if "samjax" in read_metadata(src):
        return "samjax"
    names = read_tensors(src)
    if is_samed(names):
        return "SAMed"
    if any(".lora_" in name for name in names):
        raise ValueError(f"{src} lacks its adapter_config.json; give the folder that peft wrote")
    raise ValueError(
        f"{src} is no adapter of samjax, peft or SAMed; give a folder that peft's save_pretrained "
        "wrote, or a file of SAMed or samjax"
    )


def _tell_size(model: Any, console: Console) -> None:
    config = model.config
    if config.grid != config.image_encoder.position_grid:
        console.print(
            f"the adapter was trained at {config.frame} px, and transformers' SamModel takes the "
            "input of its own weights alone; `samjax merge --to hf` writes a model for that size"
        )


def run(argv: list[str], console: Console) -> Outcome:
    """Reads the arguments and runs the verb."""
    args = parse(ConvertAdapter, argv, "samjax convert-adapter", None, None)
    return args.run(console), args.json
