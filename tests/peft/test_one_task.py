"""A trained model of dense tasks, folded for one of them: SAM's weights, and what is left over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax import peft
from samjax.models import MSam, Prompts

IMAGE = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 128, 128, 3), np.uint8))
SIZE = jnp.array([[128, 128]], jnp.int32)


@pytest.fixture(scope="module")
def maps(dense):
    """Of all tasks, by the adapted model."""
    _, model, variables = dense
    return jax.device_get(jax.jit(lambda v: model.apply(v, IMAGE, SIZE))(variables))


def one_of(dense, base, task):
    _, model, variables = dense
    return peft.one_task(model, variables["params"], variables["peft"], base, task)


def assert_close(actual, expected):
    bound = 1e-5 * np.std(expected)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=bound)


def test_a_task_of_one_channel_is_a_sam(
    dense, maps, small_config, small_model, small_params, torch_sam
):
    torch = pytest.importorskip("torch")
    run = jax.jit(lambda p: small_model.apply({"params": p}, IMAGE, SIZE, Prompts.none(1))[0])
    picture = torch.tensor(np.asarray(IMAGE[0])).permute(2, 0, 1).float()
    for task in ("depth", "edges"):
        one = one_of(dense, small_params, task)
        assert one.spec is None and not isinstance(one.model, MSam)
        assert_close(run(one.sam_params)[:, :1], maps[task])
        theirs = torch_sam(small_config, jax.tree.map(np.asarray, one.sam_params))
        batch = [{"image": picture, "original_size": (128, 128)}]
        with torch.no_grad():
            logits = theirs(batch, multimask_output=False)[0]["low_res_logits"]
        bound = 1e-4 * maps[task].std()
        np.testing.assert_allclose(logits.numpy(), maps[task], atol=bound)
        # Points and boxes are embedded as before.
        ours, base = ({**p["prompt_encoder"]} for p in (one.sam_params, small_params))
        assert (
            ours.pop("no_mask_embed")["embedding"] != base.pop("no_mask_embed")["embedding"]
        ).any()
        jax.tree.map(np.testing.assert_array_equal, ours, base)


def test_of_several_channels_rows_and_decoder_stay(dense, maps, small_params):
    one = one_of(dense, small_params, "normals")
    for name in ("prompt_encoder", "mask_decoder"):
        jax.tree.map(np.testing.assert_array_equal, one.sam_params[name], small_params[name])
    assert [task.name for task in one.model.tasks] == ["normals"]
    found = jax.jit(lambda p: one.model.apply({"params": p}, IMAGE, SIZE))(one.params)
    assert_close(found["normals"], maps["normals"])
    trained = peft.report(one.spec, one.model)
    assert trained.trainable == trained.decoder and trained.adapter == 0


def test_a_wrong_merge_is_seen(dense, small_params):
    _, model, variables = dense
    depth = one_of(dense, small_params, "depth")

    def verify(task, one):
        return peft.verify_task_merge(
            model, variables["params"], variables["peft"], task, one.model, one.params
        )

    differences = verify("depth", depth)
    assert differences.keys() == {"embedding", "maps"}
    assert all(0 < difference < 1e-4 for difference in differences.values())
    with pytest.raises(RuntimeError, match="the embedding of a test image differs by"):
        verify("edges", depth)


def test_merge_takes_the_name_of_a_task(dense, small_model, small_params):
    _, model, variables = dense
    with pytest.raises(ValueError, match="no task 'normal'; the nearest is normals"):
        peft.merge(model, variables["params"], variables["peft"], task="normal")
    with pytest.raises(ValueError, match="small here predicts masks and has no task 'depth'"):
        peft.merge(small_model, small_params, {}, task="depth")
