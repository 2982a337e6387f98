"""Folders of dense tasks, and changes that keep their geometry true."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from samjax.data.dense import DenseDataset, DenseSample, open_dense, resize_nearest
from samjax.data.dense_augment import DenseAugmentConfig, augment_dense
from samjax.data.dense_folder import DenseFolder
from samjax.data.dense_pipeline import prepare_truth
from samjax.preprocess import Frame
from samjax.tasks import CITYSCAPES, NYUV2, PASCAL_CONTEXT, Task, find

SIZE = (12, 16)
RNG = np.random.default_rng(0)


def write(root, split="train", count=11):
    """A split as MTAN has it, with unknown pixels."""
    normals = RNG.normal(size=(count, *SIZE, 3)).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals[:, 0] = 0
    data = {
        "image": RNG.random((count, *SIZE, 3), np.float32),
        "label": RNG.integers(-1, 13, (count, *SIZE)).astype(np.int8),
        "depth": (RNG.random((count, *SIZE, 1)) * 9).astype(np.float32),
        "normal": normals,
    }
    for name, arrays in data.items():
        (root / split / name).mkdir(parents=True)
        for i, array in enumerate(arrays):
            np.save(root / split / name / f"{i}.npy", array)
    return data


def test_a_folder_is_read_as_it_is_laid_out(tmp_path):
    data = write(tmp_path)
    write(tmp_path, "val", 2)
    source = DenseFolder(tmp_path, "train", NYUV2)
    assert source.names == tuple(map(str, range(11)))  # 2 before 10
    sample = source[10]
    np.testing.assert_array_equal(sample.image, np.round(data["image"][10] * 255))
    np.testing.assert_array_equal(sample.truth["segmentation"], data["label"][10])
    np.testing.assert_array_equal(sample.truth["depth"], data["depth"][10])
    np.testing.assert_array_equal(sample.truth["normals"], data["normal"][10])
    assert sample.truth["segmentation"].dtype == np.int32
    assert len(DenseFolder(tmp_path, "test", NYUV2[:1])) == 2


def test_what_is_missing_is_told(tmp_path):
    def complaint(data, split="train", tasks=NYUV2):
        with pytest.raises(ValueError) as caught:
            open_dense(data, split, tasks)
        return str(caught.value)

    assert complaint("").startswith("no data: pass --data")
    assert f"there is no folder {tmp_path}/no:" in complaint(f"{tmp_path}/no")
    root = str(tmp_path)
    assert "train/image: a folder of dense tasks has {train,val}/image" in complaint(root)
    write(tmp_path)
    for split in ("validation", "val"):
        assert "splits train and test, and no validation" in complaint(root, split)
    assert "split must be one of" in complaint(root, "all")
    assert f"there is no folder {root}/val/image" in complaint(root, "test")
    said = complaint(root, tasks=[Task("disparities", 1, "masked_l1")])
    assert f"task disparities: {root}/train has no folder disparities, only depth" in said
    (tmp_path / "train/label").rename(tmp_path / "train/label_7")
    said = complaint(root)
    assert "task segmentation:" in said
    assert "no folder label_13 or label or segmentation, only depth, label_7, normal" in said
    (tmp_path / "train/depth/3.npy").unlink()
    said = complaint(root, tasks=NYUV2[1:])
    assert f"task depth: {root}/train/depth has no file for 3 of {root}/train/image" in said
    (tmp_path / "train/depth/7.npy").unlink()
    assert "no file for 3 and 1 more of" in complaint(root, tasks=NYUV2[1:])


def test_sizes_are_checked_before_long_work(tmp_path):
    """Of all files by their headers; of the first sample the values too."""
    write(tmp_path)
    source = open_dense(str(tmp_path), "train", NYUV2)
    assert isinstance(source, DenseDataset)
    source.check_sizes()

    def complaint(file, content):
        path = tmp_path / "train" / file
        before = path.read_bytes()
        path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
        with pytest.raises(ValueError) as caught:
            source.check_sizes()
        path.write_bytes(before)
        return str(caught.value)

    whole = (tmp_path / "train/image/7.npy").read_bytes()
    assert "depth/9.npy is [3, 4], and task depth" in complaint("depth/9.npy", np.zeros((3, 4)))
    two = np.zeros((*SIZE, 2), np.float32)
    assert "task normals needs [12, 16, 3]" in complaint("normal/9.npy", two)
    assert "and an image is (height, width, 3)" in complaint("image/9.npy", two)
    assert "image/7.npy cannot be read as an array" in complaint("image/7.npy", whole[:-100])
    assert "task segmentation has the classes 0" in complaint("label/0.npy", np.full(SIZE, 13))
    source.check_sizes()


@pytest.mark.parametrize(("folder", "classes"), [("label_7", 7), ("label_19", 19), ("label", 7)])
def test_cityscapes(tmp_path, folder, classes):
    """128x256 there; 2975 and 500 images; labels in the folder of as many classes."""
    image, disparity = RNG.random((*SIZE, 3)), RNG.random((*SIZE, 1)).astype(np.float32)
    labels = RNG.integers(-1, classes, SIZE).astype(np.float64)
    for split in ("train", "val"):
        arrays = {"image": image, "depth": disparity, folder: labels, "label_2": labels}
        for name, array in arrays.items():
            (tmp_path / split / name).mkdir(parents=True)
            np.save(tmp_path / split / name / "0.npy", array)
    tasks = (Task("segmentation", classes, "cross_entropy"), CITYSCAPES[1])
    for split in ("train", "test"):
        truth = open_dense(str(tmp_path), split, tasks)[0].truth
        np.testing.assert_array_equal(truth["segmentation"], labels)
        np.testing.assert_array_equal(truth["disparity"], disparity)


@pytest.mark.parametrize(
    ("folder", "array", "message"),
    [
        ("label", np.full(SIZE, 13), "has the value 13, and task segmentation has the classes 0"),
        ("label", np.full(SIZE, 0.5), "has the value 0.5"),
        ("label", np.full(SIZE, np.nan), "has the value nan"),
        ("label", np.zeros((*SIZE, 3)), r"is \[12, 16, 3\], and task .* needs \[12, 16\]"),
        ("label", np.zeros((3, 4)), r"is \[3, 4\], and task segmentation needs \[12, 16\]"),
        ("depth", np.zeros((*SIZE, 2)), r"is \[12, 16, 2\], and task depth needs \[12, 16, 1\]"),
        ("depth", np.full(SIZE, np.nan), "not finite"),
        ("depth", np.full(SIZE, -1.0), "values below 0"),
        ("normal", np.full((*SIZE, 3), 1.0), "neither 1 nor 0"),
        ("image", np.zeros(SIZE), r"and an image is \(height, width, 3\)"),
        ("image", np.full((*SIZE, 3), 2.0), r"outside \[0, 1\]"),
    ],
)
def test_arrays_that_cannot_be(tmp_path, folder, array, message):
    write(tmp_path, count=1)
    np.save(tmp_path / f"train/{folder}/0.npy", array)
    source = DenseFolder(tmp_path, "train", NYUV2)
    with pytest.raises(ValueError, match=message):
        source[0]


def test_a_file_that_is_no_array_is_named(tmp_path):
    write(tmp_path, count=1)
    (tmp_path / "train/depth/0.npy").write_bytes(b"\x93NUMPY no")
    with pytest.raises(ValueError, match=r"depth/0.npy cannot be read as an array"):
        DenseFolder(tmp_path, "train", NYUV2)[0]


def test_threads_take_turns_with_headers(tmp_path, monkeypatch):
    """Python 3.11's `ast`, by which NumPy parses them, fails now and then where they do not."""
    write(tmp_path, count=4)
    source = DenseFolder(tmp_path, "train", NYUV2)
    parse, at_once, most = np.lib.format.open_memmap, set(), []

    def parse_slowly(*args, **options):
        at_once.add(threading.get_ident())
        most.append(len(at_once))
        time.sleep(0.002)
        try:
            return parse(*args, **options)
        finally:
            at_once.remove(threading.get_ident())

    monkeypatch.setattr(np.lib.format, "open_memmap", parse_slowly)
    with ThreadPoolExecutor(4) as executor:
        samples = list(executor.map(source.__getitem__, range(4)))
    assert [sample.name for sample in samples] == ["0", "1", "2", "3"]
    assert len(most) == 16 and max(most) == 1


