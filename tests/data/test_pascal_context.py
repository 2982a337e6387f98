"""PASCAL-Context, from small files in ASTMT's layout."""

import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy.io import savemat

from samjax.data.builders.prepare import prepare
from samjax.data.dense import DenseDataset, open_dense
from samjax.data.dense_augment import DenseAugmentConfig, augment_dense
from samjax.data.dense_pipeline import prepare_truth
from samjax.preprocess import Frame
from samjax.tasks import PASCAL_CONTEXT, Task, find

NAMES = ("2008_000003", "2008_000002", "2010_000001")
SIZES = dict(zip(NAMES, ((30, 40), (24, 36), (40, 30)), strict=True))
# Among PASCAL-Context's 459 classes: NYUv2 has walls and people, but no sky.
WALL, PERSON, SKY = 440, 284, 360


def structs(items, *fields):
    """An array of structs, (1, n)."""
    array = np.empty((1, len(items)), [(field, object) for field in fields])
    for i, item in enumerate(items):
        for field in fields:
            array[0, i][field] = item[field]
    return array


def person(shape, parts, number=15):
    """An object of PASCAL-Part whose parts are boxes (top, bottom, left, right) by name."""
    masks = []
    for name, (top, bottom, left, right) in parts:
        mask = np.zeros(shape, np.uint8)
        mask[top:bottom, left:right] = 1
        masks.append({"part_name": name, "mask": mask})
    own = structs(masks, "part_name", "mask") if masks else np.zeros((0, 0))
    whole = np.ones(shape, np.uint8)
    return {"class": "person", "class_ind": number, "mask": whole, "parts": own}


def write_anno(file, objects):
    anno = {"imname": file.stem, "objects": structs(objects, "class", "class_ind", "mask", "parts")}
    savemat(file, {"anno": anno})


@pytest.fixture
def root(tmp_path):
    """Three images in the list of training and one in that of validation."""
    rng = np.random.default_rng(0)
    folders = ("ImageSets/Context", "JPEGImages", "semseg/VOC12", "semseg/pascal-context")
    more = ("human_parts", "sal_distill", "normals_distill", "pascal-context/trainval")
    for folder in (*folders, *more):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Context/train.txt").write_text("\n".join(NAMES) + "\n")
    (tmp_path / "ImageSets/Context/val.txt").write_text(NAMES[1])
    for name, shape in SIZES.items():

        def save(file, values):
            Image.fromarray(values).save(tmp_path / file)

        save(f"JPEGImages/{name}.jpg", rng.integers(0, 256, (*shape, 3), np.uint8))
        classes = rng.choice([0, 7, 20, 255], shape).astype(np.uint8)
        save(f"semseg/VOC12/{name}.png", classes)
        save(f"sal_distill/{name}.png", rng.choice([0, 127, 128, 255], shape).astype(np.uint8))
        normals = rng.normal(size=(*shape, 3))
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
        colours = np.round((normals + 1) * 255 / 2).astype(np.uint8)
        save(f"normals_distill/{name}.png", colours)
        labels = np.full(shape, SKY, np.uint16)
        labels[10:] = WALL
        labels[10:, 20:] = PERSON
        savemat(tmp_path / f"pascal-context/trainval/{name}.mat", {"LabelMap": labels})
        write_anno(tmp_path / f"human_parts/{name}.mat", [person(shape, [])])
    return tmp_path


def pixels(root, file):
    return np.asarray(Image.open(root / file))


def test_samples_are_what_the_files_hold(root):
    source = open_dense(str(root), "train", PASCAL_CONTEXT)
    assert isinstance(source, DenseDataset)
    assert source.names == NAMES and len(source) == 3
    source.check_sizes()
    for index, name in enumerate(NAMES):
        sample, shape = source[index], SIZES[name]
        assert sample.name == name and set(sample.truth) == {task.name for task in PASCAL_CONTEXT}
        np.testing.assert_array_equal(sample.image, pixels(root, f"JPEGImages/{name}.jpg"))
        stored = pixels(root, f"semseg/VOC12/{name}.png").astype(int)
        expected = np.where(stored == 255, -1, stored)
        np.testing.assert_array_equal(sample.truth["segmentation"], expected)
        stored = pixels(root, f"sal_distill/{name}.png")
        np.testing.assert_array_equal(sample.truth["saliency"], stored >= 128)
        for task in ("segmentation", "saliency", "edges", "human_parts"):
            assert sample.truth[task].shape == shape and sample.truth[task].dtype == np.int32
        assert (sample.truth["human_parts"] == -1).all()
    test = open_dense(str(root), "test", PASCAL_CONTEXT)
    assert test.names == NAMES[1:2]


