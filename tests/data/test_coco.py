"""COCO datasets: layouts, masks as pycocotools makes them, objects, classes, and complaints."""

import contextlib
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from samjax.data.coco import CocoSource
from samjax.data.sources import Dataset

# pycocotools 2.0.11 with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HEIGHT, WIDTH = 20, 30
BOX = [[4, 2, 14, 2, 14, 12, 4, 12]]
TRIANGLE = [[10.5, 5, 28, 9.25, 16, 18]]
RUNS = {"size": [HEIGHT, WIDTH], "counts": [40, 100, HEIGHT * WIDTH - 140]}
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 8, "name": "zebra"}]
WHOLE = (1.0, 0.0, 0.0)


def picture(file, value=0, size=(WIDTH, HEIGHT)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 2, 3)).save(file)


def annotate(file, files, annotations, categories=CATEGORIES):
    """Writes a JSON; annotations are (image's position, category, segmentation, is it a crowd)."""
    images = [
        {"id": 100 + i, "file_name": name, "height": HEIGHT, "width": WIDTH}
        for i, name in enumerate(files)
    ]
    entries = [
        {"id": i, "image_id": 100 + at, "category_id": of, "segmentation": shape, "iscrowd": crowd}
        for i, (at, of, shape, crowd) in enumerate(annotations, 1)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": entries, "categories": categories}
    file.write_text(json.dumps(content))
    return content


@pytest.fixture
def dataset(tmp_path):
    """a has a cat, a dog over it and a crowd of dogs; b has a cat; c has nothing."""
    for i, name in enumerate("abc"):
        picture(tmp_path / "images" / f"{name}.png", i)
    annotations = [(0, 3, BOX, 0), (0, 7, TRIANGLE, 0), (0, 7, RUNS, 1), (1, 3, TRIANGLE, 0)]
    annotate(tmp_path / "annotations.json", ["a.png", "b.png", "c.png"], annotations)
    return tmp_path


def original(root):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(root / "annotations.json"))


def union(coco, ids):
    masks = [coco.annToMask(annotation) for annotation in coco.loadAnns(ids)]
    return np.any(masks, axis=0) if masks else np.zeros((HEIGHT, WIDTH), bool)


def complaint(root, split="train", **options):
    with pytest.raises(ValueError) as caught:
        CocoSource(root, split, **{"fractions": WHOLE, **options})
    return str(caught.value)


def test_together_is_the_union_of_pycocotools_masks(dataset):
    source = CocoSource(dataset, "train", fractions=WHOLE)
    assert isinstance(source, Dataset)
    source.check_sizes()
    assert source.names == ("a", "b", "c") and len(source) == 3
    for index, ids in enumerate([(1, 2, 3), (4,), ()]):
        sample = source[index]
        assert sample.name == source.names[index] and (sample.image[..., 0] == index).all()
        np.testing.assert_array_equal(sample.mask, union(original(dataset), ids))


def test_each_annotation_is_a_sample_but_crowds_are_not(dataset):
    source = CocoSource(dataset, "train", fractions=WHOLE, objects="each")
    assert source.names == ("a#1", "a#2", "b#4")
    for index, id in enumerate((1, 2, 4)):
        np.testing.assert_array_equal(source[index].mask, union(original(dataset), [id]))
    source.check_sizes()


def test_classes_choose_annotations(dataset):
    source = CocoSource(dataset, "train", fractions=WHOLE, classes=("dog",))
    assert source.names == ("a", "b", "c")
    for index, ids in enumerate([(2, 3), (), ()]):
        np.testing.assert_array_equal(source[index].mask, union(original(dataset), ids))
    each = CocoSource(dataset, "train", 0, WHOLE, "each", ("dog", "cat"))
    assert each.names == ("a#1", "a#2", "b#4")
    assert CocoSource(dataset, "train", 0, WHOLE, "each", ("dog",)).names == ("a#2",)
    assert "no category 'catt'; the nearest is 'cat'" in complaint(dataset, classes=("catt",))
    assert "no objects of the classes 'zebra'" in complaint(
        dataset, objects="each", classes=("zebra",)
    )


@pytest.mark.parametrize("objects", ["together", "each"])
def test_a_split_without_any_of_the_classes_is_refused(dataset, objects):
    message = complaint(dataset, objects=objects, classes=("zebra",))
    assert message.endswith("annotates no objects of the classes 'zebra' in the split 'train'")
    # One object is enough, and without classes a split may be all background.
    CocoSource(dataset, "train", 0, WHOLE, objects, ("zebra", "dog"))
    annotate(dataset / "annotations.json", ["c.png"], [])
    assert not CocoSource(dataset, "train", fractions=WHOLE)[0].mask.any()


