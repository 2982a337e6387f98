"""Adapters of HuggingFace's peft: real ones in transformers' `SamModel`, there and back."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from samjax import peft as peft_lib
from samjax.hashes import params_sha256
from samjax.models import MODELS, Prompts, Sam, TinyVitConfig
from samjax.peft import (
    DoRA,
    Freeze,
    LoRA,
    LoRAConv,
    PeftSpec,
    Rule,
    Stack,
    Train,
    huggingface,
    to_huggingface,
)
from samjax.preprocess import normalize, prepare_image
from samjax.weights import write_weights

# peft asks transformers for what newer versions of it call by another name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")

BOUND = 1e-4  # of the standard deviation of transformers' own outputs
QKV = r"vision_encoder\.layers\.\d+\.attn\.qkv"
ATTENTION = ["qkv", "attn.proj", "q_proj", "k_proj", "v_proj", "out_proj"]
BOX = [[20.0, 30.0], [80.0, 100.0]]


@pytest.fixture(scope="module")
def library():
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory, small_config, small_params):
    """A folder with the small model for transformers."""
    folder = tmp_path_factory.mktemp("base") / "hf"
    write_weights(folder, small_config, small_params, "hf")
    return folder


@pytest.fixture(scope="module")
def theirs(library, base):
    """`theirs()` is a fresh `SamModel`."""
    import transformers

    return lambda: transformers.SamModel.from_pretrained(base).eval()


@pytest.fixture(scope="module")
def make(library, theirs, tmp_path_factory):
    """`make(**config)`: a folder that peft saved, with random numbers, and the model in it."""
    import torch

    def build(**config):
        torch.manual_seed(0)
        model = library.get_peft_model(theirs(), library.LoraConfig(**config)).eval()
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)
            elif parameter.requires_grad and "positional_embedding" not in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        folder = tmp_path_factory.mktemp("peft") / "adapter"
        model.save_pretrained(folder)
        return folder, model

    return build


@pytest.fixture(scope="module")
def outputs_of(small_config):
    """`outputs_of(model)` of transformers: embedding, logits of three masks and their IoU."""
    import torch

    rng = np.random.default_rng(1)
    image, size = prepare_image(rng.integers(0, 256, (128, 96, 3), np.uint8), small_config.frame)
    args = jnp.asarray(image[None]), jnp.asarray(size[None])
    config = small_config
    pixels = normalize(*args, config.normalization, config.pixel_mean, config.pixel_std)
    pixels = torch.from_numpy(np.asarray(pixels).transpose(0, 3, 1, 2).copy())

    def run(model):
        boxes = torch.tensor([[np.ravel(BOX).tolist()]])
        with torch.no_grad():
            inner = model
            if hasattr(model, "merge_and_unload"):
                # peft's wrapper of a module cannot be called by names, as SamModel calls its parts.
                saved = model.peft_config["default"].modules_to_save
                inner = copy.deepcopy(model).merge_and_unload() if saved else model.get_base_model()
            embedding = inner.get_image_embeddings(pixels)
            out = inner(image_embeddings=embedding, input_boxes=boxes, multimask_output=True)
        return embedding.numpy().transpose(0, 2, 3, 1), out.pred_masks[0], out.iou_scores[0]

    return run, args


@pytest.fixture(scope="module")
def compare(outputs_of, small_model):
    """`compare(variables, model)`: differences in deviations of transformers' outputs."""
    run, args = outputs_of
    prompts = Prompts(jnp.asarray([BOX]), jnp.asarray([[2, 3]], jnp.int32))

    @jax.jit
    def apply(variables):
        embedding = small_model.apply(variables, *args, method="encode")
        return embedding, *small_model.apply(variables, embedding, prompts, method="decode")

    def differences(variables, model, merged=True):
        params, records = (jax.tree.map(jnp.asarray, variables[k]) for k in ("params", "peft"))
        if merged:  # else each structure of records would compile anew
            variables = {"params": peft_lib.merge(small_model, params, records)}
        embedding, logits, iou = apply(variables)
        pairs = zip((embedding, logits[:, 1:], iou[:, 1:]), run(model), strict=True)
        return [float(np.abs(a - np.asarray(b)).max() / np.asarray(b).std()) for a, b in pairs]

    return differences


