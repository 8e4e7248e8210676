"""Files from the web: over https alone, resumed where they broke off, checked before they get their name.

A download grows in `<name>.part`; beside it `<name>.part.json` says which version of the file it is a part of, so that
a later call resumes (RFC 9110: Range with If-Range) or, if the file has changed meanwhile, starts over. Size and sha256
are compared before the part is renamed; a file that is not what it should be is kept as `<name>.bad`.
"""

import contextlib
import errno
import fcntl
import gzip
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from tokenizer.files import atomic_write, write_json
from tokenizer.progress import progress_bar

ATTEMPTS = 6  # in a row without a byte of progress
BACK_OFF_SECONDS = 1.0  # doubled with each attempt
TIMEOUT_SECONDS = 30.0  # for a connection, and for each read from it
STALL_SECONDS = 30.0  # a connection that brings less than this many seconds
STALL_BYTES = 30_000  # of this many bytes is given up for a new one
MAX_GZIP_RATIO = 100  # of text to compressed bytes, where the size of the text is not known; English has 3
PLAIN_HTTP_HOSTS: set[str] = set()
"""Hosts that may be asked over plain http; the tests put the loopback address here."""

_RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}


def download(
    url: str,
    path: str | os.PathLike[str],
    *,
    num_bytes: int | None = None,
    sha256: str | None = None,
    progress: bool = False,
) -> Path:
    """Fetch `url` into the file `path`; nothing is fetched if the right file is there already.

    Broken connections, stalls and busy servers are tried again, going on from what is there. Of several processes that
    want the same file one fetches it and the others wait.

    Args:
        url: of scheme https.
        path: the final name; its folder is made.
        num_bytes: the size that the file must have, if known.
        sha256: the hash that the file must have, if known.
        progress: draw a progress bar also where stderr is no terminal.

    Raises:
        ValueError: not https, or redirected to what is not; a file of another size or hash; `path` has `..` in it.
        OSError: the server refuses, or cannot be reached after `ATTEMPTS` attempts; no room on the disk.
    """
    _check_url(url)
    target = Path(path)
    if ".." in target.parts or not target.name:
        raise ValueError(f"path={os.fspath(path)!r} must name a file, without '..'")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target):
        if target.exists():
            _check_file(target, target, url, num_bytes, sha256)
            return target
        part = target.with_name(f"{target.name}.part")
        _fetch_all(url, part, num_bytes, progress)
        try:
            _check_file(part, target, url, num_bytes, sha256)
        except ValueError:
            os.replace(part, target.with_name(f"{target.name}.bad"))
            raise
        finally:
            _state_file(part).unlink(missing_ok=True)
        os.replace(part, target)
    return target


def decompress(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    num_bytes: int | None = None,
    sha256: str | None = None,
    progress: bool = False,
) -> None:
    """Write the text of a .gz file, of any number of members, to `target`.

    Args:
        source: the compressed file.
        target: gets its name when the whole text is in it and checked.
        num_bytes: the size that the text must have, if known; else at most `MAX_GZIP_RATIO` times that of `source`.
        sha256: the hash that the text must have, if known.
        progress: draw a progress bar also where stderr is no terminal.

    Raises:
        ValueError: the file is cut off, damaged, has something else behind its end, or holds another text.
        OSError: no room on the disk.
    """
    source, target = Path(source), Path(target)
    limit = num_bytes if num_bytes is not None else MAX_GZIP_RATIO * source.stat().st_size
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_room(target, num_bytes or 0)
    digest, written = hashlib.sha256(), 0
    with (
        gzip.open(source) as packed,
        atomic_write(target) as text,
        progress_bar(f"unpacking {source.name}", num_bytes, "bytes", progress) as show,
    ):
        try:
            while block := packed.read(1 << 20):
                written += len(block)
                if written > limit:
                    raise ValueError(f"{source} unpacks to more than {limit:,} bytes")
                digest.update(block)
                text.write(block)
                show(written)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{source} is no whole .gz file ({error}): remove it and get it again") from None
        if num_bytes is not None and written != num_bytes:
            raise ValueError(f"{source} unpacks to {written:,} bytes, expected {num_bytes:,}")
        if sha256 is not None and digest.hexdigest() != sha256:
            raise ValueError(f"{source} unpacks to a text of sha256 {digest.hexdigest()}, expected {sha256}")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https only."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in PLAIN_HTTP_HOSTS):
        raise ValueError(f"{url} is refused: only https is safe to download from")


