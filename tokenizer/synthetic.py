"""Large texts for the benchmark, made from a small real one: as big as OpenWebText or TinyStories, written in seconds.

Words and the punctuation after them are drawn with the frequencies of the real text. A few words are new: two frequent
words glued together, chosen by a power law, so that the number of distinct pre-tokens keeps growing with the length of
the text as it does in real text (Heaps' law). The same arguments give the same bytes, whatever the number of threads.
"""

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenizer.files import END_OF_TEXT
from tokenizer.kernels.machine import kernel
from tokenizer.pretokenize import count_pretokens

BLOCK = 1 << 25  # bytes drawn from one seed
LONGEST = 24  # bytes of a word; longer ones are left out
NUM_PARTS = 4096  # new words are made of this many frequent ones
WORD = re.compile(rb" [A-Za-z0-9\x80-\xff]+")
CLOSING = re.compile(rb"[!-/:-@\[-`{-~]+|'(?:[sdmt]|ll|ve|re)|\n+")  # what follows a word without a blank

# Ranks of new words: P(rank > r) = (1 + r / SCALE) ** -DECAY. With 2.75 % of the words new, 11.9 GB of English get 6.6
# million distinct pre-tokens, as many as OpenWebText's training set is reported to have.
SCALE, DECAY = 1e5, 0.7
SHARE_OF_NEW_WORDS = {"owt-scale": 0.0275, "tinystories-scale": 0.0}
WORDS_PER_DOCUMENT = {"owt-scale": 800, "tinystories-scale": 160}


class Urn(NamedTuple):
    """Byte strings to draw, each with its frequency: Walker's alias method, one random number per draw."""

    text: NDArray[np.uint8]  # (n, LONGEST + 8)
    lengths: NDArray[np.int64]
    threshold: NDArray[np.float64]
    alias: NDArray[np.int64]


def make_urn(counts: dict[bytes, int]) -> Urn:
    """The urn of the strings in `counts`, the most frequent first."""
    strings = sorted(counts, key=lambda string: (-counts[string], string))
    weights = np.array([counts[string] for string in strings], np.float64)
    threshold = weights * len(strings) / weights.sum()
    alias = np.arange(len(strings))
    small = [i for i, value in enumerate(threshold) if value < 1]
    large = [i for i, value in enumerate(threshold) if value >= 1]
    while small and large:
        low, high = small.pop(), large[-1]
        alias[low] = high
        threshold[high] -= 1 - threshold[low]
        if threshold[high] < 1:
            small.append(large.pop())
    threshold[small + large] = 1
    text = np.zeros((len(strings), LONGEST + 8), np.uint8)
    for row, string in zip(text, strings, strict=True):
        row[: len(string)] = np.frombuffer(string, np.uint8)
    return Urn(text, np.array([len(string) for string in strings]), threshold, alias)


