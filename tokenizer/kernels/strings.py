"""The characters of a `str` as UTF-8, read from the memory of Python itself.

`str.encode` looks at text that is not all ASCII character by character, and its result would have to be copied once
more to have readable bytes after its end. Here 16 characters at a time are narrowed to bytes as long as they are ASCII.
That needs a few facts about CPython, which hold where `KNOWN` says so: a string has its length, its hash and a word of
flags after its type, and then, after fields that only strings beyond ASCII have, its characters, in 1, 2 or 4 bytes.
"""

import ctypes
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenizer.kernels import lists
from tokenizer.kernels.machine import NONE, ONE, character_at, kernel, lowest_bit, narrow_16

Word = np.uint64
Byte = np.uint8

FLAGS = 32  # offset of the flags: 2 bits, 3 bits for the width of a character, then whether it is compact and ASCII
ASCII_BEGIN = sys.getsizeof("") - 1  # a string ends with a NUL
OTHER_BEGIN = sys.getsizeof(chr(0x100)) - 4  # of a fresh string, which has no copy in UTF-8 yet


def width_of(text: str) -> int:
    """Bytes per character of `text` in memory."""
    flags: int = ctypes.c_uint32.from_address(id(text) + FLAGS).value
    return flags >> 2 & 7


def _is_as_expected(text: str, width: int) -> bool:
    begin = ASCII_BEGIN if text.isascii() else OTHER_BEGIN
    encoding = {1: "latin-1", 2: "utf-16-le", 4: "utf-32-le"}[width]
    return width_of(text) == width and ctypes.string_at(id(text) + begin, width * len(text)) == text.encode(encoding)


KNOWN = lists.KNOWN and all(
    _is_as_expected("".join(["ab", last, "c"]), width)
    for last, width in (("d", 1), ("\xe9", 1), ("\u0100", 2), ("\U00010000", 4))
)


@kernel
def write_utf8(address: int, length: int, like: Any, out: NDArray[np.uint8]) -> np.int64:
    """Write the `length` characters at `address`, each of the type of `like`, to `out` as UTF-8; their number of bytes.

    -1 if one of them is a surrogate, which UTF-8 has no form for.

    Args:
        out: room for `max_bytes` and 16 more.
    """
    begin, end = Word(address), Word(length)
    i = size = NONE
    while i < end:
        while i + Word(16) <= end:
            others = narrow_16(begin, i, like, out, size)
            if others != NONE:
                i += Word(lowest_bit(others))
                size += Word(lowest_bit(others))
                break
            i += Word(16)
            size += Word(16)
        run = NONE  # ASCII characters since the last other one
        while i < end and (run < Word(4) or end - i < Word(16)):
            code = np.uint32(character_at(begin, i, like))
            i += ONE
            if code < 0x80:
                out[size] = code
                size += ONE
                run += ONE
                continue
            run = NONE
            if code < 0x800:
                out[size] = 0xC0 | code >> 6
                out[size + ONE] = 0x80 | code & 0x3F
                size += Word(2)
            elif code < 0x10000:
                if 0xD800 <= code < 0xE000:
                    return np.int64(-1)
                out[size] = 0xE0 | code >> 12
                out[size + ONE] = 0x80 | code >> 6 & 0x3F
                out[size + Word(2)] = 0x80 | code & 0x3F
                size += Word(3)
            else:
                out[size] = 0xF0 | code >> 18
                out[size + ONE] = 0x80 | code >> 12 & 0x3F
                out[size + Word(2)] = 0x80 | code >> 6 & 0x3F
                out[size + Word(3)] = 0x80 | code & 0x3F
                size += Word(4)
    return np.int64(size)


KINDS = {1: Byte(0), 2: np.uint16(0), 4: np.uint32(0)}


def max_bytes(text: str) -> int:
    """Bytes that `text` may need in UTF-8."""
    return len(text) * (1 if text.isascii() else min(width_of(text) + 1, 4))


def to_utf8(text: str, out: NDArray[np.uint8]) -> int:
    """Write `text` to `out` as UTF-8; its number of bytes, or -1 if it has lone surrogates.

    Args:
        out: room for `max_bytes` of it and 16 more.
    """
    begin = ASCII_BEGIN if text.isascii() else OTHER_BEGIN
    size: int = write_utf8(id(text) + begin, len(text), KINDS[width_of(text)], out)
    return size
