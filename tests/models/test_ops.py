"""Derivatives written by hand against torch's, in float64 there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax import ops

RNG = np.random.default_rng(0)


def gradients(function, *arrays: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The output in float32 and the gradients of its sum of sines."""
    arguments = [jnp.asarray(array, jnp.float32) for array in arrays]
    every = tuple(range(len(arrays)))
    found = jax.grad(lambda *args: jnp.sum(jnp.sin(function(*args))), argnums=every)(*arguments)
    return np.asarray(function(*arguments)), [np.asarray(g) for g in found]


def torch_gradients(function, *arrays: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    torch = pytest.importorskip("torch")
    arguments = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in arrays]
    out = function(*arguments)
    torch.sin(out).sum().backward()
    return out.detach().numpy(), [argument.grad.numpy() for argument in arguments]


def assert_same(ours, theirs) -> None:
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def functional():
    return pytest.importorskip("torch").nn.functional


def test_gelu_is_torchs_and_keeps_one_array():
    x = np.concatenate([RNG.normal(size=500) * 3, [0, -0.0, 30, -30]])
    assert_same(gradients(ops.gelu, x), torch_gradients(lambda x: functional().gelu(x), x))
    pull = jax.eval_shape(lambda x: jax.vjp(ops.gelu, x)[1], jnp.ones((5, 7)))
    assert [leaf.shape for leaf in jax.tree.leaves(pull)] == [(5, 7)]


@pytest.mark.parametrize("scale", [1.0, 1e-3, 100.0])
def test_standardize_is_torchs_layer_norm(scale):
    x = RNG.normal(size=(2, 3, 24)) * scale + 0.5 * scale
    layer_norm = lambda x: functional().layer_norm(x, (24,), eps=1e-6)  # noqa: E731
    ours, theirs = gradients(lambda x: ops.standardize(1e-6, x), x), torch_gradients(layer_norm, x)
    np.testing.assert_allclose(ours[0], theirs[0], atol=2e-5)
    np.testing.assert_allclose(ours[1][0] * scale, theirs[1][0] * scale, atol=2e-5)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6), (1, 9), (9, 1)])
def test_matmul_is_torchs_whichever_side_is_thin(shape):
    x, kernel = RNG.normal(size=(2, 3, 4, shape[0])), RNG.normal(size=shape)
    assert_same(gradients(ops.matmul, x, kernel), torch_gradients(lambda x, w: x @ w, x, kernel))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(8, 7), (9, 12)])
def test_depthwise_is_torchs_grouped_convolution(stride, size):
    x, kernel = RNG.normal(size=(2, *size, 5)), RNG.normal(size=(3, 3, 1, 5))

    def theirs(x, kernel):
        x, kernel = x.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1)
        y = functional().conv2d(x, kernel, stride=stride, padding=1, groups=5)
        return y.permute(0, 2, 3, 1)

    ours = gradients(lambda x, kernel: ops.depthwise(stride, x, kernel), x, kernel)
    assert_same(ours, torch_gradients(theirs, x, kernel))


def test_gradients_keep_half_precision_and_several_at_once():
    """bfloat16 in, bfloat16 out; a leading axis of adapters goes through `vmap`."""
    x = jnp.asarray(RNG.normal(size=(4, 6)), jnp.bfloat16)
    kernels = jnp.asarray(RNG.normal(size=(3, 6, 2)), jnp.bfloat16)

    def loss(kernel):
        return ops.gelu(ops.matmul(ops.standardize(1e-6, x), kernel)).sum()

    together = jax.vmap(jax.grad(loss))(kernels)
    assert together.dtype == jnp.bfloat16
    apart = jnp.stack([jax.grad(loss)(kernel) for kernel in kernels])
    np.testing.assert_allclose(
        together.astype(jnp.float32), apart.astype(jnp.float32), rtol=0.02, atol=0.02
    )
