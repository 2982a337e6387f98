"""The semantic head against the original's decoder with its tokens replaced."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax import peft
from samjax.models.msam import MSam, maps_of, msam_params
from samjax.nn import Context
from samjax.peft import MethodConfig
from samjax.tasks import parse

TASKS = parse(
    [
        "segmentation:3:mask_classification",
        "parts:2:mask_classification:1:5",
        "depth:1:masked_l1",
    ]
)
MASKS = {"segmentation": 3, "parts": 5}
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model(small_config):
    return MSam(small_config, tasks=TASKS)


@pytest.fixture(scope="module")
def start(model, small_params):
    return msam_params(small_params, model)


def test_params_are_sams(model, start, small_params):
    assert jax.tree.structure(start) == jax.tree.structure(model.init_params_shapes())
    sams = small_params["mask_decoder"]
    row = small_params["prompt_encoder"]["no_mask_embed"]["embedding"]
    for name, count in MASKS.items():
        decoder = start[f"mask_decoder_{name}"]
        np.testing.assert_array_equal(start[f"no_mask_embed_{name}"]["embedding"], row)
        np.testing.assert_array_equal(
            decoder["mask_tokens"]["embedding"],
            np.repeat(sams["mask_tokens"]["embedding"][:1], count, axis=0),
        )
        assert not any(np.any(leaf) for leaf in decoder["output_classifier"].values())
        shared = {"iou_token", "transformer", "output_hypernetworks_mlps_0"}
        shared |= {f"output_upscaling_{i}" for i in (0, 1, 3)}
        assert decoder.keys() == shared | {"mask_tokens", "output_classifier"}
        assert all(decoder[part] is sams[part] for part in shared)
    assert start["mask_decoder_depth"] is sams


def test_masks_and_classes_are_the_originals(model, start, small_torch):
    """Its four tokens are N of ours, all with its first hypernetwork, and a classifier on top."""
    torch = pytest.importorskip("torch")
    embedding = RNG.normal(size=(2, 8, 8, 32)).astype(np.float32)
    for name, count in MASKS.items():
        decoder = dict(start[f"mask_decoder_{name}"])
        tokens = RNG.normal(size=(count, 32)).astype(np.float32)
        classifier = {
            "kernel": RNG.normal(size=decoder["output_classifier"]["kernel"].shape),
            "bias": RNG.normal(size=decoder["output_classifier"]["bias"].shape),
        }
        classifier = {key: leaf.astype(np.float32) for key, leaf in classifier.items()}
        decoder |= {"mask_tokens": {"embedding": tokens}, "output_classifier": classifier}
        params = {**start, f"mask_decoder_{name}": decoder}
        ours = jax.jit(
            lambda p, e, name=name: model.apply({"params": p}, e, name, method="decode_task")
        )(params, embedding)

        theirs = copy.deepcopy(small_torch.mask_decoder)
        theirs.num_mask_tokens = count
        theirs.mask_tokens = torch.nn.Embedding.from_pretrained(torch.tensor(tokens))
        theirs.output_hypernetworks_mlps = torch.nn.ModuleList(
            [theirs.output_hypernetworks_mlps[0]] * count
        )
        seen = []
        theirs.transformer.register_forward_hook(lambda *call, seen=seen: seen.append(call[2][0]))
        row = torch.tensor(start[f"no_mask_embed_{name}"]["embedding"][0])
        for i in range(2):
            features = torch.tensor(embedding[i]).permute(2, 0, 1)[None]
            with torch.no_grad():
                masks, _ = theirs.predict_masks(
                    image_embeddings=features,
                    image_pe=small_torch.prompt_encoder.get_dense_pe(),
                    sparse_prompt_embeddings=torch.zeros(1, 0, 32),
                    dense_prompt_embeddings=row[None, :, None, None].expand(features.shape),
                )
            expected = masks[0].numpy()
            np.testing.assert_allclose(ours.masks[i], expected, atol=1e-4 * expected.std())
            own = seen[-1][0, 1 : 1 + count].numpy()
            logits = own @ classifier["kernel"] + classifier["bias"]
            np.testing.assert_allclose(ours.classes[i], logits, atol=1e-4 * logits.std())


def test_what_trains_is_the_decoder_without_what_it_lacks(model, start):
    """Of all decoders alike, and nothing of the encoder."""
    spec = MethodConfig("decoder").spec(tasks=3)
    mask = peft.trainable(spec, model, {"params": start, "peft": {}})["params"]
    for name in MASKS:
        assert all(jax.tree.leaves(mask[f"mask_decoder_{name}"]))
        assert mask[f"no_mask_embed_{name}"]["embedding"]
    depth = dict(mask["mask_decoder_depth"])
    frozen = ["iou_prediction_head", *(f"output_hypernetworks_mlps_{i}" for i in (1, 2, 3))]
    for part in frozen:
        assert not any(jax.tree.leaves(depth.pop(part)))
    assert all(jax.tree.leaves(depth))
    assert not any(jax.tree.leaves(mask["image_encoder"]))
    # Of the original: without its IoU head and three of its hypernetworks; by hand.
    sizes = jax.tree.map(np.size, start)
    sams = sum(jax.tree.leaves(sizes["mask_decoder_depth"]))
    lacks = sum(sum(jax.tree.leaves(sizes["mask_decoder_depth"][part])) for part in frozen)
    heads = {name: 32 * (count - 4) + 33 * 4 for name, count in (("segmentation", 3),)}
    heads["parts"] = 32 * (5 - 4) + 33 * 3
    expected = 3 * (sams - lacks + 32) + sum(heads.values())
    assert peft.report(spec, model).decoder == expected


def test_all_tasks_in_one_pass(model, start):
    image = jnp.asarray(RNG.integers(0, 255, (1, 128, 128, 3), np.uint8))
    size = jnp.full((1, 2), 128, jnp.int32)

    @jax.jit
    def both(params):
        together = model.apply({"params": params}, image, size)
        embedding = model.apply({"params": params}, image, size, method="encode")
        alone = {
            task.name: model.apply(
                {"params": params}, embedding, task.name, Context(task=i), method="decode_task"
            )
            for i, task in enumerate(TASKS)
        }
        return together, {name: maps_of(decoded) for name, decoded in alone.items()}

    together, alone = both(start)
    for task in TASKS:
        maps = maps_of(together[task.name])
        assert maps.shape == (1, task.channels, 32, 32) and maps.dtype == np.float32
        np.testing.assert_allclose(maps, alone[task.name], atol=1e-5 * float(jnp.std(maps)) + 1e-6)
    # At first every class is as likely, so that its scores are one map.
    scores = maps_of(together["segmentation"])[0]
    np.testing.assert_allclose(scores[0], scores[2], rtol=1e-5)
