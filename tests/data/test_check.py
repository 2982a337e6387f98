"""What check-data finds: in whole datasets, in broken ones, and in those that cannot be opened."""

import json

import numpy as np
import pytest
from PIL import Image

from samjax.cli import main
from samjax.data.check import Report, check
from samjax.data.examine import Problem

HALF = np.array([[0, 255]] * 4, np.uint8).repeat(2, axis=1)


def write(file, pixels):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file)


def write_pair(folder, name, seed, mask=HALF, kind="masks"):
    write(folder / f"images/{name}.png", np.random.default_rng(seed).integers(0, 256, (4, 4, 3)))
    write(folder / f"{kind}/{name}.png", mask)


@pytest.fixture
def dataset(tmp_path):
    """Two images in each of train and test; validation is no part of it."""
    for seed, name in enumerate(("train/a", "train/b", "test/c", "test/d")):
        split, name = name.split("/")
        write_pair(tmp_path / split, name, seed)
    return tmp_path


def found(root, split=None, **options):
    """Severity, kind and detail of all problems, without the folder's own path."""
    report = check(str(root), split, **options)
    return [(p.severity, p.kind, p.detail.replace(f"{root}/", "")) for p in report.problems]


def test_a_good_dataset(dataset):
    write_pair(dataset / "val", "e", 4)
    report = check(str(dataset))
    assert report.problems == () and list(report.lines()) == []
    assert report.summary() == {
        "images": {"train": 2, "validation": 1, "test": 2},
        **{"errors": 0, "warnings": 0, "notes": 0},
    }
    assert check(str(dataset), "val").images == {"validation": 1}


def test_a_missing_split_is_a_warning_unless_it_is_asked_for(dataset):
    (problem,) = found(dataset)
    assert problem[:2] == ("warning", "splits that cannot be opened") and "validation" in problem[2]
    assert found(dataset, "validation")[0][0] == "error"


def test_everything_is_found_at_once(dataset):
    train = dataset / "train"
    write(train / "images/lone.png", HALF)
    write(train / "masks/c_mask.png", HALF)
    write(train / "images/b.bmp", HALF)
    write_pair(train, "small", 10, mask=HALF[:2])
    write_pair(train, "empty", 11, mask=HALF * 0)
    write_pair(train, "labels", 12, mask=[[0, 1, 2, 3]] * 4)
    write_pair(train, "broken", 13)
    (train / "images/broken.png").write_bytes(b"<html>")
    write_pair(train, "broken_mask", 14)
    (train / "masks/broken_mask.png").write_bytes(b"")
    # The same pixels in another format, and twice in one split.
    Image.open(train / "images/a.png").save(dataset / "test/images/copy.bmp")
    write(dataset / "test/masks/copy.png", HALF)
    write_pair(train, "again", 11)
    problems = found(dataset)
    details = {(severity, kind): [] for severity, kind, _ in problems}
    for severity, kind, detail in problems:
        details[severity, kind].append(detail)
    unreadable = details.pop(("error", "files that cannot be used"))
    assert [text.split(" cannot be decoded")[0] for text in unreadable] == [
        "train/images/broken.png",
        "train/masks/broken_mask.png",
    ]
    (sizes,) = details.pop(("error", "sizes that differ"))
    assert sizes.startswith("the mask train/masks/small.png is 4x2 pixels")
    (closed,) = details.pop(("warning", "splits that cannot be opened"))
    assert "validation" in closed
    (labels,) = details.pop(("warning", "masks with more than two values"))
    assert labels.startswith("train/masks/labels.png is a label image")
    assert details == {
        ("error", "images without a mask"): ["train/images/lone.png"],
        ("error", "masks without an image"): ["train/masks/c_mask.png"],
        ("error", "several files of one name"): ["train/images/b.bmp", "train/images/b.png"],
        ("error", "images that occur in several splits"): [
            "train/images/a.png (train) = test/images/copy.bmp (test)"
        ],
        ("warning", "empty masks"): ["train/masks/empty.png"],
        ("note", "images that occur several times in a split"): [
            "train/images/again.png (train) = train/images/empty.png (train)"
        ],
    }


