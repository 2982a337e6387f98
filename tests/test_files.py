"""Files are whole or absent, and a disk that refuses is named in one sentence."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from samjax.evaluation.evaluate import Evaluation
from samjax.files import error_number, write_beside, writing
from samjax.viz import save_png

NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)


def write_csv(path):
    names = tuple(f"image{i}" for i in range(500))
    Evaluation(names, {"dice": np.linspace(0, 1, 500)}).write_csv(path)


def write_tensors(path):  # as adapters are
    with write_beside(path) as temporary:
        save_file({"a": NOISE}, temporary)


def write_folder(path):
    with write_beside(path) as temporary:
        temporary.mkdir()
        (temporary / "file").write_bytes(NOISE.tobytes())


WRITERS = {
    "eval.csv": write_csv,
    "gallery.png": lambda path: save_png(Image.fromarray(NOISE), path),
    "adapter.safetensors": write_tensors,
    "folder": write_folder,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(name, tmp_path, files_end_at):
    path = tmp_path / name
    message = rf"{name} cannot be written \(File too large\): free"
    with pytest.raises(OSError, match=message), files_end_at(2000):
        WRITERS[name](path)
    assert not list(tmp_path.iterdir())
    WRITERS[name](path)
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", WRITERS)
def test_a_place_under_a_file(name, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=rf"file/{name} cannot be written \(Not a directory\)"):
        WRITERS[name](tmp_path / "file" / name)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_folder(name, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=rf"{name} cannot be written \(Permission denied\)"):
        WRITERS[name](tmp_path / name)
    tmp_path.chmod(0o700)
    assert not list(tmp_path.iterdir())


def test_other_errors_pass(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"), writing(tmp_path / "a"):
        open(tmp_path / "absent")
    elsewhere = PermissionError(errno.EACCES, "Permission denied", "/elsewhere/read")
    with pytest.raises(PermissionError) as caught, writing(tmp_path / "a"):
        raise elsewhere
    assert caught.value is elsewhere
    with pytest.raises(ZeroDivisionError), write_beside(tmp_path / "a") as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_of_the_same_number_left_is_not_in_the_way(tmp_path):
    path = tmp_path / "folder"
    code = (
        "import os, sys; from pathlib import Path; from samjax.files import write_beside\n"
        "with write_beside(Path(sys.argv[1])) as temporary: temporary.mkdir(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, path], timeout=60).returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".folder.") and left.name.endswith(
        ".tmp"
    )  # hidden from run folders
    # Nor what one left that had this process's number, which containers give out again.
    (tmp_path / f".folder.{os.getpid()}.tmp").mkdir()
    write_folder(path)
    assert (path / "file").read_bytes() == NOISE.tobytes()


def test_two_writers_in_one_process_do_not_share_a_file(tmp_path):
    path = tmp_path / "a"
    with write_beside(path) as first, write_beside(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the one that ended last
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (ValueError("I/O error: No space left on device (os error 28)"), 28),
        (ValueError("OUT_OF_RANGE: File too large [os_error_code='27']"), 27),
        (ValueError("28 is no number of an error"), None),
    ],
)
def test_the_number_of_an_error(error, number):
    assert error_number(error) == number
