"""Pre-tokens as keys of a hash table: two words each, compared by two comparisons.

The key of up to 15 bytes is the bytes themselves, filled up to 16 with 0xFF, which is no byte of UTF-8. That of a
longer pre-token (one in a thousand) is a hash and its length; its bytes have to be compared too.
"""

import numpy as np
from numpy.typing import NDArray

from tokenizer.kernels.machine import ALL, ONE, copy_filled, inline_kernel, kernel, leading_zeros, load_word

Word = np.uint64

INLINE_BYTES = 15
LONG = ONE << Word(56)  # the second word of a key is smaller, a length, where a pre-token is longer than INLINE_BYTES
FILLS = np.array([[0] * n + [255] * (16 - n) for n in range(INLINE_BYTES + 1)], np.uint8)  # row n keeps n bytes

MIX1, MIX2 = Word(0x9E3779B97F4A7C15), Word(0xC2B2AE3D27D4EB4F)  # odd numbers without a pattern in their bits


@kernel
def hash_bytes(text: NDArray[np.uint8], begin: int, length: int) -> Word:
    """A hash of text[begin : begin + length]."""
    value = MIX1 ^ Word(length)
    whole = length - length % 8
    for i in range(begin, begin + whole, 8):
        value = (value ^ load_word(text, i)) * MIX2
        value ^= value >> Word(32)
    if length > whole:
        rest = load_word(text, begin + whole) & ((ONE << Word(8 * (length - whole))) - ONE)
        value = (value ^ rest) * MIX2
        value ^= value >> Word(32)
    return value


@inline_kernel
def write_key(
    keys: NDArray[np.uint64], i: Word, text: NDArray[np.uint8], begin: Word, length: Word, hash_mask: Word
) -> None:
    """Write the key of text[begin : begin + length] to keys[2 * i :]; reads up to 16 bytes.

    Args:
        hash_mask: bits of the hash of a long pre-token that count.
    """
    if length <= Word(INLINE_BYTES):
        copy_filled(keys, np.int64(i * Word(16)), text, np.int64(begin), FILLS, np.int64(length))
    else:
        keys[i + i] = hash_bytes(text, np.int64(begin), np.int64(length)) & hash_mask
        keys[i + i + ONE] = length


@inline_kernel
def hash_key(low: Word, high: Word) -> Word:
    """A hash of a key whose top bits depend on every bit of both words."""
    return (low ^ (high * MIX2)) * MIX1


@inline_kernel
def length_of_key(low: Word, high: Word) -> Word:
    """Length in bytes of the pre-token that has a key."""
    if high < LONG:
        return high
    if high == ALL:
        return Word(8) - leading_zeros(~low) // Word(8)
    return Word(16) - leading_zeros(~high) // Word(8)
