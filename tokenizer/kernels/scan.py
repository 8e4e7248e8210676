"""Where pre-tokens begin: the course's pattern as arithmetic on bit masks, 64 bytes of text at a time.

    '(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

Give every byte the class of its character: letter, number, white space or other. In a mask, bit i speaks of byte i of
the block, so `mask << 1` speaks of the byte before and `mask >> 1` of the byte after. A pre-token begins

1. where a run of letters, numbers or others begins, unless a blank stands before it (the ` ?` of the pattern);
2. where a run of white space begins;
3. at the last character of a run of white space that is not the end of the text (the lookahead `(?!\\S)` leaves it
   over), be it the blank that joins the next word or a line feed that stands alone;
4. after a contraction, and not after its apostrophe.

ASCII is classified by comparing 64 bytes at once; other characters are decoded one by one and added to the masks.
Whatever reaches from one block into the next is carried along, so that blocks leave no trace in the result.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenizer.kernels.machine import ALL, NONE, ONE, bytes_in_range, inline_kernel, kernel, lowest_bit, ones_of

OTHER, LETTER, NUMBER, SPACE = 0, 1, 2, 3  # the values of `tokenizer.pretokenize.unicode_classes`

Word = np.uint64
Byte = np.uint8
TOP = Word(63)


class Block(NamedTuple):
    """What 64 bytes are, one bit per byte; each byte is a letter, a number, white space, or none of them."""

    letters: Word
    numbers: Word
    spaces: Word
    blanks: Word  # U+0020, also in spaces
    quotes: Word  # U+0027
    spaces1: Word  # first bytes of the white space characters of 1, 2 and 3 bytes
    spaces2: Word
    spaces3: Word


class BeyondAscii(NamedTuple):
    """The part that characters of several bytes have in the masks of a block."""

    letters: Word
    numbers: Word
    spaces: Word
    spaces2: Word
    spaces3: Word


class Overflow(NamedTuple):
    """The bytes of a block's last character that lie in the next block."""

    letters: Word
    numbers: Word
    spaces: Word


@kernel
def decode(text: NDArray[np.uint8], position: int, end: int) -> tuple[Any, Any]:
    """Code point and length in bytes of the UTF-8 character at `position`; (-1, 1) for a byte that begins none.

    Overlong forms, surrogates, code points above U+10FFFF and characters cut by `end` are none (RFC 3629).
    """
    first = np.int64(text[position])
    if first < 0x80:
        return first, 1
    if first < 0xC2 or first > 0xF4:
        return -1, 1
    length = 2 + (first >= 0xE0) + (first >= 0xF0)
    if position + length > end:
        return -1, 1
    code = first & (0x7F >> length)
    for i in range(position + 1, position + length):
        if text[i] & 0xC0 != 0x80:
            return -1, 1
        code = (code << 6) | np.int64(text[i] & 0x3F)
    if length == 3 and (code < 0x800 or 0xD800 <= code < 0xE000):
        return -1, 1
    if length == 4 and (code < 0x10000 or code > 0x10FFFF):
        return -1, 1
    return code, length


@kernel
def character_start(text: NDArray[np.uint8], position: int, end: int) -> int:
    """Where the UTF-8 character that has `position` inside it begins; `position` if none has."""
    for start in range(position - 1, max(position - 4, -1), -1):
        if text[start] & 0xC0 != 0x80:
            length = decode(text, start, end)[1]
            return start if start + length > position else position
    return position


@kernel
def beyond_ascii_of(
    text: NDArray[np.uint8], position: int, end: int, classes: NDArray[np.uint8], beyond_ascii: Word
) -> tuple[BeyondAscii, Overflow]:
    """What the characters beyond ASCII among the 64 bytes at `position` add to the masks; `beyond_ascii` has them."""
    letters = numbers = spaces = spaces2 = spaces3 = NONE
    overflow = Overflow(NONE, NONE, NONE)
    while beyond_ascii != NONE:
        i = lowest_bit(beyond_ascii)
        beyond_ascii &= beyond_ascii - ONE
        if text[position + i] < 0xC2 or position + i >= end:  # inside a character, or after the text
            continue
        code, length = decode(text, position + i, end)
        kind = classes[code] if code >= 0 else OTHER
        if kind == OTHER:
            continue
        character = (ONE << Word(length)) - ONE
        inside = character << Word(i)
        outside = character >> Word(64 - i) if i + length > 64 else NONE
        if kind == LETTER:
            letters |= inside
            overflow = Overflow(outside, NONE, NONE)
        elif kind == NUMBER:
            numbers |= inside
            overflow = Overflow(NONE, outside, NONE)
        else:
            spaces |= inside
            overflow = Overflow(NONE, NONE, outside)
            spaces2 |= (ONE << Word(i)) if length == 2 else NONE
            spaces3 |= (ONE << Word(i)) if length == 3 else NONE
    return BeyondAscii(letters, numbers, spaces, spaces2, spaces3), overflow


