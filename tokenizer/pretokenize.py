"""From text to pre-tokens: the pattern, the classes of characters in it, and special tokens, which come first."""

import functools
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import regex
from numpy.typing import NDArray

from tokenizer.chunks import Chunk, ChunkReader, Errors, Paths, default_threads, work_on_chunks
from tokenizer.kernels import PADDING

if TYPE_CHECKING:
    from tokenizer.kernels.count import Table
    from tokenizer.kernels.scan import SpecialTokens

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pre-token pattern of GPT-2, as CS336 A1 section 2.4 gives it."""


@functools.cache
def unicode_classes() -> NDArray[np.uint8]:
    """Class of each code point in `PATTERN`: 1 letter, 2 number, 3 white space, 0 any other; shape (0x110000,).

    `regex` decides, so the classes follow the Unicode version of the installed `regex`.
    """
    every_character = np.arange(0x110000, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
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
        openings=np.frombuffer(b"".join(openings), np.uint8),
        has_single_byte=1 in lengths,
    )


def pretokens(text: str) -> Iterator[str]:
    """The pre-tokens of a text without special tokens.

    >>> list(pretokens("some text that i'll  split"))
    ['some', ' text', ' that', ' i', "'ll", ' ', ' split']
    """
    return (match.group() for match in regex.finditer(PATTERN, text))


class PretokenCounts(NamedTuple):
    """Distinct pre-tokens as arrays: number i is text[offsets[i] : offsets[i + 1]] and stands `counts[i]` times."""

    text: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def from_dict(cls, counts: Mapping[bytes, int]) -> "PretokenCounts":
        """The arrays for pre-tokens and their counts."""
        return cls(
            np.frombuffer(b"".join(counts), np.uint8),
            np.cumsum([0, *map(len, counts)], dtype=np.int64),
            np.fromiter(counts.values(), np.int64, len(counts)),
        )

    def to_dict(self) -> dict[bytes, int]:
        """Count of each pre-token."""
        text, bounds = self.text.tobytes(), self.offsets.tolist()
        pretokens = (text[begin:end] for begin, end in itertools.pairwise(bounds))
        return dict(zip(pretokens, self.counts.tolist(), strict=True))


def count_pretokens(
    input_path: Paths,
    special_tokens: Sequence[str],
    *,
    num_threads: int | None = None,
    errors: Errors = "strict",
    progress: bool = False,
    chunk_bytes: int = 1 << 20,
) -> PretokenCounts:
    """How often each pre-token stands in text files, which may be larger than memory.

    Threads take chunks of text in turn, and each counts in a table of its own; the tables are added up at the end. The
    order of the result depends on threads and chunks, the counts do not. Memory grows with distinct pre-tokens only.

    Args:
        input_path: one file or several; .gz and .xz are decompressed.
        special_tokens: strings that separate pre-tokens and are not counted; the longest match goes first.
        num_threads: by default one per processor that this process may use.
        errors: "strict" refuses bytes that are no UTF-8, "replace" reads U+FFFD instead of them.
        progress: show a bar on stderr even if it is no terminal.
        chunk_bytes: how much text a thread takes at a time.

    Raises:
        ValueError: see `tokenizer.chunks.ChunkReader`.
    """
    check_special_tokens(special_tokens)
    threads = default_threads(num_threads)
    reader = ChunkReader(input_path, special_tokens, errors, chunk_bytes)
    if reader.num_bytes is not None:
        threads = max(1, min(threads, reader.num_bytes // chunk_bytes))
    specials, classes = special_token_arrays(special_tokens), unicode_classes()
    tables = work_on_chunks(
        reader, lambda chunks: count_chunks(chunks, classes, specials), threads, "counting pre-tokens", progress
    )
    return tables_to_arrays(tables)


def new_table(slot_bits: int, arena_bytes: int, hash_mask: int) -> "Table":
    """An empty table of pre-tokens with 2**slot_bits slots, each within one line of the cache."""
    from tokenizer.kernels.count import Table

    words = 4 << slot_bits
    try:
        memory = np.zeros(words + 8, np.uint64)
        arena = np.zeros(arena_bytes, np.uint8)
    except MemoryError:
        needed = (words * 8 + arena_bytes) >> 20
        raise MemoryError(
            f"no {needed} MiB for a table of distinct pre-tokens: use less text or fewer threads"
        ) from None
    first = -memory.ctypes.data % 64 // 8
    slots = memory[first : first + words]
    return Table(slots, arena, np.zeros(2, np.int64), np.uint64(64 - slot_bits), np.uint64(hash_mask))


def grown(table: "Table", slots_needed: int, arena_needed: int) -> "Table":
    """A table with the same counts and room for `slots_needed` more pre-tokens and `arena_needed` more bytes."""
    from tokenizer.kernels.count import add_table

    used_slots, used_arena = table.used.tolist()
    slot_bits = 64 - int(table.shift)
    while 2 * (used_slots + slots_needed) > 1 << slot_bits:
        slot_bits += 1
    arena_bytes = max(len(table.arena), 2 * (used_arena + arena_needed))
    larger = new_table(slot_bits, arena_bytes, int(table.hash_mask))
    add_table(larger, table)
    return larger


def count_chunks(
    chunks: Iterator[Chunk], classes: NDArray[np.uint8], specials: "SpecialTokens", hash_mask: int = (1 << 64) - 1
) -> "Table":
    """The counts of the pre-tokens of all `chunks`: what one thread does."""
    from tokenizer.kernels import count

    table = new_table(17, 1 << 20, hash_mask)
    scratch = count.Scratch(
        np.empty(count.PIECE + PADDING, np.uint32),
        np.empty(2 * count.BATCH, np.uint64),
        np.empty(count.BATCH, np.uint64),
    )
    for chunk in chunks:
        position, state = count.count_text(chunk.text, 0, chunk.length, classes, specials, table, scratch)
        while state != count.DONE:
            if state == count.TABLE_FULL:
                piece = len(scratch.starts)
                table = grown(table, piece, piece)
            else:
                scratch = scratch._replace(starts=np.empty(2 * len(scratch.starts), np.uint32))
            position, state = count.count_text(chunk.text, position, chunk.length, classes, specials, table, scratch)
        scratch = scratch._replace(starts=scratch.starts[: count.PIECE + PADDING])
    return table


def tables_to_arrays(tables: "Sequence[Table]") -> PretokenCounts:
    """The sum of several tables, as arrays."""
    from tokenizer.kernels.count import add_table, bytes_in_table, write_table

    total, *others = sorted(tables, key=lambda table: int(table.used[0]), reverse=True)
    for other in others:
        slots, arena_bytes = (total.used + other.used).tolist()
        if slots > 7 * (len(total.slots) // 4) // 8 or arena_bytes > len(total.arena):  # most are in both
            total = grown(total, *other.used.tolist())
        add_table(total, other)
    num = int(total.used[0])
    result = PretokenCounts(
        np.empty(bytes_in_table(total), np.uint8), np.empty(num + 1, np.int64), np.empty(num, np.int64)
    )
    write_table(total, *result)
    return result
