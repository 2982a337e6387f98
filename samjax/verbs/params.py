"""`samjax params`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from samjax.arguments import Outcome, parse
from samjax.peft.method_config import MethodConfig
from samjax.peft.recipes import RECIPES

if TYPE_CHECKING:
    from samjax.peft import Report
    from samjax.tasks import Task


@dataclasses.dataclass(frozen=True)
class Params:
    """Counts what a method trains in a model; needs no weights.

    Example: samjax params --model vit_b --method lora
    """

    method: Annotated[MethodConfig, tyro.conf.arg(name="")]
    model: str = "vit_b"
    """vit_b, vit_l, vit_h, medsam, vit_t (MobileSAM) or lite_medsam."""
    tasks: tuple[str, ...] = ()
    """Dense tasks, as `samjax train` takes them: nyuv2, or depth:1:masked_l1 and the like."""
    list: bool = False
    """Every method with its own defaults, and what it trains beside the mask decoder."""
    json: bool = False
    """Print one JSON object, on one line, last on stdout."""

    def run(self, console: Console) -> dict[str, Any]:
        """Prints the report and the counts."""
        from samjax.models import MODELS, MSam, Sam
        from samjax.peft import report
        from samjax.tasks import NYUV2, parse

        if self.model not in MODELS:
            raise ValueError(f"unknown model {self.model!r}; known are {', '.join(MODELS)}")
        tasks = parse(self.tasks)

        def counted(method: MethodConfig, tasks: tuple[Task, ...]) -> Report:
            config = MODELS[self.model]
            model = MSam(config, tasks=tasks) if tasks else Sam(config)
            return report(method.spec(len(tasks)), model)

        if self.list:
            result = {}
            console.print(f"numbers that train in {self.model} beside its mask decoder")
            for name, recipe in RECIPES.items():
                # Those of dense tasks have NYUv2's where none are named.
                counts = counted(MethodConfig(name), tasks or (NYUV2 if recipe.dense else ()))
                result[name] = counts.trainable - counts.decoder
                console.print(f"{name:<11} {result[name]:>10,}  {recipe.summary}")
                given = (
                    f"{k} {_shown(v)}" for k, v in recipe.settings.items() if v not in (None, "")
                )
                if settings := ", ".join(given):
                    console.print(f"{'':<23} {settings}", style="dim")
            return result
        counts = counted(self.method, tasks)
        console.print(str(counts))
        names = ("total", "adapter", "decoder", "trainable")
        return {name: getattr(counts, name) for name in names}


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def run(argv: list[str], console: Console) -> Outcome:
    """Reads the arguments and runs the verb."""
    args = parse(Params, argv, "samjax params", Params(method=MethodConfig()), None)
    return args.run(console), args.json
