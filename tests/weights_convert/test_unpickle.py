"""Reading torch archives and safetensors without torch: equal to torch, and nothing is ever run."""

import io
import logging
import pickle
import random
import struct
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from weights_convert import read_tensors


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def saved(torch, path, what, **options):
    torch.save(what, path, **options)
    return path


def as_numpy(torch, tensor):
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_same(torch, path, state):
    read = read_tensors(path)
    assert list(read) == list(state)
    for name, tensor in state.items():
        expected = as_numpy(torch, tensor)
        assert read[name].dtype == expected.dtype, name
        assert read[name].shape == expected.shape, name
        assert read[name].tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_torch_saves(torch, tmp_path, protocol):
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    state = {
        "plain": base,
        "transposed": base.permute(2, 0, 1),
        "slice": base[1, ::2, 1:3],
        "shared": base[0],
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 5),
        "half": torch.randn(3, 3).half(),
        "bfloat16": torch.randn(3, 3).bfloat16(),
        "double": torch.randn(2).double(),
        "bool": torch.tensor([True, False]),
        "byte": torch.arange(4, dtype=torch.uint8),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }
    path = saved(torch, tmp_path / "any.name", state, pickle_protocol=protocol)
    assert_same(torch, path, state)


def test_reads_a_module_state_dict(torch, tmp_path):
    state = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4)).state_dict()
    assert isinstance(state, OrderedDict)  # with version numbers in its `_metadata`
    assert_same(torch, saved(torch, tmp_path / "a.pth", state), state)


def test_unwraps_and_strips_with_a_notice(torch, tmp_path, caplog):
    weight = torch.randn(2, 3)
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
    for wrapper in ("model", "state_dict", "model_state_dict"):
        path = tmp_path / f"{wrapper}.pth"
        saved(torch, path, {"epoch": 3, wrapper: {"module.w": weight}, "optimizer": optimizer})
        with caplog.at_level(logging.INFO, "samjax"):
            assert_same(torch, path, {"w": weight})
        assert repr(wrapper) in caplog.text and "'module.'" in caplog.text


def test_a_big_endian_archive(torch, tmp_path):
    path = saved(torch, tmp_path / "a.pth", {"w": torch.tensor([1.0, 2.0]).bfloat16()})
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        for name, data in entries.items():
            if name.endswith("byteorder"):
                data = b"big"
            elif "/data/" in name:
                data = np.frombuffer(data, "u2").byteswap().tobytes()
            archive.writestr(name, data)
    assert read_tensors(tmp_path / "b.pth")["w"].tolist() == [1.0, 2.0]


def test_reads_safetensors(tmp_path):
    state = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones(3, ml_dtypes.bfloat16),
        "h": np.ones((1, 2), np.float16),
    }
    safetensors.numpy.save_file(state, tmp_path / "a.pth")  # the content decides
    read = read_tensors(tmp_path / "a.pth")
    assert {k: (v.dtype, v.tobytes()) for k, v in read.items()} == {
        k: (v.dtype, v.tobytes()) for k, v in state.items()
    }