@pytest.mark.parametrize("value", ["3", 3.0, 9, None, True, [3]])
def test_a_category_that_there_is_not_is_a_fault(dataset, value):
    file = dataset / "annotations.json"
    content = json.loads(file.read_text())
    content["annotations"][3]["category_id"] = value
    file.write_text(json.dumps(content))
    message = complaint(dataset, classes=("cat",))
    assert f"annotation 4 of 'b.png' has the category_id {json.dumps(value)}, which is" in message
    assert complaint(dataset) == message
    # A JSON without categories may say of its annotations what it likes.
    del content["categories"]
    file.write_text(json.dumps(content))
    assert CocoSource(dataset, "train", fractions=WHOLE)[1].mask.any()


def test_layout_of_coco(tmp_path):
    for split in ("train", "val"):
        file = tmp_path / f"annotations/instances_{split}2017.json"
        annotate(file, [f"{split}.png"], [(0, 3, BOX, 0)])
        picture(tmp_path / f"{split}2017" / f"{split}.png")
        (tmp_path / f"annotations/captions_{split}2017.json").write_text("{}")
    assert CocoSource(tmp_path, "train").names == ("train",)
    assert CocoSource(tmp_path, "validation").names == ("val",)
    message = complaint(tmp_path, "test")
    assert "no JSON for the split 'test', only annotations/instances_train2017.json" in message
    assert "split by seed" in message
    # So that COCO, whose test has no annotations, can be used whole.
    assert CocoSource(file, "train", fractions=WHOLE).names == ("val",)


def test_layout_of_roboflow(tmp_path):
    for split in ("train", "valid", "test"):
        annotate(tmp_path / split / "_annotations.coco.json", [f"{split}.jpg"], [(0, 3, BOX, 0)])
        picture(tmp_path / split / f"{split}.jpg")
    for split, folder in (("train", "train"), ("validation", "valid"), ("test", "test")):
        assert CocoSource(tmp_path, split).names == (folder,)
    (tmp_path / "test" / "more.json").write_text("{}")
    assert "keep one of them" in complaint(tmp_path, "test")


@pytest.mark.parametrize(
    ("json_file", "image_folder", "file_name"),
    [
        ("annotations.json", "images", "a.png"),
        ("annotations.json", ".", "images/a.png"),
        ("annotations/instances_default.json", "images", "a.png"),
        ("annotations/instances_default.json", "images/default", "a.png"),
        ("labels.json", "data", "a.png"),
        ("result.json", ".", "a.png"),
    ],
)
def test_layouts_of_one_json(tmp_path, json_file, image_folder, file_name):
    annotate(tmp_path / json_file, [file_name], [(0, 3, BOX, 0)])
    picture(tmp_path / image_folder / file_name)
    for root in (tmp_path, tmp_path / json_file):
        source = CocoSource(root, "train", fractions=WHOLE)
        assert source.names == (file_name.removesuffix(".png"),)
        assert source[0].mask.sum() == 100


def test_one_json_is_split_by_seed(tmp_path):
    files = [f"{i:02}.png" for i in range(20)]
    annotate(tmp_path / "annotations.json", files, [(i, 3, BOX, 0) for i in range(20)])
    for file in files:
        picture(tmp_path / "images" / file)
    splits = [CocoSource(tmp_path, split, seed=3).names for split in ("train", "val", "test")]
    assert [len(names) for names in splits] == [16, 2, 2]
    assert sorted(sum(splits, ())) == [file[:2] for file in files]
    # An image's objects stay in its split.
    each = CocoSource(tmp_path, "test", seed=3, objects="each").names
    assert [name.split("#")[0] for name in each] == list(splits[2])


def test_one_more_image_leaves_the_others_in_their_splits(tmp_path):
    files = [f"{i:02}.png" for i in range(100)]
    for file in [*files, "00.jpg"]:
        picture(tmp_path / "images" / file)

    def drawn():
        splits = (CocoSource(tmp_path, split, seed=5) for split in ("train", "val", "test"))
        return [{name.removesuffix(".png") for name in source.names} for source in splits]

    annotate(tmp_path / "x.json", files, [])
    before = drawn()
    annotate(tmp_path / "x.json", [*files, "00.jpg"], [])  # now names have their extensions
    after = drawn()
    # By chance, a test of ten would share one with another draw.
    assert [len(split) for split in after] == [81, 10, 10]
    assert all(len(old - new) <= 1 for old, new in zip(before, after, strict=True))


