"""The binary sets of Conv-LoRA and NAS-LoRA as small files in their official layouts."""

import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image


class Files:
    """A dataset's files, as published, and what they show."""

    def __init__(self, root, build):
        self.root = root
        self._build = build
        self.images: dict[tuple[str, str], np.ndarray] = {}
        self.masks: dict[tuple[str, str], np.ndarray] = {}

    def add(self, split, image, mask, mode="L"):
        """Writes noise and a rectangle to two paths; the sample's name is the image's stem."""
        number = len(self.images)
        rng = np.random.default_rng(number)
        height, width = 20 + number, 31 - number
        marked = np.zeros((height, width), bool)
        marked[4 : 9 + number, 5:12] = True
        name = image.rpartition("/")[2].rpartition(".")[0]
        self.write(image, rng.integers(0, 256, (height, width, 3), np.uint8))
        self.write(mask, encoded(marked, mode))
        with Image.open(self.root / image) as written:
            self.images[split, name] = np.asarray(written.convert("RGB"))
        self.masks[split, name] = marked

    def write(self, path, pixels):
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        made = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        made.save(file)

    def build(self, name):
        """Prepares a dataset beside its files, where TFDS_DATA_DIR is."""
        return self._build(name, self.root / "tfds", self.root)

    def official(self, name):
        """Writes a dataset as it is published."""
        _OFFICIAL[name](self)

    def table(self, name, splits, *tests):
        """Writes Conv-LoRA's archive of a set: paths in CSV files, whose names tell the splits."""
        for place, split in {**splits, **dict.fromkeys(tests, "test")}.items():
            rows = [",image,label"]
            for i in range(2):
                image, mask = f"{place}/images/{place}{i}.jpg", f"{place}/masks/{place}{i}.png"
                self.add(split, f"{name}/{image}", f"{name}/{mask}")
                rows.append(f"{i},{image},{mask}")
            (self.root / name / f"{place}.csv").write_text("\n".join(rows) + "\n")
        self.zip(name)

    def zip(self, *folders):
        """Packs folders into archives of their names, or of the name after a colon."""
        for told in folders:
            folder, _, file = told.partition(":")
            with zipfile.ZipFile(self.root / (file or f"{folder}.zip"), "w") as archive:
                archive.writestr(f"__MACOSX/{folder}/._1.png", b"macOS")
                for path in sorted((self.root / folder).rglob("*")):
                    archive.write(path, path.relative_to(self.root))
            shutil.rmtree(self.root / folder)


def encoded(marked, mode):
    """A mask as the sets have them: black and white, nearly so, in colours, of 16 bits."""
    grey = np.where(marked, 255, 0).astype(np.uint8)
    if mode == "noisy":  # what JPEG leaves
        noise = np.random.default_rng(1).integers(0, 60, marked.shape, np.uint8)
        return np.where(marked, 255 - noise, noise)
    if mode == "I;16":
        return np.where(marked, 65535 - 99, 257 * 60).astype(np.uint16)
    if mode == "P":
        image = Image.fromarray(marked.astype(np.uint8), "P")
        image.putpalette([0, 0, 0, 100, 0, 0])
        return image
    return Image.fromarray(grey).convert(mode)


def cvc_clinicdb(files):
    for i in range(1, 11):
        original, truth = (f"CVC-ClinicDB/{kind}/{i}.tif" for kind in ("Original", "Ground Truth"))
        files.add("all", original, truth)


def isic2017(files):
    for split, place in (("train", "Training"), ("validation", "Validation"), ("test", "Test_v2")):
        images, masks = f"ISIC-2017_{place}_Data", f"ISIC-2017_{place}_Part1_GroundTruth"
        for _ in range(2):
            name = f"ISIC_{len(files.images):07}"
            files.add(split, f"{images}/{name}.jpg", f"{masks}/{name}_segmentation.png")
            files.write(f"{images}/{name}_superpixels.png", np.zeros((20, 31), np.uint8))
        (files.root / images / f"{images}_metadata.csv").write_text("image_id\n")
        files.zip(images, masks)


def camo(files):
    root = "CAMO-V.1.0-CVIU2019"
    for split, place in (("train", "Train"), ("test", "Test")):
        for mode in ("noisy", "RGB", "RGBA", "P", "I;16", "1"):
            name = f"camourflage_{len(files.images):05}"
            files.add(split, f"{root}/Images/{place}/{name}.jpg", f"{root}/GT/{name}.png", mode)
    files.zip(root)


def sbu_shadow(files):
    for split, place in (("train", "SBUTrain4KRecoveredSmall"), ("test", "SBU-Test")):
        for i in range(2):
            images, masks = (f"SBU-shadow/{place}/Shadow{kind}" for kind in ("Images", "Masks"))
            files.add(split, f"{images}/lssd{i}.jpg", f"{masks}/lssd{i}.png")
    files.write("SBU-shadow/SBU-Test/ShadowImages/lonely.jpg", np.zeros((9, 9, 3), np.uint8))
    files.zip("SBU-shadow")


def leaf_disease(files):
    files.table("leaf_disease_segmentation", {"train": "train", "val": "validation"}, "test")


def massachusetts_roads(files):
    for split, place in (("train", "train"), ("validation", "valid"), ("test", "test")):
        for i in range(2):
            name = f"{10078660 + i}_15"
            images, masks = f"mass_roads/{place}/sat", f"mass_roads/{place}/map"
            files.add(split, f"{images}/{name}.tiff", f"{masks}/{name}.tif", ("L", "RGB")[i])


def polyp(files):
    for name in ("cju0qkwl35piu", "1", "2"):
        image, mask = (f"TrainDataset/{kind}/{name}.png" for kind in ("image", "mask"))
        files.add("train", image, mask, "noisy")
    for test, names in {"Kvasir": ("cju1b75x6", "cju1bm8"), "CVC-ClinicDB": ("7",)}.items():
        for name in names:
            image, mask = (f"TestDataset/{test}/{kind}/{name}.png" for kind in ("images", "masks"))
            files.add("test", image, mask, "noisy")
    files.write("TestDataset/CVC-300/images/149.png", np.zeros((9, 9, 3), np.uint8))
    files.zip("TrainDataset", "TestDataset")


_OFFICIAL = {
    write.__name__: write
    for write in (
        cvc_clinicdb,
        isic2017,
        camo,
        sbu_shadow,
        leaf_disease,
        massachusetts_roads,
        polyp,
    )
}


@pytest.fixture
def files(tmp_path, monkeypatch, build):
    """Where a test puts a dataset's files; `tfds:NAME` is what it builds of them."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return Files(tmp_path, build)
