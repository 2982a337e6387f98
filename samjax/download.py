"""Files from the network: verified, whole or absent, and resumed where a download was interrupted.

Until it is whole, a file NAME is `.NAME.part` beside its place; `.NAME.part.json` says from which
URL, and from which state of the file there, these bytes are. `.NAME.lock` keeps processes apart,
and `.NAME.verified` remembers that the file was hashed.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal

from samjax.hashes import file_hash
from samjax.lock import try_lock, wait_lock
from samjax.terminal import download_bar

# Seconds that a server may take to answer, or to send the next bytes.
TIMEOUT = 30.0
# How often an attempt that made no progress is repeated, and seconds before the first repetition;
# each further one waits twice as long.
RETRIES = 3
DELAY = 1.0

_CHUNK = 1 << 16
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


class DownloadError(RuntimeError):
    """A file could not be downloaded; the message says why."""


class _Transient(Exception):
    """What another attempt may mend."""


def cache_dir() -> Path:
    """Where downloads are kept: $SAMJAX_CACHE, or samjax/ in the user's cache folder."""
    if "SAMJAX_CACHE" in os.environ:
        return Path(os.environ["SAMJAX_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "samjax"


def fetch(url: str, path: Path, size: int | None, checksum: str | None, console: Console) -> None:
    """Downloads `url` to `path`, which appears once it is whole and verified.

    `size` in bytes and `checksum` are those of the published file: its sha256 in hexadecimal, or
    `md5:` and its MD5, where that is the one published; None is not checked. What an interrupted
    download left is continued where the server has not changed the file (RFC 9110: Range with
    If-Range). Of several processes one downloads, the others wait for it. Raises DownloadError with
    one sentence; OSError where `path` cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path, console):
        if path.exists():  # another process was faster
            verify(path, size, checksum)
            return
        partial = _Partial(path, url)
        with download_bar(console) as bar:
            task = bar.add_task(path.name, total=size)
            try:
                _transfer(partial, size, lambda done: bar.update(task, completed=done))
            except DownloadError as error:
                raise DownloadError(
                    f"could not download {url} ({error}); run this again to go on, or get that "
                    f"file in another way and put it at {path}"
                ) from None
        difference = _difference(partial.file, size, checksum)
        if difference:
            partial.discard()
            raise DownloadError(
                f"{url} gave another file than the published one ({difference}), so nothing was "
                f"kept; try again, or put the published file at {path}"
            )
        partial.finish()
        _remember(path, checksum)


def verify(path: Path, size: int | None, checksum: str | None) -> None:
    """Raises ValueError where a file is not the one of that size and checksum.

    A file in its place is hashed once, and again when its size or time of change is another.
    """
    if checksum is not None and _remembers(path, checksum):
        return
    difference = _difference(path, size, checksum)
    if difference:
        raise ValueError(
            f"{path} is not the published file ({difference}); delete it, and it is downloaded anew"
        )
    _remember(path, checksum)


def _difference(file: Path, size: int | None, checksum: str | None) -> str | None:
    """What tells a file from the one of that size and checksum; None where nothing does."""
    found = file.stat().st_size
    if size is not None and found != size:
        return f"it has {found} bytes, not {size}"
    if checksum is not None:
        algorithm, _, expected = checksum.rpartition(":")
        algorithm = algorithm or "sha256"
        if (digest := file_hash(file, algorithm)) != expected:
            return f"its {algorithm} is {digest}, not {expected}"
    return None


class _Partial:
    """What there is of a file so far."""

    def __init__(self, path: Path, url: str) -> None:
        self.path, self.url = path, url
        self.file = _beside(path, "part")
        self._record = _beside(path, "part.json")

    def length(self) -> int:
        """Bytes so far."""
        return self.file.stat().st_size if self.file.exists() else 0

    def validator(self) -> str | None:
        """What to put into If-Range to continue; None where the bytes cannot be continued."""
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(self._record.read_text())
            if record["url"] == self.url and self.length():
                return record["validator"]
        return None

    def begin(self, headers: Message) -> None:
        """Starts anew, on the state of the file that the server's headers name."""
        self.discard()
        # A weak ETag does not say that the bytes are the same.
        tag = headers.get("ETag", "")
        validator = headers.get("Last-Modified") if not tag or tag.startswith("W/") else tag
        self._record.write_text(json.dumps({"url": self.url, "validator": validator}))

    def discard(self) -> None:
        """Forgets all bytes."""
        self.file.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)

    def finish(self) -> None:
        """Puts the whole file into its place."""
        os.replace(self.file, self.path)
        self._record.unlink(missing_ok=True)


def _transfer(partial: _Partial, size: int | None, show: Callable[[int], None]) -> None:
    """Makes `partial` whole, in as many attempts as it takes while there is progress."""
    failures, best = 0, partial.length()
    while True:
        try:
            return _attempt(partial, size, show)
        except _Transient as error:
            failures = failures + 1 if partial.length() <= best else 1
            best = max(best, partial.length())
            if failures > RETRIES:
                raise DownloadError(str(error)) from None
        time.sleep(DELAY * 2 ** (failures - 1))


def _attempt(partial: _Partial, size: int | None, show: Callable[[int], None]) -> None:
    validator = partial.validator()
    offset = partial.length() if validator else 0
    if size is not None and offset >= size:
        if offset == size:
            return
        offset = 0
    headers = {"User-Agent": "samjax", "Accept-Encoding": "identity"}
    if offset and validator:
        headers |= {"Range": f"bytes={offset}-", "If-Range": validator}
    with _open(urllib.request.Request(partial.url, headers=headers), partial) as response:
        total = _total(response, offset, partial)
        if size is not None and total not in (size, None):
            raise DownloadError(f"it has {total} bytes there, not {size}: it is another file")
        if response.status != 206:
            partial.begin(response.headers)
        length = partial.length()
        _check_space(partial.path.parent, (size or total or 0) - length)
        with partial.file.open("ab") as stream:
            while chunk := _read(response):
                stream.write(chunk)
                length += len(chunk)
                show(length)
    if length < (size or total or 0):
        raise _Transient(f"the connection ended after {length} bytes of {size or total}")


def _open(request: urllib.request.Request, partial: _Partial) -> http.client.HTTPResponse:
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        answer = f"the server answers {error.code} {error.reason}"
        if error.code == 416:  # there are no bytes from there on: the file has changed
            partial.discard()
        elif error.code not in _TRANSIENT_STATUS:
            raise DownloadError(answer) from None
        raise _Transient(answer) from None
    except urllib.error.URLError as error:
        raise _Transient(str(error.reason)) from None
    except (OSError, http.client.HTTPException) as error:
        raise _Transient(_name(error)) from None


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Transient(_name(error)) from None


def _total(response: http.client.HTTPResponse, offset: int, partial: _Partial) -> int | None:
    """Bytes of the whole file, as far as the server says."""
    if response.status != 206:
        return int(response.headers["Content-Length"] or 0) or None
    said = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", said)
    if match is None or int(match[1]) != offset:
        partial.discard()
        raise _Transient(f"the server sends {said!r} for the bytes from {offset} on")
    return None if match[2] == "*" else int(match[2])


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(f"{folder} has {decimal(free)} free, and {decimal(needed)} are to come")


def _name(error: Exception) -> str:
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _lock(path: Path, console: Console) -> Iterator[None]:
    """Holds the right to download `path`; the system takes it from a process that ends."""
    with _beside(path, "lock").open("ab") as stream:
        if not try_lock(stream.fileno()):
            console.print(f"another process is downloading {path.name}; waiting for it")
            wait_lock(stream.fileno())
        yield


def _state(path: Path, checksum: str) -> str:
    stat = path.stat()
    return f"{checksum} {stat.st_size} {stat.st_mtime_ns}\n"


def _remembers(path: Path, checksum: str) -> bool:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return _beside(path, "verified").read_text() == _state(path, checksum)
    return False


def _remember(path: Path, checksum: str | None) -> None:
    # In a folder that is only read from, the file is hashed each time.
    with contextlib.suppress(OSError):
        if checksum is not None:
            _beside(path, "verified").write_text(_state(path, checksum))


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")
