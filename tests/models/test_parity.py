"""Against the original in torch, and against golden outputs of an independent implementation.

Errors are the largest absolute difference over the reference's standard deviation. The bound is
1e-3; the reference's own float32 noise is about 4e-6.
"""

import jax
import numpy as np
import pytest

from samjax import load
from samjax.download import DownloadError
from samjax.models import MODELS, Prompts, Sam
from samjax.preprocess import MASK_THRESHOLD, postprocess_masks, prepare_image
from weights_convert import to_params

BOUND = 1e-3


class Table:
    """Collects errors, reports them, and checks them at the end."""

    def __init__(self, title: str, report_lines: list[str]) -> None:
        self.rows: list[tuple[str, float]] = []
        self._lines = report_lines
        self._lines.append(f"{title} (largest error / standard deviation)")

    def add(self, name: str, ours, reference) -> None:
        ours, reference = np.asarray(ours), np.asarray(reference)
        assert ours.shape == reference.shape, name
        self.rows.append((name, float(np.abs(ours - reference).max() / reference.std())))

    def check(self) -> None:
        self._lines += [f"  {name:<28} {error:.1e}" for name, error in self.rows]
        assert all(error <= BOUND for _, error in self.rows)


def prompt(points=None, labels=None, box=None, masks=None) -> Prompts:
    """One prompt in the order of the reference, from coordinates in the model's input."""
    coords, kinds = np.zeros((0, 2)), np.zeros(0, np.int32)
    if points is not None:
        coords, kinds = np.asarray(points).reshape(-1, 2), np.asarray(labels).reshape(-1)
        if box is None:
            coords, kinds = np.append(coords, [[0, 0]], axis=0), np.append(kinds, -1)
    if box is not None:
        coords = np.append(coords, np.asarray(box).reshape(2, 2), axis=0)
        kinds = np.append(kinds, [2, 3])
    return Prompts(coords[None].astype(np.float32), kinds[None].astype(np.int32), masks)


def functions(model: Sam):
    return [
        jax.jit(lambda p, *args, m=name: model.apply({"params": p}, *args, method=m))
        for name in ("encode_normalized", "encode", "decode")
    ]


def test_vit_b_at_full_depth(segment_anything, report_lines):
    import torch

    torch.manual_seed(0)
    reference = segment_anything.sam_model_registry["vit_b"]().eval()
    with torch.no_grad():
        for name, leaf in reference.named_parameters():
            # Zero-initialised in the original: they would hide what depends on them.
            if "rel_pos" in name or "pos_embed" in name:
                leaf.normal_(std=0.02)
    model = Sam(MODELS["vit_b"])
    tensors = {k: v.numpy() for k, v in reference.state_dict().items()}
    params = to_params(tensors, model.config)
    encode, _, decode = functions(model)
    image = np.random.default_rng(0).normal(size=(1, 1024, 1024, 3)).astype(np.float32)

    table = Table("ViT-B, random weights, against segment-anything 1.0", report_lines)
    points, labels = np.array([[[100.0, 200.0], [700.0, 300.0]]]), np.array([[1, 0]])
    with torch.no_grad():
        expected = reference.image_encoder(torch.tensor(image.transpose(0, 3, 1, 2)))
        sparse, dense = reference.prompt_encoder(
            points=(torch.tensor(points, dtype=torch.float), torch.tensor(labels)),
            boxes=None,
            masks=None,
        )
        logits, iou = reference.mask_decoder.predict_masks(
            expected, reference.prompt_encoder.get_dense_pe(), sparse, dense
        )
    embeddings = encode(params, image)
    table.add("image embeddings", embeddings.transpose(0, 3, 1, 2), expected)
    ours, our_iou = decode(params, embeddings, prompt(points, labels))
    table.add("low-res logits", ours, logits)
    table.add("IoU predictions", our_iou, iou)
    table.check()


