"""A text of your own: what it is called, how its documents become one file, and which part of it is held out.

A plain text file is read as it is. JSON Lines have a document a line, an object with a string "text", as The Pile, C4,
Dolma and FineWeb have, or a string; they are gathered into one file, `<|endoftext|>` behind each document.
"""

import codecs
import contextlib
import errno
import gzip
import io
import json
import lzma
import mmap
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from lm import VOCAB_SIZES
from tokenizer.chunks import InvalidTextError, invalid_utf8
from tokenizer.files import END_OF_TEXT, atomic_write
from tokenizer.progress import progress_bar

JSON_ENDINGS = (".jsonl", ".ndjson")
PACKED_ENDINGS = (".gz", ".xz")
KINDS_OF_TEXT = ".txt or .jsonl, also .gz or .xz"

BLOCK_BYTES = 1 << 20
LONGEST_LINE = 1 << 28  # bytes of JSON: a file of another kind may have no line ends, and not fit into memory
DECODER = json.JSONDecoder(parse_int=float)  # a number may have more digits than int takes; none is used
KINDS = {dict: "an object", list: "an array", float: "a number", bool: "true or false", type(None): "null"}

HELD_OUT_SHARE = 20  # one byte in 20 of a text without a validation text is held out,
HELD_OUT_BYTES = 10_000_000  # but not more than this
LARGEST_SHARE = 4  # times that, for the sake of a whole document,
LARGEST_BYTES = 4096  # or this many bytes, if those are more


def dataset_name(text: str | os.PathLike[str]) -> str:
    """The name of the dataset of a text file.

    >>> dataset_name("texts/my.book.txt.gz")
    'my.book'
    """
    name = re.sub(r"(\.[A-Za-z]+)?(\.gz|\.xz)?$", "", Path(text).name)
    if name in ("", ".", "..") or name in VOCAB_SIZES:
        raise ValueError(f"train_text={os.fspath(text)}: rename the file; its name is the dataset's, not {name!r}")
    return name


def check_text(name: str, path: str | os.PathLike[str]) -> Path:
    """The path of a text that is there and has a name that can be written down.

    Args:
        name: of the argument, for the message.
        path: what it says.

    Raises:
        ValueError: a directory, an empty file, or a name that is no UTF-8.
        FileNotFoundError: no file of that name.
    """
    text = Path(path)
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # neither config.yaml nor the logger of a run can hold such a name
        spelling = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise ValueError(f"{name}={spelling}: a name there is not UTF-8; rename it") from None
    if text.is_dir():
        raise ValueError(f"{name}={text} is a directory; give a text file ({KINDS_OF_TEXT})")
    if not text.exists():
        raise FileNotFoundError(f"{name}={text}: no such file; a corpus is one of {', '.join(VOCAB_SIZES)}")
    if text.stat().st_size == 0:
        raise ValueError(f"{name}={text} is empty")
    return text


def is_plain(text: Path) -> bool:
    """Whether a text is one file as the tokenizer reads it; what is not is gathered into one."""
    return not _strip_packing(text.name).endswith(JSON_ENDINGS)


def gather(text: Path, target: Path, progress: bool = False) -> None:
    """Write the documents of a text to one file, `<|endoftext|>` behind each; of a plain file, the text as it is.

    Memory is bounded by the longest document. Empty documents are left out; one that has `<|endoftext|>` inside is
    several, one that ends with it gets no second one.

    Args:
        text: a plain text or JSON Lines, compressed or not.
        target: gets its name when everything is in it.
        progress: draw a progress bar also where stderr is no terminal.

    Raises:
        ValueError: no UTF-8, no JSON Lines with texts (with file and line), no document, no whole .gz or .xz file.
        OSError: no room on the disk.
    """
    _check_room(text, target.parent)
    with (
        atomic_write(target) as copy,
        progress_bar(f"gathering {text.name}", text.stat().st_size, "bytes", progress) as show,
    ):
        _copy(text, copy, show)
        if copy.tell() == 0:
            raise ValueError(f"{text} has no documents in it")


def _check_room(text: Path, folder: Path) -> None:
    needed, free = text.stat().st_size, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes to copy, {free:,} free", str(folder))


def _copy(path: Path, copy: IO[bytes], show: Callable[[int], None]) -> None:
    """Write what a file holds; `show` is told of how many of its bytes have been read."""
    unseen = 0
    with open(path, "rb") as packed, _unpacked(path, packed) as file:
        for piece in _blocks(path, file) if is_plain(path) else _json_documents(path, file):
            copy.write(piece)
            unseen += len(piece)
            if unseen > BLOCK_BYTES:
                show(packed.tell())
                unseen = 0


@contextlib.contextmanager
def _unpacked(path: Path, packed: io.BufferedReader) -> Iterator[io.BufferedReader]:
    """What is in a compressed file, or the file itself if it is none."""
    openers: dict[str, Callable[[io.BufferedReader], Any]] = {".gz": gzip.open, ".xz": lzma.open}
    if path.suffix not in openers:
        yield packed
        return
    try:
        yield io.BufferedReader(openers[path.suffix](packed), BLOCK_BYTES)  # whose readline is ten times as fast
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise ValueError(f"{path} is no whole {path.suffix} file: {error}") from None