def test_names_are_unique(tmp_path):
    files = ["a/1.png", "b/1.png", "b/2.png"]
    annotate(tmp_path / "x.json", files, [])
    for file in files:
        picture(tmp_path / file)
    assert CocoSource(tmp_path, "train", fractions=WHOLE).names == ("a/1", "b/1", "b/2")
    annotate(tmp_path / "x.json", ["a/1.png", "a/1.jpg"], [])
    picture(tmp_path / "a/1.jpg")
    assert CocoSource(tmp_path, "train", fractions=WHOLE).names == ("a/1.jpg", "a/1.png")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "is no COCO JSON: it needs the lists 'images' and 'annotations'"),
        ('{"images": []}', "is no COCO JSON"),
        ('{"images": [], "annotations": []}', "lists no images"),
    ],
)
def test_what_is_no_coco(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    assert message in complaint(tmp_path) and "x.json" in complaint(tmp_path)


def test_no_json_or_no_telling_which(tmp_path):
    assert "must hold one COCO JSON" in complaint(tmp_path)
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("{}")
    assert "it has 'a.json', 'b.json'" in complaint(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("images", 0, "height"), 0, "image 'a.png' has no height and width above 0"),
        (("images", 0, "width"), "30", "image 'a.png' has no height and width above 0"),
        (("images", 1, "id"), None, "image 1 of the list has no id"),
        (("images", 1, "id"), 100, "image 'b.png' (id 100) is listed twice"),
        (("images", 1, "file_name"), "", "image 101 has no file_name"),
        (("categories", 1, "name"), None, "category 1 of the list has no name and id"),
        (("categories", 1, "id"), 7.0, "category 1 of the list has no name and id"),
        (("annotations", 0, "image_id"), 99, "annotation 1 points to image 99"),
        (("annotations", 1, "id"), 1, "annotation 1 is listed twice"),
        (("annotations", 1, "id"), None, "annotation 1 of the list has no id"),
        (("annotations", 0, "segmentation"), [[1, 1, 5, 5]], "of 'a.png' has a polygon of 4"),
        (("annotations", 2, "segmentation", "size"), [30, 20], "run lengths of size [30, 20]"),
    ],
)
def test_faults_of_entries_are_named(dataset, path, value, message):
    file = dataset / "annotations.json"
    content = json.loads(file.read_text())
    *way, last = path
    entry = content
    for key in way:
        entry = entry[key]
    entry[last] = value
    file.write_text(json.dumps(content))
    assert message in complaint(dataset) and str(file) in complaint(dataset)


def test_missing_images_are_named(dataset):
    (dataset / "images/b.png").unlink()
    message = complaint(dataset)
    assert "1 of the images" in message and "'b.png'" in message and "annotations.json" in message
    for name in "ac":
        (dataset / f"images/{name}.png").unlink()
    assert "such as 'a.png', are in none of" in complaint(dataset)


def test_images_must_have_the_size_that_was_annotated(dataset):
    picture(dataset / "images/b.png", size=(HEIGHT, WIDTH))
    source = CocoSource(dataset, "train", fractions=WHOLE)
    for read in (source.check_sizes, lambda: source[1]):
        with pytest.raises(ValueError, match=r"b\.png is 20x30 pixels .* annotates it at 30x20"):
            read()


def test_files_that_are_no_images_are_named(dataset):
    (dataset / "images/b.png").write_text("<html>404</html>")
    source = CocoSource(dataset, "train", fractions=WHOLE)
    with pytest.raises(ValueError, match=r"b\.png cannot be decoded as an image"):
        source.check_sizes()


def test_broken_compressed_run_lengths_are_found_before_training(dataset):
    file = dataset / "annotations.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": "52"}
    file.write_text(json.dumps(content))
    source = CocoSource(dataset, "train", fractions=WHOLE)
    for read in (source.check_sizes, lambda: source[0]):
        with pytest.raises(ValueError, match=r"annotation 1 of 'a\.png' has run lengths of 7 pix"):
            read()


def test_polygons_need_pycocotools_and_run_lengths_do_not(dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(RuntimeError, match=r"pip install 'samjax\[coco\]'"):
        CocoSource(dataset, "train", fractions=WHOLE)
    annotate(dataset / "annotations.json", ["a.png"], [(0, 3, RUNS, 0)])
    assert CocoSource(dataset, "train", fractions=WHOLE)[0].mask.sum() == 100