CASES = {
    "qkv": {"target_modules": ["qkv"], "r": 3, "lora_alpha": 5},
    "all attention and MLPs": {"target_modules": [*ATTENTION, "lin1", "lin2"], "r": 2},
    "convolutions": {"target_modules": ["conv1", "conv2", "projection"], "r": 4},
    "patterns and rsLoRA": {
        "target_modules": ["qkv", "attn.proj", "lin1"],
        "r": 4,
        "lora_alpha": 3,
        "rank_pattern": {"attn.proj": 2, r"layers\.1\..*lin1": 6},
        "alpha_pattern": {r"vision_encoder.layers.0.attn.qkv": 7.5},
        "use_rslora": True,
    },
    "DoRA": {"target_modules": ["qkv", "lin2"], "r": 2, "use_dora": True},
    "trained decoder": {
        "target_modules": QKV,
        "r": 2,
        "modules_to_save": ["mask_decoder", "prompt_encoder"],
    },
    "trained neck": {"target_modules": ["lin1"], "r": 2, "modules_to_save": ["neck"]},
    # Ranks above what the last layers of the decoder's MLPs can have.
    "all linear": {"target_modules": "all-linear", "r": 40, "lora_alpha": 12},
}


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same(make, compare, tmp_path, small_model, small_params, theirs, case):
    folder, model = make(**CASES[case])
    spec, variables = huggingface.load(folder, small_model, small_params)
    differences = compare(variables, model, merged=case != "patterns and rsLoRA")
    assert max(differences) < BOUND, differences
    assert compare(variables, theirs())[1] > 0.01  # the adapter does something

    # As an adapter file.
    file = tmp_path / "adapter.safetensors"
    peft_lib.save(file, spec, small_model, variables, params_sha256(small_params))
    params, records = peft_lib.load(file, small_model, small_params)
    again = {"params": params, "peft": records}
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_the_spec_is_short(make, small_model, small_params):
    folder, _ = make(**CASES["trained decoder"])
    spec, variables = huggingface.load(folder, small_model, small_params)
    assert spec == PeftSpec(
        (
            Rule("image_encoder/blocks_*/attn/qkv", LoRA(2, 8.0)),
            Rule("mask_decoder/**", Train("decoder")),
            Rule("prompt_encoder/**", Train()),
        )
    )
    spec, variables = huggingface.load(folder, small_model, small_params, factors_only=True)
    assert len(spec.rules) == 1
    jax.tree.map(np.testing.assert_array_equal, variables["params"], small_params)


SPECS = {
    "q and v": [Rule("image_encoder/**/attn/qkv[q,v]", LoRA(3, 5.0))],
    "k at one rank, all of the rest at others": [
        Rule("image_encoder/blocks_0/attn/qkv[k]", LoRA(2, 3.0, rank_stabilized=True)),
        Rule("image_encoder/**/attn/*", LoRA(4, dropout=0.1)),
        Rule("image_encoder/{neck_2,patch_embed/proj}", LoRAConv(2, 7.0)),
    ],
    "decoder trained and adapted": [
        Rule("image_encoder/**/mlp/*", LoRA(2)),
        Rule("mask_decoder/**/q_proj", LoRA(2)),
        Rule("mask_decoder/iou_prediction_head/**", Freeze()),
        Rule("mask_decoder/**", Train("decoder")),
    ],
    "stack": [Rule("image_encoder/**/qkv[v]", Stack((LoRA(2, 1.0), LoRA(3, 9.0))))],
    "DoRA": [
        Rule("image_encoder/**/attn/qkv[q,v]", DoRA(2, 3.0)),
        Rule("image_encoder/**/attn/proj", DoRA(3)),
    ],
}


def draw(spec, model, params):
    """Variables of a spec with random trained leaves."""
    variables = {"params": params, "peft": peft_lib.attach(spec, model, params, jax.random.key(0))}
    mask = peft_lib.trainable(spec, model, variables)
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda x, t: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32) if t else x,
        variables,
        mask,
    )


