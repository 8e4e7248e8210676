"""A text of your own: what it is called, how its documents become one file, and which part of it is held out.

A plain text file is read as it is. JSON Lines have a document a line, an object with a string "text", as The Pile, C4,
Dolma and FineWeb have, or a string; in a folder, each text file is a document, too. They are gathered into one file,
`<|endoftext|>` behind each document.
"""

import codecs
import contextlib
import errno
import gzip
import hashlib
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
from typing import Any, NamedTuple

from lm import VOCAB_SIZES
from tokenizer.chunks import InvalidTextError, PlainFile, invalid_utf8
from tokenizer.files import END_OF_TEXT, atomic_write, write_json
from tokenizer.progress import progress_bar

TEXT_ENDINGS = (".txt", ".md", ".text")
JSON_ENDINGS = (".jsonl", ".ndjson")
ENDINGS = tuple(ending + packed for packed in ("", ".gz", ".xz") for ending in TEXT_ENDINGS + JSON_ENDINGS)
PACKED_SHARE = 3  # bytes of English text in a compressed byte
MADE_HERE = (
    {"stages.json"},
    {"meta.json", "tokenizer"},
    {"vocab.json", "merges.txt"},
    {"config.yaml", "metrics.jsonl"},
    {"record.json", "output.txt"},
)
"""Names by which a folder is known for a dataset, a tokenizer, a run or that of a sweep, whose files are no texts."""

BLOCK_BYTES = 1 << 20
LOOK_BACK_BYTES = 1 << 12  # for a separator at the end of a document, and white space after it
LONGEST_LINE = 1 << 28  # bytes of JSON: a file of another kind may have no line ends, and not fit into memory
DECODER = json.JSONDecoder(parse_int=float)  # a number may have more digits than int takes; none is used
KINDS = {dict: "an object", list: "an array", float: "a number", bool: "true or false", type(None): "null"}

HELD_OUT_SHARE = 20  # one byte in 20 of a text without a validation text is held out,
HELD_OUT_BYTES = 10_000_000  # but not more than this
LARGEST_SHARE = 4  # times that, for the sake of a whole document,
LARGEST_BYTES = 4096  # or this many bytes, if those are more


class Files(NamedTuple):
    """The files that make up a text, and how many others lie beside them."""

    paths: list[Path]
    num_others: int


def list_files(text: Path) -> Files:
    """The files of a text: itself, or those below a folder, in the order of their names.

    Hidden files and folders are passed over, and so are datasets, tokenizers and runs; links are followed, but no
    folder is entered twice.

    Raises:
        ValueError: a folder without texts, or that is itself a dataset, a tokenizer or a run.
        OSError: a folder that cannot be read.
    """
    if not text.is_dir():
        return Files([text], 0)
    paths = sorted(_walk(text), key=lambda path: path.relative_to(text).as_posix())
    texts = [path for path in paths if path.name.lower().endswith(ENDINGS) and path.is_file()]
    if not texts:
        endings = ", ".join(TEXT_ENDINGS + JSON_ENDINGS)
        raise ValueError(f"{text} has no texts in it, that is, files that end in {endings} (or these and .gz or .xz)")
    return Files(texts, len(paths) - len(texts))


