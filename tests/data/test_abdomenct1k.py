"""AbdomenCT-1K, from small volumes in the layout of its archives to records of slices."""

import io
import json
import sys
import zipfile

import nibabel
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from rich.console import Console

from samjax import cli, tasks
from samjax.data.builders import prepared_folder
from samjax.data.builders.prepare import prepare
from samjax.data.dense import open_dense
from samjax.data.sources import open_source
from samjax.data.volumes import VolumeFile, read_label_slices, read_slices

SHAPE = (24, 20, 6)  # to the right, to the front, up
SPACING = (0.8, 0.8, 2.5)
CASES = [f"Case_{i:05}" for i in range(1, 6)]
UNLABELLED = "Case_00031"
NAME = "abdomenct1k:size=24,min_area=3,window=-100+155"
CLASSES = ["background", "liver", "kidney", "spleen", "pancreas"]


def quiet():
    return Console(file=io.StringIO(), soft_wrap=True)


def volumes(case):
    """Hounsfield units and labels of a case; axes go to the right, to the front and up."""
    rng = np.random.default_rng(CASES.index(case) if case in CASES else 99)
    hounsfield = rng.integers(-1024, 1500, SHAPE).astype(np.int16)
    labels = np.zeros(SHAPE, np.uint8)
    labels[12:20, 5:15, 1:5] = 1  # the liver is on the right
    labels[2:6, 6:10, 2:4] = 3
    labels[9, 3, 2] = 4
    labels[21, 18, 5] = 2  # one pixel: less than counts
    return hounsfield, labels


def affine():
    matrix = np.diag([*SPACING, 1.0])
    matrix[:3, 3] = (-9, -7, 30)
    return matrix


def save(path, values, matrix=None, **header):
    image = nibabel.Nifti1Image(values, affine() if matrix is None else matrix)
    if header:
        image.header.set_slope_inter(**header)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def write_official(root):
    """Two parts, the second as an archive; of one image there are no labels."""
    for case in (*CASES, UNLABELLED):
        hounsfield, labels = volumes(case)
        part = 1 if case in CASES[:3] else 2
        save(root / f"AbdomenCT-1K-ImagePart{part}" / f"{case}_0000.nii.gz", hounsfield)
        if case in CASES:
            save(root / "Mask" / f"{case}.nii.gz", labels)
    second = root / "AbdomenCT-1K-ImagePart2"
    with zipfile.ZipFile(root / f"{second.name}.zip", "w") as archive:
        archive.writestr(f"__MACOSX/{second.name}/._Case_00004_0000.nii.gz", b"macOS")
        for file in sorted(second.iterdir()):
            archive.write(file, f"{second.name}/{file.name}")
            file.unlink()
    second.rmdir()


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    root = tmp_path_factory.mktemp("official")
    write_official(root)
    return root