@pytest.mark.parametrize("case", SPECS)
def test_peft_loads_what_is_saved(
    library, theirs, compare, tmp_path, small_model, small_params, case
):
    spec = PeftSpec(tuple(SPECS[case]))
    variables = draw(spec, small_model, small_params)
    to_huggingface.save(tmp_path / "folder", spec, small_model, variables)
    model = library.PeftModel.from_pretrained(theirs(), tmp_path / "folder").eval()
    differences = compare(variables, model)
    assert max(differences) < BOUND, differences
    assert compare(variables, theirs())[1] > 0.01
    _, back = huggingface.load(tmp_path / "folder", small_model, small_params)
    assert max(compare(back, model)) < BOUND
    # And what peft saves again.
    model.save_pretrained(tmp_path / "again")
    _, again = huggingface.load(tmp_path / "again", small_model, small_params)
    jax.tree.map(np.testing.assert_array_equal, again, back)


def test_rank_of_segments(tmp_path, small_model, small_params):
    spec = PeftSpec(tuple(SPECS["q and v"]))
    record = to_huggingface.save(
        tmp_path / "folder", spec, small_model, draw(spec, small_model, small_params)
    )
    assert record["r"] == 6 and record["lora_alpha"] == pytest.approx(10)
    tensors = safetensors.numpy.load_file(tmp_path / "folder/adapter_model.safetensors")
    b = tensors["base_model.model.vision_encoder.layers.0.attn.qkv.lora_B.weight"]
    blocks = b.reshape(3, 32, 2, 3)
    zero = np.array([[not blocks[i, :, j].any() for j in range(2)] for i in range(3)])
    assert np.array_equal(zero, [[False, True], [True, True], [True, False]])


@pytest.mark.parametrize("factor", [-0.5, 0.0])
def test_a_scale_that_alpha_cannot_say(tmp_path, small_model, small_params, factor):
    rules = (
        Rule("image_encoder/**/qkv[q,v]", LoRA(2, 5.0)),
        Rule("image_encoder/neck_0", LoRAConv(2)),
    )
    spec = PeftSpec(rules)
    variables = draw(spec, small_model, small_params)
    variables["peft"] = peft_lib.scale(variables["peft"], factor)
    to_huggingface.save(tmp_path / "folder", spec, small_model, variables)
    _, back = huggingface.load(tmp_path / "folder", small_model, small_params)
    merged = [
        peft_lib.merge(small_model, small_params, tree)
        for tree in (variables["peft"], back["peft"])
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *merged)


@pytest.mark.parametrize(("rates", "expected"), [((0.1, 0.1), 0.1), ((0.1, 0.2), 0.0)])
def test_dropout_of_a_stack(tmp_path, small_model, small_params, rates, expected):
    stack = Stack(tuple(LoRA(2, dropout=rate) for rate in rates))
    spec = PeftSpec((Rule("image_encoder/**/qkv[v]", stack),))
    variables = draw(spec, small_model, small_params)
    record = to_huggingface.save(tmp_path / "folder", spec, small_model, variables)
    assert record["lora_dropout"] == expected


@pytest.mark.parametrize(
    ("rules", "match"),
    [
        ([Rule("image_encoder/**/bias", Train())], "leaves .* of the image encoder would not be"),
        ([Rule("mask_decoder/**", Train())], "only trains the model's own leaves"),
        (
            [Rule("image_encoder/**/norm*", peft_lib.SSF())],
            r"image_encoder/blocks_0/norm1: peft has nothing that computes SSFDelta",
        ),
        (
            [
                Rule("image_encoder/**/proj", LoRA(2)),
                Rule("image_encoder/**/qkv", DoRA(2)),
            ],
            "DoRA at all sites or at none, and image_encoder/.*/proj is LoRA",
        ),
    ],
)
def test_what_peft_cannot_say(tmp_path, small_model, small_params, rules, match):
    spec = PeftSpec(tuple(rules))
    with pytest.raises(ValueError, match=match) as info:
        to_huggingface.save(
            tmp_path / "folder", spec, small_model, draw(spec, small_model, small_params)
        )
    assert "samjax merge" in str(info.value)
    assert list(tmp_path.iterdir()) == []


