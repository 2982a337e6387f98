"""LoRA's training step beside that of the mask decoder alone, here and in HuggingFace + peft.

SAM ViT-B, float32, batch 1, on CPU. Each library is compared with itself: how many steps LoRA takes
while the decoder alone takes one. Rank 4, the decoder trained beside it, AdamW, the same random
weights, image, box and loss, which must come out equal. Each library has a process of its own; they
take turns, and ratios are medians of the ratios within a round.

    pip install -e . torch transformers peft
    python experiments/bench_methods.py

HuggingFace's decoder-only step encodes under `torch.no_grad`, as one would write it; its LoRA is
peft's on the fused qkv of every block, where samjax has q and v.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from bench_encoder import (  # pyrefly: ignore[missing-import]
    Size,
    random_weights,
    restrict_cores,
    rounds_of,
    run,
    started,
)
from bench_models import Setup, load_transformers, versions  # pyrefly: ignore[missing-import]
from rich.console import Console
from safetensors.numpy import save_file

from samjax.bench import (
    compiled_steps,
    cpu_name,
    machine_load,
    markdown,
    random_batch,
    ratios,
    training_config,
)
from samjax.terminal import error_console

# What a round asks of each worker: the steps of these methods.
TASKS = ("decoder", "lora")
# Losses differ from samjax's by at most this share.
BOUND = 1e-3


@dataclasses.dataclass(frozen=True)
class Bench(Size):
    """Times training steps of SAM ViT-B, LoRA and decoder-only, here and in HuggingFace + peft.

    Example: python experiments/bench_methods.py --rounds 7
    """


@dataclasses.dataclass(frozen=True)
class Model:
    """Training steps that are ready: calls without arguments, each of which takes one."""

    decoder: Callable[[], Any]
    lora: Callable[[], Any]
    facts: dict[str, Any]  # with the loss of each method's first step


def build_samjax(setup: Setup) -> Model:
    """This library's steps, as `samjax bench methods` times them."""
    from samjax.models import Sam
    from weights_convert import to_params

    config, tensors, _ = setup.load()
    configs = {name: training_config(name, 1) for name in TASKS}
    steps = compiled_steps(Sam(config), configs, error_console(), to_params(tensors, config))
    for step in steps.values():
        step.run()
    losses = {name: float(step.logs["loss"]) for name, step in steps.items()}
    facts = {"library": versions("jax"), "losses": losses}
    return Model(steps["decoder"].run, steps["lora"].run, facts)


class TorchTraining:
    """Training steps of HuggingFace's `SamModel`, with the batch and the loss of samjax's."""

    def __init__(self, setup: Setup) -> None:
        import torch

        from samjax.preprocess import normalize

        torch.set_num_threads(setup.cores)
        self._config, self._tensors, _ = setup.load()
        config, batch = self._config, random_batch(self._config, 1)
        mean, std, kind = config.pixel_mean, config.pixel_std, config.normalization
        image = np.array(normalize(batch["image"], batch["input_size"], kind, mean, std))
        self._pixels = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
        self._truth = torch.from_numpy(batch["mask"].astype(np.float32))
        self._boxes = torch.from_numpy(batch["coords"].reshape(1, 1, 4))

    def load(self) -> Any:
        """A frozen model with the weights."""
        return load_transformers(self._config, self._tensors).requires_grad_(False)

    def decode(self, model: Any) -> Any:
        """A forward pass whose embedding has no gradient."""
        import torch

        with torch.no_grad():
            embedding = model.vision_encoder(self._pixels).last_hidden_state
        return model(image_embeddings=embedding, input_boxes=self._boxes, multimask_output=False)

    def whole(self, model: Any) -> Any:
        """A forward pass from the pixels."""
        return model(pixel_values=self._pixels, input_boxes=self._boxes, multimask_output=False)

    def stepper(
        self,
        model: Any,
        forward: Callable[[Any], Any],
        extra_loss: Callable[[], Any] = lambda: 0.0,
    ) -> Callable[[], float]:
        """A step that trains the mask decoder and whatever in the model is not frozen."""
        import torch

        # Not peft's `modules_to_save`, whose wrapper wants an argument without a name.
        model.mask_decoder.requires_grad_(True)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-4)

        def step() -> float:
            optimizer.zero_grad()
            loss = self._loss(forward(model)) + extra_loss()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            return loss.item()

        return step

    def _loss(self, output: Any) -> Any:
        """BCE, Dice and the squared error of the predicted IoU, as in `samjax.training.losses`."""
        from torch.nn import functional

        truth, masks, iou = self._truth, output.pred_masks[:, 0], output.iou_scores[:, 0, 0]
        size = truth.shape[1:]
        logits = functional.interpolate(masks, size, mode="bilinear", align_corners=False)[:, 0]
        bce = functional.binary_cross_entropy_with_logits(logits, truth)
        p, axes = logits.sigmoid(), (1, 2)
        overlap = (p * truth).sum(axes)
        dice = 1 - (2 * overlap + 1) / (p.sum(axes) + truth.sum(axes) + 1)
        found = logits > 0
        both, either = (found & (truth > 0)).sum(axes), (found | (truth > 0)).sum(axes)
        return bce + dice.mean() + (iou - both / either.clamp(min=1)).square().mean()