@inline_kernel
def classify(
    text: NDArray[np.uint8], position: int, end: int, classes: NDArray[np.uint8], overflow: Overflow
) -> tuple[Block, Overflow]:
    """The masks of the 64 bytes at `position`, and what their last character leaves for the next block.

    What lies at or after `end` counts as white space: a run of white space there is not followed by other text.
    """
    controls = bytes_in_range(text, position, Byte(9), Byte(5))
    blanks = bytes_in_range(text, position, Byte(ord(" ")), Byte(1))
    quotes = bytes_in_range(text, position, Byte(ord("'")), Byte(1))
    numbers = bytes_in_range(text, position, Byte(ord("0")), Byte(10))
    letters = bytes_in_range(text, position, Byte(ord("A")), Byte(26)) | bytes_in_range(
        text, position, Byte(ord("a")), Byte(26)
    )
    beyond_ascii = bytes_in_range(text, position, Byte(0x80), Byte(0x80))

    spaces1 = controls | blanks
    spaces, spaces2, spaces3 = spaces1, NONE, NONE
    if beyond_ascii != NONE:
        more, next_overflow = beyond_ascii_of(text, position, end, classes, beyond_ascii)
        letters |= more.letters | overflow.letters
        numbers |= more.numbers | overflow.numbers
        spaces |= more.spaces | overflow.spaces
        spaces2, spaces3, overflow = more.spaces2, more.spaces3, next_overflow

    if end - position < 64:
        text_bits = (ONE << Word(end - position)) - ONE
        letters, numbers, spaces = letters & text_bits, numbers & text_bits, spaces | ~text_bits
    return Block(letters, numbers, spaces, blanks, quotes, spaces1, spaces2, spaces3), overflow


@kernel
def contraction_length(text: NDArray[np.uint8], quote: int, end: int) -> int:
    """Bytes of the contraction ('s 'd 'm 't 'll 've 're) whose apostrophe is at `quote`; 0 if it is none."""
    if quote + 1 >= end:
        return 0
    first = text[quote + 1]
    if first == ord("s") or first == ord("d") or first == ord("m") or first == ord("t"):
        return 2
    if quote + 2 >= end:
        return 0
    second = text[quote + 2]
    if (first == ord("l") and second == ord("l")) or ((first == ord("v") or first == ord("r")) and second == ord("e")):
        return 3
    return 0


@inline_kernel
def write_positions(mask: Word, position: int, starts: NDArray[np.int64], k: Word) -> Word:
    """Append `position + i` to `starts` for every bit i of `mask`; the new length.

    Eight at a time, the last of them meaningless: the processor cannot guess where a loop over the bits would end.
    """
    end = k + ones_of(mask)
    while k < end:
        for i in range(Word(0), Word(8)):
            starts[k + i] = position + lowest_bit(mask)
            mask &= mask - ONE
        k += Word(8)
    return end