@kernel
def uniform(state: NDArray[np.uint64]) -> float:
    """The next number in [0, 1) of the splitmix64 generator in `state`."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.float64((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


@kernel
def draw(urn: Urn, state: NDArray[np.uint64]) -> Any:
    """Row of a string drawn from `urn`."""
    x = uniform(state) * len(urn.lengths)
    row = np.int64(x)
    return row if x - row < urn.threshold[row] else urn.alias[row]


@kernel
def copy(buffer: NDArray[np.uint8], position: int, urn: Urn, row: int, skip: int) -> int:
    """Append a string of `urn` without its first `skip` bytes at `position`; the new position."""
    for i in range(LONGEST):  # a constant number of bytes is one move; what is too much is overwritten
        buffer[position + i] = urn.text[row, skip + i]
    return position + urn.lengths[row] - skip


@kernel
def end_document(buffer: NDArray[np.uint8], position: int, separator: NDArray[np.uint8]) -> int:
    """Append `separator` at `position`; the new position."""
    for i in range(len(separator)):
        buffer[position + i] = separator[i]
    return position + len(separator)


@kernel
def fill(
    buffer: NDArray[np.uint8],
    words: Urn,
    closings: Urn,
    separator: NDArray[np.uint8],
    share_of_closings: float,
    share_of_new: float,
    share_of_ends: float,
    state: NDArray[np.uint64],
) -> int:
    """Fill `buffer` with whole words, and end with `separator`; the number of bytes written."""
    position = 0
    while position + 4 * LONGEST + len(separator) < len(buffer):
        if uniform(state) < share_of_new:
            rank = np.uint64(SCALE * ((1 - uniform(state)) ** (-1 / DECAY) - 1))
            mixed = rank * np.uint64(0x9E3779B1)  # odd: the low bits of different ranks differ
            first, second = (
                np.int64(mixed % np.uint64(NUM_PARTS)),
                np.int64((mixed >> np.uint64(12)) % np.uint64(NUM_PARTS)),
            )
            position = copy(buffer, position, words, first, 0)
            position = copy(buffer, position, words, second, 1)
        else:
            position = copy(buffer, position, words, draw(words, state), 0)
        if uniform(state) < share_of_closings:
            position = copy(buffer, position, closings, draw(closings, state), 0)
        if uniform(state) < share_of_ends:
            position = end_document(buffer, position, separator)
    return end_document(buffer, position, separator)


def write_text(path: Path, kind: str, source: Path, num_bytes: int, num_threads: int) -> None:
    """Write about `num_bytes` of text with the words of `source` to `path`.

    Args:
        path: the file to write.
        kind: "owt-scale" or "tinystories-scale": how often words are new, and how long documents are.
        source: a real text, documents separated by `<|endoftext|>`.
        num_bytes: rounded to whole blocks of 32 MiB; a smaller text is one smaller block.
        num_threads: how many blocks are drawn at the same time.

    Raises:
        ValueError: the source has no words, or the disk no room.
    """
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free - (1 << 30):
        raise ValueError(
            f"{path.parent} has {free / 1e9:.1f} GB free, {num_bytes / 1e9 + 1:.1f} GB are needed: lower --scale_gb"
        )
    counts = count_pretokens(source, [END_OF_TEXT], num_threads=num_threads).to_dict()
    words = {token: count for token, count in counts.items() if len(token) <= LONGEST and WORD.fullmatch(token)}
    closings = {token: count for token, count in counts.items() if len(token) <= LONGEST and CLOSING.fullmatch(token)}
    if not words or not closings:
        raise ValueError(f"{source} has no words or no punctuation to make a text of")
    word_urn, closing_urn = make_urn(words), make_urn(closings)
    if len(words) < NUM_PARTS and SHARE_OF_NEW_WORDS[kind]:
        raise ValueError(f"{source} has {len(words)} distinct words, new ones need {NUM_PARTS}: give a larger --file")
    separator = np.frombuffer(f"\n{END_OF_TEXT}\n".encode(), np.uint8)
    block = min(BLOCK, num_bytes)

    def make(index: int) -> NDArray[np.uint8]:
        buffer = np.empty(block, np.uint8)
        state = np.array([index], np.uint64) * np.uint64(0xD1342543DE82EF95)
        length = fill(
            buffer,
            word_urn,
            closing_urn,
            separator,
            sum(closings.values()) / sum(words.values()),
            SHARE_OF_NEW_WORDS[kind],
            1 / WORDS_PER_DOCUMENT[kind],
            state,
        )
        return buffer[:length]

    num_blocks = max(round(num_bytes / block), 1)
    with open(path, "wb") as file, ThreadPoolExecutor(num_threads) as pool:
        pending = [pool.submit(make, index) for index in range(min(num_threads, num_blocks))]
        for index in range(num_blocks):
            file.write(pending.pop(0).result().data)
            if index + num_threads < num_blocks:
                pending.append(pool.submit(make, index + num_threads))
        file.flush()
        os.fsync(file.fileno())
