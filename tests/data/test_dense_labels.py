"""Label images as truths of a dense task, in folders and in datasets of TFDS."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from samjax.data.builders.records import Contents, RecordsBuilder
from samjax.data.dense import DenseDataset, open_dense
from samjax.data.sources import open_source
from samjax.tasks import Task

SIZE = (6, 9)
RNG = np.random.default_rng(0)
TASK = Task("segmentation", 4, "mask_classification")
NAMES = tuple("abcdefghij")


def image_of(name):
    return np.full((*SIZE, 3), 20 * NAMES.index(name), np.uint8)


def labels_of(name):
    """Each class, and 255 where a pixel does not count."""
    rng = np.random.default_rng(NAMES.index(name))
    labels = rng.integers(0, 4, SIZE)
    labels[0] = (0, 1, 2, 3, 255, 0, 1, 2, 3)
    return labels


def as_palette(labels):
    """Colours that say nothing: white for class 0, black for class 3."""
    image = Image.fromarray(labels.astype(np.uint8), "P")
    colours = np.zeros((256, 3), np.uint8)
    colours[:3] = ((255, 255, 255), (1, 200, 3), (255, 255, 254))
    image.putpalette(colours.ravel().tolist())
    return image


KINDS = {
    "grey": lambda labels: Image.fromarray(labels.astype(np.uint8)),
    "palette": as_palette,
    "16 bits": lambda labels: Image.fromarray(labels.astype(np.uint16)),
}


def write(folder, names, kind="grey"):
    for place in ("images", "labels"):
        (folder / place).mkdir(parents=True)
    for name in names:
        Image.fromarray(image_of(name)).save(folder / "images" / f"{name}.png")
        KINDS[kind](labels_of(name)).save(folder / "labels" / f"{name}.png")


def truth_of(name):
    labels = labels_of(name)
    return np.where(labels == 255, -1, labels)


def assert_samples(source, names):
    assert isinstance(source, DenseDataset)
    assert source.names == tuple(names) and len(source) == len(names)
    source.check_sizes()
    for index, name in reversed(list(enumerate(names))):
        sample = source[index]
        np.testing.assert_array_equal(sample.image, image_of(name))
        (truth,) = sample.truth.values()
        assert sample.name == name and truth.dtype == np.int32
        np.testing.assert_array_equal(truth, truth_of(name))


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_classes_whatever_the_file(tmp_path, kind):
    for split, names in (("train", "abc"), ("val", "de"), ("test", "f")):
        write(tmp_path / split, names, kind)
    for task in (TASK, Task("parts", 4, "cross_entropy")):
        for split, names in (("train", "abc"), ("validation", "de"), ("test", "f")):
            assert_samples(open_dense(str(tmp_path), split, [task]), names)
    assert open_dense(str(tmp_path), "train", [TASK]).image_file(1).name == "b.png"


def test_a_flat_folder_is_split_as_one_of_masks(tmp_path):
    write(tmp_path, NAMES)
    found = []
    for split in ("train", "validation", "test"):
        options = {"seed": 3, "fractions": (0.6, 0.2, 0.2)}
        names = open_source(str(tmp_path), split, **options).names
        assert_samples(open_dense(str(tmp_path), split, [TASK], **options), names)
        found += names
    assert sorted(found) == list(NAMES)


def complaint(data, split="train", tasks=(TASK,)):
    with pytest.raises(ValueError) as caught:
        open_dense(str(data), split, tasks).check_sizes()
    return str(caught.value)


def test_values_out_of_range_are_named(tmp_path):
    write(tmp_path / "train", "ab")
    labels = labels_of("b")
    labels[3, 4] = 4
    file = tmp_path / "train/labels/b.png"
    Image.fromarray(labels.astype(np.uint16)).save(file)
    source = open_dense(str(tmp_path), "train", [TASK])
    message = f"{file} has the value 4, and task segmentation has the classes 0 to 3, and 255 where"
    for read in (source.check_sizes, lambda: source[1]):  # before a run begins, and in it
        with pytest.raises(ValueError, match=message):
            read()
    Image.fromarray(labels.astype(np.uint16) + 300).save(tmp_path / "train/labels/a.png")
    assert "a.png has the value 30" in complaint(tmp_path)


def test_what_cannot_be_used_is_told(tmp_path):
    root = tmp_path / "data"
    write(root / "train", "ab")
    depth = Task("depth", 1, "masked_l1")
    assert "hold classes, and masked_l1 has none: choose cross_entropy" in complaint(
        root, tasks=[depth]
    )
    said = complaint(root, tasks=[TASK, depth])
    assert "there are the tasks segmentation and depth: name one of them" in said
    many = Task("segmentation", 256, "cross_entropy")
    assert "256 classes, and label images have at most 255" in complaint(root, tasks=[many])
    assert "has no split 'test', only train" in complaint(root, "test")
    Image.new("L", (3, 4)).save(root / "train/labels/b.png")
    assert "b.png is 3x4 pixels (width x height), but its image" in complaint(root)
    Image.new("RGB", SIZE[::-1], "red").save(root / "train/labels/b.png")
    with pytest.raises(ValueError, match=r"b\.png holds colours"):
        open_dense(str(root), "train", [TASK])[1]
    (root / "train/labels/b.png").unlink()
    assert "images without a mask: 'b.png'" in complaint(root)
    (root / "test/images").mkdir(parents=True)
    Image.new("RGB", SIZE[::-1]).save(root / "test/images/a.png")
    assert "test/labels is missing: put the labels there" in complaint(root, "test")
    (root / "train/labels").rename(root / "train/masks")
    assert "has masks/, of objects without a class: put label images of a" in complaint(root)


def test_a_task_of_a_folder_of_arrays_may_be_called_labels(tmp_path):
    for place, shape in (("image", (*SIZE, 3)), ("labels", SIZE), ("masks", SIZE)):
        (tmp_path / "train" / place).mkdir(parents=True)
        np.save(tmp_path / "train" / place / "0.npy", np.zeros(shape))
    tasks = [Task("labels", 4, "mask_classification"), Task("masks", 1, "balanced_bce")]
    assert open_dense(str(tmp_path), "train", tasks)[0].truth["labels"].shape == SIZE
    with pytest.raises(ValueError, match="no validation"):
        open_dense(str(tmp_path), "validation", tasks)


class Labelled(RecordsBuilder, skip_registration=True):
    """Records with a label image, as datasets of several classes have them."""

    VERSION = tfds.core.Version("1.0.0")
    TITLE, HOMEPAGE, LICENSE, CITATION = "labelled", "nowhere", "any", ""

    splits = {"train": NAMES}  # noqa: RUF012

    @classmethod
    def how_to_get(cls):
        return ""

    @classmethod
    def missing(cls, folder):
        return ""

    @classmethod
    def find(cls, folder):
        return folder

    def record_features(self):
        image = tfds.features.Image
        return {"image": image(shape=(None, None, 3)), "labels": image(shape=(None, None, 1))}

    def contents(self, found):
        self.info.metadata["classes"] = ["ground", "tree", "house", "sky"]

        def encoded(image):
            file = io.BytesIO()
            image.save(file, "PNG")
            return file.getvalue()

        def records(names):
            for name in names:
                image = Image.fromarray(image_of(name))
                yield {"image": encoded(image), "labels": encoded(as_palette(labels_of(name)))}

        return {
            split: Contents(list(names), records(names)) for split, names in self.splits.items()
        }


@pytest.fixture
def built(tmp_path, monkeypatch):
    """`built(splits)` makes tfds:labelled of so many splits."""

    def build(splits):
        builder = Labelled(data_dir=tmp_path / "tfds")
        builder.splits = splits
        (tmp_path / "files" / "any").mkdir(parents=True)  # TFDS wants some
        config = tfds.download.DownloadConfig(manual_dir=tmp_path / "files")
        builder.download_and_prepare(download_config=config)
        folder = tmp_path / "tfds" / "labelled" / "1.0.0"
        monkeypatch.setattr("samjax.data.tfds.prepared_folder", lambda name, data_dir: folder)

    return build


def test_a_dataset_of_tfds_has_them_as_labels(built, tmp_path):
    built({"train": NAMES[:7], "validation": "h", "test": ("j", "i")})
    for split, names in (("train", NAMES[:7]), ("validation", "h"), ("test", ("j", "i"))):
        assert_samples(open_dense("tfds:labelled", split, [TASK]), names)
    source = open_dense("tfds:labelled", "test", [TASK])
    assert source.image_file(0).getvalue() and "j (image)" in str(source.image_file(0))
    said = complaint("tfds:labelled", tasks=[Task("segmentation", 5, "cross_entropy")])
    assert "has 5 classes, and labelled has 4, ground, tree, house, sky: name the task seg" in said
    said = complaint("tfds:labelled", tasks=[Task("parts", 4, "cross_entropy")])
    assert "labelled has no task 'parts'; the nearest is segmentation, it has segmentation" in said
    said = complaint("tfds:labelled", tasks=[Task("segmentation", 1, "masked_l1")])
    assert "label images of labelled hold classes, and masked_l1 has none" in said


def test_a_dataset_of_tfds_without_splits_is_split_by_seed(built):
    built({"train": NAMES})
    found = []
    for split in ("train", "validation", "test"):
        source = open_dense("tfds:labelled", split, [TASK], seed=1, fractions=(0.5, 0.3, 0.2))
        assert_samples(source, source.names)
        found.append(source.names)
    assert [len(names) for names in found] == [5, 3, 2]
    assert sorted(sum(found, ())) == list(NAMES)
