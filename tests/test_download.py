"""Downloads from a real server on this machine: ranges, cut connections, lies, two processes."""

import contextlib
import hashlib
import http.server
import io
import os
import socket
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
from rich.console import Console

from samjax import download
from samjax.download import DownloadError, fetch, verify

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SIZE = len(CONTENT)
CUT = 100_001


class Server:
    """Serves `content` under any path; `plan` says how the next requests go wrong."""

    def __init__(self):
        self.content = CONTENT
        self.etag = '"one"'
        self.ranges = True
        self.requests = []  # their headers
        self.plan = []  # per request: status, cut, length, hold (an event), range
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.http.server_port}/weights.pth"

    def _handler(self):
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                server.requests.append(self.headers)
                # Where the client has gone, writing fails.
                with contextlib.suppress(ConnectionError):
                    server.answer(self, server.plan.pop(0) if server.plan else {})

        return Handler

    def answer(self, request, plan):
        if "status" in plan:
            request.send_error(plan["status"])
            return
        asked, offset = request.headers.get("Range"), 0
        if asked and self.ranges and request.headers.get("If-Range") == self.etag:
            offset = int(asked.removeprefix("bytes=").removesuffix("-"))
            request.send_response(206)
            last = len(self.content) - 1
            sent = plan.get("range", f"bytes {offset}-{last}/{len(self.content)}")
            request.send_header("Content-Range", sent)
        else:
            request.send_response(200)
        if self.etag:
            request.send_header("ETag", self.etag)
        body = self.content[offset:]
        request.send_header("Content-Length", str(plan.get("length", len(body))))
        request.end_headers()
        request.wfile.write(body[: plan.get("cut")])
        if "hold" in plan:
            plan["hold"].wait(30)
            request.wfile.write(body[plan["cut"] :])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "DELAY", 0.0)
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "weights.pth"


def get(url, path, size=SIZE, sha256=SHA256):
    fetch(url, path, size, sha256, Console(quiet=True))


def files(path):
    return {file.name for file in path.parent.iterdir()}


MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


@pytest.mark.parametrize(
    ("size", "sha256"), [(SIZE, SHA256), (None, MD5), (SIZE, None), (None, None)]
)
def test_a_whole_file(server, path, size, sha256):
    get(server.url, path, size, sha256)
    assert path.read_bytes() == CONTENT
    stamp = {".weights.pth.verified"} if sha256 else set()
    assert files(path) == {"weights.pth", ".weights.pth.lock"} | stamp
    assert [request["Range"] for request in server.requests] == [None]


def test_progress_is_told_in_bytes(server, path):
    console = Console(file=io.StringIO(), width=100)
    fetch(server.url, path, SIZE, SHA256, console)
    told = console.file.getvalue()
    assert "weights.pth" in told and "300.0/300.0 kB" in told


@pytest.mark.parametrize("size", [SIZE, None])
def test_a_cut_connection_is_resumed(server, path, size):
    server.plan = [{"cut": CUT}, {"cut": 50_000}]
    get(server.url, path, size)
    assert path.read_bytes() == CONTENT
    assert [r["Range"] for r in server.requests] == [
        None,
        f"bytes={CUT}-",
        f"bytes={CUT + 50_000}-",
    ]
    assert [r["If-Range"] for r in server.requests] == [None, '"one"', '"one"']


def test_a_server_without_ranges_starts_anew(server, path):
    server.ranges = False
    server.plan = [{"cut": CUT}]
    get(server.url, path)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("etag", ['W/"weak"', None])
def test_bytes_that_cannot_be_told_are_not_continued(server, path, etag):
    server.etag = etag
    server.plan = [{"cut": CUT}]
    get(server.url, path)
    assert path.read_bytes() == CONTENT
    assert [r["Range"] for r in server.requests] == [None, None]


def test_a_changed_file_is_not_spliced(server, path):
    server.plan = [{"cut": CUT}] + [{"status": 503}] * 9
    with pytest.raises(DownloadError, match="503"):
        get(server.url, path, sha256=None)
    server.plan, server.etag, server.content = [], '"two"', CONTENT[::-1]
    get(server.url, path, sha256=None)
    assert server.requests[-1]["If-Range"] == '"one"'
    assert path.read_bytes() == CONTENT[::-1]


def test_another_address_is_not_continued(server, path):
    server.plan = [{"cut": CUT}] + [{"status": 503}] * 9
    with pytest.raises(DownloadError):
        get(server.url, path)
    server.plan = []
    get(server.url + ".new", path)
    assert server.requests[-1]["Range"] is None and path.read_bytes() == CONTENT


