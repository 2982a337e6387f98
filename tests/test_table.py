"""Tables of papers: what they hold, how they are shown, and what is recorded; no training here."""

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from samjax.comparison import Spread
from samjax.config import Config, load_experiment
from samjax.data.builders import DATASETS
from samjax.data.prompts import PromptConfig
from samjax.tables.cells import cells_of, record_file
from samjax.tables.measured import (
    Measured,
    flat_settings,
    read_recorded,
    read_runs,
    write_recorded,
)
from samjax.tables.missing import Job, missing, run_jobs
from samjax.tables.report import markdown, to_json
from samjax.tables.table import (
    SPEED,
    UNTRAINED,
    Column,
    Metric,
    Published,
    Row,
    Table,
    config_in,
    find_table,
    load_table,
    method_in,
    tables_in,
)

REPO = Path(__file__).resolve().parent.parent
EXPERIMENTS = REPO / "experiments"
TABLES = sorted(tables_in(EXPERIMENTS))
CONFIG = Config(model="vit_t", image_size=64, steps=7, data="tfds:kvasir_seg")
DICE, IOU = Metric("dice", "DSC"), Metric("iou", "mIoU")


def toy(**changes):
    rows = (
        Row("nothing", UNTRAINED, "66.4±1.1 -"),
        Row("LoRA", "lora:rank=8", "90.1±0.6 75.3±0.0"),
        Row("decoder", "decoder", "- 60"),
        Row("VPT", unavailable="samjax has none"),
    )
    columns = (
        Column("ct", "CT", CONFIG, (DICE,), learning_rate=1e-4),
        Column("coco", "COCO", dataclasses.replace(CONFIG, steps=9), (IOU,)),
    )
    return Table(
        **({"title": "Toy", "source": "a paper", "rows": rows, "columns": columns} | changes)
    )


def measured(column="ct", method="lora:rank=8,learning_rate=0.0001", **changes):
    settings = {
        "config": CONFIG,
        "seeds": (0, 1),
        "metrics": {"dice": Spread(0.875, 0.0125), "iou": Spread(0.75, None)},
        "steps": 7,
        "command": "samjax table toy --run",
        "date": "2026-01-02",
        "machine": "a toy",
    }
    return Measured(**({"column": column, "method": method} | settings | changes))


@pytest.mark.parametrize("name", TABLES)
def test_every_table_of_the_papers_can_be_run(name):
    """All methods with all protocols are valid, and the docstring tells what there is to tell."""
    table = load_table(EXPERIMENTS / f"{name}.py")
    text = " ".join((EXPERIMENTS / f"{name}.py").read_text().split())
    assert "Published numbers: " in text or "were NOT FOUND" in text
    for said in (f"samjax table {name}", "ot the paper", "What was measured: "):
        assert said in text
    data = {column.config.data.partition("/")[0] for column in table.columns if not column.timed}
    assert data <= {f"tfds:{dataset}" for dataset in DATASETS}
    cells = [(r, c) for c in table.columns for r in table.rows if not r.unavailable]
    assert all(column.config.weights or column.timed for column in table.columns)
    texts = {(method_in(row, column), column.name) for row, column in cells}
    assert len(texts) == len(cells)
    # One of each kind: columns of one learning rate differ in nothing that a method sees.
    for row, column in {(method_in(r, c), c.config.tasks): (r, c) for r, c in cells}.values():
        assert config_in(row, column).data == column.config.data
    for name in table.records:
        assert (EXPERIMENTS / "measured" / f"{name}.json").is_file()


def test_the_papers_have_their_tables():
    assert {f"sam_parser_table{i}" for i in range(1, 6)} <= set(TABLES)
    wanted = "conv_lora_binary conv_lora_trans10k nas_lora_table ta_lora_nyuv2".split()
    assert {*wanted, "ta_lora_cityscapes", "ta_lora_pascal_context"} <= set(TABLES)
    assert not any(name.startswith("bench") for name in TABLES)
    nine = load_table(EXPERIMENTS / "nas_lora_table.py")
    assert len(nine.columns) == 9 and not any(row.published for row in nine.rows)
    main = load_table(EXPERIMENTS / "sam_parser_table3.py")
    parser = main.published(main.rows[-1], main.columns[1])
    assert parser == {
        "iou": Published(75.0, 0.1, "75.0 ± 0.1"),
        "dice": Published(83.2, 0.0, "83.2 ± 0.0"),
    }