def test_where_it_cannot_be_saved(tmp_path, small_model):
    tiny = Sam(dataclasses.replace(MODELS["vit_t"], name="tiny"))
    with pytest.raises(ValueError, match="no class for tiny, whose image encoder is a TinyViT"):
        to_huggingface.save(tmp_path / "folder", PeftSpec(()), tiny, {})
    (tmp_path / "used").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        to_huggingface.save(tmp_path / "used", PeftSpec(()), small_model, {})


@pytest.fixture
def editable(make, tmp_path):
    """`editable(config, tensors)` is a copy of a folder with changes; None removes a key."""
    source, _ = make(target_modules=["qkv"], r=2, modules_to_save=["neck"])
    record = json.loads((source / "adapter_config.json").read_text())
    arrays = safetensors.numpy.load_file(source / "adapter_model.safetensors")

    def change(config=None, tensors=None):
        folder = tmp_path / "folder"
        folder.mkdir()
        changed = {k: v for k, v in (arrays | (tensors or {})).items() if v is not None}
        safetensors.numpy.save_file(changed, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(record | (config or {})))
        return folder

    return change


FIRST = "base_model.model.vision_encoder.layers.0.attn.qkv."
NECK = "base_model.model.vision_encoder.neck.conv1.weight"


def zeros(*shape):
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("config", "tensors", "match"),
    [
        ({"peft_type": "VERA"}, {}, "reads LoRA and DoRA of peft, and this is VERA"),
        ({"bias": "all"}, {}, "bias is all"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights pissa changes the weights"),
        ({"future": {"a": 1}, "lora_bias": True}, {}, r"2 of its keys \(future, lora_bias\)"),
        ({"layer_replication": [[0, 2]]}, {}, "layer_replication"),
        ({"r": "2"}, {}, "r is 2, not a whole number above 0"),
        ({"r": 0}, {}, "r is 0, not a whole number"),
        ({"r": 3}, {}, "have the ranks 2 and 2 where 3 is said"),
        ({"rank_pattern": {"qkv": 1}}, {}, "ranks 2 and 2 where 1"),
        ({"rank_pattern": {"(": 1}}, {}, r"rank_pattern has \(, which is no regular expression"),
        ({"rank_pattern": [1]}, {}, "adapter_config.json cannot be read"),
        ({"lora_alpha": -1}, {}, "alpha must be positive"),
        ({"lora_dropout": 1.5}, {}, "dropout must be in"),
        ({"modules_to_save": "neck"}, {}, "modules_to_save is neck, not a list"),
        ({"modules_to_save": None}, {}, "6 tensors of modules that modules_to_save lacks"),
        ({"modules_to_save": ["neck", "mask_decoder"]}, {}, "lacks .* tensors of modules_to_save"),
        ({"use_dora": True}, {}, "qkv lacks its lora_magnitude_vector"),
        ({}, {FIRST + "lora_B.weight": None}, "qkv lacks its lora_B"),
        ({}, {FIRST + "lora_C.weight": zeros(1)}, "does not read .*lora_C.weight"),
        ({}, {FIRST + "lora_A.other.weight": zeros(1), FIRST + "lora_A.one.weight": zeros(1)},
         r"several adapters \(one, other\)"),
        ({}, {FIRST + "lora_A.weight": zeros(2, 48)}, r"is \[2, 48\] where .* take \[2, 32\]"),
        ({}, {FIRST + "lora_A.weight": zeros(2)}, "have 1 and 2 axes, not 2"),
        ({}, {FIRST + "lora_A.weight": np.full((2, 32), np.nan, np.float32)}, "is not finite"),
        ({}, {NECK: zeros(32, 32)}, r"\[32, 32\] where these weights have \[32, 32, 1, 1\]"),
        ({}, {NECK: None}, "lacks 1 tensors of modules_to_save"),
        ({}, {FIRST.replace("layers.0", "layers.7") + "lora_A.weight": zeros(2, 32)},
         r"small lacks 1 of its layers \(vision_encoder.layers.7.attn.qkv.weight\)"),
        ({}, {FIRST.replace("attn.qkv", "layer_norm1") + "lora_A.weight": zeros(2, 32)},
         "layer_norm1 is no layer that samjax adapts"),
    ],
)  # fmt: skip
def test_what_does_not_fit(editable, small_model, small_params, config, tensors, match):
    folder = editable(config, tensors)
    with pytest.raises(ValueError, match=match) as info:
        huggingface.load(folder, small_model, small_params)
    assert str(folder) in str(info.value) and "\n" not in str(info.value)


