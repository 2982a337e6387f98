"""The Python of the documentation runs, on a small model in place of a large one."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samjax import peft
from samjax.models import MODELS, MSam, Sam
from samjax.peft import MethodConfig
from samjax.peft.recipes import RECIPES
from samjax.tasks import NYUV2
from samjax.weights import save_checkpoint

REPO = Path(__file__).resolve().parent.parent
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks(page, tmp_path, monkeypatch, small_model, small_params, capsys):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    save_checkpoint(tmp_path / "sam_vit_b", small_model.config, small_params)
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_readme_names_experiments_that_exist():
    for name in set(re.findall(r"experiments/\w+\.py", (REPO / "README.md").read_text())):
        assert (REPO / name).is_file(), name


@pytest.mark.parametrize(("model", "column"), [("vit_b", 2), ("vit_t", 3)])
def test_methods_overview_counts_what_trains(model, column):
    page = (REPO / "docs/methods.md").read_text()
    table = page.partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if "`" in line and "|" in line]
    told = {row[0].strip(" []").split("`")[1]: int(row[column].replace(",", "")) for row in rows}
    counts = {}
    for name, recipe in RECIPES.items():
        sam = MSam(MODELS[model], tasks=NYUV2) if recipe.dense else Sam(MODELS[model])
        spec = MethodConfig(name).spec(len(NYUV2) if recipe.dense else 0)
        counts[name] = peft.report(spec, sam)
    assert told == {name: count.trainable - count.decoder for name, count in counts.items()}
