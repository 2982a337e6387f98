"""Whether merged weights compute what the weights and their adapter computed."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samjax.models.msam import MSam, maps_of
from samjax.models.prompt_encoder import Prompts
from samjax.models.sam import Sam
from samjax.nn import Context

# For MobileSAM, the most sensitive of the models, it is 5e-6, rounding of float32; a merge that is
# wrong, such as by a factor or an axis, shows in the first digit.
LARGEST_DIFFERENCE = 1e-3


def verify_merge(
    model: Sam, params: Any, peft: Any, merged: Any, rest: Any = None
) -> dict[str, float]:
    """The largest differences of `merged` from `params` with `peft`, in standard deviations.

    `rest` are records that are still beside `merged`.

    Both run on a random image, always the same one, at the model's input size: `embedding` of the
    image, `logits` at low resolution without a prompt and with a box. Matrix products have full
    float32 precision. Raises RuntimeError above `LARGEST_DIFFERENCE`: rounding cannot explain it.
    """
    image, input_size = _test_image(model)
    corners = np.array([[[0.25], [0.75]]]) * np.array(model.config.frame.shape[::-1])
    box = Prompts(jnp.asarray(corners, jnp.float32), jnp.array([[2, 3]], jnp.int32))

    @jax.jit
    def outputs(variables: Any) -> dict[str, Any]:
        embedding = model.apply(variables, image, input_size, method="encode")
        logits = [
            model.apply(variables, embedding, prompts, method="decode")[0]
            for prompts in (Prompts.none(1), box)
        ]
        return {"embedding": embedding, "logits": jnp.stack(logits)}

    with jax.default_matmul_precision("highest"):
        expected = outputs({"params": params, "peft": peft})
        actual = outputs({"params": merged, **({"peft": rest} if rest else {})})
    return _differences(expected, actual)


def verify_task_merge(
    model: MSam, params: Any, peft: Any, task: str, merged_model: Sam, merged: Any
) -> dict[str, float]:
    """`verify_merge` for one task of a model of dense tasks.

    `merged` are the params of `merged_model`: a model of that task alone, or SAM, whose single mask
    without a prompt is then to be the task's map. The differences are of `embedding` and `maps`.
    """
    image, input_size = _test_image(model)
    ctx = Context(task=model.index(task))

    @functools.partial(jax.jit, static_argnums=0)
    def outputs(model: Sam, variables: Any, ctx: Context) -> dict[str, Any]:
        embedding = model.apply(variables, image, input_size, ctx, method="encode")
        if isinstance(model, MSam):
            decoded = model.apply(variables, embedding, task, ctx, method="decode_task")
            maps = maps_of(decoded)
        else:
            maps = model.apply(variables, embedding, Prompts.none(1), method="decode")[0][:, :1]
        return {"embedding": embedding, "maps": maps}

    with jax.default_matmul_precision("highest"):
        expected = outputs(model, {"params": params, "peft": peft}, ctx)
        actual = outputs(merged_model, {"params": merged}, Context())
    return _differences(expected, actual)


def _test_image(model: Sam) -> tuple[Any, Any]:
    shape = model.config.frame.shape
    image = np.random.default_rng(0).integers(0, 256, (1, *shape, 3), np.uint8)
    return jnp.asarray(image), jnp.array([shape], jnp.int32)


def _differences(expected: dict[str, Any], actual: dict[str, Any]) -> dict[str, float]:
    """In standard deviations. Raises RuntimeError above `LARGEST_DIFFERENCE`."""
    differences = {
        name: float(np.abs(actual[name] - expected[name]).max() / np.std(expected[name]))
        for name in expected
    }
    for name, difference in differences.items():
        if not difference <= LARGEST_DIFFERENCE:  # also where it is not a number
            raise RuntimeError(
                f"the merged weights do not equal the adapted model: the {name} of a test image "
                f"differs by {difference:.2g} of its deviation, and rounding explains "
                f"{LARGEST_DIFFERENCE:g} at most; please report this, and use the adapter itself "
                "in the meantime"
            )
    return differences
