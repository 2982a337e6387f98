"""Each object as a sample of its own, from the data to the metrics of a run."""

import csv
import json

import pytest
from PIL import Image

from samjax.cli import main
from samjax.config import Config
from samjax.data.augment import NO_AUGMENTATION
from samjax.data.pipeline import train_batches
from samjax.data.prompts import PromptConfig
from samjax.data.sources import open_source
from samjax.preprocess import Frame
from samjax.weights import save_checkpoint

SIDE = 64
EXPERIMENT = """
from samjax.config import Config
from samjax.data.prompts import PromptConfig

def config():
    return Config(
        weights={weights!r}, data={data!r}, steps=2, batch_size=2, eval_batch_size=2, gallery=1,
        objects="each", prompts=PromptConfig(none=0.0, box=1.0),
    )
"""


@pytest.fixture
def dataset(tmp_path):
    """A COCO dataset whose images have one "left" and one "right" square each, far apart."""
    for split, count in (("train", 3), ("test", 2)):
        images, annotations = [], []
        (tmp_path / split).mkdir()
        for i in range(count):
            Image.new("RGB", (SIDE, SIDE)).save(tmp_path / f"{split}/{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE})
            for category, x in ((1, 4), (2, 44)):
                square = [x, 20, x + 16, 20, x + 16, 36, x, 36]
                annotations.append(
                    {
                        "id": 2 * i + category,
                        "image_id": i,
                        "category_id": category,
                        "segmentation": [square],
                    }
                )
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 1, "name": "left"}, {"id": 2, "name": "right"}],
        }
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(content))
    return tmp_path


def test_prompts_are_drawn_from_the_object(dataset):
    source = open_source(str(dataset), "train", objects="each")
    batches = train_batches(
        source,
        frame=Frame(SIDE, SIDE),
        batch_size=len(source),
        seed=0,
        prompts=PromptConfig(none=0.0, box=1.0),
        augment=NO_AUGMENTATION,
    )
    batch = batches[0]
    assert sorted(batch["index"]) == list(range(6))
    for index, coords, mask in zip(batch["index"], batch["coords"], batch["mask"], strict=True):
        is_right = source.names[index].endswith(("#2", "#4", "#6"))
        assert (coords[:, 0] > SIDE / 2).all() == is_right
        assert mask.sum() == 16 * 16 and mask[:, SIDE // 2 :].any() == is_right


@pytest.mark.parametrize(
    "prompts", [PromptConfig(), PromptConfig(none=0.1, box=1.0)], ids=["none", "some"]
)
def test_each_object_needs_a_prompt(prompts):
    with pytest.raises(ValueError, match="which object is meant"):
        Config(objects="each", prompts=prompts)


@pytest.mark.slow
def test_a_run(dataset, tmp_path, small_config, small_params, capsys):
    save_checkpoint(tmp_path / "weights", small_config, small_params)
    text = EXPERIMENT.format(weights=str(tmp_path / "weights"), data=str(dataset))
    experiment = tmp_path / "experiment.py"
    experiment.write_text(text)
    run = tmp_path / "run"
    assert main(["train", str(experiment), "--out", str(run), "--classes", "right"]) == 0
    with open(run / "eval_after.csv") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["0#2", "1#4"]
    assert json.loads((run / "config.json").read_text())["classes"] == ["right"]
    assert main(["eval", str(run), "--split", "train", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 3
    assert main(["eval", str(experiment), "--classes", "rihgt"]) == 1
    assert "no category 'rihgt'; the nearest is 'right'" in capsys.readouterr().err
