"""mSAM against the original's decoder, called once for each channel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax import peft
from samjax.models.msam import MSam, msam_params
from samjax.nn import Context
from samjax.peft import MethodConfig, PeftSpec, Rule
from samjax.peft.ta_lora import TALoRA
from samjax.tasks import parse

TASKS = parse(["segmentation:3:cross_entropy", "depth:1:masked_l1", "normals:3:cosine"])
CHANNELS = [(task.name, task.channels) for task in TASKS]
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model(small_config):
    return MSam(small_config, tasks=TASKS)


@pytest.fixture(scope="module")
def params(model, small_params):
    """SAM's, but rows and decoders moved apart, as training does."""
    start = msam_params(small_params, model)

    def moved(path, leaf):
        name = path[0].key
        return (
            leaf
            if "_embed_" not in name and "decoder" not in name
            else leaf * (1 + 0.1 * RNG.normal(size=leaf.shape)).astype(np.float32)
        )

    return jax.tree_util.tree_map_with_path(moved, start)


def inputs(batch=2):
    image = RNG.integers(0, 255, (batch, 128, 128, 3), np.uint8)
    return jnp.asarray(image), jnp.full((batch, 2), 128, jnp.int32)


def test_params_are_sams(model, small_model, small_params):
    start = msam_params(small_params, model)
    assert jax.tree.structure(start) == jax.tree.structure(model.init_params_shapes())
    row = small_params["prompt_encoder"]["no_mask_embed"]["embedding"]
    for name, count in CHANNELS:
        np.testing.assert_array_equal(
            start[f"no_mask_embed_{name}"]["embedding"], np.repeat(row, count, axis=0)
        )
    # At first every channel is SAM's single mask without a prompt.
    image, size = inputs(1)
    from samjax.models import Prompts

    logits, _ = jax.jit(lambda p: small_model.apply({"params": p}, image, size, Prompts.none(1)))(
        small_params
    )
    maps = jax.jit(lambda p: model.apply({"params": p}, image, size))(start)
    for name, count in CHANNELS:
        assert maps[name].shape == (1, count, 32, 32)
        for channel in range(count):
            np.testing.assert_allclose(maps[name][:, channel], logits[:, 0], atol=1e-5)


def test_channels_are_the_originals_decodings(model, params, small_config, torch_sam, small_params):
    """Each with its row as dense prompt, and with its task's decoder."""
    torch = pytest.importorskip("torch")
    image, size = inputs(2)
    embeddings = jax.jit(lambda p: model.apply({"params": p}, image, size, method="encode"))(params)
    for name, count in CHANNELS:
        ours = jax.jit(
            lambda p, e, name=name: model.apply({"params": p}, e, name, method="decode_task")
        )(params, embeddings)
        own = {
            **small_params,
            "mask_decoder": jax.tree.map(np.asarray, params[f"mask_decoder_{name}"]),
        }
        theirs = torch_sam(small_config, own)
        rows = np.asarray(params[f"no_mask_embed_{name}"]["embedding"])
        for i in range(2):
            embedding = torch.tensor(np.asarray(embeddings[i])).permute(2, 0, 1)[None]
            for channel in range(count):
                dense = torch.tensor(rows[channel])[None, :, None, None].expand(embedding.shape)
                with torch.no_grad():
                    masks, _ = theirs.mask_decoder(
                        embedding,
                        theirs.prompt_encoder.get_dense_pe(),
                        torch.zeros(1, 0, rows.shape[1]),
                        dense,
                        multimask_output=False,
                    )
                expected = masks[0, 0].numpy()
                bound = 1e-4 * expected.std()
                np.testing.assert_allclose(ours[i, channel], expected, atol=bound)


def adapted(model, params, rank_task=2, moved=True):
    settings = TALoRA(tasks=3, rank_in=4, rank_out=5, rank_task=rank_task)
    spec = PeftSpec((Rule("image_encoder/**/attn/qkv[q,v]", settings),))
    records = peft.attach(spec, model, params, jax.random.key(0))
    if moved:
        records = jax.tree.map(
            lambda x: x + 0.2 * RNG.normal(size=x.shape).astype(np.float32), records
        )
    return spec, records


def test_all_tasks_in_one_pass_are_single_passes(model, params):
    _, records = adapted(model, params)
    variables = {"params": params, "peft": records}
    image, size = inputs(2)
    together = jax.jit(lambda v: model.apply(v, image, size, jnp.arange(3), method="encode_tasks"))(
        variables
    )
    one = jax.jit(lambda v, task: model.apply(v, image, size, Context(task=task), method="encode"))
    singles = np.stack([one(variables, jnp.int32(task)) for task in range(3)])
    np.testing.assert_allclose(together, singles, atol=1e-5 * singles.std())
    assert one._cache_size() == 1  # one program for all tasks
    assert np.abs(singles[0] - singles[1]).max() > 1e-2 * singles.std()


def test_what_no_adapter_has_touched_is_computed_once(model, params):
    """By the FLOPs that two further tasks add to the pass of an encoder with two blocks."""
    image, size = inputs(1)

    def further(method):
        spec = method.spec(tasks=3)
        records = peft.attach(spec, model, params, jax.random.key(0))
        encode = jax.jit(lambda v, tasks: model.apply(v, image, size, tasks, method="encode_tasks"))
        one, three = (
            encode.lower({"params": params, "peft": records}, jnp.arange(n)).cost_analysis()
            for n in (1, 3)
        )
        return three["flops"] - one["flops"]

    assert further(MethodConfig("lora_hps")) == 0
    every = further(MethodConfig("ta_lora", rank=4, targets=("q", "v")))
    late = further(MethodConfig("ta_lora", rank=4, targets=("q", "v"), first_block=1))
    # Of 64 tokens of 32 channels: qkv, proj and the MLP. Attention is the rest of a block.
    block = 2 * 64 * (32 * 96 + 32 * 32 + 2 * 32 * 128)
    assert late / 2 > block and block < (every - late) / 2 < 2 * block


def test_merged_for_a_task_is_that_task(model, params):
    _, records = adapted(model, params)
    image, size = inputs(1)
    run = jax.jit(lambda v, task: model.apply(v, image, size, Context(task=task), method="encode"))
    for task in range(3):
        merged = peft.merge(model, params, records, Context(task=task))
        expected = run({"params": params, "peft": records}, jnp.int32(task))
        actual = run({"params": merged}, jnp.int32(task))
        np.testing.assert_allclose(actual, expected, atol=1e-4 * expected.std())
    with pytest.raises(ValueError, match=r"give its index, Context\(task=...\)"):
        peft.merge(model, params, records)


def test_a_further_task_adds_its_row_alone(model, params):
    counts = []
    for tasks in (3, 4):
        spec = PeftSpec((Rule("image_encoder/**/attn/qkv", TALoRA(tasks, 4, 4, 2)),))
        counts.append(peft.report(spec, model).adapter)
    assert counts[1] - counts[0] == 2 * 2  # rank_task numbers in each of two layers
