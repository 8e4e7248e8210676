"""Text files in chunks that threads can work on apart: no pre-token and no special token lies in two of them.

A chunk ends where white space follows another character, for there a pre-token ends whatever surrounds it, or where a
special token begins; never inside a special token. Such places exist in files without any document separator too, and
what is found in the text does not depend on the cuts.
"""

import gzip
import lzma
import os
import re
import stat
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokenizer.kernels import PADDING
from tokenizer.progress import progress_bar

Result = TypeVar("Result")
Errors = Literal["strict", "replace"]
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

WINDOW = 1 << 12  # bytes looked at to find the end of a chunk; nearly always enough


class Chunk(NamedTuple):
    """A piece of a file: `text[:length]`, which begins `offset` bytes into the file; PADDING bytes follow it."""

    path: Path
    offset: int
    length: int
    text: NDArray[np.uint8]


def list_paths(input_path: Paths) -> list[Path]:
    """`input_path` as a list of paths, which are one text, read in this order."""
    paths = [input_path] if isinstance(input_path, str | os.PathLike) else list(input_path)
    if not paths:
        raise ValueError("input_path=[] must name at least one text file")
    return [Path(path) for path in paths]


class InvalidTextError(ValueError):
    """Text that is no UTF-8, at byte `offset` of the file `path`.

    Attributes:
        found: the message without its advice, for programs that have other advice to give.
        encoding: what the text may be in, in the words of iconv.
    """

    def __init__(self, path: Path, offset: int, found: str, encoding: str, advice: str):
        super().__init__(f"{found}: {advice}")
        self.path, self.offset, self.found, self.encoding = path, offset, found, encoding


class CutFinder:
    """Finds places at which a text can be cut."""

    def __init__(self, special_tokens: Sequence[str]):
        self.special_tokens = [token.encode() for token in special_tokens]
        self.margin = max([8, *map(len, self.special_tokens)])  # bytes on both sides that decide
        candidates = [rb"(?<=\S)\s", *(re.escape(token) for token in self.special_tokens)]
        self.candidates = re.compile(b"|".join(candidates))

    def find(self, window: bytes, first: int, last: int) -> int | None:
        """The first place to cut in window[first:last]; `window` has `margin` bytes around, or ends with the text."""
        for candidate in self.candidates.finditer(window, first):
            if candidate.start() >= last:
                break
            if self._is_safe(window, candidate.start()):
                return candidate.start()
        return None

    def _is_safe(self, window: bytes, cut: int) -> bool:
        before = window[max(cut - 8, 0) : cut].decode("utf-8", "ignore")
        return not before[-1:].isspace() and all(
            window.find(token, max(cut - len(token) + 1, 0), cut + len(token) - 1) < 0 for token in self.special_tokens
        )


