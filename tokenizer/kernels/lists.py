"""Lists of ints from arrays, and to the bytes that they stand for, in the memory of Python itself.

`tolist` makes a new int of each element, which takes as long as encoding the text does. Here every id exists as an int
once, and a list of ids only refers to those. That needs a few facts about CPython, which hold where `KNOWN` says so: an
object begins with its reference count and the address of its type; in a list its length follows, and the address of
its elements, which are addresses of objects. Elsewhere the callers do without these kernels.
"""

import ctypes
import sys
import sysconfig

import numpy as np
from numba import types
from numpy.typing import NDArray

from tokenizer.kernels.encode import decode_id
from tokenizer.kernels.machine import NONE, ONE, prefetch_at, python_kernel, set_word_at, word_at

Word = np.uint64

KNOWN = (
    sys.implementation.name == "cpython"
    and (3, 11) <= sys.version_info[:2] <= (3, 13)
    and sys.maxsize > 1 << 32
    and sys.byteorder == "little"
    and not sysconfig.get_config_var("Py_GIL_DISABLED")
    and not hasattr(sys, "getobjects")  # a build that traces references: its objects begin otherwise
)
TYPE, LENGTH, ELEMENTS = Word(8), Word(16), Word(24)  # offsets in a list; its reference count is at 0
HAS_IMMORTALS = sys.version_info >= (3, 12)
IMMORTAL = Word(1 << 31)  # the bit that says of a reference count that it must not change (PEP 683)
AHEAD = Word(32)  # ints between the one asked of memory and the one used

new_list = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_ssize_t)(("PyList_New", ctypes.pythonapi))
"""A list of so many elements, which `fill_list` must fill before anyone looks at them."""

int_value = types.ExternalFunction("PyLong_AsLong", types.long_(types.uint64))
forget_error = types.ExternalFunction("PyErr_Clear", types.void())


@python_kernel
def fill_list(address: int, ints: NDArray[np.uint64], ids: NDArray[np.uint32], count: int) -> None:
    """Fill the `new_list` at `address` with `ids[:count]`.

    Args:
        ints: address of the int that is each id.
    """
    elements = word_at(Word(address) + ELEMENTS)
    for i in range(Word(count)):
        if i + AHEAD < Word(count):
            prefetch_at(ints[ids[i + AHEAD]])
        number = ints[ids[i]]
        references = word_at(number)
        if not HAS_IMMORTALS or references & IMMORTAL == NONE:
            set_word_at(number, references + ONE)
        set_word_at(elements + Word(8) * i, number)


@python_kernel
def decode_list(
    address: int,
    int_type: int,
    token_bytes: NDArray[np.uint8],
    token_ends: NDArray[np.uint32],
    out: NDArray[np.uint8],
) -> np.int64:
    """`tokenizer.kernels.encode.decode_ids` for the list at `address`.

    -1 also if an element is an int in a wider sense, a bool, say: the address of `int` is `int_type`. Of nothing else
    is the value asked, so that no other code can run meanwhile.
    """
    count, elements = word_at(Word(address) + LENGTH), word_at(Word(address) + ELEMENTS)
    size = NONE
    for i in range(count):
        if i + AHEAD < count:
            prefetch_at(word_at(elements + Word(8) * (i + AHEAD)))
        number = word_at(elements + Word(8) * i)
        if word_at(number + TYPE) != Word(int_type):
            return np.int64(-1)
        token_id = Word(int_value(number))  # -1 and an error if it is beyond 64 bits
        if token_id >= Word(len(token_ends) - 1):
            forget_error()
            return np.int64(-1)
        size = decode_id(token_id, token_bytes, token_ends, out, size)
    return np.int64(size)
