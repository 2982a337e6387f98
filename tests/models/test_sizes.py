"""ViT-L and ViT-H, inputs of any size and aspect, all mixtures of prompts: against the original.

The encoders have two blocks, one of windows and one global. Errors are the largest absolute
difference over the reference's standard deviation.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.models import MODELS, Sam
from samjax.preprocess import postprocess_masks, prepare_image, prepare_mask_prompt
from samjax.prompting import Prompt, assemble

BOUND = 1e-3
SIZES = (512, 1024, (640, 960))
# In the quick tests one size each; the others are slow.
QUICK = {("vit_l", (640, 960)), ("vit_h", 512)}
CASES = [
    pytest.param(
        name,
        size,
        id=f"{name}-{size}",
        marks=() if (name, size) in QUICK else pytest.mark.slow,
    )
    for name, size in itertools.product(("vit_b", "vit_l", "vit_h"), SIZES)
]
IMAGE_SIZE = (270, 390)


def mixtures():
    """Every mixture of no, one or three points, a box or none, a mask or none."""
    height, width = IMAGE_SIZE
    points = [
        {},
        {"point_coords": np.array([[200.0, 130.0]]), "point_labels": np.array([1])},
        {
            "point_coords": np.array([[200.0, 130.0], [30.5, 20.0], [389.0, 269.0]]),
            "point_labels": np.array([1, 0, 1]),
        },
    ]
    boxes = [{}, {"box": np.array([40.0, 30.5, 300.0, float(height)])}]
    y, x = np.mgrid[:height, :width]
    disc = (y - 130) ** 2 + (x - 200) ** 2 < 80**2
    masks = [{}, {"mask_input": disc}]
    for parts in itertools.product(points, boxes, masks):
        yield Prompt(**{key: value for part in parts for key, value in part.items()})


def in_torch(reference, torch, config, embedding, prompt):
    """Logits, IoUs and masks of the original for one prompt, by its own parts."""
    scale = np.array(config.frame.resized_shape(*IMAGE_SIZE))[::-1] / IMAGE_SIZE[::-1]

    def tensor(array):
        return torch.from_numpy(np.array(array, np.float32))[None]

    points = boxes = masks = None
    if prompt.point_coords is not None:
        labels = torch.as_tensor(prompt.point_labels)[None]
        points = tensor(prompt.point_coords * scale), labels
    if prompt.box is not None:
        boxes = tensor((prompt.box.reshape(2, 2) * scale).ravel())
    if prompt.mask_input is not None:
        low = tuple(4 * side for side in config.grid)
        masks = tensor(prepare_mask_prompt(prompt.mask_input, config.frame, low))[None]
    sparse, dense = reference.prompt_encoder(points=points, boxes=boxes, masks=masks)
    logits, iou = reference.mask_decoder.predict_masks(
        embedding, reference.prompt_encoder.get_dense_pe(), sparse, dense
    )
    height, width = config.frame.resized_shape(*IMAGE_SIZE)
    full = torch.nn.functional.interpolate(
        logits, config.frame.shape, mode="bilinear", align_corners=False
    )[..., :height, :width]
    full = torch.nn.functional.interpolate(full, IMAGE_SIZE, mode="bilinear", align_corners=False)
    return logits.numpy()[0], iou.numpy()[0], full.numpy()[0] > 0


@pytest.mark.parametrize(("name", "size"), CASES)
def test_every_size_and_every_prompt(name, size, torch_sam, draw_params, report_lines):
    import torch

    full = MODELS[name]
    encoder = dataclasses.replace(full.image_encoder, depth=2, global_attn_indexes=(1,))
    config = dataclasses.replace(full, image_encoder=encoder).with_image_size(size)
    model = Sam(config)
    params = draw_params(model)
    reference = torch_sam(config, params)

    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(0, 256, (27, 39, 3)), np.ones((10, 10, 1))).astype(np.uint8)
    pixels, input_size = prepare_image(image, config.frame)
    encode = jax.jit(lambda p, *a: model.apply({"params": p}, *a, method="encode"))
    embeddings = encode(params, pixels[None], input_size[None])
    mean, std = np.array(config.pixel_mean), np.array(config.pixel_std)
    normalised = np.zeros((1, 3, *config.frame.shape), np.float32)
    h, w = input_size
    normalised[0, :, :h, :w] = ((pixels[:h, :w] - mean) / std).transpose(2, 0, 1)
    with torch.no_grad():
        embedding = reference.image_encoder(torch.from_numpy(normalised))
    errors = {"embedding": distance(embeddings.transpose(0, 3, 1, 2), embedding.numpy())}

    prompts = list(mixtures())
    batch = assemble(prompts, [IMAGE_SIZE] * len(prompts), config)
    decode = jax.jit(lambda p, *a: model.apply({"params": p}, *a, method="decode"))
    logits, iou = (np.asarray(x) for x in decode(params, embeddings, batch))
    agreeing = []
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            expected, expected_iou, masks = in_torch(reference, torch, config, embedding, prompt)
        worst = max(errors.get("logits", 0.0), distance(logits[i], expected))
        errors["logits"] = worst
        errors["IoU"] = max(errors.get("IoU", 0.0), distance(iou[i], expected_iou))
        ours = postprocess_masks(jnp.asarray(logits[i]), config.frame, IMAGE_SIZE) > 0
        agreeing.append(np.mean(np.asarray(ours) == masks))
    told = ", ".join(f"{key} {value:.1e}" for key, value in errors.items())
    report_lines.append(
        f"{name} of two blocks at {config.frame} px, {len(prompts)} mixtures of prompts: {told}; "
        f"masks agree in {100 * np.mean(agreeing):.4f} % of pixels"
    )
    assert max(errors.values()) <= BOUND
    assert min(agreeing) >= 0.9999


def distance(ours, reference):
    assert ours.shape == reference.shape
    return float(np.abs(ours - reference).max() / reference.std())