def _walk(top: Path) -> Iterator[Path]:
    entered = set()
    for place, folders, files in os.walk(top, onerror=_refuse, followlinks=True):
        folder = Path(place)
        status = folder.stat()
        made_here = any(names <= {*folders, *files} for names in MADE_HERE)
        if made_here and folder == top:
            raise ValueError(
                f"{top} is a dataset, a tokenizer or a run, no folder of texts; --data.directory takes a dataset"
            )
        if made_here or (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (folder / name for name in files if not name.startswith("."))


def _refuse(error: OSError) -> None:
    raise error


def describe(text: Path) -> str:
    """What a text consists of, to be said to who has brought it."""
    if not text.is_dir():
        return str(text)
    paths, num_others = list_files(text)
    others = f", {num_others:,} {'other' if num_others == 1 else 'others'} left out" if num_others else ""
    return f"{len(paths):,} {'file' if len(paths) == 1 else 'files'} of {text}/{others}"


def count_bytes(text: Path) -> int:
    """About the size of a text, three times that of what is compressed."""
    return sum(path.stat().st_size * (PACKED_SHARE if _packing(path) else 1) for path in list_files(text).paths)


def fingerprint(folder: Path, memory: Path) -> str:
    """A hash of the names and contents of the texts of a folder.

    Args:
        folder: of texts.
        memory: a file of what was hashed last time, which is not read again if its size and time of change are the
            same. Where it cannot be written, as in a directory that is read-only, all is read next time.
    """
    try:
        before = json.loads(memory.read_bytes())
    except (FileNotFoundError, ValueError):
        before = {}
    known = before["files"] if before.get("folder") == str(folder.resolve()) else {}
    files = {}
    for path in list_files(folder).paths:
        name, status = path.relative_to(folder).as_posix(), path.stat()
        seen = {"num_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        same = known.get(name, {})
        files[name] = same if seen.items() <= same.items() else {**seen, "sha256": _sha256(path)}
    if files != known:
        with contextlib.suppress(OSError):
            write_json(memory, {"folder": str(folder.resolve()), "files": files})
    contents = [[name, file["num_bytes"], file["sha256"]] for name, file in files.items()]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stem(text: Path) -> str:
    """The name of a folder, or that of a file without its endings.

    >>> stem(Path("texts/my.book.txt.gz"))
    'my.book'
    """
    if text.is_dir():
        return text.name if text.name not in ("", "..") else text.resolve().name
    return re.sub(r"(\.[A-Za-z]+)?(\.gz|\.xz)?$", "", text.name)


def dataset_name(text: str | os.PathLike[str]) -> str:
    """The name of the dataset of a text.

    Raises:
        ValueError: it is that of a corpus, or none at all.
    """
    name = stem(Path(text))
    if name in ("", ".", "..") or name in VOCAB_SIZES:
        raise ValueError(f"train_text={os.fspath(text)}: rename it; its name is the dataset's, not {name!r}")
    return name


def check_text(name: str, path: str | os.PathLike[str]) -> Path:
    """The path of a text that is there and has a name that can be written down.

    Args:
        name: of the argument, for the message.
        path: what it says.

    Raises:
        ValueError: a folder without texts, an empty file, or a name that is no UTF-8.
        FileNotFoundError: no file of that name.
    """
    text = Path(path)
    for written in (os.fspath(path), stem(text)):  # by config.yaml and the logger of a run
        try:
            written.encode()
        except UnicodeEncodeError:
            spelling = os.fsencode(written).decode("utf-8", "backslashreplace")
            raise ValueError(f"{name}={spelling}: a name there is not UTF-8; rename it") from None
    if not text.exists():
        raise FileNotFoundError(f"{name}={text}: no such file; a corpus is one of {', '.join(VOCAB_SIZES)}")
    if not text.is_dir() and text.stat().st_size == 0:
        raise ValueError(f"{name}={text} is empty")
    list_files(text)
    return text


def is_plain(text: Path) -> bool:
    """Whether a text is one file as the tokenizer reads it; what is not is gathered into one."""
    return not text.is_dir() and not _strip_packing(text).endswith(JSON_ENDINGS)


def _strip_packing(path: Path) -> str:
    return path.name.lower().removesuffix(_packing(path))


def _packing(path: Path) -> str:
    return path.suffix.lower() if path.suffix.lower() in (".gz", ".xz") else ""


def gather(text: Path, target: Path, progress: bool = False) -> None:
    """Write the documents of a text to one file, `<|endoftext|>` behind each; of a plain file, the text as it is.

    Memory is bounded by the longest document. Empty documents are left out; one that has `<|endoftext|>` inside is
    several, one that ends with it gets no second one.

    Args:
        text: a plain text or JSON Lines, compressed or not, or a folder of such.
        target: gets its name when everything is in it.
        progress: draw a progress bar also where stderr is no terminal.

    Raises:
        ValueError: no UTF-8, no JSON Lines with texts (with file and line), no document, no whole .gz or .xz file, a
            file that changes while it is read.
        OSError: no room on the disk.
    """
    files = [PlainFile(path) for path in list_files(text).paths]
    num_bytes, alone = sum(file.before.st_size for file in files), is_plain(text)
    done = shown = 0
    _check_room(num_bytes, target.parent)
    with atomic_write(target) as copy, progress_bar(f"gathering {stem(text)}", num_bytes, "bytes", progress) as show:
        for file in files:
            for piece, read in _read(file.path, alone):
                copy.write(piece)
                if done + read > shown + BLOCK_BYTES:
                    show(shown := done + read)
            done += file.before.st_size
            file.check_unchanged()
        show(done)
        if copy.tell() == 0:
            raise ValueError(f"{text} has no documents in it")


def _check_room(num_bytes: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise OSError(errno.ENOSPC, f"{num_bytes:,} bytes to copy, {free:,} free", str(folder))


def _read(path: Path, alone: bool) -> Iterator[tuple[bytes, int]]:
    """What a file holds, piece by piece, each with how far the file has been read.

    Args:
        path: of a plain text or JSON Lines.
        alone: whether a plain text is not one document among others.
    """
    with open(path, "rb") as packed, _unpacked(path, packed) as file:
        if not is_plain(path):
            pieces = _json_documents(path, file)
        else:
            pieces = _blocks(path, file) if alone else _text_document(path, file)
        for piece in pieces:
            yield piece, packed.tell()


@contextlib.contextmanager
def _unpacked(path: Path, packed: io.BufferedReader) -> Iterator[io.BufferedReader]:
    """What is in a compressed file, or the file itself if it is none."""
    openers: dict[str, Callable[[io.BufferedReader], Any]] = {".gz": gzip.open, ".xz": lzma.open}
    if not _packing(path):
        yield packed
        return
    try:
        yield io.BufferedReader(openers[_packing(path)](packed), BLOCK_BYTES)  # whose readline is ten times as fast
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise ValueError(f"{path} is no whole {path.suffix} file: {error}") from None


def _text_document(path: Path, file: io.BufferedReader) -> Iterator[bytes]:
    """A text in blocks, and what goes behind it."""
    end = b""
    for block in _blocks(path, file):
        yield block
        end = (end + block)[-LOOK_BACK_BYTES:]
    yield _separator(end)


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
    return b"" if not document or document[-LOOK_BACK_BYTES:].rstrip().endswith(end) else end


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
        unpack = {".gz": "gzip -dc", ".xz": "xz -dc"}.get(_packing(path))
        command = f"{unpack} {path} | {iconv}" if unpack else f"{iconv} {path}"
        command += f" > utf8{Path(_strip_packing(path)).suffix or '.txt'}"
        raise ValueError(f"{error.found}: convert the text, e.g. `{command}`") from None
