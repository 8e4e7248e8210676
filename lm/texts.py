"""A text of your own: what it is called, whether it can be read, and which part of it is held out."""

import contextlib
import errno
import gzip
import lzma
import mmap
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lm import VOCAB_SIZES
from tokenizer.chunks import InvalidTextError
from tokenizer.files import END_OF_TEXT, atomic_write

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
        raise ValueError(f"{name}={text} is a directory; give a text file (.txt, .txt.gz, .txt.xz)")
    if not text.exists():
        raise FileNotFoundError(f"{name}={text}: no such file; a corpus is one of {', '.join(VOCAB_SIZES)}")
    if text.stat().st_size == 0:
        raise ValueError(f"{name}={text} is empty")
    return text


def hold_out(text: Path, train: Path, valid: Path) -> None:
    """Write about the last twentieth of a text file to `valid`, and the rest to `train`; `_place_to_cut` says where.

    Raises:
        ValueError: the text cannot be cut in two, or is no whole .gz or .xz file.
        OSError: no room on the disk.
    """
    whole = train.with_name(".text.part")
    try:
        _copy(text, whole)
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


def _copy(text: Path, target: Path) -> None:
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    free = shutil.disk_usage(target.parent).free
    if text.stat().st_size > free:
        raise OSError(errno.ENOSPC, f"{text.stat().st_size:,} bytes to copy, {free:,} free", str(target.parent))
    try:
        with openers.get(text.suffix, open)(text, "rb") as source, open(target, "wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise ValueError(f"{text} is no whole {text.suffix} file: {error}") from None


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
def advice(own: list[Path]) -> Iterator[None]:
    """Tell who brings a text of another encoding to convert that, and not the copy without its end."""
    try:
        yield
    except InvalidTextError as error:
        text = error.path if error.path in own else own[0]
        command = f"iconv -f {error.encoding} -t UTF-8 {text} > utf8.txt"
        raise ValueError(f"{error.found}: convert the text, e.g. `{command}`") from None