def test_positions_that_were_trained(make, small_model, small_params):
    """transformers has them twice, once for the image; peft trains the prompt encoder's copy."""
    folder, _ = make(**CASES["trained decoder"])
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["base_model.model.prompt_encoder.shared_embedding.positional_embedding"] += 1
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match="positional_embedding is not that of these weights"):
        huggingface.load(folder, small_model, small_params)


def test_damaged_folders(editable, small_model, small_params):
    folder = editable()
    config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"

    def refused(match, error=ValueError):
        with pytest.raises(error, match=match) as info:
            huggingface.load(folder, small_model, small_params)
        assert "\n" not in str(info.value)

    text = config.read_text()
    for damaged in (text[:-5], "[]", ""):
        config.write_text(damaged)
        refused(r"adapter_config.json cannot be read")
    config.write_text("{}")
    refused("and this is None")
    config.unlink()
    refused("lacks its adapter_config.json", FileNotFoundError)
    config.write_text(text)
    tensors.write_bytes(tensors.read_bytes()[:-100])
    refused("cannot be read, it is damaged")
    tensors.unlink()
    refused("lacks its adapter_model.safetensors", FileNotFoundError)


def test_names_of_adapters_and_dtypes(editable, small_model, small_params, make):
    """What a state saved by hand calls its tensors; numbers of half precision; a torch file."""
    import torch

    folder = editable()
    file = folder / "adapter_model.safetensors"
    _, expected = huggingface.load(folder, small_model, small_params)
    tensors = {}
    for name, array in safetensors.numpy.load_file(file).items():
        name = name.replace(".weight", ".mine.weight") if "lora_" in name else name
        tensors[name.replace(".neck.", ".neck.modules_to_save.mine.")] = array
    tensors["base_model.model.vision_encoder.neck.original_module.conv1.weight"] = zeros(1)
    safetensors.numpy.save_file(tensors, file)
    _, variables = huggingface.load(folder, small_model, small_params)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    file.unlink()
    halves = {name: torch.from_numpy(array).bfloat16() for name, array in tensors.items()}
    torch.save(halves, folder / "adapter_model.bin")
    _, variables = huggingface.load(folder, small_model, small_params)
    for path, leaf in flatten_dict(variables["params"], sep="/").items():
        assert leaf.dtype == np.float32
        assert np.allclose(leaf, flatten_dict(expected["params"], sep="/")[path], rtol=1e-2)


def test_peft_on_metas_own_model(library, small_torch, small_model, small_params, tmp_path):
    """The names are the original's where peft adapted the original."""
    import torch

    torch.manual_seed(0)
    config = library.LoraConfig(
        target_modules=["qkv", "neck.0"], r=2, modules_to_save=["mask_decoder"]
    )
    model = library.get_peft_model(copy.deepcopy(small_torch), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "folder")
    _, variables = huggingface.load(tmp_path / "folder", small_model, small_params)
    x = np.random.default_rng(0).standard_normal((1, 128, 128, 3), np.float32)
    encode = jax.jit(lambda v, x: small_model.apply(v, x, method="encode_normalized"))
    ours = encode(variables, x)
    with torch.no_grad():
        inner = model.get_base_model()
        expected = inner.image_encoder(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
        token = inner.mask_decoder.state_dict()["modules_to_save.default.iou_token.weight"]
    assert np.abs(np.moveaxis(ours, -1, 1) - expected).max() < BOUND * expected.std()
    assert np.array_equal(variables["params"]["mask_decoder"]["iou_token"]["embedding"], token)


def test_a_tiny_vit_takes_metas_names_alone(editable, draw_params):
    encoder = TinyVitConfig(embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 1, 1))
    model = Sam(dataclasses.replace(MODELS["vit_t"], name="tiny", image_encoder=encoder))
    with pytest.raises(ValueError, match="tiny lacks 2 of its layers"):
        huggingface.load(editable({}, {}), model, draw_params(model), factors_only=True)
