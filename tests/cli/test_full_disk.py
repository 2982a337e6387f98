"""A disk that is full: one sentence, and what was there before is all that is there after."""

import errno
import os

import numpy as np
import pytest

# Files end at 2 kB (4 kB in some shells), as on a disk that is full: compiled programs too, in a
# cache that no other test sees.
LIMITED = (
    "sh",
    "-c",
    'unset JAX_COMPILATION_CACHE_DIR; export SAMJAX_CACHE="$(mktemp -d)"; ulimit -f 4; exec "$@"',
    "sh",
)


@pytest.mark.parametrize(
    "arguments", [("w",), ("w.safetensors", "--to", "meta")], ids=["samjax", "meta"]
)
def test_weights_that_do_not_fit(spawn, assert_refused, files, tmp_path, arguments):
    name, *options = arguments
    result = spawn("convert", files / "small", tmp_path / name, *options, prefix=LIMITED)
    assert_refused(result, f"{tmp_path / name} cannot be written (File too large): free space")
    assert not os.listdir(tmp_path)


def test_masks_that_do_not_fit(spawn, assert_refused, files, tmp_path):
    """The mask would fit, the overlay does not: the earlier mask stays, and nothing is added."""
    (tmp_path / "mask_0_0.png").write_bytes(b"earlier")
    options = ("--weights", files / "small", "--out", tmp_path)
    result = spawn("predict", files / "image.png", *options, prefix=LIMITED)
    assert_refused(result, "overlay.png cannot be written (File too large): free space")
    assert os.listdir(tmp_path) == ["mask_0_0.png"]
    assert (tmp_path / "mask_0_0.png").read_bytes() == b"earlier"


def test_new_folders_go_again(predict, assert_refused, tmp_path, monkeypatch):
    def refuse(file, **arrays):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez_compressed", refuse)
    result = predict(tmp_path / "a/b", "--save-logits")
    assert_refused(result, "logits.npz cannot be written (No space left on device): free space")
    assert not os.listdir(tmp_path)