class PlainFile:
    """A text file of which any part can be read at any time."""

    def __init__(self, path: Path):
        self.path = path
        self.before = path.stat()
        if not stat.S_ISREG(self.before.st_mode):
            raise ValueError(f"{path} is not a regular file: write the text to a file first")
        self.num_bytes: int | None = self.before.st_size

    def clip(self, offset: int) -> int:
        """`offset`, or the end of the text if that comes first."""
        return min(offset, self.before.st_size)

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on; fewer only at the end of the text."""
        buffer = np.empty(self.clip(offset + size) - offset, np.uint8)
        self.read_into(buffer, offset)
        return buffer.tobytes()

    def read_all(self) -> bytes:
        """The whole text."""
        end = 1 << 20
        while self.clip(end) == end:
            end *= 2
        return self.read(0, end)

    def read_into(self, buffer: NDArray[np.uint8], offset: int) -> None:
        """Fill `buffer` from `offset` on."""
        with open(self.path, "rb", buffering=0) as file:
            done = 0
            while done < len(buffer):
                size = os.preadv(file.fileno(), [buffer[done:].data], offset + done)
                if size == 0:
                    raise self._changed()
                done += size

    def check_unchanged(self) -> None:
        """Raise ValueError if size or time of change differ from those at the beginning."""
        after = self.path.stat()
        if (after.st_size, after.st_mtime_ns) != (self.before.st_size, self.before.st_mtime_ns):
            raise self._changed()

    def _changed(self) -> ValueError:
        return ValueError(f"{self.path} changed while it was read: start again when nothing writes to it")


class CompressedFile(PlainFile):
    """A .gz or .xz file, whose text comes from front to back; what has been read is kept until it is forgotten."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.num_bytes = None
        self.stream = gzip.GzipFile(path) if path.suffix == ".gz" else lzma.LZMAFile(path)  # noqa: SIM115
        self.kept, self.kept_offset = bytearray(), 0

    def _decompress(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end of the text."""
        try:
            return self.stream.read(size)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise ValueError(f"{self.path} is not a whole {self.path.suffix} file: {error}") from error

    def measure(self) -> int:
        """Size of the text, found by decompressing all of it once."""
        self.num_bytes = 0
        while block := self._decompress(1 << 20):
            self.num_bytes += len(block)
        self.stream.seek(0)
        return self.num_bytes

    def skip(self, offset: int) -> None:
        """Go forward to `offset` and keep nothing that lies before."""
        self.forget(offset)
        while self.kept_offset < offset and (block := self._decompress(min(1 << 20, offset - self.kept_offset))):
            self.kept_offset += len(block)

    def clip(self, offset: int) -> int:
        """`offset`, or the end of the text if that comes first; reads as far."""
        missing = offset - self.kept_offset - len(self.kept)
        if missing > 0:
            self.kept += self._decompress(missing)
        return min(offset, self.kept_offset + len(self.kept))

    def read_into(self, buffer: NDArray[np.uint8], offset: int) -> None:
        """Fill `buffer` from `offset` on, which must not have been forgotten."""
        first = offset - self.kept_offset
        buffer[:] = np.frombuffer(self.kept, np.uint8)[first : first + len(buffer)]

    def forget(self, offset: int) -> None:
        """Keep nothing of what has been read that lies before `offset`."""
        surplus = min(max(offset - self.kept_offset, 0), len(self.kept))
        del self.kept[:surplus]
        self.kept_offset += surplus


class ChunkReader:
    """Hands out the chunks of several files, in order, to any number of threads.

    Args:
        input_path: one file or several; names that end in .gz or .xz are decompressed.
        special_tokens: strings that must not be cut.
        chunk_bytes: size of a chunk, up to the next place where the text can be cut.
        errors: what to do about bytes that are no UTF-8: refuse them ("strict"), or read U+FFFD instead of them as
            `bytes.decode` does ("replace").

    Raises:
        ValueError: for an input that is no regular file; while chunks are read, for text that is no UTF-8 (with file
            and offset), or a file that changes.
    """

    def __init__(
        self, input_path: Paths, special_tokens: Sequence[str], errors: Errors = "strict", chunk_bytes: int = 1 << 20
    ):
        check_errors(errors, special_tokens)
        self.files = [
            CompressedFile(path) if path.suffix in (".gz", ".xz") else PlainFile(path)
            for path in list_paths(input_path)
        ]
        sizes = [file.num_bytes for file in self.files]
        self.num_bytes = None if None in sizes else sum(size or 0 for size in sizes)
        self.finder = CutFinder(special_tokens)
        self.errors = errors
        self.chunk_bytes = chunk_bytes
        self.lock = threading.Lock()
        self.stopped = False
        self.num_chunks, self.bytes_handed_out = 0, 0
        self.current, self.offset = 0, 0  # the file and the place in it where the next chunk begins

    def chunks(self) -> Iterator[Chunk]:
        """Chunks that no other thread gets, until there are none left; each is valid until the next is asked for."""
        buffer = np.empty(0, np.uint8)
        while (taken := self.take(buffer)) is not None:
            _, chunk = taken
            buffer = chunk.text
            yield self.check(chunk)

    def take(self, buffer: NDArray[np.uint8]) -> tuple[int, Chunk] | None:
        """Number and text of the next chunk, None at the end; uses `buffer` for it, if that is large enough."""
        with self.lock:
            piece = self._next_piece()
            if piece is None:
                return None
            file, begin, end = piece
            length, number = end - begin, self.num_chunks
            self.num_chunks += 1
            if len(buffer) < length + PADDING:
                buffer = np.zeros(length + length // 8 + PADDING, np.uint8)  # also for a chunk that is a bit longer
            if isinstance(file, CompressedFile):
                file.read_into(buffer[:length], begin)
                file.forget(end - self.finder.margin)  # what decides about a cut at `end`
        if not isinstance(file, CompressedFile):
            file.read_into(buffer[:length], begin)
        return number, Chunk(file.path, begin, length, buffer)

    def _next_piece(self) -> tuple[PlainFile, int, int] | None:
        while self.current < len(self.files) and not self.stopped:
            file, begin = self.files[self.current], self.offset
            end = self._end_of_chunk(file, begin)
            if end - begin >= 1 << 32:
                raise ValueError(f"{file.path} has no white space or special token in the 4 GiB from byte {begin} on")
            if end > begin:
                self.offset = end
                self.bytes_handed_out += end - begin
                return file, begin, end
            self.current, self.offset = self.current + 1, 0
        return None

    def _end_of_chunk(self, file: PlainFile, begin: int) -> int:
        """The first place to cut from `chunk_bytes` after `begin` on, or the end of the text."""
        margin, size = self.finder.margin, WINDOW
        first = begin + self.chunk_bytes
        while file.clip(first) == first:
            start = max(first - margin, begin)
            window = file.read(start, size + 2 * margin)
            at_end = len(window) < size + 2 * margin
            last = len(window) if at_end else len(window) - margin
            cut = self.finder.find(window, first - start, last)
            if cut is not None:
                return start + cut
            first = start + last + at_end
            size *= 2
        return file.clip(first)

    def check(self, chunk: Chunk) -> Chunk:
        """`chunk` with valid UTF-8, or ValueError."""
        from tokenizer.kernels.scan import find_invalid_utf8

        path, offset, length, text = chunk
        invalid = find_invalid_utf8(text, 0, length)
        if invalid == length:
            return chunk
        data = text[:length].tobytes()
        if self.errors == "strict" or (offset == 0 and is_utf16(data)):
            raise invalid_utf8(path, data, offset, invalid)
        replaced = np.frombuffer(data.decode("utf-8", "replace").encode() + bytes(PADDING), np.uint8)
        return Chunk(path, offset, len(replaced) - PADDING, replaced)

    def place_of(self, error: BaseException) -> tuple[int, int]:
        """Where in the text an error arose, as far as it says; the beginning if it does not."""
        if not isinstance(error, InvalidTextError):
            return 0, 0
        return [file.path for file in self.files].index(error.path), error.offset

    def check_unchanged(self) -> None:
        """Raise ValueError if a file is not as it was at the beginning."""
        for file in self.files:
            file.check_unchanged()


def check_errors(errors: Errors, special_tokens: Sequence[str]) -> None:
    """Raise ValueError for a policy that does not exist, or under which special tokens could arise from broken text."""
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors={errors!r} must be 'strict' or 'replace'")
    if errors == "replace" and any("\ufffd" in token for token in special_tokens):
        raise ValueError("special_tokens must not contain U+FFFD when errors='replace' writes it for broken text")


def is_utf16(data: bytes) -> bool:
    """Whether a file that begins with `data` says that it is UTF-16."""
    return data[:2] in (b"\xff\xfe", b"\xfe\xff")


def invalid_utf8(path: Path, data: bytes, offset: int, invalid: int) -> InvalidTextError:
    """The error for data[invalid] that is no UTF-8, where `data` begins `offset` bytes into the file."""
    if offset == 0 and is_utf16(data):
        advice = f"convert it, e.g. `iconv -f UTF-16 -t UTF-8 {path}`"
        return InvalidTextError(path, invalid, f"{path} is UTF-16, not UTF-8", "UTF-16", advice)
    found = f"{path} is not UTF-8 at byte {offset + invalid} ({data[invalid : invalid + 4].hex(' ')})"
    advice = "mend the file, or pass errors='replace' to read U+FFFD there"
    return InvalidTextError(path, offset + invalid, found, "LATIN1", advice)


def read_text(path: Path, errors: Errors = "strict") -> str:
    """The whole text of one small file.

    Raises:
        ValueError: as `ChunkReader`.
    """
    file = CompressedFile(path) if path.suffix in (".gz", ".xz") else PlainFile(path)
    data = file.read_all()
    file.check_unchanged()
    try:
        return data.decode("utf-8", "replace" if errors == "replace" and not is_utf16(data) else "strict")
    except UnicodeDecodeError as error:
        raise invalid_utf8(path, data, 0, error.start) from None


def default_threads(num_threads: int | None) -> int:
    """`num_threads`, or the number of processors that this process may use."""
    if num_threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_threads < 1:
        raise ValueError(f"num_threads={num_threads} must be at least 1")
    return num_threads


def work_on_chunks(
    reader: ChunkReader, work: Callable[[Iterator[Chunk]], Result], num_threads: int, description: str, progress: bool
) -> list[Result]:
    """`work(chunks)` in each of `num_threads` threads, which share the chunks of `reader`; what each returned.

    An error or Ctrl-C stops all threads at their next chunk. Of several errors the first in the text is raised.
    """
    with (
        ThreadPoolExecutor(num_threads) as pool,
        progress_bar(description, reader.num_bytes, "bytes", progress) as show,
    ):
        try:
            futures = [pool.submit(work, reader.chunks()) for _ in range(num_threads)]
            waiting: set[Future[Result]] = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=0.1, return_when=FIRST_EXCEPTION)
                show(reader.bytes_handed_out)
                if any(future.exception() for future in done):
                    reader.stopped = True
        except BaseException:
            reader.stopped = True
            raise
    errors = [error for error in (future.exception() for future in futures) if error]
    if errors:
        raise min(errors, key=reader.place_of)
    reader.check_unchanged()
    return [future.result() for future in futures]
