"""Whether merged weights compute what the weights and their adapter computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samjax.models.prompt_encoder import Prompts
from samjax.models.sam import Sam

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
    shape = model.config.frame.shape
    image = np.random.default_rng(0).integers(0, 256, (1, *shape, 3), np.uint8)
    corners = np.array([[[0.25], [0.75]]]) * np.array(shape[::-1])
    box = Prompts(jnp.asarray(corners, jnp.float32), jnp.array([[2, 3]], jnp.int32))

    @jax.jit
    def outputs(variables: Any) -> dict[str, Any]:
        input_size = jnp.array([shape], jnp.int32)
        embedding = model.apply(variables, jnp.asarray(image), input_size, method="encode")
        logits = [
            model.apply(variables, embedding, prompts, method="decode")[0]
            for prompts in (Prompts.none(1), box)
        ]
        return {"embedding": embedding, "logits": jnp.stack(logits)}

    with jax.default_matmul_precision("highest"):
        expected = outputs({"params": params, "peft": peft})
        actual = outputs({"params": merged, **({"peft": rest} if rest else {})})
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