def test_mobile_sam_golden(asset, report_lines):
    golden = np.load(asset("fixtures/mobile_sam_kvasir_test0.npz"))
    model, params = load(asset("weights/mobile_sam.safetensors"))
    assert model.config == MODELS["vit_t"]
    _, encode, decode = functions(model)
    image, input_size = prepare_image(golden["image"], model.config.frame)
    assert np.array_equal(image, golden["resized"])

    table = Table("MobileSAM, against golden outputs", report_lines)
    embeddings = encode(params, image[None], input_size[None])
    table.add("image embeddings", embeddings.transpose(0, 3, 1, 2), golden["embedding"])
    scale = 1024 / 352
    prompts = {
        "box": prompt(box=golden["box"] * scale),
        "point": prompt(golden["point"] * scale, [1]),
    }
    for name, one in prompts.items():
        logits, iou = decode(params, embeddings, one)
        table.add(f"{name}: low-res logits", logits, golden[f"{name}/low_res_logits"])
        table.add(f"{name}: IoU predictions", iou, golden[f"{name}/iou"])
        masks = (
            np.asarray(postprocess_masks(logits, model.config.frame, (352, 352))) > MASK_THRESHOLD
        )
        assert np.mean(masks == golden[f"{name}/masks"]) >= 0.9999
    table.check()


def test_decoder_golden(asset, report_lines):
    golden = np.load(asset("fixtures/sam_decoder_prompts.npz"))
    model, params = load(asset("weights/mobile_sam.safetensors"))
    _, _, decode = functions(model)
    embeddings = golden["image_embedding"].transpose(0, 2, 3, 1)
    encode_prompts = jax.jit(lambda p, one: model.apply({"params": p}, one, method=_encode_prompts))

    table = Table("Prompt encoder and decoder, against golden outputs", report_lines)
    for name in ("point", "points2", "pos_neg", "box", "box_point", "point_mask"):
        given = {
            key: golden[f"{name}/{key}"]
            for key in ("points", "labels", "box")
            if f"{name}/{key}" in golden.files
        }
        masks = golden["point/masks4"][:, 1] if name == "point_mask" else None
        one = prompt(**given, masks=masks)
        sparse, dense = encode_prompts(params, one)
        table.add(f"{name}: sparse", sparse, golden[f"{name}/sparse"])
        corner = np.asarray(dense).transpose(0, 3, 1, 2)[:, :, :1, :4]
        table.add(f"{name}: dense", corner, golden[f"{name}/dense"])
        logits, iou = decode(params, embeddings, one)
        table.add(f"{name}: low-res logits", logits, golden[f"{name}/masks4"])
        table.add(f"{name}: IoU predictions", iou, golden[f"{name}/iou4"])
    table.check()


def _encode_prompts(model: Sam, one: Prompts):
    from samjax.models.sam import DETERMINISTIC

    return model.prompt_encoder(one, (64, 64), DETERMINISTIC)[:2]


@pytest.fixture(scope="module")
def lite_medsam(asset):
    """LiteMedSAM out of its PyPI package."""
    asset("fixtures/lite_medsam_kvasir_test0.npz")  # without it there is nothing to compare with
    try:
        return load("lite_medsam")
    except DownloadError as error:
        pytest.skip(str(error))


def test_lite_medsam_golden(asset, lite_medsam, report_lines):
    golden = np.load(asset("fixtures/lite_medsam_kvasir_test0.npz"))
    model, params = lite_medsam
    assert model.config == MODELS["lite_medsam"]
    encode, encode_pixels, decode = functions(model)
    table = Table("LiteMedSAM, against golden outputs", report_lines)
    image = golden["image"].transpose(0, 2, 3, 1)
    embeddings = encode(params, image)
    table.add("image embeddings", embeddings.transpose(0, 3, 1, 2), golden["embedding"])
    logits, iou = decode(params, embeddings, prompt(box=golden["box256"]))
    table.add("box: low-res logits", logits, golden["masks4"])
    table.add("box: IoU predictions", iou, golden["iou4"])
    table.check()
    # Its preprocessing is [0, 1], without a mean: the golden image is uint8 scaled so.
    pixels = np.round(image * 255).astype(np.uint8)
    size = np.array([[256, 256]], np.int32)
    low, high = pixels.min().astype(np.float32), pixels.max().astype(np.float32)
    same = encode(params, (pixels - low) / (high - low))
    assert np.allclose(encode_pixels(params, pixels, size), same, atol=1e-4)
