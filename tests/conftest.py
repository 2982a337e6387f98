"""What several tests share: optional assets, and the original SAM in torch."""

import os
import sys
import types
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("SAMJAX_TEST_ASSETS", REPO / "../shared"))


@pytest.fixture(scope="session")
def asset():
    """`asset(name)` is the path of a file that is not in the repository; skips without it."""

    def find(name: str) -> Path:
        path = ASSETS / name
        if not path.exists():
            pytest.skip(f"no {name} in {ASSETS}; set SAMJAX_TEST_ASSETS to a folder that has it")
        return path

    return find


@pytest.fixture(scope="session")
def segment_anything():
    """The original package. It imports torchvision, of which the models need nothing."""
    pytest.importorskip("torch", reason="the original SAM needs torch")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        _stub_torchvision()
    return pytest.importorskip("segment_anything", reason="segment-anything is not installed")


def _stub_torchvision() -> None:
    stubs = {
        "torchvision": (),
        "torchvision.ops": (),
        "torchvision.ops.boxes": ("batched_nms", "box_area"),
        "torchvision.transforms": (),
        "torchvision.transforms.functional": ("resize", "to_pil_image"),
    }
    for name, functions in stubs.items():
        module = sys.modules[name] = types.ModuleType(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
        for function in functions:
            setattr(module, function, None)
