import gzip
import hashlib
import http.server
import random
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

import pytest
from toy import disk_calls, flushed_before_it_was_named

from lm import download as module
from lm.download import decompress, download

DATA = random.Random(0).randbytes(200_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@dataclass
class Script:
    """How the server answers: one behaviour per request, the last one for ever."""

    behaviours: list = field(default_factory=lambda: ["serve"])
    data: bytes = DATA
    etag: str = '"v1"'
    requests: list = field(default_factory=list)
    url: str = ""


class Handler(http.server.BaseHTTPRequestHandler):
    script: Script
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        script = self.script
        wanted = {name: self.headers.get(name) for name in ("Range", "If-Range")}
        script.requests.append((self.path, wanted["Range"]))
        behaviour = script.behaviours.pop(0) if len(script.behaviours) > 1 else script.behaviours[0]
        self.close_connection = True
        if callable(behaviour):
            behaviour(self, script)
            return
        start = 0
        if wanted["Range"] and (wanted["If-Range"] or script.etag) == script.etag:
            start = int(wanted["Range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(script.data) > 0 and start:
            self.answer(416, {"Content-Range": f"bytes */{len(script.data)}", "Content-Length": "0"})
            return
        body = script.data[start:]
        headers = {"Content-Length": str(len(body)), "ETag": script.etag}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(script.data) - 1}/{len(script.data)}"
        self.answer(206 if start else 200, headers)
        self.wfile.write(body)

    def answer(self, status, headers):
        self.send_response(status)
        for name, value in {"Connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args):
        pass


def cut_after(num_bytes, start=0):
    """Promises the whole file from `start`, breaks off after `num_bytes`."""

    def behave(handler, script):
        length = len(script.data) - start
        headers = {"Content-Length": str(length), "ETag": script.etag}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(script.data) - 1}/{len(script.data)}"
        handler.answer(206 if start else 200, headers)
        handler.wfile.write(script.data[start : start + num_bytes])
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)

    return behave


def status(code, **headers):
    def behave(handler, script):
        handler.answer(code, {"Content-Length": "0", **{k.replace("_", "-"): v for k, v in headers.items()}})

    return behave


def whole_whatever_asked(handler, script):
    handler.answer(200, {"Content-Length": str(len(script.data))})
    handler.wfile.write(script.data)


def no_length(handler, script):
    handler.answer(200, {"ETag": script.etag})
    handler.wfile.write(script.data)


def drip_after(num_bytes):
    """Send so many bytes at once, then one every 20 ms, for 3 s."""

    def behave(handler, script):
        handler.answer(200, {"Content-Length": str(len(script.data)), "ETag": script.etag})
        handler.wfile.write(script.data[:num_bytes])
        try:
            for i in range(num_bytes, num_bytes + 150):
                handler.wfile.write(script.data[i : i + 1])
                handler.wfile.flush()
                time.sleep(0.02)
        except OSError:
            pass  # the client has given up, as it should

    return behave


def hang_up(handler, script):
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server(monkeypatch):
    script = Script()
    handler = type("ScriptedHandler", (Handler,), {"script": script})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        script.url = f"http://127.0.0.1:{running.server_port}/file.bin"
        monkeypatch.setattr(module, "PLAIN_HTTP_HOSTS", {"127.0.0.1"})
        monkeypatch.setattr(module, "BACK_OFF_SECONDS", 0.001)
        monkeypatch.setattr(module, "TIMEOUT_SECONDS", 5.0)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield script
        running.shutdown()
        thread.join()


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_file_arrives_whole_and_is_not_fetched_twice(server, tmp_path):
    target = tmp_path / "new" / "file.bin"
    assert download(server.url, target, num_bytes=len(DATA), sha256=SHA256) == target
    assert target.read_bytes() == DATA
    assert names(target.parent) == ["file.bin"]
    download(server.url, target, num_bytes=len(DATA), sha256=SHA256)
    assert len(server.requests) == 1


@pytest.mark.parametrize("cut", [0, 1, 4096, 65_537, len(DATA) - 1])
def test_a_broken_connection_is_taken_up_where_it_broke(server, tmp_path, cut):
    server.behaviours = [cut_after(cut), "serve"]
    download(server.url, tmp_path / "file.bin", num_bytes=len(DATA), sha256=SHA256)
    assert (tmp_path / "file.bin").read_bytes() == DATA
    assert [wanted for _, wanted in server.requests] == [None, f"bytes={cut}-" if cut else None]


def test_every_connection_may_break_while_each_brings_something(server, tmp_path):
    server.behaviours = [cut_after(20_000, start) for start in range(0, 180_000, 20_000)] + ["serve"]
    download(server.url, tmp_path / "file.bin", sha256=SHA256)
    assert len(server.requests) == 10


def test_an_interrupted_download_is_resumed_by_the_next_call(server, tmp_path):
    server.behaviours = [cut_after(70_000), hang_up]
    with pytest.raises(OSError, match=r"6 times without progress; 70,000 bytes are kept, call again"):
        download(server.url, tmp_path / "file.bin", sha256=SHA256)
    assert names(tmp_path) == ["file.bin.part", "file.bin.part.json"]
    server.requests.clear()
    server.behaviours = ["serve"]
    download(server.url, tmp_path / "file.bin", sha256=SHA256)
    assert server.requests == [("/file.bin", "bytes=70000-")]
    assert names(tmp_path) == ["file.bin"]


def test_a_server_that_cannot_resume_sends_it_all_again(server, tmp_path):
    server.behaviours = [cut_after(70_000), whole_whatever_asked]
    download(server.url, tmp_path / "file.bin", sha256=SHA256)
    assert (tmp_path / "file.bin").read_bytes() == DATA


def test_a_file_that_changed_meanwhile_is_started_over(server, tmp_path):
    def change(handler, script):
        cut_after(70_000)(handler, script)
        script.data, script.etag = DATA[::-1], '"v2"'

    server.behaviours = [change, "serve"]
    download(server.url, tmp_path / "file.bin", num_bytes=len(DATA))
    assert (tmp_path / "file.bin").read_bytes() == DATA[::-1]


def test_a_part_of_another_url_is_not_gone_on_with(server, tmp_path):
    server.behaviours = [cut_after(70_000), hang_up]
    with pytest.raises(OSError):
        download(server.url, tmp_path / "file.bin")
    server.behaviours = ["serve"]
    server.requests.clear()
    download(server.url + "?other", tmp_path / "file.bin", sha256=SHA256)
    assert server.requests == [("/file.bin?other", None)]


@pytest.mark.parametrize("length", [len(DATA), len(DATA) + 10])
def test_a_part_that_holds_everything_already(server, tmp_path, length):
    server.behaviours = [cut_after(70_000), hang_up]
    with pytest.raises(OSError):
        download(server.url, tmp_path / "file.bin")
    (tmp_path / "file.bin.part").write_bytes((DATA + bytes(10))[:length])
    server.behaviours = ["serve"]
    download(server.url, tmp_path / "file.bin", num_bytes=len(DATA), sha256=SHA256)
    assert (tmp_path / "file.bin").read_bytes() == DATA


def test_another_range_than_asked_for_is_thrown_away(server, tmp_path):
    server.behaviours = [cut_after(70_000), cut_after(50_000, start=60_000), "serve"]
    download(server.url, tmp_path / "file.bin", sha256=SHA256)
    assert (tmp_path / "file.bin").read_bytes() == DATA


def test_wrong_hash_is_kept_as_bad_with_both_hashes_named(server, tmp_path):
    with pytest.raises(ValueError, match=f"has sha256 {SHA256}, expected {'0' * 64}; kept as file.bin.bad"):
        download(server.url, tmp_path / "file.bin", sha256="0" * 64)
    assert names(tmp_path) == ["file.bin.bad"]


@pytest.mark.parametrize("behaviour", ["serve", no_length])
def test_wrong_length_is_refused(server, tmp_path, behaviour):
    server.behaviours = [behaviour]
    with pytest.raises(ValueError, match="200,000 bytes, expected 199,999"):
        download(server.url, tmp_path / "file.bin", num_bytes=len(DATA) - 1)
    assert "file.bin" not in names(tmp_path)


def test_a_file_of_unknown_length_is_checked_by_its_hash(server, tmp_path):
    server.behaviours = [no_length]
    download(server.url, tmp_path / "file.bin", sha256=SHA256)
    assert (tmp_path / "file.bin").read_bytes() == DATA


def test_another_file_in_the_way_is_left_alone(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match="it is in the way: move it"):
        download(server.url, tmp_path / "file.bin", sha256=SHA256)
    assert (tmp_path / "file.bin").read_bytes() == b"mine"


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_a_refusal_is_final(server, tmp_path, code):
    server.behaviours = [status(code)]
    with pytest.raises(OSError, match=f"the server answers {code}"):
        download(server.url, tmp_path / "file.bin")
    assert len(server.requests) == 1
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_server_is_asked_again_but_not_for_ever(server, tmp_path, code):
    server.behaviours = [status(code), status(code), "serve"]
    download(server.url, tmp_path / "file.bin", sha256=SHA256)
    server.behaviours = [status(code)]
    server.requests.clear()
    with pytest.raises(OSError, match=f"answers {code}, 6 times without progress"):
        download(server.url, tmp_path / "other.bin")
    assert len(server.requests) == 6


def test_the_wait_between_attempts_doubles(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    monkeypatch.setattr(module, "BACK_OFF_SECONDS", 1.0)
    server.behaviours = [status(503)]
    with pytest.raises(OSError):
        download(server.url, tmp_path / "file.bin")
    assert waits == [1, 2, 4, 8, 16]


def test_nobody_listens(server, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/file.bin"
        with pytest.raises(OSError, match="6 times without progress"):
            download(url, tmp_path / "file.bin")


def test_redirects_are_followed_and_a_resumed_part_asks_there_too(server, tmp_path):
    moved = status(302, Location="/elsewhere.bin")
    server.behaviours = [moved, cut_after(1000), moved, "serve"]
    download(server.url, tmp_path / "file.bin", sha256=SHA256)
    assert server.requests[1:] == [
        ("/elsewhere.bin", None),
        ("/file.bin", "bytes=1000-"),
        ("/elsewhere.bin", "bytes=1000-"),
    ]


@pytest.mark.parametrize("place", ["http://example.invalid/file.bin", "file:///etc/hostname", "ftp://127.0.0.1/x"])
def test_a_redirect_to_what_is_not_https_is_refused(server, tmp_path, place):
    server.behaviours = [status(302, Location=place)]
    with pytest.raises((ValueError, OSError), match=r"only https is safe|not allowed"):
        download(server.url, tmp_path / "file.bin")
    assert names(tmp_path) == []


def test_a_redirect_loop_ends(server, tmp_path):
    server.behaviours = [status(302, Location="/file.bin")]
    with pytest.raises(OSError, match="redirect"):
        download(server.url, tmp_path / "file.bin")
    assert len(server.requests) < 15


@pytest.mark.parametrize("url", ["http://example.invalid/x", "http://127.0.0.1:1/x", "file:///etc/hostname", "x"])
def test_only_https_is_asked(tmp_path, url):
    with pytest.raises(ValueError, match="only https is safe"):
        download(url, tmp_path / "file.bin")


@pytest.mark.parametrize("quick", [0, 100_000])
def test_a_slow_drip_is_given_up(server, tmp_path, monkeypatch, quick):
    monkeypatch.setattr(module, "STALL_SECONDS", 0.2)
    server.behaviours = [drip_after(quick), "serve"]
    download(server.url, tmp_path / "file.bin", sha256=SHA256)
    assert quick <= int(server.requests[1][1].strip("bytes=-")) < quick + 120


def test_silence_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.2)
    server.behaviours = [lambda handler, script: time.sleep(0.5), "serve"]
    download(server.url, tmp_path / "file.bin", sha256=SHA256)


@pytest.mark.parametrize("name", ["../file.bin", "a/../../file.bin", ".."])
def test_names_that_lead_elsewhere_are_refused(server, tmp_path, name):
    with pytest.raises(ValueError, match=r"without '\.\.'"):
        download(server.url, tmp_path / name)
    assert server.requests == []


def test_no_room_is_seen_before_the_download(server, tmp_path, monkeypatch):
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="200,000 bytes are needed, 1,000 are free"):
        download(server.url, tmp_path / "file.bin")


CHILD = """
import sys
from lm import download
download.PLAIN_HTTP_HOSTS.add("127.0.0.1")
download.download(*sys.argv[1:3], sha256=sys.argv[3])
"""


def test_two_processes_fetch_one_file_once(server, tmp_path):
    def slowly(handler, script):
        time.sleep(0.5)
        whole_whatever_asked(handler, script)

    server.behaviours = [slowly]
    command = [sys.executable, "-c", CHILD, server.url, str(tmp_path / "file.bin"), SHA256]
    children = [subprocess.Popen(command) for _ in range(2)]
    assert [child.wait(60) for child in children] == [0, 0]
    assert len(server.requests) == 1
    assert (tmp_path / "file.bin").read_bytes() == DATA


TEXT = b"Once upon a time, there was a little fox. " * 5000


def test_text_is_unpacked_and_checked(tmp_path):
    members = gzip.compress(TEXT[:1000]) + gzip.compress(TEXT[1000:])
    (tmp_path / "a.gz").write_bytes(members)
    decompress(tmp_path / "a.gz", tmp_path / "a.txt", num_bytes=len(TEXT), sha256=hashlib.sha256(TEXT).hexdigest())
    assert (tmp_path / "a.txt").read_bytes() == TEXT


PACKED = gzip.compress(TEXT)


@pytest.mark.parametrize(
    ("packed", "expected", "message"),
    [
        (PACKED[:-1], {}, "no whole .gz file"),
        (PACKED[: len(PACKED) // 2], {}, "no whole .gz file"),
        (PACKED[:20] + b"?" + PACKED[21:], {}, "no whole .gz file"),
        (PACKED + b"garbage", {}, "no whole .gz file"),
        (TEXT, {}, "no whole .gz file"),
        (PACKED, {"num_bytes": len(TEXT) - 1}, "unpacks to more than 209,999 bytes"),
        (PACKED, {"num_bytes": len(TEXT) + 1}, "unpacks to 210,000 bytes, expected 210,001"),
        (PACKED, {"num_bytes": len(TEXT), "sha256": "0" * 64}, "expected 0000"),
        (gzip.compress(bytes(10_000_000)), {}, "unpacks to more than"),
    ],
)
def test_what_is_not_the_packed_text_is_refused(tmp_path, packed, expected, message):
    (tmp_path / "a.gz").write_bytes(packed)
    with pytest.raises(ValueError, match=re.escape(message)):
        decompress(tmp_path / "a.gz", tmp_path / "a.txt", **expected)
    assert names(tmp_path) == ["a.gz"]


def test_the_file_is_on_the_device_before_it_has_its_name(server, tmp_path, monkeypatch):
    calls = disk_calls(monkeypatch)
    download(server.url, tmp_path / "file.bin", sha256=SHA256)
    assert flushed_before_it_was_named(calls, "file.bin")


def test_a_weak_etag_is_no_version_to_resume_with(server, tmp_path):
    server.etag = 'W/"v1"'
    server.behaviours = [cut_after(5000), "serve"]
    download(server.url, tmp_path / "file.bin", sha256=SHA256)
    assert server.requests[1][1] is None


def test_a_file_of_another_length_is_refused_before_it_is_fetched(server, tmp_path):
    with pytest.raises(ValueError, match="not the file that is wanted"):
        download(server.url, tmp_path / "file.bin", num_bytes=100)
    assert not list(tmp_path.glob("file.bin*"))
