"""From text to pre-tokens: the pattern, the classes of characters in it, and special tokens, which come first."""

import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import regex
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizer.kernels.scan import SpecialTokens

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pre-token pattern of GPT-2, as CS336 A1 section 2.4 gives it."""


@functools.cache
def unicode_classes() -> NDArray[np.uint8]:
    """Class of each code point in `PATTERN`: 1 letter, 2 number, 3 white space, 0 any other; shape (0x110000,).

    `regex` decides, so the classes follow the Unicode version of the installed `regex`.
    """
    every_character = "".join(map(chr, range(0x110000)))
    classes = np.zeros(0x110000, np.uint8)
    for value, pattern in enumerate((r"\p{L}+", r"\p{N}+", r"\s+"), start=1):
        for run in regex.finditer(pattern, every_character):
            classes[run.start() : run.end()] = value
    classes.flags.writeable = False
    return classes


def unicode_version() -> dict[str, str]:
    """What decided the classes of characters: the version of `regex`, and 16 hex digits of a hash of the classes.

    Two tokenizers whose `classes` differ may cut the same text differently.
    """
    return {"regex": regex.__version__, "classes": hashlib.sha256(unicode_classes().tobytes()).hexdigest()[:16]}


def check_special_tokens(special_tokens: Sequence[str]) -> None:
    """Raise ValueError for a special token that is empty or listed twice."""
    if isinstance(special_tokens, str):
        raise ValueError(f"special_tokens={special_tokens!r} must be a list of strings, not one string")
    for i, token in enumerate(special_tokens):
        if not token:
            raise ValueError(f"special_tokens[{i}] is empty: a special token needs at least one character")
        if token in special_tokens[:i]:
            raise ValueError(f"special_tokens lists {token!r} twice")


def special_token_pattern(special_tokens: Sequence[str]) -> re.Pattern[str] | None:
    """A pattern that matches any special token, the longest where several begin; None without special tokens."""
    if not special_tokens:
        return None
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in longest_first))


def split_special_tokens(text: str, special_tokens: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """The pieces of `text` in order, each with whether it is a special token; empty pieces are left out.

    >>> list(split_special_tokens("a<|x|>b<|x|><|x|>", ["<|x|>", "<|x|><|x|>"]))
    [('a', False), ('<|x|>', True), ('b', False), ('<|x|><|x|>', True)]
    """
    pattern = special_token_pattern(special_tokens)
    position = 0
    for match in pattern.finditer(text) if pattern else ():
        if match.start() > position:
            yield text[position : match.start()], False
        yield match.group(), True
        position = match.end()
    if position < len(text):
        yield text[position:], False


def special_token_arrays(special_tokens: Sequence[str]) -> "SpecialTokens":
    """`special_tokens` as the kernels take them."""
    from tokenizer.kernels.scan import SpecialTokens

    encoded = [token.encode() for token in special_tokens]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]), reverse=True)
    lengths = [len(encoded[i]) for i in order]
    openings = sorted({(token + b"\0")[:2] for token in encoded})
    return SpecialTokens(
        text=np.frombuffer(b"".join(encoded[i] for i in order), np.uint8),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        numbers=np.array(order, np.int64),
        openings=np.frombuffer(b"".join(openings), np.uint8).reshape(-1, 2),
        has_single_byte=1 in lengths,
    )


def pretokens(text: str) -> Iterator[str]:
    """The pre-tokens of a text without special tokens.

    >>> list(pretokens("some text that i'll  split"))
    ['some', ' text', ' that', ' i', "'ll", ' ', ' split']
    """
    return (match.group() for match in regex.finditer(PATTERN, text))