def test_a_file_may_be_a_table_and_an_experiment(tmp_path):
    assert load_experiment(EXPERIMENTS / "ta_lora_nyuv2.py").config.tasks == ("nyuv2",)
    with pytest.raises(ValueError, match=r"it is a table: samjax table .*sam_parser_table1\.py"):
        load_experiment(EXPERIMENTS / "sam_parser_table1.py")
    with pytest.raises(ValueError, match=r"defines no function table\(\)"):
        load_table(EXPERIMENTS / "kvasir_lora.py")
    (tmp_path / "broken.py").write_text("def table(:\n")
    (tmp_path / "mine.py").write_text('"""Mine, in\ntwo lines.\n\nMore."""\n\n\ndef table(): ...\n')
    assert tables_in(tmp_path) == {"mine": "Mine, in two lines."}
    assert find_table("mine", tmp_path) == tmp_path / "mine.py"
    with pytest.raises(FileNotFoundError, match=r"no table 'mien' in .*; the nearest is mine"):
        find_table("mien", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": (Row("a", "lora", "1 2 3"),)}, "has 3 published numbers and the columns have 2"),
        ({"rows": (Row("a", "lora", "1 2±x"),)}, "a published number is such as 82.9, .* '2±x'"),
        ({"rows": (Row("a", "lora"), Row("a", "decoder"))}, "two rows are called 'a'"),
        ({"rows": (Row("a"),)}, "needs a method, or why it has none"),
        ({"columns": 2 * (Column("c", "C", CONFIG, (DICE,)),)}, "two columns are called 'c'"),
    ],
)
def test_tables_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        toy(**changes)


def test_rows_and_columns_by_name():
    table = toy()
    rows, columns = table.chosen(("decoder", "lora"), ("coco",))
    assert [row.name for row in rows] == ["LoRA", "decoder"]
    assert [column.name for column in columns] == ["coco"]
    assert table.chosen((), ()) == (table.rows, table.columns)
    assert table.chosen(("LoRA",), ())[0] == table.chosen(("lora:rank=8",), ())[0]
    with pytest.raises(ValueError, match="no row 'loar'; the nearest is lora"):
        table.chosen(("loar",), ())
    with pytest.raises(ValueError, match="no dataset 'cocoa'; the nearest is coco"):
        table.chosen((), ("cocoa",))


def test_learning_rates_of_a_column():
    table = toy()
    ct, coco = table.columns
    untrained, lora, decoder, _ = table.rows
    assert method_in(lora, ct) == "lora:rank=8,learning_rate=0.0001"
    assert method_in(lora, coco) == "lora:rank=8"
    assert method_in(decoder, ct) == "decoder" and method_in(untrained, ct) == UNTRAINED
    own = Row("own", "lora:learning_rate=1e-2")
    assert method_in(own, ct) == own.method
    assert method_in(Row("plain", "lora"), ct) == "lora:learning_rate=0.0001"
    assert config_in(lora, ct).learning_rate == 1e-4