@kernel
def scan(
    text: NDArray[np.uint8], begin: int, end: int, classes: NDArray[np.uint8], starts: NDArray[np.int64], k: int
) -> np.int64:
    """Append the offset of every pre-token of text[begin:end] to `starts[k:]`; the new length of `starts`.

    A pre-token ends where the next begins, the last at `end`. A byte that belongs to no UTF-8 character is an OTHER.

    Args:
        text: bytes, of which PADDING after `end` must be readable; what they are does not matter.
        classes: class of each code point, see `tokenizer.pretokenize.unicode_classes`.
        starts: any integer type that holds `end`; needs room for end - begin + PADDING entries.
    """
    if begin >= end:
        return np.int64(k)
    count = Word(k)
    letter_before = number_before = other_before = space_before = blank_before = NONE
    inside_contraction = after_contraction = NONE
    ahead, overflow = classify(text, begin, end, classes, Overflow(NONE, NONE, NONE))
    for position in range(begin, end, 64):
        block = ahead
        spaces_ahead = ALL
        if position + 64 < end:
            ahead, overflow = classify(text, position + 64, end, classes, overflow)
            spaces_ahead = ahead.spaces
        letters, numbers, spaces = block.letters, block.numbers, block.spaces
        others = ~(letters | numbers | spaces)

        runs = (
            (letters & ~((letters << ONE) | letter_before))
            | (numbers & ~((numbers << ONE) | number_before))
            | (others & ~((others << ONE) | other_before))
        )
        joined = (block.blanks << ONE) | blank_before
        space_runs = spaces & ~((spaces << ONE) | space_before)
        last_spaces = block.spaces1 & ~((spaces >> ONE) | (spaces_ahead << TOP))
        if (block.spaces2 | block.spaces3) != NONE:
            last_spaces |= block.spaces2 & ~((spaces >> Word(2)) | (spaces_ahead << Word(62)))
            last_spaces |= block.spaces3 & ~((spaces >> Word(3)) | (spaces_ahead << Word(61)))
        found = (((runs & ~joined) | space_runs | last_spaces) & ~inside_contraction) | after_contraction

        inside_contraction = after_contraction = NONE
        quotes = block.quotes & found
        while quotes != NONE:
            i = lowest_bit(quotes)
            quotes &= quotes - ONE
            length = contraction_length(text, position + i, end)
            if length == 0:
                continue
            if i + 1 < 64:
                found &= ~(ONE << Word(i + 1))
            else:
                inside_contraction = ONE
            if i + length < 64:
                found |= ONE << Word(i + length)
            else:
                after_contraction = ONE << Word(i + length - 64)

        if end - position < 64:
            found &= (ONE << Word(end - position)) - ONE
        count = write_positions(found, position, starts, count)
        letter_before, number_before, other_before = letters >> TOP, numbers >> TOP, others >> TOP
        space_before, blank_before = spaces >> TOP, block.blanks >> TOP
    return np.int64(count)


@kernel
def find_invalid_utf8(text: NDArray[np.uint8], begin: int, end: int) -> int:
    """Offset of the first byte of text[begin:end] that belongs to no UTF-8 character; `end` if there is none."""
    position = begin
    while position < end:
        beyond_ascii = bytes_in_range(text, position, Byte(0x80), Byte(0x80))
        if beyond_ascii == NONE:
            position += 64
            continue
        position += lowest_bit(beyond_ascii)
        if position >= end:
            return end
        while position < end and text[position] >= 0x80:
            code, length = decode(text, position, end)
            if code < 0:
                return position
            position += length
    return end


class SpecialTokens(NamedTuple):
    """Special tokens as arrays, the longest first; `tokenizer.pretokenize.special_token_arrays` makes them."""

    text: NDArray[np.uint8]  # all of them, one after the other
    offsets: NDArray[np.int64]  # where each begins in `text`, and the end
    numbers: NDArray[np.int64]  # which of the caller's list each is
    openings: NDArray[np.uint8]  # distinct first two bytes of them, one pair after the other
    has_single_byte: bool  # one of them is a single byte: then the second bytes say nothing


@kernel
def special_token_at(text: NDArray[np.uint8], position: int, end: int, specials: SpecialTokens) -> int:
    """Row in `specials` of the longest special token that stands at `position`; -1 if none does."""
    for row in range(len(specials.numbers)):
        first, last = specials.offsets[row], specials.offsets[row + 1]
        if position + last - first > end:
            continue
        same = True
        for i in range(first, last):
            if text[position + i - first] != specials.text[i]:
                same = False
                break
        if same:
            return row
    return -1


@kernel
def find_special_token(text: NDArray[np.uint8], begin: int, end: int, specials: SpecialTokens) -> tuple[int, int]:
    """Offset and row in `specials` of the first special token in text[begin:end] (the longest there), or (end, -1).

    64 positions at a time are compared with the first two bytes of the special tokens, which leaves few to look at.
    """
    for position in range(begin, end, 64):
        candidates = NONE
        for pair in range(0, len(specials.openings), 2):
            opening = bytes_in_range(text, position, specials.openings[pair], Byte(1))
            if opening != NONE and not specials.has_single_byte:
                opening &= bytes_in_range(text, position + 1, specials.openings[pair + 1], Byte(1))
            candidates |= opening
        while candidates != NONE:
            candidate = position + lowest_bit(candidates)
            candidates &= candidates - ONE
            if candidate >= end:
                break
            row = special_token_at(text, candidate, end, specials)
            if row >= 0:
                return candidate, row
    return end, -1