def plane(slope=(0.3, 0.1), shape=(60, 80)):
    """A depth map, its pixels' places as "classes", and directions that tell left from right."""
    rows, columns = np.indices(shape)
    depth = (5 + slope[0] * rows + slope[1] * columns)[..., None].astype(np.float32)
    normals = np.stack([columns / 80, rows / 60, np.zeros(shape)], -1).astype(np.float32)
    image = np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)
    labels = (rows * 80 + columns).astype(np.int32)
    truth = {"segmentation": labels, "depth": depth, "normals": normals}
    return DenseSample("a", image, truth)


TASKS = (Task("segmentation", 60 * 80, "cross_entropy"), *NYUV2[1:])


def test_a_mirror_turns_directions_around():
    sample = plane()
    config = DenseAugmentConfig(scales=(1.0,))
    seen = set()
    for seed in range(8):
        got = augment_dense(np.random.default_rng(seed), sample, TASKS, config)
        flipped = bool(got.image[0, 0, 0])
        seen.add(flipped)
        order = slice(None, None, -1 if flipped else 1)
        sign = np.float32([-1 if flipped else 1, 1, 1])
        np.testing.assert_array_equal(got.image, sample.image[:, order])
        np.testing.assert_array_equal(got.truth["depth"], sample.truth["depth"][:, order])
        np.testing.assert_array_equal(
            got.truth["normals"], sample.truth["normals"][:, order] * sign
        )
    assert seen == {True, False}