def test_normals_are_known_on_things_of_nyuv2(root):
    truth = open_dense(str(root), "train", PASCAL_CONTEXT[3:4])[0].truth["normals"]
    assert truth.dtype == np.float32 and not truth[:10].any()
    np.testing.assert_allclose(np.linalg.norm(truth[10:], axis=-1), 1, atol=1e-6)
    stored = pixels(root, f"normals_distill/{NAMES[0]}.png") / 255 * 2 - 1
    np.testing.assert_allclose(truth[10:], stored[10:], atol=0.02)  # 8 bits


def test_edges_lie_between_regions(root):
    edges = open_dense(str(root), "train", PASCAL_CONTEXT[4:])[0].truth["edges"]
    rows, columns = np.nonzero(edges)
    assert ((np.abs(rows - 9.5) < 1) | (np.abs(columns - 19.5) < 1)).all()
    assert edges.sum(axis=0)[1:18].tolist() == [1] * 17  # one pixel wide
    assert edges[:8].sum() == 0 and edges[12:28].sum(axis=1).tolist() == [1] * 16


def test_parts_of_people(root):
    """Sides are one class, later parts lie over earlier ones, other animals do not count."""
    shape = SIZES[NAMES[0]]
    boxes = ["head", "lear", "torso", "neck", "luarm", "rlarm", "lhand", "ruleg", "llleg", "rfoot"]
    expected = np.zeros(shape, int)
    parts = []
    for i, (name, label) in enumerate(zip(boxes, (1, 1, 2, 2, 3, 4, 4, 5, 6, 6), strict=True)):
        parts.append((name, (2 * i, 2 * i + 3, 1, 9)))
        expected[2 * i : 2 * i + 3, 1:9] = label
    other = [("hair", (0, 30, 30, 35)), ("rebrow", (1, 2, 36, 37)), ("leye", (3, 4, 36, 37))]
    for _, (top, bottom, left, right) in other:
        expected[top:bottom, left:right] = 1
    cat = person(shape, [("head", (0, 30, 15, 20)), ("tail", (0, 30, 20, 25))], number=8)
    objects = [cat, person(shape, parts), person(shape, []), person(shape, other)]
    write_anno(root / f"human_parts/{NAMES[0]}.mat", objects)
    write_anno(root / f"human_parts/{NAMES[1]}.mat", [cat])
    write_anno(root / f"human_parts/{NAMES[2]}.mat", [])
    source = open_dense(str(root), "train", PASCAL_CONTEXT[1:2])
    np.testing.assert_array_equal(source[0].truth["human_parts"], expected)
    for index in (1, 2):
        assert source[index].truth["human_parts"].shape == SIZES[NAMES[index]]
        assert (source[index].truth["human_parts"] == -1).all()


