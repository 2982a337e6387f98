"""Merged weights are compared with the adapted model, and a wrong merge is seen."""

import jax
import numpy as np
import pytest

from samjax import peft
from samjax.peft import MethodConfig


@pytest.fixture(scope="module")
def adapted(small_model, small_params):
    """A LoRA adapter that does something, and what merging it gives."""
    spec = MethodConfig(decoder="none").spec()
    records = peft.attach(spec, small_model, small_params, jax.random.key(0))
    rng = np.random.default_rng(0)
    records = jax.tree.map(
        lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32) if x.ndim else x, records
    )
    return records, peft.merge(small_model, small_params, records)


def test_merged_weights_are_equal_up_to_rounding(adapted, small_model, small_params):
    differences = peft.verify_merge(small_model, small_params, *adapted)
    assert differences.keys() == {"embedding", "logits"}
    assert all(0 < difference < 1e-4 for difference in differences.values())


@pytest.mark.parametrize("wrong", ["not merged", "twice", "not finite"])
def test_a_wrong_merge_is_seen(adapted, small_model, small_params, wrong):
    records, merged = adapted
    if wrong == "not merged":
        merged = small_params
    elif wrong == "twice":
        merged = peft.merge(small_model, merged, records)
    else:
        merged = jax.tree.map(lambda x: x * np.float32(np.nan), merged)
    with pytest.raises(RuntimeError, match="merged weights do not equal the adapted model"):
        peft.verify_merge(small_model, small_params, records, merged)