def test_what_is_enlarged_is_nearer():
    """Each pixel of the truths is a pixel of before, the same in all of them."""
    sample = plane()
    config = DenseAugmentConfig(flip=False, scales=(1.5,))
    got = augment_dense(np.random.default_rng(0), sample, TASKS, config)
    rows, columns = np.divmod(got.truth["segmentation"], 80)
    assert np.ptp(rows) == 39
    assert np.ptp(columns) == 52
    np.testing.assert_allclose(
        got.truth["depth"], sample.truth["depth"][rows, columns] / 1.5, rtol=1e-6
    )
    np.testing.assert_array_equal(got.truth["normals"], sample.truth["normals"][rows, columns])
    # The image goes along, to a pixel.
    assert np.abs(got.image[..., 1].astype(int) - rows).max() <= 1
    assert np.abs(got.image[..., 0].astype(int) - columns).max() <= 1


def test_changes_are_a_function_of_the_generator():
    sample = plane()
    one, other = (
        augment_dense(np.random.default_rng(5), sample, TASKS, DenseAugmentConfig())
        for _ in range(2)
    )
    np.testing.assert_array_equal(one.image, other.image)
    with pytest.raises(ValueError, match="scales must be 1 or more"):
        DenseAugmentConfig(scales=(0.5,))


def test_edges_and_saliency_go_along_with_their_image():
    """An image that shows its own truths, of a size of its own, through changes and the frame."""
    shape, tasks = (50, 75), [find(PASCAL_CONTEXT, name) for name in ("edges", "saliency")]
    blocks = np.kron(RNG.integers(-1, 2, (5, 5)), np.ones((10, 15))).astype(np.int32)
    image = np.repeat((blocks * 100 + 100).astype(np.uint8)[..., None], 3, axis=-1)
    sample = DenseSample("a", image, {"edges": blocks, "saliency": blocks})
    frame = Frame(48, 64)
    for seed in range(6):
        got = augment_dense(np.random.default_rng(seed), sample, tasks, DenseAugmentConfig())
        for task in tasks:
            own = got.truth[task.name]
            assert own.shape == shape and own.dtype == np.int32
            # Off the borders between blocks, which the image blurs.
            assert np.mean(own * 100 + 100 == got.image[..., 0]) > 0.8
            placed = prepare_truth(task, own, frame)
            height, width = frame.resized_shape(*shape)
            assert placed.shape == (48, 64) and placed.dtype == np.int32
            assert set(np.unique(placed[:height, :width])) <= {-1, 0, 1}
            assert (placed[height:] == -1).all() and (placed[:, width:] == -1).all()


@pytest.mark.parametrize("shape", [(5, 8), (20, 33), (10, 16), (1, 1)])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_nearest_pixels_are_those_of_torch(shape, channels):
    torch = pytest.importorskip("torch")
    array = RNG.normal(size=(10, 16, *channels)).astype(np.float32)
    planes = torch.from_numpy(array.reshape(10, 16, -1)).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(planes, size=shape, mode="nearest-exact")
    expected = expected[0].permute(1, 2, 0).numpy().reshape(*shape, *channels)
    np.testing.assert_array_equal(resize_nearest(array, shape), expected)