def archive(path, data, storages=None, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("a/data.pkl", data)
        for key, content in (storages or {"0": bytes(16)}).items():
            file.writestr(f"a/data/{key}", content)
    return path


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def tensor_pickle(offset=0, shape=(4,), strides=(1,), count=4, kind="FloatStorage"):
    """The pickle of {"w": tensor} as torch writes it, with any numbers."""
    out = io.BytesIO()

    class Writer(pickle._Pickler):
        def persistent_id(self, value):
            return value.ident if isinstance(value, Ident) else None

        def save_global(self, value, name=None):
            self.write(b"c" + value.encode() + b"\n")

        def save(self, value, save_persistent_id=True):
            if isinstance(value, str) and "\n" in value:
                return self.save_global(value)
            return super().save(value, save_persistent_id)

    class Ident:
        def __init__(self):
            self.ident = ("storage", f"torch\n{kind}", "0", "cpu", count)

    writer = Writer(out, 2)
    writer.write(b"\x80\x02}")
    writer.save("w")
    writer.save("torch._utils\n_rebuild_tensor_v2")
    writer.save((Ident(), offset, shape, strides, False, None))
    writer.write(b"Rs.")
    return out.getvalue()


def test_the_hand_made_pickle_is_right(tmp_path):
    data = np.arange(4, dtype=np.float32)
    path = archive(tmp_path / "a.pth", tensor_pickle(1, (3,), (1,)), {"0": data.tobytes()})
    assert read_tensors(path)["w"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "numbers",
    [
        {"offset": 1},
        {"offset": -1},
        {"strides": (2,)},
        {"strides": (-1,)},
        {"strides": (1, 1)},
        {"shape": (5,)},
        {"shape": (-4,)},
        {"shape": (1 << 40,), "strides": (0,)},
        {"shape": (1,) * 40, "strides": (1,) * 40},
        {"shape": (0, 1 << 62, 1 << 62), "strides": (1, 1, 1)},
        {"count": 5},
        {"count": 1 << 61},
        {"count": -4},
        {"shape": (True,)},
        {"shape": ("4",)},
        {"shape": [4]},
        {"offset": 1 << 70},
        {"kind": "DoubleStorage"},
        {"kind": "NoSuchStorage"},
    ],
)
def test_never_reads_outside_the_storage(tmp_path, numbers):
    path = archive(tmp_path / "a.pth", tensor_pickle(**numbers))
    with pytest.raises(ValueError, match=r"a\.pth"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("what", "name"),
    [
        (Evil(eval, "1/0"), r"eval"),
        (Evil(print, "run"), r"print"),
        (Evil(getattr, OrderedDict(), "x"), r"getattr"),
        ({"args": __import__("argparse").Namespace(a=1), "model": {}}, r"copyreg|argparse"),
        ({"loss": np.float64(1.0), "model": {}}, r"numpy"),
        (np.zeros(3), r"numpy"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_asks_for_something_else(tmp_path, capsys, what, name, protocol):
    path = archive(tmp_path / "a.pth", pickle.dumps(what, protocol))
    with pytest.raises(ValueError, match=rf"asks for \S*({name})\S*, .* save only") as info:
        read_tensors(path)
    assert "\n" not in str(info.value) and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02r\xff\xff\xff\xff.",  # a memo index of 4 G
        b"\x80\x05\x96\x00\x00\x00\x00\x10\x00\x00\x00.",  # a bytearray of 64 GB
        b"\x80\x02X\xff\xff\xff\x7f.",  # a string longer than the file
        b"\x80\x02" + b"(" * 1000 + b".",
        b"\x80\x02" + b"t" * 10 + b".",
        b"\x80\x02]q\x00h\x00a.",  # a list that holds itself
        b"\x80\x02}\x85}s.",  # an unhashable key
        b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"Ns.",  # a key too deep to be hashed
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",
        b"\x80\x02ccollections\nOrderedDict\n)R}b.",
        b"\x80\x02K\x01Q.",
        b"\x80\x02K\x01K\x02R.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02c\xff\xfe\n\xff\n.",
        b"\x80\x02N.",
        b"\x80\x02.",
        b"\x80\x02",
        b"",
        b"." * (9 << 20),
    ],
    ids=lambda data: data[2:22].hex(),
)
def test_malformed_pickles(tmp_path, data):
    with pytest.raises(ValueError, match=r"a\.pth") as info:
        read_tensors(archive(tmp_path / "a.pth", data))
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 400 + len(str(tmp_path))


def test_other_files(torch, tmp_path):
    def refused(name, data, match):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=match):
            read_tensors(tmp_path / name)

    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        read_tensors(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="is no file"):
        read_tensors(tmp_path)
    refused("empty.pth", b"", "empty file")
    refused("lfs.pth", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")
    refused("page.pth", b"<!DOCTYPE html>", "web page")
    refused("text.pth", b"hello", "neither safetensors nor")
    refused("bare.pth", pickle.dumps({}), r"torch\.save\(torch\.load")
    refused("short.safetensors", struct.pack("<Q", 1 << 60) + b"{}", "damaged")
    refused("none.safetensors", struct.pack("<Q", 2) + b"{}", "no tensors")
    legacy = io.BytesIO()
    torch.save({"w": torch.zeros(1)}, legacy, _use_new_zipfile_serialization=False)
    refused("legacy.pth", legacy.getvalue(), "before version 1.6")
    with pytest.raises(ValueError, match="compressed"):
        read_tensors(archive(tmp_path / "z.pth", b"N." * 99, None, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("readme", "x")
    with pytest.raises(ValueError, match=r"no data\.pkl"):
        read_tensors(tmp_path / "other.zip")


def test_state_dicts_with_other_things(torch, tmp_path):
    w = torch.zeros(1)
    for state, match in [
        ({"w": w, "epoch": 3}, "int under epoch"),
        ({"w": [w]}, "list under w"),
        ({1: w}, "under 1"),
        ({}, "an empty dict"),
        ([w], "a list"),
        ({"model": {"w": w}, "state_dict": {"w": w}}, "several state dicts"),
        ({"model": {}}, "an empty dict"),
    ]:
        with pytest.raises(ValueError, match=match):
            read_tensors(saved(torch, tmp_path / "a.pth", state))


@pytest.mark.parametrize("kind", ["zip", "safetensors"])
def test_mutated_files_are_read_or_refused_in_a_sentence(torch, tmp_path, kind):
    state = {f"blocks.{i}.weight": torch.randn(3, 4) for i in range(6)}
    path = tmp_path / "good"
    if kind == "zip":
        torch.save({"model": state}, path)
    else:
        safetensors.numpy.save_file({k: v.numpy() for k, v in state.items()}, path)
    good, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(400):
        data = bytearray(good)
        match rng.randrange(4):
            case 0:
                del data[rng.randrange(len(data)) :]
            case 1:
                for _ in range(rng.randint(1, 8)):
                    data[rng.randrange(len(data))] = rng.randrange(256)
            case 2:
                start = rng.randrange(len(data))
                del data[start : start + rng.randint(1, 64)]
            case 3:
                start = rng.randrange(len(data))
                data[start:start] = rng.randbytes(rng.randint(1, 64))
        path.write_bytes(bytes(data))
        try:
            read_tensors(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 150  # the others hit numbers or padding