def build_peft(setup: Setup) -> Model:
    """HuggingFace's `SamModel`, as it is and with LoRA of its `peft`."""
    import peft

    training = TorchTraining(setup)
    lora = peft.LoraConfig(r=4, lora_alpha=4, target_modules=r"vision_encoder\..*\.qkv")
    adapted = peft.get_peft_model(training.load(), lora)
    steps = {
        "decoder": training.stepper(training.load(), training.decode),
        "lora": training.stepper(adapted, training.whole),
    }
    facts = {
        "library": versions("transformers", "peft", "torch"),
        "losses": {name: step() for name, step in steps.items()},
    }
    return Model(steps["decoder"], steps["lora"], facts)


BUILDERS: dict[str, Callable[[Setup], Model]] = {"samjax": build_samjax, "peft": build_peft}


def bench(args: Bench, console: Console) -> dict[str, Any]:
    """The whole comparison, as a JSON-able dict."""
    needs = ("torch", "transformers", "peft")
    if missing := [name for name in needs if importlib.util.find_spec(name) is None]:
        raise ValueError(f"to compare with HuggingFace: pip install {' '.join(missing)}")
    config, cores = args.config(), restrict_cores(args.cores)
    load = machine_load(console)
    with tempfile.TemporaryDirectory(prefix="samjax-bench-") as folder:
        setup = Setup(config.to_json(), f"{folder}/weights.safetensors", cores)
        save_file(random_weights(config), setup.weights)
        with started(dict.fromkeys(BUILDERS, setup), "bench_methods", console) as workers:
            facts = {worker.name: worker.facts for worker in workers}
            check_losses(facts)
            seconds = rounds_of(workers, TASKS, args.rounds, console)
    libraries = {
        name: {**facts[name], "seconds": taken, **ratios(taken["decoder"], taken["lora"])}
        for name, taken in seconds.items()
    }
    return {
        "cpu": cpu_name(),
        "cores": cores,
        "load": load,
        "image_size": args.image_size,
        "depth": args.depth,
        "rounds": args.rounds,
        "libraries": libraries,
    }


def check_losses(facts: dict[str, dict[str, Any]]) -> None:
    """Raises RuntimeError where a library does not compute what samjax does."""
    ours = facts["samjax"]["losses"]
    for name, fact in facts.items():
        for task, theirs in fact["losses"].items():
            if not abs(theirs - ours[task]) <= BOUND * abs(ours[task]):
                raise RuntimeError(
                    f"{name} does not compute what samjax does: the first loss of {task} is "
                    f"{theirs:.6f}, and samjax's is {ours[task]:.6f}"
                )


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    head = (
        f"{result['cpu']}, {result['cores']} cores; ViT-B of {result['depth']} blocks at "
        f"{result['image_size']} px, float32, batch 1; median of {result['rounds']} rounds at load "
        f"{result['load']:.1f}."
    )
    rows = [("library", "with", "decoder, s/step", "LoRA, s/step", "LoRA (decoder = 1)", "rounds")]
    for name, row in result["libraries"].items():
        least, most = row["ratio_range"]
        medians = (f"{np.median(row['seconds'][task]):.3g}" for task in TASKS)
        spread = f"{least:.3f} to {most:.3f}"
        rows.append((name, row["library"], *medians, f"{row['ratio']:.3f}", spread))
    return f"{head}\n\n{markdown(rows)}"


if __name__ == "__main__":
    sys.exit(run(Bench, "bench_methods.py", bench, table))