def _state_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _fetch_all(url: str, part: Path, num_bytes: int | None, progress: bool) -> None:
    """Bring the whole file into `part`, over as many connections as it takes."""
    failures = 0
    with progress_bar(f"downloading {url.rpartition('/')[2]}", num_bytes, "bytes", progress) as show:
        while True:
            before = _size(part)
            try:
                if _fetch_more(url, part, num_bytes, show):
                    return
                cause = "the connection broke off"
            except urllib.error.HTTPError as error:
                if error.code not in _RETRIED_STATUS:
                    raise OSError(f"{url}: the server answers {error.code} {error.reason}".split("\n")[0]) from None
                cause = f"the server answers {error.code}"
            except urllib.error.URLError as error:
                cause = str(error.reason)
            except (TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException) as error:
                cause = str(error) or type(error).__name__
            failures = 1 if _size(part) > before else failures + 1
            if failures >= ATTEMPTS:
                kept = f"; {_size(part):,} bytes are kept, call again to go on" if _size(part) else ""
                raise OSError(f"{url}: {cause}, {ATTEMPTS} times without progress{kept}")
            wait = BACK_OFF_SECONDS * 2 ** (failures - 1)
            print(f"download: {cause}; again in {wait:.0f} s from byte {_size(part):,}", file=sys.stderr)
            time.sleep(wait)


def _fetch_more(url: str, part: Path, num_bytes: int | None, show: Any) -> bool:
    """One connection: append what it brings to `part`; whether the file is whole now."""
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "lm-from-scratch"})  # noqa: S310 - checked
    start, validator = _size(part), _validator(part, url)
    if start and not validator:
        start = 0
    if start:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", validator)
    opener = urllib.request.build_opener(_Redirects)
    try:
        response = opener.open(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if whole and int(whole[1]) == start:
            return True  # everything had arrived, only the last rename was missing
        part.unlink()
        return False
    with response:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if response.status == 206 and (not found or int(found[1]) != start):
            part.unlink(missing_ok=True)
            raise http.client.HTTPException("the server sent another part than asked for")
        if response.status == 206:
            total = int(found[2]) if found else None
        else:  # the whole file: a new version, or a server that cannot resume
            start = 0
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else None
        if num_bytes is not None and total is not None and total != num_bytes:
            raise ValueError(f"{url} has {total:,} bytes, expected {num_bytes:,}: not the file that is wanted")
        _check_room(part, (total or num_bytes or 0) - start)
        write_json(_state_file(part), {"url": url, "validator": _validator_of(response.headers)})
        with open(part, "r+b" if start else "wb") as file:
            file.seek(start)
            return _receive(response, file, start, total, show)


def _receive(response: Any, file: IO[bytes], start: int, total: int | None, show: Any) -> bool:
    done, since, mark = start, time.monotonic(), start
    try:
        while block := response.read1(1 << 20):
            file.write(block)
            done += len(block)
            show(done)
            if time.monotonic() - since > STALL_SECONDS:
                if done - mark < STALL_BYTES:
                    raise TimeoutError(f"only {done - mark:,} bytes in {STALL_SECONDS:.0f} s")
                since, mark = time.monotonic(), done
    finally:
        file.flush()
        os.fsync(file.fileno())
    return total is None or done >= total


def _validator(part: Path, url: str) -> str:
    """The version of the file that `part` is a part of, as If-Range wants it; "" if it is not known."""
    try:
        state = json.loads(_state_file(part).read_bytes())
        return str(state["validator"]) if state["url"] == url else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _validator_of(headers: Any) -> str:
    etag = headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_room(path: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free:
        raise OSError(errno.ENOSPC, f"{num_bytes:,} bytes are needed, {free:,} are free on the disk", str(path))


def _check_file(path: Path, target: Path, url: str, num_bytes: int | None, sha256: str | None) -> None:
    """Raise ValueError if `path`, which is or will be `target`, is not the file that is wanted."""
    aside = "it is in the way: move it" if path == target else f"kept as {target.name}.bad"
    if num_bytes is not None and path.stat().st_size != num_bytes:
        raise ValueError(f"{target} from {url} has {path.stat().st_size:,} bytes, expected {num_bytes:,}; {aside}")
    if sha256 is not None:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256:
            raise ValueError(f"{target} from {url} has sha256 {digest}, expected {sha256}; {aside}")


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    with open(target.with_name(f".{target.name}.lock"), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
