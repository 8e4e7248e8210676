"""How often each pre-token stands in a text: an open-addressing hash table that keeps short keys in its slots.

The slots hold keys, see `tokenizer.kernels.keys`; the bytes of long pre-tokens lie in an arena.

The table is larger than the caches, so most of the time would go into waiting for memory. Therefore 64 pre-tokens at a
time are hashed and their slots asked for; when the first of them is looked up, its slot has arrived.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenizer.kernels import PADDING
from tokenizer.kernels.keys import LONG, hash_key, length_of_key, write_key
from tokenizer.kernels.machine import NONE, ONE, copy_16_bytes, kernel, prefetch
from tokenizer.kernels.scan import SpecialTokens, character_start, find_special_token, scan

Word = np.uint64

SLOT = Word(4)  # words in a slot: key, key, count, where a long pre-token lies in the arena
BATCH = 64
DONE, TABLE_FULL, PIECE_TOO_SHORT = 0, 1, 2
PIECE = 1 << 15  # bytes that are scanned before they are counted: their starts stay in the first-level cache


class Table(NamedTuple):
    """Pre-tokens and their counts; see `tokenizer.pretokenize` for how it is made and grown."""

    slots: NDArray[np.uint64]  # 2**n slots of 4 words; a slot is empty if its second word is 0
    arena: NDArray[np.uint8]  # the bytes of long pre-tokens, one after the other
    used: NDArray[np.int64]  # (2,) slots and arena bytes in use
    shift: Word  # 64 - n: the top n bits of a hash say which slot
    hash_mask: Word  # all ones; a test sets few, so that hashes collide


class Scratch(NamedTuple):
    """Room for intermediate results: kernels do not allocate."""

    starts: NDArray[np.uint32]  # PIECE + PADDING, more where a pre-token is longer
    keys: NDArray[np.uint64]  # (2 * BATCH,)
    homes: NDArray[np.uint64]  # (BATCH,)


@kernel
def same_bytes(a: NDArray[np.uint8], a_start: int, b: NDArray[np.uint8], b_start: int, length: int) -> bool:
    """Whether two runs of bytes are equal."""
    for i in range(length):  # noqa: SIM110
        if a[a_start + i] != b[b_start + i]:
            return False
    return True


@kernel
def copy_bytes(target: NDArray[np.uint8], to: int, source: NDArray[np.uint8], start: int, length: int) -> None:
    """target[to : to + length] = source[start : start + length]."""
    for i in range(length):
        target[to + i] = source[start + i]


@kernel
def add(
    slots: NDArray[np.uint64],
    arena: NDArray[np.uint8],
    used: NDArray[np.int64],
    home: Word,
    low: Word,
    high: Word,
    count: Word,
    text: NDArray[np.uint8],
    start: int,
) -> None:
    """Add `count` to the pre-token (low, high), whose bytes stand in `text` at `start` if it is long.

    Looks from slot `home` on for the pre-token or an empty slot: linear probing. There must be room for one more.
    """
    wrap = Word(len(slots) - 1)
    slot = home * SLOT
    while slots[slot + ONE] != NONE:
        if slots[slot] == low and slots[slot + ONE] == high:
            length = np.int64(high)
            if high >= LONG or same_bytes(arena, np.int64(slots[slot + Word(3)]), text, start, length):
                slots[slot + Word(2)] += count
                return
        slot = (slot + SLOT) & wrap
    if high < LONG:
        length = np.int64(high)
        copy_bytes(arena, used[1], text, start, length)
        slots[slot + Word(3)] = Word(used[1])
        used[1] += length
    slots[slot], slots[slot + ONE], slots[slot + Word(2)] = low, high, count
    used[0] += 1


@kernel
def has_room(table: Table, pretokens: int, arena_bytes: int) -> bool:
    """Whether the table stays at most half full and its arena suffices, if all of `pretokens` are new."""
    slots_suffice = 2 * (table.used[0] + pretokens) <= len(table.slots) // 4
    return slots_suffice and table.used[1] + arena_bytes <= len(table.arena)


@kernel
def count_starts(text: NDArray[np.uint8], starts: NDArray[np.uint32], num: int, table: Table, scratch: Scratch) -> None:
    """Count the `num` pre-tokens that begin at `starts`; each ends where the next begins."""
    keys, homes = scratch.keys, scratch.homes
    slots, arena, used, shift, hash_mask = table
    # Indices are unsigned because Numba asks of each signed one whether it is negative.
    for first in range(NONE, Word(num), Word(BATCH)):
        size = min(Word(BATCH), Word(num) - first)
        for i in range(size):
            start = Word(starts[first + i])
            write_key(keys, i, text, start, Word(starts[first + i + ONE]) - start, hash_mask)
            homes[i] = (hash_key(keys[i + i], keys[i + i + ONE]) & hash_mask) >> shift
            prefetch(slots, np.int64(homes[i]) * 32)
        for i in range(size):
            slot, low, high = homes[i] * SLOT, keys[i + i], keys[i + i + ONE]
            if slots[slot] == low and slots[slot + ONE] == high and high >= LONG:  # 99 of 100
                slots[slot + Word(2)] += ONE
            else:
                add(slots, arena, used, homes[i], low, high, ONE, text, np.int64(starts[first + i]))


@kernel
def count_text(
    text: NDArray[np.uint8],
    begin: int,
    end: int,
    classes: NDArray[np.uint8],
    specials: SpecialTokens,
    table: Table,
    scratch: Scratch,
) -> tuple[int, int]:
    """Count the pre-tokens of text[begin:end] between special tokens.

    Returns:
        (end, DONE), or the offset from which to go on after the `table` or `scratch.starts` has been given more room.

    Args:
        text: bytes, of which PADDING after `end` must be readable, at most 4 GiB.
    """
    starts = scratch.starts
    piece = len(starts) - PADDING
    special, row = find_special_token(text, begin, end, specials)
    position = begin
    while position < end:
        if position == special:
            position += specials.offsets[row + 1] - specials.offsets[row]
            special, row = find_special_token(text, position, end, specials)
            continue
        stop = special
        if position + piece < special:
            stop = character_start(text, position + piece, special)
        num = scan(text, position, stop, classes, starts, 0)
        if stop < special:
            # What follows may lengthen the last pre-token and, in a contraction, change where the last begins.
            num -= 2
            if num <= 0:
                return position, PIECE_TOO_SHORT
            stop = np.int64(starts[num])
        else:
            starts[num] = stop
        if not has_room(table, num, stop - position):
            return position, TABLE_FULL
        count_starts(text, starts, num, table, scratch)
        position = stop
    return end, DONE


@kernel
def add_table(table: Table, other: Table) -> None:
    """Add the counts of `other`, for which `table` must have room."""
    ahead = Word(16) * SLOT
    slots, num_words = other.slots, Word(len(other.slots))
    for i in range(NONE, num_words, SLOT):
        j = i + ahead
        if j < num_words and slots[j + ONE] != NONE:
            home = (hash_key(slots[j], slots[j + ONE]) & table.hash_mask) >> table.shift
            prefetch(table.slots, np.int64(home) * 32)
        low, high, count = slots[i], slots[i + ONE], slots[i + Word(2)]
        if high != NONE:
            home = (hash_key(low, high) & table.hash_mask) >> table.shift
            place = np.int64(slots[i + Word(3)])
            add(table.slots, table.arena, table.used, home, low, high, count, other.arena, place)


@kernel
def write_table(table: Table, text: NDArray[np.uint8], offsets: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
    """Write the pre-tokens one after the other into `text`, where each begins into `offsets`, and their counts."""
    slots = table.slots
    row, position = 0, np.int64(0)
    for i in range(0, len(slots), 4):
        low, high = slots[i], slots[i + 1]
        if high == NONE:
            continue
        length = np.int64(length_of_key(low, high))
        if high >= LONG and position + 16 <= len(text):  # what is copied beyond its end is overwritten by the next
            copy_16_bytes(text, position, slots, i * 8)
        elif high >= LONG:
            for k in range(length):
                text[position + k] = np.uint8(((low if k < 8 else high) >> Word(8 * (k % 8))) & Word(0xFF))
        else:
            copy_bytes(text, position, table.arena, np.int64(slots[i + 3]), length)
        offsets[row], counts[row] = position, np.int64(slots[i + 2])
        position += length
        row += 1
    offsets[row] = position


@kernel
def bytes_in_table(table: Table) -> np.int64:
    """Number of bytes of all pre-tokens in the table together."""
    total = np.int64(0)
    for i in range(0, len(table.slots), 4):
        if table.slots[i + 1] != NONE:
            total += np.int64(length_of_key(table.slots[i], table.slots[i + 1]))
    return total
