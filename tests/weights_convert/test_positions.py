"""Position tables resampled for good: as torch does it, and the same function as at run time."""

import dataclasses

import jax
import numpy as np
import pytest

from samjax.models import MODELS, Prompts, Sam
from weights_convert.positions import for_own_input


@pytest.mark.parametrize("size", [96, (96, 160)])
def test_computes_what_the_model_computes_with_its_own_tables(small_config, small_params, size):
    rng = np.random.default_rng(0)
    config = small_config.with_image_size(size)
    baked, params = for_own_input(config, small_params)
    assert baked.image_encoder.position_grid == config.grid
    assert dataclasses.replace(baked, image_encoder=config.image_encoder) == config
    shape = config.frame.shape
    image = rng.integers(0, 256, (1, *shape, 3), np.uint8)
    args = jax.numpy.asarray(image), jax.numpy.array([shape], jax.numpy.int32), Prompts.none(1)
    outputs = [
        np.asarray(jax.jit(Sam(c).apply)({"params": p}, *args)[0])
        for c, p in ((config, small_params), (baked, params))
    ]
    assert np.abs(outputs[0] - outputs[1]).max() <= 1e-5 * outputs[0].std()


def test_resamples_as_torch_does(small_config, small_params):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    _, params = for_own_input(small_config.with_image_size((96, 160)), small_params)
    before, after = (tree["image_encoder"] for tree in (small_params, params))
    table = torch.tensor(before["pos_embed"]).permute(0, 3, 1, 2)
    expected = functional.interpolate(table, (6, 10), mode="bicubic").permute(0, 2, 3, 1)
    np.testing.assert_allclose(after["pos_embed"], expected.numpy(), atol=1e-6)
    for name, length in (("rel_pos_h", 11), ("rel_pos_w", 19)):
        table = torch.tensor(before["blocks_1"]["attn"][name]).T[None]
        expected = functional.interpolate(table, length, mode="linear")[0].T
        np.testing.assert_allclose(after["blocks_1"]["attn"][name], expected.numpy(), atol=1e-6)
        assert after["blocks_0"]["attn"][name] is before["blocks_0"]["attn"][name]  # of windows


def test_leaves_alone_what_fits(small_config, small_params):
    assert for_own_input(small_config, small_params) == (small_config, small_params)
    assert for_own_input(MODELS["vit_t"], {}) == (MODELS["vit_t"], {})
