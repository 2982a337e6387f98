"""SAMed's files: what its wrapper computes, and what is refused."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax import peft as peft_lib
from samjax.hashes import params_sha256
from samjax.models import MODELS, Prompts, Sam
from samjax.peft import LoRA, PeftSpec, Rule, Train, huggingface, samed, to_huggingface

RANK = 3


@pytest.fixture(scope="module")
def adapted(small_torch):
    """The original's model with SAMed's LoRA in it, and the tensors that SAMed saves."""
    import torch

    class Wrapped(torch.nn.Module):
        """A fused qkv with an update of its first and of its last third."""

        def __init__(self, qkv):
            super().__init__()
            self.qkv, width = qkv, qkv.in_features
            self.pairs = [
                (torch.randn(RANK, width) / 6, torch.randn(width, RANK) / 6) for _ in range(2)
            ]

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            first, last = (x @ a.T @ b.T for a, b in self.pairs)
            return torch.cat([q + first, k, v + last], dim=-1)

    torch.manual_seed(0)
    model = copy.deepcopy(small_torch)
    tensors, count = {}, 0
    for block in model.image_encoder.blocks:
        block.attn.qkv = Wrapped(block.attn.qkv)
        for a, b in block.attn.qkv.pairs:
            tensors |= {f"w_a_{count:03d}": a, f"w_b_{count:03d}": b}
            count += 1
    for part in (model.prompt_encoder, model.mask_decoder):
        for parameter in part.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    tensors |= {
        name: tensor
        for name, tensor in model.state_dict().items()
        if "prompt_encoder" in name or "mask_decoder" in name
    }
    return model, tensors


@pytest.fixture
def saved(adapted, tmp_path):
    """`saved(**changes)`: the path of SAMed's file; a tensor that is None is left out."""
    import torch

    def save(**changes):
        tensors = {k: v for k, v in (adapted[1] | changes).items() if v is not None}
        torch.save(tensors, tmp_path / "epoch_159.pth")
        return tmp_path / "epoch_159.pth"

    return save


def test_samed_computes_the_same(adapted, saved, tmp_path, small_model, small_params):
    import torch

    spec, variables = samed.load(saved(), small_model, small_params)
    assert spec == PeftSpec(
        (
            Rule("image_encoder/blocks_*/attn/qkv[q,v]", LoRA(RANK)),
            Rule("prompt_encoder/**", Train()),
            Rule("mask_decoder/**", Train("decoder")),
        )
    )
    model = adapted[0]
    x = np.random.default_rng(0).standard_normal((1, 128, 128, 3), np.float32)
    with torch.no_grad():
        embedding = model.image_encoder(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
        sparse, dense = model.prompt_encoder(points=None, boxes=None, masks=None)
        masks, _ = model.mask_decoder(
            image_embeddings=embedding,
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
    prompts = Prompts(jnp.zeros((1, 0, 2)), jnp.zeros((1, 0), jnp.int32))
    apply = jax.jit(small_model.apply, static_argnames="method")
    ours = apply(variables, x, method="encode_normalized")
    logits, _ = apply(variables, ours, prompts, method="decode")
    for a, b in ((jnp.moveaxis(ours, -1, 1), embedding), (logits[:, 1:], masks)):
        assert np.abs(a - b.numpy()).max() < 1e-4 * b.numpy().std()

    file = tmp_path / "adapter.safetensors"
    peft_lib.save(file, spec, small_model, variables, params_sha256(small_params))
    params, records = peft_lib.load(file, small_model, small_params)
    jax.tree.map(np.testing.assert_array_equal, {"params": params, "peft": records}, variables)
    # And on to peft.
    to_huggingface.save(tmp_path / "folder", spec, small_model, variables)
    _, again = huggingface.load(tmp_path / "folder", small_model, small_params)
    jax.tree.map(np.testing.assert_array_equal, again["params"], variables["params"])


def test_a_decoder_of_more_classes(saved, small_model, small_params):
    import torch

    tokens = {"mask_decoder.mask_tokens.weight": torch.zeros(9, 32)}
    more = {f"mask_decoder.output_hypernetworks_mlps.{i}.layers.0.bias": torch.zeros(32)
            for i in range(4, 9)}  # fmt: skip
    path = saved(**tokens, **more)
    with pytest.raises(ValueError, match=r"has 9 mask tokens .* --without-decoder"):
        samed.load(path, small_model, small_params)
    spec, variables = samed.load(path, small_model, small_params, factors_only=True)
    assert spec == PeftSpec((Rule("image_encoder/blocks_*/attn/qkv[q,v]", LoRA(RANK)),))
    jax.tree.map(np.testing.assert_array_equal, variables["params"], small_params)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"w_a_000": None}, "is no file of SAMed: it lacks w_a_000"),
        ({"w_b_003": None}, "holds 7 factors, and q and v in each of the 2 blocks of small have 8"),
        ({"w_a_004": (3, 32)}, "holds 9 factors"),
        ({"w_a_001": (2, 32)}, "factors of w_a_001 have the ranks 2 and 3 where 3 is said"),
        ({"w_b_002": (48, 3)}, r"a factor of w_a_002 is \[48, 3\] where these weights take"),
        ({"w_a_000": ()}, "have 0 and 2 axes"),
        ({"sa_a_000": (3, 32)}, r"1 tensors that SAMed does not write \(sa_a_000\)"),
        ({"mask_decoder.iou_token.weight": None}, "1 tensors are missing"),
        ({"mask_decoder.iou_token.weight": (1, 16)}, r"is \[1, 16\] where these weights have"),
        ({"prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 16)},
         "gaussian_matrix is not that of these weights"),
    ],
)  # fmt: skip
def test_what_does_not_fit(saved, small_model, small_params, changes, match):
    import torch

    path = saved(**{k: v if v is None else torch.zeros(v) for k, v in changes.items()})
    with pytest.raises(ValueError, match=match) as info:
        samed.load(path, small_model, small_params)
    assert "\n" not in str(info.value)


def test_numbers_that_are_not_finite_and_files_that_are_not_there(saved, small_model, small_params):
    import torch

    path = saved(w_a_001=torch.full((RANK, 32), torch.inf))
    with pytest.raises(ValueError, match="blocks_0/attn/qkv/a is not finite"):
        samed.load(path, small_model, small_params)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"epoch_159\.pth cannot be read"):
        samed.load(path, small_model, small_params)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        samed.load(path.with_name("none.pth"), small_model, small_params)


def test_a_tiny_vit_is_refused(saved):
    tiny = Sam(dataclasses.replace(MODELS["vit_t"], name="tiny"))
    with pytest.raises(ValueError, match="SAMed adapts SAM's ViT, and tiny has a TinyViT"):
        samed.load(saved(), tiny, {})
