"""Damaged and forged files: each is refused in a sentence that names it, or gives the same weights.

Some 500 seeded mutations of every kind of file that samjax reads. None may run code, take long or
much memory, raise anything else, or change a weight unseen.
"""

import contextlib
import json
import random
import re
import resource
import shutil
import signal
import struct
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from samjax import load_adapted, peft
from samjax.hashes import params_sha256, sealed
from samjax.models import MODELS
from samjax.peft import MethodConfig
from samjax.weights import read_weights, write_weights
from weights_convert import from_params

SECONDS = 20  # for one file of half a megabyte; they take some milliseconds
MORE_MEMORY = 4 << 30  # of address space, of which threads reserve much
FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")


class Forbidden(BaseException):
    """Not an Exception: what reads a file must not be able to catch it."""


_watching = False


def _audit(event, _arguments):
    if _watching and event in FORBIDDEN:
        raise Forbidden(event)


@pytest.fixture(scope="module", autouse=True)
def audit():
    sys.addaudithook(_audit)  # stays for good, and watches only within `bounded`


@contextlib.contextmanager
def bounded():
    """Neither much time nor much memory nor any program."""
    global _watching

    def late(*_):
        raise Forbidden(f"takes more than {SECONDS} s")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, limits[1]))
    _watching = True
    try:
        yield
    finally:
        _watching = False
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


@pytest.fixture(scope="module")
def good(tmp_path_factory, small_config, small_model, small_params):
    """A folder with one file, or folder, of each kind."""
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("good")
    write_weights(folder / "samjax", small_config, small_params)
    write_weights(folder / "meta.safetensors", small_config, small_params, "meta")
    write_weights(folder / "hf", small_config, small_params, "hf")
    tensors = from_params(small_params, small_config)
    state = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
    torch.save({"model": state}, folder / "torch.pth")
    spec = MethodConfig().spec()
    records = peft.attach(spec, small_model, small_params, jax.random.key(0))
    variables = {"params": small_params, "peft": records}
    sha = params_sha256(small_params)
    peft.save(folder / "adapter", spec, small_model, variables, sha, {"method": "lora"})
    return folder


@pytest.fixture
def read(monkeypatch, good, small_config):
    """Reads a file of either kind: what it says of the model, and all arrays."""
    monkeypatch.setitem(MODELS, "small", small_config)

    def read(path):
        if path.name == "adapter":
            model, *trees = load_adapted(good / "samjax", path)
            return model.config, trees
        return read_weights(path)

    return read


def leaves(tree):
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}


# Mutations: each changes the file or folder at `path`, by `rng`.


def some_file(path, rng):
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return rng.choice([file for file in files if file.stat().st_size])


def place(data, rng):
    """A position: in one of two cases among the first or the last 8 kB, where headers are."""
    if rng.random() < 0.5:
        edge = rng.randrange(min(8192, len(data)))
        return edge if rng.random() < 0.7 else len(data) - 1 - edge
    return rng.randrange(len(data))


def flip_bits(data, rng):
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        data[place(data, rng)] ^= 1 << rng.randrange(8)


def overwrite(data, rng):
    start = place(data, rng)
    filler = rng.choice([bytes(16), b"\xff" * 16, rng.randbytes(16)])
    data[start : start + 16] = filler[: len(data) - start]


def cut(data, rng):
    del data[place(data, rng) :]


def delete(data, rng):
    start = place(data, rng)
    del data[start : start + rng.randint(1, 64)]


def insert(data, rng):
    start = place(data, rng)
    data[start:start] = rng.randbytes(rng.randint(1, 64))


def on_bytes(change):
    def mutate(path, rng):
        file = some_file(path, rng)
        data = bytearray(file.read_bytes())
        change(data, rng)
        file.write_bytes(data)

    mutate.__name__ = change.__name__
    return mutate


def lose_a_file(path, rng):
    some_file(path, rng).unlink()


BYTES = tuple(map(on_bytes, (flip_bits, flip_bits, overwrite, cut, delete, insert)))
HUGE = (-1, 0, 1 << 31, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 64, 1.5, "8", None, [])


def safetensors_file(path):
    return path / "model.safetensors" if path.is_dir() else path


def forge_the_header(path, rng):
    """One entry of the safetensors header says something else of shape, type or place."""
    file = safetensors_file(path)
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = rng.choice(sorted(header.keys() - {"__metadata__"}))
    entry = header[name]
    match rng.randrange(7):
        case 0:
            entry["shape"] = [rng.choice(HUGE), *entry["shape"][1:]]
        case 1:
            entry["shape"] = [rng.choice(HUGE)] * rng.choice([1, 2, 64])
        case 2:
            entry["dtype"] = rng.choice(["F64", "F16", "BF16", "I32", "U8", "BOOL", "X", 3])
        case 3:
            entry["data_offsets"][rng.randrange(2)] = rng.choice(HUGE)
        case 4:
            header[name + "x"] = header.pop(name)
        case 5:
            other = rng.choice(sorted(header.keys() - {"__metadata__", name}))
            entry["data_offsets"], header[other]["data_offsets"] = (
                header[other]["data_offsets"],
                entry["data_offsets"],
            )
        case 6:
            header["__metadata__"] = rng.choice([3, {}, {"samjax_weights": "[" * 50_000}, None])
    text = json.dumps(header).encode()
    claimed = rng.choice([len(text)] * 8 + [0, 1 << 40, 1 << 63])
    file.write_bytes(struct.pack("<Q", claimed) + text + rest)