@pytest.fixture(scope="module")
def data_dir(official, tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    prepared = prepare(NAME, root, official, quiet())
    assert prepared.splits == {"train": 4 * len(CASES)} and not prepared.reused
    return root


def read(name, data_dir):
    builder = tfds.builder_from_directory(prepared_folder(name, data_dir))
    return builder.info.metadata, list(builder.as_data_source("train"))


def displayed(volume, z):
    """A slice as radiologists see it: the front at the top, the right of the body on the left."""
    width, height, _ = volume.shape
    rows = [[volume[width - 1 - c, height - 1 - r, z] for c in range(width)] for r in range(height)]
    return np.array(rows)


def test_records_are_the_slices_of_the_volumes(data_dir):
    metadata, records = read(NAME, data_dir)
    assert metadata["classes"] == CLASSES
    names = [f"{case}_{z:04}" for case in CASES for z in (1, 2, 3, 4)]
    assert metadata["names"] == {"train": names}
    assert [record["name"].decode() for record in records] == names
    assert metadata["groups"] == {"train": [name[:10] for name in names]}
    for name, record in zip(names, records, strict=True):
        hounsfield, labels = volumes(name[:10])
        z = int(name[-4:])
        grey = np.clip(displayed(hounsfield, z), -100, 155) + 100  # 255 units wide
        np.testing.assert_array_equal(record["image"][..., 0], grey)
        np.testing.assert_array_equal(record["labels"][..., 0], displayed(labels, z))
        left, right = np.split(record["labels"][..., 0] == 1, 2, axis=1)
        assert left.any() and not right.any()  # the liver


def test_organs_are_classes_of_a_source(data_dir, monkeypatch, train_one_step):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    data, options = f"tfds:{NAME}", {"seed": 1, "fractions": (0.8, 0.0, 0.2)}
    splits = {
        split: open_source(data, split, classes=("liver",), **options)
        for split in ("train", "test")
    }
    cases = {split: {name[:10] for name in source.names} for split, source in splits.items()}
    assert len(cases["train"]) == 4 and len(cases["test"]) == 1
    assert not cases["train"] & cases["test"]
    source = splits["train"]
    for name, sample in zip(source.names, (source[i] for i in range(len(source))), strict=True):
        _, labels = volumes(name[:10])
        np.testing.assert_array_equal(sample.mask, displayed(labels, int(name[-4:])) == 1)
    organs = open_source(data, "train", objects="each", **options)
    assert {name.partition("#")[2] for name in organs.names} == {"1", "3", "4"}
    assert len(organs) == 4 * (4 + 2 + 1)  # slices of the liver, the spleen and the pancreas
    assert np.isfinite(train_one_step(source))
    (task,) = tasks.parse(["segmentation:5:mask_classification"])
    dense = open_dense(data, "train", [task], **options)
    _, labels = volumes(dense.names[1][:10])
    np.testing.assert_array_equal(
        dense[1].truth["segmentation"], displayed(labels, int(dense.names[1][-4:]))
    )


def test_the_same_volume_stored_otherwise_gives_the_same_records(data_dir, tmp_path):
    _, expected = read(NAME, data_dir)
    for i, case in enumerate(CASES):
        image = tmp_path / f"AbdomenCT-1K-ImagePart1/{case}_0000.nii.gz"
        label = tmp_path / f"Mask/{case}.nii.gz"
        for file, values in zip((image, label), volumes(case), strict=True):
            matrix, header = affine(), {}
            if i in (1, 2):  # LAS, LPS
                for axis in range(i):
                    values = np.flip(values, axis)
                    matrix[:, 3] += matrix[:, axis] * (SHAPE[axis] - 1)
                    matrix[:, axis] *= -1
            if i == 3:  # up, to the right, to the front
                values = values.transpose(2, 0, 1)
                matrix = matrix[:, [2, 0, 1, 3]]
            if i == 4 and file == image:  # scaled, and turned by less than half a voxel
                values, header = (values + 1024).astype(np.uint16), {"slope": 1, "inter": -1024}
                matrix[0, 1] = 0.005
            save(file, values, matrix, **header)
    prepare(NAME, tmp_path / "tfds", tmp_path, quiet())
    _, records = read(NAME, tmp_path / "tfds")
    for one, other in zip(records, expected, strict=True):
        assert one["name"] == other["name"]
        for key in ("image", "labels"):
            np.testing.assert_array_equal(one[key], other[key])


def test_settings_make_other_slices_in_another_folder(official, data_dir, tmp_path):
    name = "abdomenct1k:organs=spleen+pancreas,size=12,min_area=0,window=0+1000"
    assert prepare(name, data_dir, official, quiet()).splits == {"train": 2 * len(CASES)}
    folders = [prepared_folder(own, data_dir) for own in (name, NAME, "abdomenct1k")]
    assert [folder.parent.name for folder in folders] == [
        "window=0+1000,size=12,organs=spleen+pancreas,min_area=0",
        "window=-100+155,size=24,organs=liver+kidney+spleen+pancreas,min_area=3",
        "window=-500+1000,size=256,organs=liver+kidney+spleen+pancreas,min_area=100",
    ]
    assert [folder.is_dir() for folder in folders] == [True, True, False]
    # The order in which they are given does not matter.
    assert (
        prepared_folder("abdomenct1k:min_area=3,size=24,window=-1e2+155.0", data_dir) == folders[1]
    )
    metadata, records = read(name, data_dir)
    assert metadata["names"]["train"][:2] == ["Case_00001_0002", "Case_00001_0003"]
    hounsfield, labels = volumes(CASES[0])
    record = records[1]
    assert record["image"].shape[:2] == record["labels"].shape[:2] == (10, 12)
    assert set(np.unique(record["labels"])) == {0, 3}
    # A spleen of 4 by 4 pixels, which begins at even ones.
    np.testing.assert_array_equal(
        np.kron(record["labels"][..., 0], np.ones((2, 2))) == 3, displayed(labels, 3) == 3
    )
    grey = np.round(np.clip(displayed(hounsfield, 3), 0, 1000) * 0.255).astype(np.uint8)
    small = Image.fromarray(grey).resize((12, 10), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(small, int) - record["image"][..., 0]).max() <= 1


def test_settings_that_cannot_be(tmp_path):
    def complaint(settings):
        with pytest.raises(ValueError) as caught:
            prepared_folder(f"abdomenct1k:{settings}", tmp_path)
        assert str(caught.value).startswith(f"abdomenct1k:{settings}: ")
        return str(caught.value)

    assert "no setting 'windo'; the nearest is window, there are window, size" in complaint(
        "windo=1"
    )
    assert "'soft' is no SETTING=VALUE" in complaint("window=0+9,soft")
    assert "window cannot be '-160'" in complaint("window=-160")
    assert "window cannot be '0+x'" in complaint("window=0+x")
    assert "window must go up, such as -160+240, and is 9+9" in complaint("window=9+9")
    assert "window must go up" in complaint("window=nan+9")
    assert "size must be 1 or more" in complaint("size=0")
    assert "no organ 'livr'; the nearest is liver" in complaint("organs=kidney+livr")
    with pytest.raises(ValueError, match="kvasir_seg:size=3: kvasir_seg has no settings"):
        prepared_folder("kvasir_seg:size=3", tmp_path)


def test_the_command(official, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert cli.main(["data", "prepare", NAME, "--manual-dir", str(official), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert result["dataset"] == NAME and result["path"] == str(prepared_folder(NAME, tmp_path))
    for said in ("@article{ma2022abdomenct", "labels of 5 of 1000 volumes", f"tfds:{NAME}"):
        assert said in captured.err
    assert cli.main(["data", "list", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)["datasets"]["abdomenct1k"]
    assert entry["pairs"] is None and entry["path"] is None
    assert cli.main(["data", "list"]) == 0
    row = next(x for x in capsys.readouterr().out.splitlines() if "abdomenct1k" in x)
    assert "AbdomenCT-1K: slices of 1000 CT" in row


@pytest.fixture
def broken(tmp_path):
    """A folder of one volume, and what preparing it complains of."""
    hounsfield, labels = volumes(CASES[0])
    image = save(tmp_path / "AbdomenCT-1K-ImagePart1" / f"{CASES[0]}_0000.nii.gz", hounsfield)
    label = save(tmp_path / "Mask" / f"{CASES[0]}.nii.gz", labels)

    def complaint(name=NAME):
        with pytest.raises(ValueError) as caught:
            prepare(name, tmp_path / "tfds", tmp_path, quiet())
        config = prepared_folder(name, tmp_path / "tfds").parent
        assert list(config.iterdir()) == []  # nothing is left
        return str(caught.value)

    return image, label, complaint


def test_volumes_that_do_not_belong_together(broken):
    image, label, complaint = broken
    _, labels = volumes(CASES[0])
    save(label, labels[:, :, 1:])
    assert f"{label} is [24, 20, 5], and its image {image.name} is [24, 20, 6]" in complaint()
    flipped = affine()
    flipped[0, 0] *= -1
    save(label, labels, flipped)
    assert f"the affine of {label} puts it 36.8 mm away from its image" in complaint()
    save(label, labels[..., None, :])
    assert f"{label} is [24, 20, 1, 6], and a volume has three axes" in complaint()
    save(label, labels)
    image.unlink()
    image.with_name("Case_00009_0000.nii.gz").write_bytes(b"another")
    assert f"labels in {label.parent} have no image in" in complaint()


def test_labels_that_cannot_be(broken):
    _, label, complaint = broken
    _, labels = volumes(CASES[0])
    for value, said in ((7, "7"), (1.5, "1.5"), (-1, "-1"), (np.nan, "nan")):
        wrong = labels.astype(np.float32)
        wrong[0, 0, 5] = value
        save(label, wrong)
        assert f"{label} has the value {said}" in complaint()
    save(label, np.zeros_like(labels))
    assert "have no slice of more than 3 pixels of liver, kidney, " in complaint()
    # Whole numbers are labels, whatever their type is.
    file = VolumeFile(label, lambda: open(label, "rb"))
    save(label, labels.astype(np.float64))
    slices = read_label_slices(file, 5)
    assert slices.dtype == np.uint8
    np.testing.assert_array_equal(slices, [displayed(labels, z) for z in range(SHAPE[2])])
    assert read_slices(file).dtype == np.float64


def test_files_that_are_damaged(broken):
    image, label, complaint = broken
    for file in (label, image):
        whole = file.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", b"no gzip", whole[:-8] + bytes(8)):
            file.write_bytes(damaged)
            assert f"{file} cannot be read as NIfTI (" in complaint()
        file.write_bytes(whole)
    hounsfield, _ = volumes(CASES[0])
    values = hounsfield.astype(np.float32)
    values[3, 3, 3] = np.nan
    save(image, values)
    assert f"{image} has values that are not finite" in complaint()
    # In an archive, too.
    archive = image.parent.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as opened:
        opened.write(image, f"{image.parent.name}/{image.name}")
    content = archive.read_bytes()
    archive.write_bytes(content[:200] + bytes(300) + content[500:])
    image.unlink()
    image.parent.rmdir()
    assert f"{archive}/{image.parent.name}/{image.name} cannot be read as NIfTI" in complaint()
    archive.write_bytes(content[:-40])
    assert f"{archive} is broken (" in complaint()


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no Mask/: get .*extract Mask.7z to Mask/"):
        prepare(NAME, tmp_path, tmp_path, quiet())
    (tmp_path / "Mask").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no AbdomenCT-1K-ImagePart1.zip or "):
        prepare(NAME, tmp_path, tmp_path, quiet())
    (tmp_path / "AbdomenCT-1K-ImagePart3").mkdir()
    with pytest.raises(ValueError, match=r"Mask has no Case_00001.nii.gz"):
        prepare(NAME, tmp_path, tmp_path, quiet())


def test_without_nibabel_the_extra_is_named(official, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(RuntimeError, match=r"need nibabel .*pip install 'samjax\[medical\]'"):
        prepare(NAME, tmp_path, official, quiet())