def test_a_flat_folder_is_split_as_for_training(tmp_path):
    for seed in range(10):
        write_pair(tmp_path, f"i{seed}", seed // 9 * 8 + seed % 9)  # i8 and i9 are the same
    assert check(str(tmp_path)).images == {"train": 8, "validation": 1, "test": 1}
    together = found(tmp_path, fractions=(1.0, 0.0, 0.0))
    assert ("note", "images that occur several times in a split") in [p[:2] for p in together]
    for seed in range(20):
        kinds = {kind for _, kind, _ in found(tmp_path, seed=seed)}
        if "images that occur in several splits" in kinds:
            break
    else:
        pytest.fail("no seed parts the two")
    write(tmp_path / "masks/lone.png", HALF)  # once, though there are three splits
    assert found(tmp_path).count(("error", "masks without an image", "masks/lone.png")) == 1


def test_label_images(tmp_path):
    write_pair(tmp_path / "train", "a", 0, [[0, 1, 2, 9]] * 4, "labels")
    write_pair(tmp_path / "train", "b", 1, [[0, 1, 2, 255]] * 4, "labels")
    write_pair(tmp_path / "train", "c", 2, np.zeros((4, 4)), "labels")
    write_pair(tmp_path / "train", "d", 3, HALF, "labels")
    first, second = found(tmp_path, "train")
    assert first[2].startswith("train/labels/b.png holds 255, often void")
    assert second == ("warning", "empty masks", "train/labels/c.png")


def test_objects_and_classes(tmp_path):
    soft = np.array([[0, 0, 0, 255, 255, 255]] * 4, np.uint8).repeat(5, axis=1)
    soft[0, 14] = 100
    write_pair(tmp_path / "train", "a", 0, [[0, 1, 2, 9]] * 4)
    write_pair(tmp_path / "test", "b", 1, soft)
    write(tmp_path / "test/images/b.png", np.zeros((*soft.shape, 3)))
    assert [p[1:] for p in found(tmp_path, "train")] == [
        (
            "masks with more than two values",
            "train/masks/a.png is a label image: every label above 0 becomes the object",
        )
    ]
    assert found(tmp_path, "train", objects="each", classes=("9",)) == []
    (severity, _, detail), void = found(tmp_path, "test", objects="each")
    assert "holds 255, often void" in void[2]
    assert severity == "error" and "test/masks/b.png looks like a mask with soft edges" in detail
    ((severity, _, detail),) = found(tmp_path, "train", classes=("8",))
    assert severity == "error" and "holds the class 8; the nearest label is 9" in detail
    # What is wrong before is not said twice.
    (tmp_path / "train/images/a.png").rename(tmp_path / "train/images/c.png")
    kinds = [kind for _, kind, _ in found(tmp_path, "train", objects="each")]
    assert kinds == ["images without a mask", "masks without an image"]


def test_tiny_objects(tmp_path):
    # Two pixels of an image become one along a side of 1024.
    for name, area in (("a", 3), ("b", 4)):
        mask = np.zeros((10, 2048), np.uint8)
        mask[3, 5 : 5 + area] = 255
        write(tmp_path / f"train/images/{name}.png", np.full((10, 2048, 3), area))
        write(tmp_path / f"train/masks/{name}.png", mask)
    assert found(tmp_path, "train") == [
        (
            "warning",
            "objects smaller than a pixel of an input of 1024 pixels",
            "train/masks/a.png",
        )
    ]


@pytest.mark.parametrize("make", [lambda root: None, lambda root: (root / "images").mkdir()])
def test_data_that_cannot_be_opened(tmp_path, make):
    make(tmp_path)
    ((severity, kind, _),) = found(tmp_path)
    assert (severity, kind) == ("error", "splits that cannot be opened")
    ((severity, _, detail),) = found(tmp_path / "nowhere")
    assert severity == "error" and "does not exist" in detail


def write_coco(file, images, annotations):
    file.parent.mkdir(parents=True, exist_ok=True)
    entries = [
        {"id": i, "file_name": name, "height": 4, "width": 4} for i, name in enumerate(images)
    ]
    file.write_text(
        json.dumps(
            {
                "images": entries,
                "annotations": [
                    {"id": i, "image_id": image, "segmentation": segmentation}
                    for i, (image, segmentation) in enumerate(annotations)
                ],
            }
        )
    )


def runs(*counts):
    return {"size": [4, 4], "counts": list(counts)}


def test_coco(tmp_path):
    for seed, name in enumerate(("a", "b", "c", "e")):
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3))
        write(tmp_path / f"train/{name}.png", pixels)
    write(tmp_path / "train/small.png", np.zeros((2, 4, 3)))
    (tmp_path / "train/broken.png").write_bytes(b"<html>")
    (tmp_path / "test").mkdir()
    Image.open(tmp_path / "train/a.png").save(tmp_path / "test/a.png")
    images = ["a.png", "b.png", "c.png", "missing.png", "small.png", "broken.png", "e.png"]
    annotations = [
        (0, runs(4, 12)),
        (1, [[1, 1, 2, 2]]),
        (2, runs(16)),
        (99, runs(4, 12)),
        (6, {"size": [4, 4], "counts": "1"}),
        (6, runs(4, 12)),
    ]
    write_coco(tmp_path / "train/_annotations.coco.json", images, annotations)
    write_coco(tmp_path / "test/_annotations.coco.json", ["a.png"], [(0, runs(4, 12))])
    problems = found(tmp_path)
    starts = [
        ("warning", "splits that cannot be opened", ""),
        ("error", "faulty entries in the JSON", "_annotations.coco.json: annotation 1 of 'b.png'"),
        ("error", "faulty entries in the JSON", "_annotations.coco.json: annotation 3 points to"),
        ("error", "missing images", "train/missing.png"),
        ("warning", "empty masks", "b.png has no annotations"),
        ("warning", "empty masks", "annotation 2 of c.png"),
        ("error", "sizes that differ", "the image train/small.png is 4x2"),
        ("error", "files that cannot be used", "train/broken.png cannot be decoded"),
        ("error", "files that cannot be used", "in train/_annotations.coco.json annotation 4 of"),
        ("error", "images that occur in several splits", "a.png (train) = a.png (test)"),
    ]
    assert len(problems) == len(starts)
    for problem, (severity, kind, start) in zip(problems, starts, strict=True):
        assert problem[:2] == (severity, kind)
        assert problem[2].startswith(start)


