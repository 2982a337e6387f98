"""Counts against formulas written out by hand."""

import jax
import jax.numpy as jnp
import pytest

from samjax.flops import count_flops
from samjax.models.attention import attend_map


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_chain_of_products():
    def chain(a, b, c):
        return jnp.tanh(a @ b) @ c + 1.0

    counted = count_flops(jax.jit(chain), shape(5, 2, 3), shape(3, 7), shape(7, 4))
    assert counted == 2 * 5 * 2 * (3 * 7 + 7 * 4)


def test_loops_count_as_often_as_they_turn():
    def layers(x, kernels):
        x = jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0]
        x = jax.lax.fori_loop(0, 6, lambda _, x: x @ kernels[0], x)
        return jax.lax.map(lambda row: kernels[0] @ row, x)

    counted = count_flops(layers, shape(2, 3), shape(5, 3, 3))
    assert counted == 2 * 2 * 3 * 3 * (5 + 6 + 1)


@pytest.mark.parametrize("kind", ["dense", "chunked"])
def test_attention_in_chunks(kind):
    batch, heads, height, width, dim = 2, 3, 32, 48, 8

    def attention(*args):
        return attend_map(*args, kind)

    maps = [shape(batch, heads, height, width, dim)] * 3
    args = (*maps, shape(2 * height - 1, dim), shape(2 * width - 1, dim))
    assert ("scan" in str(jax.make_jaxpr(attention)(*args))) == (kind == "chunked")
    tokens = height * width
    scores_and_values = 2 * tokens * tokens
    positions = tokens * (height + width)
    counted = count_flops(attention, *args)
    assert counted == 2 * batch * heads * dim * (scores_and_values + positions)


def test_gradient_recomputes_a_checkpoint():
    def loss(kernel, x):
        return jnp.sin(jax.checkpoint(lambda kernel: jnp.sin(x @ kernel) @ kernel)(kernel)).sum()

    one = 2 * 4 * 5 * 5
    counted = count_flops(jax.grad(loss), shape(5, 5), shape(4, 5))
    # Forward 2, the first again, and backward: the kernel's part of both, the input's of one.
    assert counted == one * (2 + 1 + 3)


@pytest.mark.parametrize(("groups", "channels"), [(1, 6), (2, 3), (6, 1)])
def test_convolutions(groups, channels):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    counted = count_flops(convolve, shape(1, 8, 10, 6), shape(3, 3, channels, 12))
    assert counted == 2 * (4 * 5 * 12) * (3 * 3 * channels)


def test_what_nothing_reads_does_not_count():
    def waste(x, kernels):
        def layer(x, kernel):
            return x @ kernel, kernel @ kernel  # the second is stacked, and read by nothing

        def checkpointed(x):
            return x.sum(), x @ x.T

        kernels[0] @ kernels[1]
        return jax.checkpoint(checkpointed)(jax.lax.scan(layer, x, kernels)[0])[0]

    assert count_flops(waste, shape(2, 3), shape(5, 3, 3)) == 5 * 2 * 2 * 3 * 3


def test_conditionals_count_the_costliest_branch():
    def either(flag, x):
        return jax.lax.cond(flag, lambda x: x @ x, lambda x: x @ x @ x, x)

    flag = jax.ShapeDtypeStruct((), jnp.bool_)
    assert count_flops(either, flag, shape(4, 4)) == 2 * 2 * 4**3


def test_unknown_turns_are_refused():
    def power(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="while_loop"):
        count_flops(power, shape(4, 4))
    assert count_flops(lambda x: jax.lax.while_loop(lambda x: x < 9, lambda x: x + 1, x), 1.0) == 0
