"""SAM's mask decoder with a semantic head: masks of the whole image, and the class of each.

That of Conv-LoRA (Zhong et al. 2024) as its authors' code has it: AutoGluon,
`multimodal/models/sam.py`. SAM's four mask tokens give way to N, all of which start as SAM's first
one, that of the single mask; its hypernetwork serves them all, and a linear classifier tells what
each mask shows: one of C classes, or nothing. There is no prompt, but for the row of "no mask".

Differs from the paper's code: the IoU head, which is frozen there and nobody reads, is left out;
the classifier starts at zero, every class as likely as the others, instead of at random; and the
row of "no mask" trains with the decoder, as those of other dense tasks do.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from samjax.models.mask_decoder import Mlp, TokenDecoder, masks_of
from samjax.nn import Context, Dense


@struct.dataclass
class ClassifiedMasks:
    """The masks of a batch of images, and what each shows, as logits.

    `masks` (b, n, h, w). `classes` (b, n, C + 1), of which the last is nothing.
    """

    masks: Any
    classes: Any

    def scores(self) -> Float[Array, "b c h w"]:
        """Of each class at each pixel, 0 or more: sum_n softmax(classes_n)_c sigmoid(masks_n).

        The class of a pixel is that of the largest (Cheng et al. 2021, "Per-Pixel Classification is
        Not All You Need", section 3.4, semantic inference).
        """
        shares = jax.nn.softmax(self.classes, axis=-1)[..., :-1]
        masks = jax.nn.sigmoid(self.masks)
        return jnp.einsum("bnc,bnhw->bchw", shares, masks, precision="highest")


class SemanticDecoder(TokenDecoder):
    """Predicts `num_tokens` masks and which of `num_classes` classes, or nothing, each shows."""

    num_tokens: int = 1
    num_classes: int = 1

    @nn.compact
    def __call__(
        self,
        image_embeddings: Float[Array, "b h w c"],
        image_pe: Float[Array, "h w c"],
        dense: Float[Array, "b h w c"],
        ctx: Context,
    ) -> ClassifiedMasks:
        """Masks (b, num_tokens, 4 h, 4 w), classes (b, num_tokens, num_classes + 1), float32."""
        batch = len(dense)
        sparse, present = jnp.zeros((batch, 0, self.dim)), jnp.zeros((batch, 0), bool)
        tokens, upscaled = self.decode_tokens(
            self.num_tokens, image_embeddings, image_pe, sparse, dense, present, ctx
        )
        tokens = tokens[:, 1:]
        hyper = Mlp(self.dim, self.dim // 8, self.dtype, name="output_hypernetworks_mlps_0")
        classifier = Dense(self.num_classes + 1, dtype=self.dtype, name="output_classifier")
        classes = classifier(tokens, ctx).astype(jnp.float32)
        return ClassifiedMasks(masks_of(hyper(tokens, ctx), upscaled), classes)


def semantic_params(decoder: Any, num_tokens: int, num_classes: int) -> dict[str, Any]:
    """A semantic decoder's `params` from those of SAM's mask decoder; shared leaves, not copies."""
    own = {name: part for name, part in decoder.items() if not name.startswith(_LEFT_OUT)}
    tokens = np.asarray(decoder["mask_tokens"]["embedding"])
    size = tokens.shape[1], num_classes + 1
    return {
        **own,
        "mask_tokens": {"embedding": np.tile(tokens[:1], (num_tokens, 1))},
        "output_hypernetworks_mlps_0": decoder["output_hypernetworks_mlps_0"],
        "output_classifier": {
            "kernel": np.zeros(size, np.float32),
            "bias": np.zeros(size[1:], np.float32),
        },
    }


# Of SAM's decoder: what multi-mask outputs and the predicted IoU need.
_LEFT_OUT = ("iou_prediction_head", "output_hypernetworks_mlps")
