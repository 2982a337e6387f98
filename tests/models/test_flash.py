"""Flash attention: what is around the kernels, on a CPU. test_layers.py has the TPU's, emulated."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.models.flash import check_attention, fits, flash, fold_positions


def test_folded_products_are_scores_with_their_bias():
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(2, 3, 4, 5, 6)) for _ in range(2))
    bias_h, bias_w = rng.normal(size=(2, 3, 4, 5, 4)), rng.normal(size=(2, 3, 4, 5, 5))
    expected = np.einsum("bhyxd,bhvud->bhyxvu", q, k) / np.sqrt(6)
    expected += bias_h[..., :, None] + bias_w[..., None, :]
    queries, keys = fold_positions(*(jnp.float32(t) for t in (q, k, bias_h, bias_w)))
    scores = np.einsum("bhne,bhme->bhnm", queries, keys)
    np.testing.assert_allclose(scores, expected.reshape(2, 3, 20, 20), atol=1e-5)


def test_cudnn_gets_heads_of_one_width(monkeypatch):
    """The kernel's call, computed by XLA: (b, n, h, width) with widths that cuDNN takes."""
    torch = pytest.importorskip("torch")
    real, seen = jax.nn.dot_product_attention, []

    def spy(q, k, v, *, scale, implementation):
        seen.append((q.shape, k.shape, v.shape, implementation))
        return real(q, k, v, scale=scale, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 3, 20, d)).astype(np.float32) for d in (15, 15, 6))
    ours = flash("cudnn", jnp.asarray(q), jnp.asarray(k), jnp.asarray(v))
    assert seen == [((2, 20, 3, 16),) * 3 + ("cudnn",)]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(torch.tensor(t) for t in (q, k, v)), scale=1.0
    )
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


def test_what_fits_a_kernel(monkeypatch):
    assert fits("splash", 64 * 64, 192) and not fits("splash", 14 * 14, 92)
    gpu = types.SimpleNamespace(compute_capability="8.0")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    assert fits("cudnn", 14 * 14, 92) and not fits("cudnn", 64 * 64, 192)
    gpu.compute_capability = "9.0"
    assert fits("cudnn", 64 * 64, 192) and not fits("cudnn", 128 * 128, 320)


@pytest.mark.parametrize(
    ("kind", "dtype", "platform", "message"),
    [
        ("cudnn", "bfloat16", "cpu", "attention cudnn is a kernel for GPUs, and this is a CPU"),
        ("splash", "float32", "gpu", "attention splash is a kernel for TPUs, and this is a GPU"),
        ("cudnn", "float32", "gpu", "16 bits: set dtype to bfloat16"),
    ],
)
def test_kernels_are_refused_where_they_cannot_run(kind, dtype, platform, message):
    with pytest.raises(ValueError, match=message):
        check_attention(kind, dtype, platform)


@pytest.mark.parametrize("kind", ["chunked", "dense"])
def test_others_run_everywhere(kind):
    for platform in ("cpu", "gpu", "tpu"):
        check_attention(kind, "float32", platform)
