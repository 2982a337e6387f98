"""`samjax.load` and `samjax.load_adapted`."""

import jax
import numpy as np
import pytest

import samjax
from samjax import peft
from samjax.hashes import params_sha256
from samjax.peft import MethodConfig
from samjax.weights import save_checkpoint


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_parameters_are_float32_in_any_case(tmp_path, small_config, small_params, dtype):
    stored = jax.tree.map(lambda x: x.astype(dtype), small_params)
    save_checkpoint(tmp_path / "w", small_config, stored)
    model, params = samjax.load(tmp_path / "w")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}

    spec = MethodConfig().spec()
    adapter = peft.attach(spec, model, params, jax.random.key(0))
    variables = {"params": params, "peft": adapter}
    peft.save(tmp_path / "a.safetensors", spec, model, variables, params_sha256(params))
    _, again, records = samjax.load_adapted(tmp_path / "w", tmp_path / "a.safetensors")
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))
    assert jax.tree.structure(records) == jax.tree.structure(adapter)


def test_an_adapter_brings_its_input_size(tmp_path, small_config, small_params, caplog):
    save_checkpoint(tmp_path / "w", small_config, small_params)
    model, params = samjax.load(tmp_path / "w", image_size=96)
    spec = MethodConfig().spec()
    variables = {"params": params, "peft": peft.attach(spec, model, params, jax.random.key(0))}
    peft.save(tmp_path / "a.safetensors", spec, model, variables, params_sha256(params))
    assert samjax.load(tmp_path / "w")[0].config.image_size == 128
    for given, size in ((None, 96), (64, 64)):
        files = tmp_path / "w", tmp_path / "a.safetensors"
        with caplog.at_level("INFO", "samjax"):
            assert samjax.load_adapted(*files, image_size=given)[0].config.image_size == size
        said = caplog.messages.pop()
        assert said.startswith(f"{tmp_path / 'a.safetensors'}: adapter at 2 sites, ")
        assert said.endswith(" trained numbers, for small, trained at 96 px")


@pytest.mark.parametrize(
    ("trained", "decoder", "told"), [(False, "all", 1), (True, "all", 0), (False, "none", 0)]
)
def test_masks_that_were_not_trained_are_told_of(
    tmp_path, small_model, small_params, caplog, trained, decoder, told
):
    save_checkpoint(tmp_path / "w", small_model.config, small_params)
    spec = MethodConfig(decoder=decoder).spec()
    tree = peft.attach(spec, small_model, small_params, jax.random.key(0))
    variables = {"params": small_params, "peft": tree}
    file = tmp_path / "a.safetensors"
    base = params_sha256(small_params)
    peft.save(file, spec, small_model, variables, base, {"multimask": trained})
    with caplog.at_level("INFO", "samjax"):
        samjax.load_adapted(tmp_path / "w", file)
    assert sum("were not trained" in said for said in caplog.messages) == told