def change_tensors(tensors, rng):
    """Another name, shape or type of one tensor."""
    name = rng.choice(sorted(tensors))
    array = tensors[name]
    match rng.randrange(5):
        case 0:
            del tensors[name]
        case 1:
            tensors[rng.choice([name + "x", "x" + name, "x"])] = tensors.pop(name)
        case 2:
            tensors[name] = np.stack([array, array])
        case 3:
            tensors[name] = array.reshape(-1)[:-1].copy()
        case 4:
            tensors[name] = array.astype(rng.choice([np.int32, np.uint8, np.int64]))


def save_other_tensors(path, rng):
    """A whole safetensors file whose header's hashes are those of other tensors."""
    file = safetensors_file(path)
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    change_tensors(tensors, rng)
    key = "samjax" if path.name == "adapter" else "samjax_weights"
    record = json.loads(metadata[key])
    record["tensors_sha256"] = params_sha256(tensors)
    safetensors.numpy.save_file(tensors, file, metadata | {key: resealed(record)})


def resealed(record):
    return json.dumps(sealed({key: v for key, v in record.items() if key != "sha256"}))


def nodes(tree):
    """(container, key) of every value in a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield tree, key
        if isinstance(value, dict | list):
            yield from nodes(value)


def forge(record, rng):
    """Another value somewhere in a JSON record, or none."""
    container, key = rng.choice(list(nodes(record)))
    if isinstance(container, dict) and rng.random() < 0.2:
        del container[key]
    else:
        container[key] = rng.choice([*HUGE, "", "x" * 300, True, {}, {"a": 1}, -0.0, 1e400])


def forge_the_record(path, rng):
    """The record in the header says something else, with a hash that fits."""
    file = safetensors_file(path)
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    key = "samjax" if path.name == "adapter" else "samjax_weights"
    record = json.loads(metadata[key])
    forge(record, rng)
    safetensors.numpy.save_file(tensors, file, metadata | {key: resealed(record)})


def forge_the_config(path, rng):
    """`config.json` says something else, in a checkpoint with a hash that fits."""
    file = path / "config.json"
    record = json.loads(file.read_text())
    forge(record, rng)
    file.write_text(resealed(record) if path.name == "samjax" else json.dumps(record))


def forge_the_pickle(path, rng):
    """torch's pickle, in an archive with checksums that fit."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    data = entries[name]
    match rng.randrange(4):
        case 0:  # another type
            kind = rng.choice([b"HalfStorage", b"IntStorage", b"DoubleStorage", b"XStorage"])
            data = data.replace(b"FloatStorage", kind)
        case 1:  # another number: a shape, a stride, an offset or a size
            spots = [spot.start() for spot in re.finditer(rb"K[\x02-\xff]", data)]
            spot = rng.choice(spots)
            number = rng.choice([-1, 1 << 31, 1 << 40, (1 << 63) - 1])
            data = data[:spot] + b"\x8a\x08" + struct.pack("<q", number) + data[spot + 2 :]
        case 2:  # another name
            names = re.findall(rb"(?:image|prompt|mask)_\w+\.[\w.]+", data)
            one = rng.choice(names)
            data = data.replace(one, one[:-1] + b"x", 1)
        case 3:  # a call
            call = rng.choice([b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch.hub\nload\n"])
            data = b"\x80\x02" + call + b"X\x04\x00\x00\x00true\x85R" + data[2:]
    entries[name] = data
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)


# By file: the mutations, how many, and how many of them have to be seen at least; the others hit
# what does not matter, such as dates in an archive.
KINDS = {
    "torch.pth": ((*BYTES, forge_the_pickle, forge_the_pickle), 100, 80),
    "meta.safetensors": (
        (*BYTES, forge_the_header, forge_the_header, save_other_tensors, forge_the_record),
        110,
        85,
    ),
    "hf": (
        (*BYTES, lose_a_file, forge_the_config, forge_the_header, save_other_tensors),
        110,
        65,
    ),
    "samjax": ((*BYTES, lose_a_file, forge_the_config), 90, 70),
    "adapter": (
        (*BYTES, forge_the_header, save_other_tensors, forge_the_record, forge_the_record),
        110,
        80,
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_mutated_files_are_refused_or_the_same(good, read, tmp_path, name):
    kinds, count, least = KINDS[name]
    expected_config, expected = read(good / name)
    expected = leaves(expected)
    refused = 0
    for seed in range(count):
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        path = folder / name
        copy = shutil.copytree if (good / name).is_dir() else shutil.copy
        copy(good / name, path)
        mutate = kinds[seed % len(kinds)]
        mutate(path, rng)
        where = f"seed {seed}, {mutate.__name__}"
        try:
            with bounded():
                config, tree = read(path)
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            message = str(error)
            assert str(path) in message and "\n" not in message, (where, message)
            assert len(message) < 700 + 3 * len(str(path)), (where, message)
        except (Exception, Forbidden) as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        else:
            # A record that was forged with all its hashes may lie about the model, not about it.
            if not mutate.__name__.startswith("forge"):
                assert config == expected_config, where
            actual = leaves(tree)
            assert actual.keys() == expected.keys(), where
            for key, leaf in expected.items():
                same = np.asarray(actual[key]), np.asarray(leaf)
                assert same[0].dtype == same[1].dtype, (where, key)
                assert same[0].tobytes() == same[1].tobytes(), (where, key)
        shutil.rmtree(folder)
    assert refused >= least