def test_a_json_that_is_none_or_has_only_faults(tmp_path):
    write(tmp_path / "images/a.png", HALF)
    (tmp_path / "annotations.json").write_text("{}")
    ((severity, _, detail),) = found(tmp_path)
    assert severity == "error" and "is no COCO JSON" in detail
    (tmp_path / "annotations.json").write_text('{"images": [{}], "annotations": []}')
    ((severity, kind, _),) = found(tmp_path)
    assert (severity, kind) == ("error", "faulty entries in the JSON")


def test_the_worst_comes_first_and_long_lists_are_cut():
    notes = [Problem("note", "kind", str(n)) for n in range(12)]
    report = Report({}, (*notes, Problem("error", "other", "worse")))
    lines = ["error: other (1)", "  worse", "note: kind (12)", "  0", "  1", "  2", "  and 9 more"]
    assert list(report.lines(limit=3)) == lines


def test_the_command_line(dataset, capsys):
    assert main(["check-data", str(dataset)]) == 0
    printed = capsys.readouterr()
    assert "warning: splits that cannot be opened (1)" in printed.err
    assert printed.out == "images: train 2, test 2\nerrors: 0\nwarnings: 1\nnotes: 0\n"
    assert main(["check-data", str(dataset), "--objects", "each", "--classes", "7", "8"]) == 1
    assert "holds the class 7; the nearest label is 255" in capsys.readouterr().err
    (dataset / "test/masks/c.png").unlink()
    assert main(["check-data", str(dataset), "--split", "test", "--json"]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["errors"] == 1 and result["images"] == {"test": 1}
    assert result["problems"] == [
        {
            "severity": "error",
            "kind": "images without a mask",
            "detail": "test/images/c.png",
        }
    ]


def test_names_that_never_match_are_listed(tmp_path):
    """As where all masks end in `_mask`: no split can be drawn."""
    for seed in range(3):
        write(tmp_path / f"images/{seed}.png", np.zeros((4, 4, 3)))
        write(tmp_path / f"masks/{seed}_mask.png", HALF)
    problems = found(tmp_path)
    assert {kind for _, kind, _ in problems} == {"images without a mask", "masks without an image"}
    assert len(problems) == 6 and all(severity == "error" for severity, _, _ in problems)