@pytest.mark.parametrize("wrong", [{"range": f"bytes 7-{SIZE - 1}/{SIZE}"}, {"status": 416}])
def test_a_wrong_range_starts_anew(server, path, wrong):
    server.plan = [{"cut": CUT}, wrong]
    get(server.url, path)
    assert path.read_bytes() == CONTENT
    assert [r["Range"] for r in server.requests] == [None, f"bytes={CUT}-", None]


def test_another_length_is_another_file(server, path):
    server.content = CONTENT[:-1]
    with pytest.raises(DownloadError, match=f"{SIZE - 1} bytes there, not {SIZE}"):
        get(server.url, path)
    assert len(server.requests) == 1 and not path.exists()


def test_a_server_that_never_sends_all(server, path):
    server.plan = [{"cut": CUT}] + [{"cut": 0}] * 9
    with pytest.raises(DownloadError, match=f"ended after {CUT} bytes of {SIZE}"):
        get(server.url, path)
    assert len(server.requests) == 1 + download.RETRIES and not path.exists()


def test_a_slow_but_steady_server_is_endured(server, path):
    server.plan = [{"cut": 30_000}] * 9
    get(server.url, path)
    assert path.read_bytes() == CONTENT and len(server.requests) == 10


def test_a_wrong_hash_keeps_nothing(server, path):
    with pytest.raises(
        DownloadError, match=f"{server.url} gave another file .* sha256 is {SHA256}"
    ):
        get(server.url, path, sha256="0" * 64)
    with pytest.raises(DownloadError, match=r"its md5 is \w+, not 000\)"):
        get(server.url, path, sha256="md5:000")
    assert files(path) == {".weights.pth.lock"}


def test_what_no_repetition_mends_is_not_repeated(server, path):
    server.plan = [{"status": 404}]
    with pytest.raises(DownloadError, match="404") as error:
        get(server.url, path)
    assert len(server.requests) == 1
    assert server.url in str(error.value) and str(path) in str(error.value)


def test_what_may_pass_is_repeated(server, path):
    server.plan = [{"status": 503}, {"status": 429}]
    get(server.url, path)
    assert path.read_bytes() == CONTENT and len(server.requests) == 3


def test_a_silent_server_is_given_up_and_tried_again(server, path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    held = threading.Event()
    server.plan = [{"cut": CUT, "hold": held}]
    get(server.url, path)
    held.set()
    assert path.read_bytes() == CONTENT and len(server.requests) == 2


def test_no_network_says_what_to_put_where(path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "DELAY", 0.0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/weights.pth"
    with pytest.raises(DownloadError, match="refused") as error:
        get(url, path)
    assert url in str(error.value) and f"put it at {path}" in str(error.value)
    assert files(path) == {".weights.pth.lock"}


def test_a_full_disk_is_told_before_the_download(server, path, monkeypatch):
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DownloadError, match=r"1\.0 kB free, and 300\.0 kB are to come"):
        get(server.url, path)


def spawn(url, path):
    code = (
        "import sys; from pathlib import Path\n"
        "from samjax.download import fetch; from samjax.terminal import error_console\n"
        f"fetch({url!r}, Path({str(path)!r}), {SIZE}, {SHA256!r}, error_console())"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_download_goes_on(server, path):
    held = threading.Event()
    server.plan = [{"cut": 200_000, "hold": held}]
    with spawn(server.url, path) as process:
        partial = path.with_name(".weights.pth.part")
        wait_for(lambda: partial.exists() and partial.stat().st_size > 0)
        process.kill()
        process.communicate()
    held.set()
    assert not path.exists()
    left = partial.stat().st_size
    get(server.url, path)
    assert server.requests[-1]["Range"] == f"bytes={left}-" and path.read_bytes() == CONTENT


def test_one_of_two_processes_downloads(server, path):
    held = threading.Event()
    server.plan = [{"cut": CUT, "hold": held}]
    with spawn(server.url, path) as first:
        wait_for(lambda: server.requests)
        with spawn(server.url, path) as second:
            waits = second.stderr.readline()
            held.set()
            assert second.wait(60) == 0, second.stderr.read()
            second.stderr.close()
        assert first.wait(60) == 0, first.stderr.read()
        first.stderr.close()
    assert waits == "another process is downloading weights.pth; waiting for it\n"
    assert len(server.requests) == 1 and path.read_bytes() == CONTENT


def test_a_file_is_hashed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    path.write_bytes(CONTENT)
    verify(path, SIZE, SHA256)
    with monkeypatch.context() as patch:
        patch.setattr(download, "_difference", None)  # not called
        verify(path, SIZE, SHA256)
    path.write_bytes(CONTENT[::-1])
    os.utime(path, (1, 1))
    with pytest.raises(ValueError, match=f"{path} is not the published file"):
        verify(path, SIZE, SHA256)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=f"it has {SIZE - 1} bytes, not {SIZE}"):
        verify(path, SIZE, None)
