"""A record for each task is the record of that task alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.nn import Context, Segments, Site, SiteInfo
from samjax.peft.lora import LoRA
from samjax.peft.per_task import PerTask
from samjax.peft.ssf import SSF

RNG = np.random.default_rng(0)


def site():
    kernel = jnp.asarray(RNG.normal(size=(10, 12)), jnp.float32)
    info = SiteInfo(
        "image_encoder/blocks_0/attn/qkv",
        "dense",
        kernel.shape,
        segments=Segments(("q", "k", "v"), "thirds", 2),
    )
    bias = jnp.asarray(RNG.normal(size=12), jnp.float32)
    return Site(info, kernel, bias, lambda x, kernel, bias: x @ kernel + bias)


@pytest.mark.parametrize(("method", "segments"), [(LoRA(2), ("q", "v")), (SSF(), ())])
def test_each_task_has_its_own(method, segments):
    where = site()
    delta = PerTask(method, 3).init(jax.random.key(0), where, segments)
    delta = jax.tree.map(lambda x: x + 0.3 * jnp.asarray(RNG.normal(size=x.shape), x.dtype), delta)
    x = jnp.asarray(RNG.normal(size=(2, 5, 10)), jnp.float32)
    outputs = []
    for task in range(3):
        single = jax.tree.map(lambda leaf, task=task: leaf[task], delta.tasks)
        ctx = Context(task=jnp.int32(task))
        outputs.append(single(where, x, Context()))
        np.testing.assert_allclose(delta(where, x, ctx), outputs[-1], atol=1e-6)
        for one, other in zip(
            delta.merge(where.info, where.kernel, where.bias, ctx),
            single.merge(where.info, where.kernel, where.bias, Context()),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)
    assert np.abs(outputs[0] - outputs[1]).max() > 0.01


def test_a_vector_of_each_task_does_not_decay():
    delta = PerTask(SSF(), 3).init(jax.random.key(0), site(), ())
    single = SSF().init(jax.random.key(0), site(), ())
    assert jax.tree.leaves(delta.decays()) == jax.tree.leaves(single.decays())
    lora = PerTask(LoRA(2), 3).init(jax.random.key(0), site(), ())
    assert True in jax.tree.leaves(lora.decays())


def test_without_a_task_it_says_so():
    delta = PerTask(LoRA(2), 3).init(jax.random.key(0), site(), ())
    with pytest.raises(ValueError, match="a record for each task: give its index"):
        delta(site(), jnp.zeros((1, 10)), Context())
    with pytest.raises(ValueError, match="tasks must be at least 1"):
        PerTask(LoRA(2), 0)