def test_what_is_shown(tmp_path):
    table, file = toy(), tmp_path / "toy.py"
    write_recorded(record_file(file), [measured(), measured("coco", "decoder")])
    failures = {("LoRA", "coco"): "seed 0: the disk is full"}
    cells, notices = cells_of(table, table.rows, table.columns, file, tmp_path, failures)
    assert not notices
    states = [cell.state for cell in cells]
    assert states[:4] == ["not run", "recorded", "not run", "not available"]
    assert states[4:] == ["not run", "failed", "recorded", "not available"]
    text = markdown(table, cells)
    rows = [[c.strip() for c in line.split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert ["", "nothing", "66.4 ± 1.1", "not run", ""] in rows
    assert ["", "LoRA", "90.1 ± 0.6", "87.5 ± 1.2 [1]", ""] in rows
    assert ["", "LoRA", "75.3 ± 0.0", "failed", ""] in rows
    assert ["", "decoder", "60", "75.0 [2]", ""] in rows
    assert ["", "VPT", "-", "not available", ""] in rows
    first, second = (line for line in text.splitlines() if re.match(r"\[\d\]", line))
    assert "2026-01-02" in first and "seeds 0, 1" in first and "a toy" in first
    assert "`samjax table toy --run`" in first and "NOT THE PROTOCOL" not in first
    assert second.endswith("NOT THE PROTOCOL: steps 7, not 9")  # of a longer protocol
    assert "Measured with: vit_t at 64 px, 7 steps.\n" in text
    assert "Measured with: vit_t at 64 px, 7 steps (NOT THE PROTOCOL, see the notes)." in text
    assert "Not available: VPT: samjax has none." in text
    assert "Failed: LoRA on coco: seed 0: the disk is full" in text
    record = json.loads(json.dumps(to_json(table, cells)))
    assert record["errors"] == 1
    lora, decoder = record["cells"][1], record["cells"][6]
    assert lora["published"] == {"dice": {"mean": 0.901, "deviation": 0.006}}
    assert lora["measured"] == {"dice": {"mean": 0.875, "deviation": 0.0125}}
    assert lora["not_the_protocol"] == {} and lora["state"] == "recorded"
    assert decoder["not_the_protocol"] == {"steps": [7, 9]} and decoder["folder"] is None


def test_records_of_other_settings_are_shown_and_no_substitute(tmp_path):
    table, file = toy(), tmp_path / "toy.py"
    ct, coco = table.columns
    write_recorded(record_file(file), [measured(), measured("coco", "lora:rank=2")])

    def left(column, seeds=(0, 1)):
        recorded = read_recorded(record_file(file))
        return [row.name for row in missing(table, table.rows, column, seeds, tmp_path, recorded)]

    assert left(ct) == ["nothing", "decoder"]
    assert left(ct, (0, 2)) == ["nothing", "LoRA", "decoder"]
    longer = dataclasses.replace(ct, config=dataclasses.replace(CONFIG, steps=8))
    assert left(longer) == ["nothing", "LoRA", "decoder"]
    assert left(coco) == ["nothing", "LoRA", "decoder"]
    text = markdown(table, cells_of(table, table.rows, table.columns, file, tmp_path)[0])
    assert "run as `lora:rank=2`; NOT THE PROTOCOL: method.rank 2, not 8" in text
    assert "; data " not in text
    own = dataclasses.replace(CONFIG, data="/home/me/ct")
    write_recorded(record_file(file), [measured(config=own)])
    assert "; data ct;" in markdown(table, cells_of(table, table.rows, (ct,), file, tmp_path)[0])
    # Where two rows have the method, nothing tells whose it is.
    more = dataclasses.replace(table, rows=(*table.rows, Row("LoRA 4", "lora:rank=4")))
    cells = cells_of(more, more.rows, (coco,), file, tmp_path)[0]
    assert {cell.state for cell in cells} == {"not run", "not available"}


def test_a_record_is_whole_or_as_it_was(tmp_path, files_end_at):
    path = tmp_path / "measured/toy.json"
    path.parent.mkdir()
    elsewhere = dataclasses.replace(CONFIG, weights="/home/me/sam.pth", data="/home/me/ct", seed=3)
    part = dataclasses.replace(CONFIG, data="tfds:polyp/kvasir")
    write_recorded(path, [measured(config=elsewhere), measured("coco", config=part)])
    assert "/home" not in path.read_text() and "tfds:polyp/kvasir" in path.read_text()
    first, second = read_recorded(path)
    assert first.metrics == measured().metrics and first.seeds == (0, 1)
    assert first.config.weights == "sam.pth" and second.column == "coco"
    before = path.read_bytes()
    with pytest.raises(OSError, match=r"toy\.json cannot be written"), files_end_at(100):
        write_recorded(path, [measured(seeds=(5,))])
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    write_recorded(path, [measured(seeds=(5,))])  # in the place of the same cell's
    assert sorted((m.column, m.seeds) for m in read_recorded(path)) == [
        ("coco", (0, 1)),
        ("ct", (5,)),
    ]
    path.write_bytes(before[:-40])
    with pytest.raises(ValueError, match=r"toy\.json is damaged"):
        read_recorded(path)
    path.write_text('{"runs": [{"config": {}}]}')
    with pytest.raises(ValueError, match=r"toy\.json is damaged \('cells'\): restore it"):
        read_recorded(path)
    assert read_recorded(tmp_path / "absent.json") == []


def test_timed_columns(tmp_path):
    config = Config(model="vit_t", image_size=64, batch_size=2, prompts=PromptConfig(0.0, 1.0))
    column = Column("step", "A step", config, (Metric(SPEED, "images/s", 1.0),), timed=True)
    table = toy(columns=(column,), rows=(Row("LoRA", "lora"), Row("decoder", "decoder")))
    (tmp_path / "step").mkdir()
    result = {
        **{"device": "toy", "model": "vit_t", "image_size": [64, 64], "batch_size": 2},
        "methods": {"lora": {"seconds": 0.5, "all_seconds": [0.4, 0.5, 1.0]}},
    }
    (tmp_path / "step/bench.json").write_text(json.dumps(result))
    (found,), _ = read_runs(tmp_path, table.rows[0], column)
    assert found.metrics[SPEED].mean == 4.0
    assert found.metrics[SPEED].deviation == pytest.approx(1.5275, abs=1e-4)
    assert not flat_settings(found.config, "lora").items() - flat_settings(config, "lora").items()
    # A speed that is recorded may be another machine's.
    recorded = [measured("step", "decoder", config=config, metrics={SPEED: Spread(9.0, None)})]
    assert missing(table, table.rows, column, (0,), tmp_path, recorded) == [table.rows[1]]


NAMES = ("dice", "iou", "s_measure", "mean_e_measure", "weighted_f_measure", "mae")


def _rows_of(section):
    """The first table of a section of docs/results.md, without its head."""
    text = (REPO / "docs/results.md").read_text()
    lines = text[text.index(section) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| ") and "Dice" in line)
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip(" `") for cell in line.strip("|").split("|")])
    return rows


def test_a_cell_keeps_its_own_command_and_times_are_of_one_machine(tmp_path, monkeypatch):
    """What a later command ran has its name; times of two machines never stand side by side."""
    config = Config(model="vit_t", image_size=64, batch_size=2, prompts=PromptConfig(0.0, 1.0))
    column = Column("step", "A step", config, (Metric(SPEED, "images/s", 1.0),), timed=True)
    rows = (Row("LoRA", "lora"), Row("decoder", "decoder"))
    machine = {"device": "one", "threads": 2, "jax": "0"}

    def measure(model, side, texts, batch_size, rounds, console):
        facts = {"model": model, "image_size": [side, side], "batch_size": batch_size}
        times = {"seconds": 0.5, "all_seconds": [0.4, 0.5]}
        return {**facts, **machine, "methods": dict.fromkeys(texts, times)}

    monkeypatch.setattr("samjax.tables.missing.methods.measure", measure)

    def timed(row, command):
        run_jobs([Job(column, (row,), (), 0)], tmp_path, command, Console(file=io.StringIO()))
        return {m.method: m.command for row in rows for m in read_runs(tmp_path, row, column)[0]}

    assert timed(rows[0], "first") == {"lora": "first"}
    assert timed(rows[1], "second") == {"lora": "first", "decoder": "second"}
    machine["device"] = "another"
    assert timed(rows[1], "third") == {"decoder": "third"}


def test_records_agree_with_the_results_that_are_told():
    """Every row of Kvasir-SEG's and NYUv2's tables in docs/results.md, to the digits told."""
    recorded = read_recorded(EXPERIMENTS / "measured/kvasir_mobile_sam.json")
    assert all(m.config.model == "vit_t" and m.config.epochs == 4 for m in recorded)
    by_method = {m.method: m for m in recorded}
    assert len(by_method) == len(recorded)
    for method, _, *values in _rows_of("### NAS-LoRA"):
        found = by_method[UNTRAINED if method == "before training" else method]
        assert found.metrics == dict(zip(NAMES, map(_spread, values), strict=True)), method
    rows = _rows_of("### The methods side by side")
    for method, _, _, seeds, *values, _ in rows:
        found = by_method[UNTRAINED if method == "before training" else method]
        assert len(found.seeds) == int(seeds or 0)
        assert [found.metrics[name] for name in NAMES[:2]] == [_spread(v) for v in values], method
    assert {m.method for m in recorded} - {UNTRAINED} == (
        {row[0] for row in rows} | {row[0] for row in _rows_of("### NAS-LoRA")}
    ) - {"before training"}


def _spread(text):
    mean, _, deviation = text.partition(" ± ")
    return Spread(float(mean), float(deviation) if deviation else None)


def test_the_record_of_nyuv2_agrees_with_the_results_that_are_told():
    text = (REPO / "docs/results.md").read_text()
    lines = text[text.index("## NYUv2") :].splitlines()
    rows = [
        line.strip("|").split("|") for line in lines[: lines.index("## Resuming")] if "|" in line
    ]
    recorded = {m.method: m for m in read_recorded(EXPERIMENTS / "measured/ta_lora_nyuv2.json")}
    told = {"before training": UNTRAINED, "ta_lora, first_block=6": "ta_lora:first_block=6"}
    seen = set()
    for name, _, *values, _ in rows[2:]:
        method = name.replace("`", "").strip()
        method = told.get(method, method)
        seen.add(method)
        for value, found in zip(values, recorded[method].metrics.values(), strict=True):
            digits = len(value.strip().partition(".")[2])
            assert f"{found.mean:.{digits}f}" == value.strip(), method
    assert seen == set(recorded)
