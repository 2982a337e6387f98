"""A trained model of dense tasks for one of its tasks alone: weights of SAM, and what is left over.

A task of one channel, such as depth, is a SAM: its row is SAM's embedding of no mask, its decoder
SAM's, and its map SAM's single mask without a prompt. SAM has one row, so that of a task of several
channels the encoder alone goes into SAM's weights; rows and decoder stay in an adapter.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from samjax.models.msam import MSam, msam_params
from samjax.models.sam import Sam
from samjax.peft.method_config import MethodConfig
from samjax.peft.spec import PeftSpec
from samjax.peft.trees import merge
from samjax.tasks import find

# What the adapter of rows and decoder is, as a method.
REST = "decoder"


@dataclasses.dataclass(frozen=True)
class OneTask:
    """What `one_task` gives."""

    # Of SAM, with the task's encoder, and where it has one channel its row and decoder.
    sam_params: Any
    # What predicts the task: SAM, or for several channels mSAM with the adapter of `spec` that its
    # params hold.
    model: Sam
    params: Any
    spec: PeftSpec | None


def one_task(model: MSam, params: Any, peft: Any, base: Any, task: str) -> OneTask:
    """Folds `peft` for a task; `base` are SAM's params, of which the prompt encoder stays.

    Raises NotMergeable where a record cannot be folded, ValueError for a task that there is not.
    """
    chosen = find(model.tasks, task)
    merged = merge(model, params, peft, task=task)
    rows, decoder = merged[f"no_mask_embed_{task}"], merged[f"mask_decoder_{task}"]
    sam_params = {**base, "image_encoder": merged["image_encoder"]}
    if chosen.channels == 1:
        sam_params["prompt_encoder"] = {**base["prompt_encoder"], "no_mask_embed": rows}
        sam_params["mask_decoder"] = decoder
        return OneTask(sam_params, Sam(model.config), sam_params, None)
    alone = MSam(model.config, tasks=(chosen,))
    own = {f"no_mask_embed_{task}": rows, f"mask_decoder_{task}": decoder}
    spec = MethodConfig(REST).spec(tasks=1)
    return OneTask(sam_params, alone, msam_params(sam_params, alone) | own, spec)