def _blocks(path: Path, file: io.BufferedReader) -> Iterator[bytes]:
    """A text in blocks, each of whole characters."""
    offset, rest, block = 0, b"", b"first"
    while block:
        block = file.read(BLOCK_BYTES)
        data = rest + block
        try:
            _, end = codecs.utf_8_decode(data, "strict", not block)
        except UnicodeDecodeError as error:
            raise invalid_utf8(path, data, offset, error.start) from None
        yield data[:end]
        offset, rest = offset + end, data[end:]


def _json_documents(path: Path, file: io.BufferedReader) -> Iterator[bytes]:
    """The documents of JSON Lines, and what goes behind each."""
    offset = 0
    for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE), b""), start=1):
        if len(line) == LONGEST_LINE:
            raise ValueError(f"{path}: line {number} has {LONGEST_LINE:,} bytes and no end: are these JSON Lines?")
        if not line.isspace():
            document = _document(path, number, offset, line)
            yield document
            yield _separator(document)
        offset += len(line)


def _document(path: Path, number: int, offset: int, line: bytes) -> bytes:
    """The document of a line, which begins `offset` bytes into the file."""
    where = f"{path}: line {number}"
    try:
        value = DECODER.decode(line.decode().removeprefix("\ufeff" if number == 1 else ""))
    except UnicodeDecodeError as error:
        raise invalid_utf8(path, line, offset, error.start) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON ({error.msg} at character {error.colno})") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None
    if isinstance(value, dict):
        if "text" not in value:
            raise ValueError(f'{where} has no "text" in it; {_list_keys(value)}')
        value, where = value["text"], f'{where}: "text"'
    if not isinstance(value, str):
        raise ValueError(f"{where} is {KINDS[type(value)]}, not a string")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise ValueError(f"{where} has {half}, half of a surrogate pair, which is no character") from None


def _list_keys(value: dict[str, Any]) -> str:
    keys = ", ".join(map(json.dumps, value))
    return f"its keys are {keys if len(keys) <= 100 else keys[:100] + '...'}" if keys else "it is empty"


def _separator(document: bytes) -> bytes:
    """What goes behind a document that is or ends with `document`."""
    end = END_OF_TEXT.encode()
    return b"" if not document or document[-BLOCK_BYTES:].rstrip().endswith(end) else end


def _strip_packing(name: str) -> str:
    return name.removesuffix(".gz").removesuffix(".xz")


def hold_out(text: Path, train: Path, valid: Path, progress: bool = False) -> None:
    """Write about the last twentieth of a text to `valid`, and the rest to `train`; `_place_to_cut` says where.

    Raises:
        ValueError: the text cannot be cut in two, or as `gather`.
        OSError: no room on the disk.
    """
    whole = train.with_name(".text.part")
    try:
        gather(text, whole, progress)
        with open(whole, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cut = _place_to_cut(data)
            if cut is None:
                raise ValueError(f"{text} has no document, paragraph or line near its end to hold out: give valid_text")
            with atomic_write(valid) as tail:
                tail.write(data[cut:])
        with open(whole, "r+b") as rest:
            rest.truncate(cut)
            os.fsync(rest.fileno())
        os.replace(whole, train)
    finally:
        whole.unlink(missing_ok=True)


def _place_to_cut(data: mmap.mmap) -> int | None:
    """Where the first document in the last twentieth begins, or else the last one; or paragraph, or line.

    A document that begins before the largest part that may be held out is cut, at a paragraph or line.
    """
    size = min(len(data) // HELD_OUT_SHARE, HELD_OUT_BYTES)
    wanted, earliest = len(data) - size, len(data) - max(LARGEST_SHARE * size, LARGEST_BYTES)
    blank = re.match(rb"(\s|<\|endoftext\|>)*", data)
    begin, end = blank.end() if blank else 0, _end_of_text(data)
    for separator in map(re.compile, (rb"<\|endoftext\|>\s*", rb"\n[ \t\r]*\n\s*", rb"\n\s*")):
        after = (found.end() for found in separator.finditer(data, wanted))
        before = (found.end() for found in separator.finditer(data, max(begin, earliest), wanted))
        cut = next((cut for cut in after if cut < end), None) or max((cut for cut in before if cut < end), default=None)
        if cut is not None:
            return cut
    return None


def _end_of_text(data: mmap.mmap, block: int = 1 << 16) -> int:
    """Where the white space and separators at the end of a text begin."""
    end = len(data)
    while end:
        tail = data[max(end - block, 0) : end]
        text = tail.rstrip().removesuffix(END_OF_TEXT.encode())
        if len(text) == len(tail):
            break
        end -= len(tail) - len(text)
    return end


@contextlib.contextmanager
def advice() -> Iterator[None]:
    """Tell who brings a text of another encoding to convert it."""
    try:
        yield
    except InvalidTextError as error:
        path, iconv = error.path, f"iconv -f {error.encoding} -t UTF-8"
        unpack = {".gz": "gzip -dc", ".xz": "xz -dc"}.get(path.suffix)
        command = f"{unpack} {path} | {iconv}" if unpack else f"{iconv} {path}"
        command += f" > utf8{Path(_strip_packing(path.name)).suffix or '.txt'}"
        raise ValueError(f"{error.found}: convert the text, e.g. `{command}`") from None
