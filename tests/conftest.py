"""What several tests share: optional assets, and the original SAM in torch."""

import contextlib
import dataclasses
import os
import resource
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from samjax import peft
from samjax.allocator import release_freed_memory
from samjax.models import MSam, Sam, SamConfig, TinyVitConfig, VitConfig
from samjax.models.msam import msam_params
from samjax.peft import MethodConfig
from samjax.tasks import parse
from weights_convert import from_params

# Most of the tests' time is compilation: they leave out what LLVM takes longest for. With XLA_FLAGS
# set, even to nothing, they compile as users do. XLA reads it when the first array is made.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

# Many tests compile the same step; what one compiled the others, and subprocesses, read back.
_CACHE = tempfile.TemporaryDirectory(prefix="samjax-tests-")
for _name, _value in (
    ("jax_compilation_cache_dir", _CACHE.name),
    ("jax_persistent_cache_min_compile_time_secs", 0.5),
):
    jax.config.update(_name, _value)
    os.environ[_name.upper()] = str(_value)

REPO = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("SAMJAX_TEST_ASSETS", REPO / "../shared"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What workers of pytest-xdist take at a time: a file; of the laws, a method in an encoder.

    Fixtures and what JAX compiled are a worker's own, and tests of a group share them.
    """
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))


def _group(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    case = callspec.params.get("case") if callspec else None
    return str(item.path) if case is None else f"{item.path} {case}"


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Forgets the programs of a group that is done: all of them together are many gigabytes."""
    if nextitem is None or _group(nextitem) != _group(item):
        jax.clear_caches()
        release_freed_memory()


@pytest.fixture(scope="session")
def asset():
    """`asset(name)` is the path of a file that is not in the repository; skips without it."""

    def find(name: str) -> Path:
        path = ASSETS / name
        if not path.exists():
            pytest.skip(f"no {name} in {ASSETS}; set SAMJAX_TEST_ASSETS to a folder that has it")
        return path

    return find


@pytest.fixture(scope="session")
def files_end_at():
    """`with files_end_at(size)` is as on a disk that is full: no file becomes longer.

    For a moment only: pytest's own output may be a file too.
    """

    @contextlib.contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(scope="session")
def small_config() -> SamConfig:
    """A SAM of a few hundred kB with one block of windows and one of global attention."""
    encoder = VitConfig(
        embed_dim=32,
        depth=2,
        num_heads=2,
        global_attn_indexes=(1,),
        window_size=4,
        pretrain_grid=8,
    )
    return SamConfig(
        name="small",
        image_encoder=encoder,
        image_size=128,
        prompt_embed_dim=32,
        decoder_mlp_dim=64,
    )


@pytest.fixture(scope="session")
def small_model(small_config) -> Sam:
    return Sam(small_config)


@pytest.fixture(scope="session")
def draw_params():
    """`draw_params(model)` are numpy arrays, none of them all zeros or ones, as some are
    initialised: that hides mistakes.

    Drawn here, since to compile `init_params` takes a quarter of a minute.
    """

    def build(model: Sam):
        rng = np.random.default_rng(0)

        def draw(path, shape) -> np.ndarray:
            name = path[-1].key
            if name == "kernel":
                std = float(np.prod(shape.shape[:-1])) ** -0.5
            else:
                std = 0.1 if name in ("bias", "scale", "pos_embed", "rel_pos_h", "rel_pos_w") else 1
            leaf = rng.normal(float(name == "scale"), std, shape.shape)
            return (0.5 + np.abs(leaf) if name == "var" else leaf).astype(np.float32)

        return jax.tree_util.tree_map_with_path(draw, model.init_params_shapes())

    return build


@pytest.fixture
def quick_compilation():
    """Less is optimised: what compiled programs take is of no interest here."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def tiny_model(small_config) -> Sam:
    """A SAM of a few hundred kB whose encoder is a TinyViT with a block of each kind."""
    encoder = TinyVitConfig(embed_dims=(8, 16, 16, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4))
    return Sam(dataclasses.replace(small_config, name="tiny", image_encoder=encoder))


@pytest.fixture(scope="session")
def tiny_params(tiny_model, draw_params):
    return draw_params(tiny_model)


@pytest.fixture(scope="session")
def small_params(small_model, draw_params):
    return draw_params(small_model)


@pytest.fixture(scope="session")
def dense(small_config, small_params):
    """A task of each loss, as `(spec, model, variables)` of TA-LoRA; all that trains is moved."""
    losses = ("segmentation:5:cross_entropy", "depth:1:masked_l1", "normals:3:cosine")
    model = MSam(small_config, tasks=parse([*losses, "edges:1:balanced_bce"]))
    spec = MethodConfig("ta_lora", rank=4, rank_task=2).spec(tasks=4)
    params = msam_params(small_params, model)
    variables = {"params": params, "peft": peft.attach(spec, model, params, jax.random.key(0))}
    rng = np.random.default_rng(0)

    def move(leaf, trains):
        noise = 0.2 * rng.normal(size=leaf.shape).astype(np.float32)
        return np.asarray(leaf) + noise if trains else np.asarray(leaf)

    return spec, model, jax.tree.map(move, variables, peft.trainable(spec, model, variables))


@pytest.fixture(scope="session")
def torch_sam(segment_anything):
    """`torch_sam(config, params)` is the original's model, of a ViT, with samjax's weights.

    The original's encoder takes its own square alone: for another input its `pos_embed` is resized
    by torch. It resizes the relative positions itself.
    """
    import torch
    from segment_anything import modeling

    def build(config: SamConfig, params):
        encoder, dim = config.image_encoder, config.prompt_embed_dim
        (rows, columns), patch = encoder.position_grid, encoder.patch_size
        assert rows == columns, "the original's tables are of a square"
        model = modeling.Sam(
            image_encoder=modeling.ImageEncoderViT(
                depth=encoder.depth,
                embed_dim=encoder.embed_dim,
                img_size=rows * patch,
                mlp_ratio=4,
                norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6),
                num_heads=encoder.num_heads,
                patch_size=encoder.patch_size,
                qkv_bias=True,
                use_rel_pos=True,
                global_attn_indexes=encoder.global_attn_indexes,
                window_size=encoder.window_size,
                out_chans=dim,
            ),
            prompt_encoder=modeling.PromptEncoder(
                embed_dim=dim,
                image_embedding_size=config.grid,
                input_image_size=config.frame.shape,
                mask_in_chans=16,
            ),
            mask_decoder=modeling.MaskDecoder(
                num_multimask_outputs=3,
                transformer=modeling.TwoWayTransformer(
                    depth=config.decoder_depth,
                    embedding_dim=dim,
                    mlp_dim=config.decoder_mlp_dim,
                    num_heads=config.decoder_num_heads,
                ),
                transformer_dim=dim,
                iou_head_depth=3,
                iou_head_hidden_dim=256,
            ),
            pixel_mean=list(config.pixel_mean),
            pixel_std=list(config.pixel_std),
        )
        tensors = {k: torch.from_numpy(v.copy()) for k, v in from_params(params, config).items()}
        model.load_state_dict(tensors, strict=True)
        if config.grid != (rows, columns):
            table = model.image_encoder.pos_embed.data.permute(0, 3, 1, 2)
            resized = torch.nn.functional.interpolate(
                table, config.grid, mode="bicubic", align_corners=False, antialias=False
            )
            model.image_encoder.pos_embed.data = resized.permute(0, 2, 3, 1)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def small_torch(torch_sam, small_config, small_params):
    """The original's model with the weights of `small_params`."""
    return torch_sam(small_config, small_params)


@pytest.fixture(scope="session")
def segment_anything():
    """The original package; where torchvision is missing, what it needs of it is stood in for."""
    pytest.importorskip("torch", reason="the original SAM needs torch")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        stubs = _stub_torchvision()
    else:
        stubs = ()
    package = pytest.importorskip("segment_anything", reason="segment-anything is not installed")
    for name in stubs:  # else transformers would take them for torchvision
        del sys.modules[name]
    return package


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _stub_torchvision() -> tuple[str, ...]:
    stubs = {
        "torchvision": {},
        "torchvision.ops": {},
        # Of the automatic mask generator, which no test uses.
        "torchvision.ops.boxes": {"batched_nms": None, "box_area": None},
        "torchvision.transforms": {},
        # As torchvision does for PIL images.
        "torchvision.transforms.functional": {
            "resize": _resize,
            "to_pil_image": Image.fromarray,
        },
    }
    for name, functions in stubs.items():
        module = sys.modules[name] = types.ModuleType(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
        vars(module).update(functions)
    return tuple(stubs)


@pytest.fixture
def report_lines(request) -> list[str]:
    """Lines that a test adds here are printed at the end of the run, captured or not."""
    return request.config.stash.setdefault(_REPORT, [])


_REPORT = pytest.StashKey[list[str]]()


def pytest_terminal_summary(terminalreporter, config) -> None:
    for line in config.stash.get(_REPORT, []):
        terminalreporter.write_line(line)
