"""Text to token ids: scan, look each pre-token up in a cache, and merge only what the cache does not have.

Most pre-tokens of a text have occurred before, so encoding is mainly a hash table of pre-token → ids. A slot is four
words: the key, up to three ids, and how many ids there are. What does not fit inline, more ids and the bytes of long
keys, lies in a second array, `spill`. Slots are looked up in batches: the whole batch is asked of memory before the
first answer is needed.

`merge_short` and `merge_long` are `tokenizer.reference.encode` for one pre-token: the merge of lowest rank first, the
leftmost of equals. The first looks through all pairs for each merge; the second keeps the positions of each rank in a
list, so that a pre-token of n bytes takes about as long as n short ones.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenizer.kernels.keys import INLINE_BYTES, LONG, MIX1, hash_key, write_key
from tokenizer.kernels.machine import (
    ALL,
    NONE,
    ONE,
    claim,
    copy_16_bytes,
    inline_kernel,
    kernel,
    load_acquire,
    lowest_bit,
    prefetch,
    store_release,
    take,
    unpacker,
)
from tokenizer.kernels.scan import SpecialTokens, find_special_token, scan

Word = np.uint64
LOW_HALF = Word(0xFFFFFFFF)
HALF = Word(32)
NO_MERGE = np.uint32(0xFFFFFFFF)  # greater than any rank
RANK_BITS = Word(22)  # of a word in `Rules.pairs`; the other 42 are for two ids, below `tokenizer.bpe.MAX_IDS`
RANK_MASK = (ONE << RANK_BITS) - ONE
ID_BITS = Word(21)

SLOT = 4  # words per slot
BUCKET = 8  # words of `Rules.pairs` compared together: a line of the processor's cache
BATCH = 64  # pre-tokens looked up together
INLINE_IDS = 3
MAX_CACHED_BYTES = 256
MAX_QUADRATIC_BYTES = 64
PIECE = 1 << 15  # bytes scanned together: their starts stay in the fastest cache


class Rules(NamedTuple):
    """The merges of a vocabulary."""

    pairs: NDArray[np.uint64]  # hash table of a power of two words: left id, right id, rank + 1; 0 where free
    products: NDArray[np.uint32]  # id that the merge of each rank makes
    first_product: int  # of rank 0, if that of each rank follows from it by counting; else -1
    byte_ids: NDArray[np.uint32]  # id of each byte
    byte_pairs: NDArray[np.uint32]  # rank of the merge of each two bytes, first << 8 | second


class Cache(NamedTuple):
    """Pre-tokens and their ids, of all threads together.

    Nobody locks it. A slot is written by the thread that was first to claim its last word, and its high key last, so
    that one who finds that finds the rest as well; who comes second does without the slot.
    """

    slots: NDArray[np.uint64]  # SLOT words each: low key, high key (0 = free), ids 0 and 1, id 2 and the number of ids
    spill: NDArray[np.uint32]
    used: NDArray[np.int64]  # slots in use, entries of `spill` in use
    shift: int  # of a hash to the right: its top bits say which word of `slots` is looked at first


class Work(NamedTuple):
    """Scratch space; the arrays from `ids` on have room for the longest pre-token."""

    keys: NDArray[np.uint64]  # of BATCH pre-tokens, two words each, and where the search for each begins
    homes: NDArray[np.uint64]
    needed: NDArray[np.int64]  # longest pre-token met, in bytes
    ids: NDArray[np.uint32]
    ranks: NDArray[np.uint32]
    after: NDArray[np.int32]
    before: NDArray[np.int32]
    later: NDArray[np.int32]  # of each position, the next and the previous one in the list of its rank
    earlier: NDArray[np.int32]
    heap: NDArray[np.uint64]
    first: NDArray[np.int32]  # of each rank, the ends of its list of positions, and a bit whether it has any;
    last: NDArray[np.int32]  # between two pre-tokens all lists are empty: -1, -1, 0
    waiting: NDArray[np.uint64]


class Tables(NamedTuple):
    """All that encoding needs besides the text, and a place for the ids."""

    classes: NDArray[np.uint8]  # of each code point
    specials: SpecialTokens
    special_ids: NDArray[np.uint32]  # of each special token, in the order that `specials.numbers` refers to
    rules: Rules
    cache: Cache
    work: Work


unpack = unpacker(Tables)


@inline_kernel
def home_of_pair(key: Word, pairs: NDArray[np.uint64]) -> Word:
    """Where in `pairs` the bucket begins in which the search for two ids does."""
    return ((key * MIX1) >> HALF) & Word(len(pairs) - BUCKET)


@kernel
def fill_rules(lefts: NDArray[np.uint32], rights: NDArray[np.uint32], rules: Rules) -> None:
    """Fill the empty `pairs` and the `byte_pairs` of `rules`; of a repeated merge the first counts.

    Args:
        lefts: left id of the merge of each rank.
        rights: right id of it.
    """
    pairs = rules.pairs
    for rank in range(len(lefts)):
        key = (Word(lefts[rank]) << ID_BITS) | Word(rights[rank])
        i = home_of_pair(key, pairs)
        while pairs[i] != NONE and pairs[i] >> RANK_BITS != key:
            i = (i + ONE) & Word(len(pairs) - 1)
        if pairs[i] == NONE:
            pairs[i] = (key << RANK_BITS) | Word(rank + 1)
    for first in range(256):
        for second in range(256):
            rank_of_pair = find_merge(rules.byte_ids[first], rules.byte_ids[second], pairs)
            rules.byte_pairs[first << 8 | second] = rank_of_pair


@inline_kernel
def find_merge(left: np.uint32, right: np.uint32, pairs: NDArray[np.uint64]) -> np.uint32:
    """Rank of the merge of two ids, NO_MERGE if there is none."""
    key = (Word(left) << ID_BITS) | Word(right)
    i = home_of_pair(key, pairs)
    while True:
        # No branch tells the eight apart: the processor could not predict it.
        found = NONE
        for j in range(BUCKET):
            word = pairs[i + Word(j)]
            found |= word if word >> RANK_BITS == key else NONE
        if found != NONE or pairs[i + Word(BUCKET - 1)] == NONE:
            return np.uint32((found & RANK_MASK) - ONE)
        i = (i + Word(BUCKET)) & Word(len(pairs) - BUCKET)


@inline_kernel
def product_of(rank: int, rules: Rules) -> np.uint32:
    """Id that the merge of `rank` makes."""
    if rules.first_product >= 0:
        return np.uint32(rules.first_product + rank)  # saves waiting for memory
    return rules.products[rank]


@inline_kernel
def merge_short(ids: NDArray[np.uint32], count: int, ranks: NDArray[np.uint32], rules: Rules) -> Any:
    """Merge `ids[:count]` in place; the new count. Quadratic: for short pre-tokens, where it is the fastest.

    Args:
        ranks: of the merge of each id with the next.
    """
    pairs, size = rules.pairs, Word(count)
    while size > ONE:
        best, lowest = NONE, ranks[0]
        for i in range(ONE, size - ONE):
            best = Word(i) if ranks[i] < lowest else best
            lowest = min(lowest, ranks[i])
        if lowest == NO_MERGE:
            break
        ids[best] = product_of(lowest, rules)
        size -= ONE
        for i in range(best + ONE, size):
            ids[i] = ids[i + ONE]
            ranks[i - ONE] = ranks[i]
        if best > NONE:
            ranks[best - ONE] = find_merge(ids[best - ONE], ids[best], pairs)
        if best + ONE < size:
            ranks[best] = find_merge(ids[best], ids[best + ONE], pairs)
    return np.int64(size)


@kernel
def sift_down(heap: NDArray[np.uint64], size: int, hole: int, value: Word) -> None:
    """Put `value` at or below `hole` of a binary min-heap."""
    while 2 * hole + 1 < size:
        child = 2 * hole + 1
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= value:
            break
        heap[hole] = heap[child]
        hole = child
    heap[hole] = value


@inline_kernel
def enter(position: int, rank: int, work: Work) -> None:
    """Append `position` to the list of `rank`."""
    end = np.int64(work.last[rank])
    work.earlier[position], work.later[position] = end, -1
    if end < 0:
        work.first[rank] = position
        work.waiting[rank >> 6] |= ONE << Word(rank & 63)
    else:
        work.later[end] = position
    work.last[rank] = position


@inline_kernel
def leave(position: int, rank: int, work: Work) -> None:
    """Take `position` out of the list of `rank`."""
    before, after = np.int64(work.earlier[position]), np.int64(work.later[position])
    if before < 0:
        work.first[rank] = after
    else:
        work.later[before] = after
    if after < 0:
        work.last[rank] = before
    else:
        work.earlier[after] = before
    if before < 0 and after < 0:
        work.waiting[rank >> 6] &= ~(ONE << Word(rank & 63))


@kernel
def sort_positions(rank: int, work: Work) -> None:
    """Put the list of `rank` in ascending order: mostly it is, as each sweep over the text appends in order."""
    position = np.int64(work.first[rank])
    while work.later[position] > position:
        position = np.int64(work.later[position])
    if work.later[position] < 0:
        return
    size = 0
    position = np.int64(work.first[rank])
    while position >= 0:
        work.heap[size] = Word(position)
        size += 1
        position = np.int64(work.later[position])
    for i in range(size // 2 - 1, -1, -1):
        sift_down(work.heap, size, i, work.heap[i])
    work.first[rank] = work.last[rank] = -1
    while size > 0:
        size -= 1
        enter(np.int64(work.heap[0]), rank, work)
        sift_down(work.heap, size, 0, work.heap[size])


@inline_kernel
def update_rank(position: int, right: int, ids: NDArray[np.uint32], work: Work, rules: Rules) -> np.int64:
    """Find the rank of the merge of `position` with `right` anew and move it to the list of that; the rank."""
    if work.ranks[position] != NO_MERGE:
        leave(position, np.int64(work.ranks[position]), work)
    rank = find_merge(ids[position], ids[right], rules.pairs)
    work.ranks[position] = rank
    if rank != NO_MERGE:
        enter(position, np.int64(rank), work)
    return np.int64(rank)


@kernel
def merge_long(ids: NDArray[np.uint32], count: int, work: Work, rules: Rules) -> int:
    """Merge `ids[:count]` in place; the new count.

    Tokens form a linked list in place; a merge leaves its left position and removes its right one. Each position is in
    the list of the rank of its merge, if it has one. The lowest rank that has positions is worked off from the left,
    which seldom makes a lower one: a token is merged further by a rank that was learned after its own.
    `work.ranks` is as for `merge_short`.
    """
    ranks, after, before, waiting = work.ranks, work.after, work.before, work.waiting
    for i in range(count):
        after[i] = i + 1
        before[i] = i - 1
        if ranks[i] != NO_MERGE:
            enter(i, np.int64(ranks[i]), work)

    word = 0
    while word < len(waiting):
        if waiting[word] == NONE:
            word += 1
            continue
        rank = 64 * word + lowest_bit(waiting[word])
        sort_positions(rank, work)
        lowest = rank
        while lowest == rank and work.first[rank] >= 0:
            left = np.int64(work.first[rank])
            right = np.int64(after[left])
            beyond = np.int64(after[right])
            for position in (left, right):
                if ranks[position] != NO_MERGE:
                    leave(position, np.int64(ranks[position]), work)
                    ranks[position] = NO_MERGE
            ids[left] = product_of(rank, rules)
            after[left] = beyond
            if beyond < count:
                before[beyond] = left
                lowest = min(lowest, update_rank(left, beyond, ids, work, rules))
            if left > 0:
                lowest = min(lowest, update_rank(np.int64(before[left]), left, ids, work, rules))
        word = lowest >> 6

    kept = 0
    position = np.int64(0)
    while position < count:
        ids[kept] = ids[position]
        kept += 1
        position = np.int64(after[position])
    return kept


@kernel
def rebuild(old: NDArray[np.uint64], new: NDArray[np.uint64], shift: int) -> None:
    """Copy all slots of `old`, which other threads may go on to fill, into the larger and empty `new`."""
    for i in range(0, len(old), SLOT):
        high = load_acquire(old, Word(i + 1))
        if high == NONE:
            continue
        slot = (hash_key(old[i], high) >> Word(shift)) & Word(len(new) - SLOT)
        while new[slot + ONE] != NONE:
            slot = (slot + Word(SLOT)) & Word(len(new) - SLOT)
        for word in range(SLOT):
            new[slot + Word(word)] = old[i + word]


@kernel
def same_bytes(text: NDArray[np.uint8], begin: Word, length: Word, spill: NDArray[np.uint32], position: Word) -> bool:
    """Whether text[begin : begin + length] is the long key stored at spill[position:]."""
    for i in range(length):
        if text[begin + i] != (spill[position + (i >> Word(2))] >> np.uint32(Word(8) * (i & Word(3)))) & 255:
            return False
    return True


@inline_kernel
def merge_pretoken(text: NDArray[np.uint8], begin: int, length: int, rules: Rules, work: Work) -> int:
    """Write the ids of the pre-token text[begin : begin + length] to `work.ids`; their number."""
    ids, ranks = work.ids, work.ranks
    place, last = Word(begin), Word(length - 1)
    for i in range(last):
        first, second = Word(text[place + i]), Word(text[place + i + ONE])
        ids[i] = rules.byte_ids[first]
        ranks[i] = rules.byte_pairs[first << Word(8) | second]
    ids[last] = rules.byte_ids[Word(text[place + last])]
    ranks[last] = NO_MERGE
    if length <= MAX_QUADRATIC_BYTES:
        return merge_short(ids, length, ranks, rules)
    return merge_long(ids, length, work, rules)


@inline_kernel
def store(
    text: NDArray[np.uint8],
    begin: int,
    length: int,
    ids: NDArray[np.uint32],
    count: int,
    low: Word,
    high: Word,
    slot: Word,
    cache: Cache,
) -> None:
    """Fill the free `slot` with a key and its ids, unless another thread does or the cache is three quarters full."""
    long_words = (length + 3) // 4 if length > INLINE_BYTES else 0
    spilled = count if count > INLINE_IDS or long_words > 0 else 0
    if 4 * SLOT * cache.used[0] > 3 * len(cache.slots):
        return
    position = take(cache.used, ONE, spilled + long_words) if spilled > 0 else 0
    if position + spilled + long_words > len(cache.spill) or not claim(cache.slots, slot + Word(3), ONE):
        return
    cache.slots[slot] = low
    if spilled > 0:
        for i in range(count):
            cache.spill[position + i] = ids[i]
        for i in range(long_words):
            word = np.uint32(0)
            for j in range(4 * i, min(4 * i + 4, length)):
                word |= np.uint32(text[begin + j]) << np.uint32(8 * (j - 4 * i))
            cache.spill[position + count + i] = word
        cache.slots[slot + Word(2)] = Word(position)
        cache.slots[slot + Word(3)] = Word(count + INLINE_IDS) << HALF
    else:
        second = Word(ids[1]) if count > 1 else NONE
        third = Word(ids[2]) if count > 2 else NONE
        cache.slots[slot + Word(2)] = Word(ids[0]) | (second << HALF)
        cache.slots[slot + Word(3)] = third | (Word(count) << HALF)
    store_release(cache.slots, slot + ONE, high)
    take(cache.used, NONE, 1)


@kernel
def learn(
    text: NDArray[np.uint8],
    begin: int,
    length: int,
    low: Word,
    high: Word,
    slot: Word,
    tables: NDArray[np.uint64],
) -> Word:
    """Write the ids of a new pre-token to `work.ids` and to the cache, unless it is too long for that; their number.

    Not part of its caller, so that the loop there has the processor's registers for itself.
    """
    rules, cache, work = unpack(tables)[3:]
    number = merge_pretoken(text, begin, length, rules, work)
    if length <= MAX_CACHED_BYTES:
        store(text, begin, length, work.ids, number, low, high, slot, cache)
    return Word(number)


@kernel
def find_homes(
    text: NDArray[np.uint8],
    starts: NDArray[np.uint32],
    first: Word,
    size: Word,
    cache: Cache,
    keys: NDArray[np.uint64],
    homes: NDArray[np.uint64],
) -> None:
    """Write the keys of `size` pre-tokens from number `first` on, and where the search for each begins; ask for it."""
    slots, shift, wrap = cache.slots, Word(cache.shift), Word(len(cache.slots) - SLOT)
    for i in range(size):
        begin = Word(starts[first + i])
        length = Word(starts[first + i + ONE]) - begin
        write_key(keys, i, text, begin, length, ALL)
        homes[i] = (hash_key(keys[i + i], keys[i + i + ONE]) >> shift) & wrap
        prefetch(slots, np.int64(homes[i]) * 8)


@kernel
def encode_pretokens(
    text: NDArray[np.uint8],
    starts: NDArray[np.uint32],
    num_pretokens: int,
    tables: NDArray[np.uint64],
    out: NDArray[np.uint32],
    count: Word,
) -> Word:
    """Append the ids of pre-tokens text[starts[i] : starts[i + 1]] to `out[count:]`; the new count."""
    cache, work = unpack(tables)[4:]
    slots, spill = cache.slots, cache.spill
    wrap = Word(len(slots) - SLOT)
    keys, homes = work.keys, work.homes
    # Indices are unsigned because Numba asks of each signed one whether it is negative.
    for first in range(Word(0), Word(num_pretokens), Word(BATCH)):
        size = min(Word(BATCH), Word(num_pretokens) - first)
        find_homes(text, starts, first, size, cache, keys, homes)
        for i in range(size):
            low, high, slot = keys[i + i], keys[i + i + ONE], homes[i]
            while True:
                there = load_acquire(slots, slot + ONE)
                if there == high and slots[slot] == low:
                    ids, last = slots[slot + Word(2)], slots[slot + Word(3)]
                    number = last >> HALF
                    if number <= Word(INLINE_IDS):
                        out[count] = ids & LOW_HALF
                        out[count + ONE] = ids >> HALF
                        out[count + Word(2)] = last & LOW_HALF
                        count += number
                        break
                    number -= Word(INLINE_IDS)
                    begin, length = Word(starts[first + i]), high
                    if high >= LONG or same_bytes(text, begin, length, spill, ids + number):
                        for j in range(number):
                            out[count + j] = spill[ids + j]
                        count += number
                        break
                elif there == NONE:
                    begin = Word(starts[first + i])
                    length = Word(starts[first + i + ONE]) - begin
                    number = learn(text, np.int64(begin), np.int64(length), low, high, slot, tables)
                    for j in range(number):
                        out[count + j] = work.ids[j]
                    count += number
                    break
                slot = (slot + Word(SLOT)) & wrap
    return count


@kernel
def is_cut(text: NDArray[np.uint8], position: int) -> bool:
    """Whether a pre-token surely begins at `position`: a blank or line feed after a visible ASCII character."""
    return (text[position] == 32 or text[position] == 10) and 32 < text[position - 1] < 127


@kernel
def piece_end(text: NDArray[np.uint8], begin: int, end: int) -> int:
    """Where to cut text[begin:end] so that about PIECE bytes are scanned together; `end` if no place is near."""
    if end - begin <= PIECE:
        return end
    for position in range(begin + PIECE, begin, -1):
        if is_cut(text, position):
            return position
    for position in range(begin + PIECE, end):
        if is_cut(text, position):
            return position
    return end


@kernel
def longest(starts: NDArray[np.uint32], num_pretokens: int) -> np.int64:
    """Length of the longest pre-token."""
    length = np.int64(0)
    for i in range(num_pretokens):
        length = max(length, np.int64(starts[i + 1]) - np.int64(starts[i]))
    return length


@kernel
def encode_text(
    text: NDArray[np.uint8],
    begin: int,
    end: int,
    tables: NDArray[np.uint64],
    starts: NDArray[np.uint32],
    out: NDArray[np.uint32],
) -> tuple[int, np.int64]:
    """Write the ids of text[begin:end] to `out`; where it stopped, and the number of ids.

    It stops before `end` when the cache is half full, or when a pre-token is longer than `work` has room for (then
    `work.needed` says how long): the caller makes room and calls again from there.

    Args:
        text: UTF-8, after which PADDING bytes must be readable.
        tables: `words_of` the `Tables`.
        starts: scratch, room for end - begin + PADDING entries (few of them touched, unless the text has no blanks).
        out: of any integer type that holds the ids; room for end - begin + 3 of them.
    """
    classes, specials, special_ids, _, cache, work = unpack(tables)
    count = NONE
    while begin < end:
        stop, row = end, np.int64(-1)
        if len(specials.numbers) > 0:
            stop, row = find_special_token(text, begin, end, specials)
        while begin < stop:
            if 2 * SLOT * cache.used[0] > len(cache.slots) or 4 * cache.used[1] > 3 * len(cache.spill):
                return begin, np.int64(count)
            piece = piece_end(text, begin, stop)
            number = scan(text, begin, piece, classes, starts, 0)
            starts[number] = piece
            if piece - begin > len(work.ids):
                work.needed[0] = longest(starts, number)
                if work.needed[0] > len(work.ids):
                    return begin, np.int64(count)
            count = encode_pretokens(text, starts, number, tables, out, count)
            begin = piece
        if row >= 0:
            out[count] = special_ids[specials.numbers[row]]
            count += ONE
            begin = stop + specials.offsets[row + 1] - specials.offsets[row]
    return begin, np.int64(count)


@inline_kernel
def decode_id(
    token_id: Word,
    token_bytes: NDArray[np.uint8],
    token_ends: NDArray[np.uint32],
    out: NDArray[np.uint8],
    size: Word,
) -> Word:
    """Write the bytes of a token to `out[size:]` if they fit; the new size."""
    begin, end = Word(token_ends[token_id]), Word(token_ends[token_id + ONE])
    larger = size + end - begin
    if larger + Word(15) <= Word(len(out)):
        while begin < end:  # what is copied beyond the token is overwritten by the next
            copy_16_bytes(out, np.int64(size), token_bytes, np.int64(begin))
            begin += Word(16)
            size += Word(16)
    return larger


@kernel
def decode_ids(
    ids: NDArray[np.uint32], token_bytes: NDArray[np.uint8], token_ends: NDArray[np.uint32], out: NDArray[np.uint8]
) -> np.int64:
    """Write the bytes of `ids` to `out` as long as they fit; how many they are, or -1 if one of the ids is none.

    Args:
        token_bytes: of all tokens, and 16 more.
        token_ends: where each token's bytes end, after a leading 0.
        out: what a token needs and 15 bytes after it must be there, or it is not written.
    """
    size = NONE
    for token_id in ids:
        if token_id >= len(token_ends) - 1:
            return np.int64(-1)
        size = decode_id(Word(token_id), token_bytes, token_ends, out, size)
    return np.int64(size)