def test_another_folder_and_another_size_serve(root):
    file = f"{NAMES[1]}.png"
    (root / "semseg/VOC12" / file).rename(root / "semseg/pascal-context" / file)
    height, width = SIZES[NAMES[1]]
    half = np.arange(height // 2 * width // 2).reshape(height // 2, width // 2) % 21
    Image.fromarray(half.astype(np.uint8)).save(root / "semseg/pascal-context" / file)
    sample = open_dense(str(root), "train", PASCAL_CONTEXT[:1])[1]
    np.testing.assert_array_equal(
        sample.truth["segmentation"], np.kron(half, np.ones((2, 2), np.int32))
    )


def test_changes_and_the_frame_take_images_of_any_size(root):
    source, frame = open_dense(str(root), "train", PASCAL_CONTEXT), Frame(32, 32)
    for index in range(len(source)):
        rng, config = np.random.default_rng(index), DenseAugmentConfig()
        sample = augment_dense(rng, source[index], PASCAL_CONTEXT, config)
        for task in PASCAL_CONTEXT:
            placed = prepare_truth(task, sample.truth[task.name], frame)
            assert placed.shape[-2:] == (32, 32)
        assert sample.image.shape == source[index].image.shape


def test_what_is_missing_or_wrong_is_told(root):
    def complaint(split="train", tasks=PASCAL_CONTEXT):
        with pytest.raises(ValueError) as caught:
            for index in range(3):
                open_dense(str(root), split, tasks)[index]
        return str(caught.value)

    assert "no validation" in complaint("validation")
    said = complaint(tasks=[Task("edge", 1, "balanced_bce")])
    assert "no task 'edge'; the nearest is edges, known are segmentation, human_parts" in said
    said = complaint(tasks=[Task("segmentation", 60, "cross_entropy", 2.0)])
    assert "task segmentation of PASCAL-Context is segmentation:21:cross_entropy, not" in said
    parts = [find(PASCAL_CONTEXT, "human_parts")]
    file = root / f"human_parts/{NAMES[2]}.mat"
    write_anno(file, [person(SIZES[NAMES[2]], [("lwing", (0, 1, 0, 1))])])
    assert f"{file} has the part 'lwing'" in complaint(tasks=parts)
    savemat(file, {"anno": {"imname": "x"}})
    assert f"{file} is not laid out as PASCAL-Part's" in complaint(tasks=parts)
    savemat(file, {"other": 1})
    assert f"{file} has no anno" in complaint(tasks=parts)
    for content in (b"", b"no MATLAB", bytes(200)):
        file.write_bytes(content)
        assert f"{file} cannot be read as MATLAB's" in complaint(tasks=parts)
    file.unlink()
    assert f"task human_parts: {root}/human_parts has no file for {NAMES[2]} of" in complaint()
    label_map = root / f"pascal-context/trainval/{NAMES[0]}.mat"
    whole = label_map.read_bytes()
    label_map.write_bytes(whole[: len(whole) // 2])
    assert f"{label_map} cannot be read as MATLAB's" in complaint(tasks=PASCAL_CONTEXT[4:])
    segmentation = root / f"semseg/VOC12/{NAMES[0]}.png"
    Image.new("L", SIZES[NAMES[0]][::-1], 21).save(segmentation)
    assert f"{segmentation} has the value 21" in complaint(tasks=PASCAL_CONTEXT[:1])
    segmentation.unlink()
    said = complaint(tasks=PASCAL_CONTEXT[:1])
    assert "semseg/VOC12 and " in said and f"has no file for {NAMES[0]} of" in said
    (root / f"JPEGImages/{NAMES[0]}.jpg").unlink()
    (root / f"JPEGImages/{NAMES[1]}.jpg").unlink()
    said = complaint(tasks=PASCAL_CONTEXT[4:])
    assert f"images: {root}/JPEGImages has no file for {NAMES[0]} and 1 more of" in said
    (root / "ImageSets/Context/val.txt").write_text("\n")
    assert "val.txt lists no image" in complaint("test")
    (root / "ImageSets/Context/val.txt").unlink()
    assert "val.txt, which lists the images of the split test" in complaint("test")


def test_it_becomes_records_of_tfds(root, tmp_path, monkeypatch):
    """Samples are the folder's, and images the folder's files."""
    console = Console(file=io.StringIO(), soft_wrap=True)
    data_dir = tmp_path / "tfds"
    assert prepare("pascal_context", data_dir, root, console).splits == {"train": 3, "test": 1}
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    for split in ("train", "test"):
        expected = open_dense(str(root), split, PASCAL_CONTEXT)
        source = open_dense("tfds:pascal_context", split, PASCAL_CONTEXT)
        assert source.names == expected.names
        for index in range(len(expected)):
            one, other = source[index], expected[index]
            np.testing.assert_array_equal(one.image, other.image)
            for task in PASCAL_CONTEXT:
                assert one.truth[task.name].dtype == other.truth[task.name].dtype
                np.testing.assert_array_equal(one.truth[task.name], other.truth[task.name])
            image = source.image_file(index)
            assert image.read() == (root / f"JPEGImages/{one.name}.jpg").read_bytes()


def test_what_is_wrong_is_told_before_records_are_there(root, tmp_path):
    console = Console(file=io.StringIO(), soft_wrap=True)
    parts = root / f"human_parts/{NAMES[1]}.mat"
    parts.write_bytes(parts.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{parts} cannot be read as MATLAB's"):
        prepare("pascal_context", tmp_path / "tfds", root, console)
    assert list((tmp_path / "tfds" / "pascal_context").iterdir()) == []
    (root / "ImageSets/Context/val.txt").unlink()
    with pytest.raises(ValueError, match="lists the images of the split test"):
        prepare("pascal_context", tmp_path / "tfds", root, console)
    with pytest.raises(FileNotFoundError, match=r"nor does its PASCAL_MT/: get PASCAL_MT.tgz, by"):
        prepare("pascal_context", tmp_path / "tfds", root / "semseg", console)
