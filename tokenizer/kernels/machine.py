"""What the kernels need and Numba has no name for: their decorator, and a handful of machine instructions."""

import contextlib
import hashlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, event
from numba.core.caching import IndexDataCacheFile
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array
from numba.np.numpy_support import from_dtype
from numpy.typing import NDArray

BYTE = ir.IntType(8)
WORD = ir.IntType(64)
BLOCK = ir.VectorType(BYTE, 64)

ONE = np.uint64(1)
NONE = np.uint64(0)
ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


# Numba compiles a kernel afresh when its file has changed. It contains the kernels that it calls, so all files count.
SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` when first called, to run without the GIL; the next process finds the code in a cache.

    A kernel cannot allocate: it works on arrays that its caller made. Numba then counts no references to arrays
    (`_nrt=False`), which would cost two atomic operations per array and call: five times the work of the counting loop.
    """
    return _compiled(function, inline=False)


def inline_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """A `kernel` that becomes part of each kernel that calls it: a call with several arrays pushes dozens of words."""
    return _compiled(function, inline=True)


def python_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """A `kernel` that keeps the GIL, because it works on Python's objects."""
    return _compiled(function, inline=False, nogil=False)


def _compiled(function: Callable[..., Any], inline: bool, nogil: bool = True) -> Callable[..., Any]:
    compiler: Callable[..., Any] = njit
    options = {"nogil": nogil, "error_model": "numpy", "_nrt": False, "forceinline": inline}
    try:
        compiled = compiler(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's own can be written to
        return cast(Callable[..., Any], compiler(**options)(function))
    cache = compiled._cache
    cache._cache_file = CodeFile(cache.cache_path, cache._impl.filename_base, SOURCES)
    return cast(Callable[..., Any], compiled)


class CodeFile(IndexDataCacheFile):
    """The compiled code of a kernel on disk. Where it is spoiled or cannot be written, it is compiled again."""

    def _load_index(self) -> Any:
        try:
            return super()._load_index()
        except Exception:  # whatever a pickle cut short leads to
            return {}

    def load(self, key: Any) -> Any:
        """The code for types and processor, None if there is none that can be read."""
        try:
            return super().load(key)
        except Exception:
            return None

    def save(self, key: Any, data: Any) -> None:
        """Keep the code for the next process; without a word if the disk is full, say."""
        with contextlib.suppress(OSError):
            super().save(key, data)


def instruction(function: Callable[..., Any]) -> Callable[..., Any]:
    """Name a machine instruction: `function` gets types and returns the signature and what writes LLVM code."""
    return intrinsic(function)


class _Announcement(event.Listener):
    """Says once, on stderr, that the first use of a kernel compiles it: seconds, once per machine."""

    said = False

    def on_start(self, event: Any) -> None:
        if not self.said and event.data["dispatcher"].py_func.__module__.startswith("tokenizer."):
            self.said = True
            print("tokenizer: compiling its kernels (first use on this machine; cached from now on)", file=sys.stderr)

    def on_end(self, event: Any) -> None:
        pass


event.register("numba:compile", _Announcement())


def _address(context: Any, builder: Any, signature: Any, arguments: Any, first: int = 0) -> Any:
    """Pointer to a byte of an array: `arguments[first]` is the array, the next argument says which byte."""
    array = context.make_array(signature.args[first])(context, builder, arguments[first])
    return builder.gep(builder.bitcast(array.data, BYTE.as_pointer()), [arguments[first + 1]])


@instruction
def bytes_in_range(typing_context: Any, text: Any, position: Any, low: Any, count: Any) -> Any:
    """Bit i says whether low <= text[position + i] < low + count, for the 64 bytes at `position`.

    One vector subtraction and one unsigned comparison: what lies below `low` wraps around to a large number.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def repeated(value: Any) -> Any:
            lane = builder.insert_element(ir.Constant(BLOCK, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), 64), [0] * 64)
            return builder.shuffle_vector(lane, ir.Constant(BLOCK, ir.Undefined), lanes)

        address = _address(context, builder, signature, arguments)
        block = builder.load(builder.bitcast(address, BLOCK.as_pointer()), align=1)
        inside = builder.icmp_unsigned("<", builder.sub(block, repeated(arguments[2])), repeated(arguments[3]))
        return builder.bitcast(inside, WORD)

    return types.uint64(text, types.int64, types.uint8, types.uint8), generate


def words_of(tables: Any) -> NDArray[np.uint64]:
    """A `NamedTuple` of arrays, numbers and such tuples as words: an array's address and length, a number's value.

    `unpacker` makes the tuple again, in a kernel. Numba takes 0.2 microseconds for each array that it is called with,
    longer than encoding a few words takes. The arrays must be kept alive.
    """

    def flat(part: Any) -> list[int]:
        if isinstance(part, tuple):
            return [word for member in part for word in flat(member)]
        return [part.ctypes.data, part.size] if isinstance(part, np.ndarray) else [int(part)]

    return np.array([word & 0xFFFFFFFFFFFFFFFF for word in flat(tables)], np.uint64)


def unpacker(kind: type[Any]) -> Callable[..., Any]:
    """An instruction that makes of `words_of(tables)` the `tables`, a `NamedTuple` of the class `kind`."""

    def numba_type(annotation: Any) -> Any:
        if hasattr(annotation, "_fields"):
            members = [numba_type(part) for part in get_type_hints(annotation).values()]
            return types.NamedTuple(members, annotation)
        if annotation in (int, bool):
            return types.int64 if annotation is int else types.boolean
        dtype = get_args(annotation)[-1]  # of NDArray[np.uint8]: np.dtype[np.uint8], from NumPy 2.5 on np.uint8
        return types.Array(from_dtype(np.dtype((*get_args(dtype), dtype)[0])), 1, "C")

    @instruction
    def unpack(typing_context: Any, words: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            data = context.make_array(words)(context, builder, arguments[0]).data
            places = itertools.count()

            def next_word() -> Any:
                return builder.load(builder.gep(data, [ir.Constant(WORD, next(places))]))

            def made(part: Any) -> Any:
                if isinstance(part, types.NamedTuple):
                    return context.make_tuple(builder, part, [made(member) for member in part])
                if not isinstance(part, types.Array):
                    return context.cast(builder, next_word(), types.uint64, part)
                array = context.make_array(part)(context, builder)
                size = context.get_constant(types.intp, part.dtype.bitwidth // 8)
                address, length = builder.inttoptr(next_word(), array.data.type), next_word()
                populate_array(array, address, shape=[length], strides=[size], itemsize=size, meminfo=None)
                return array._getvalue()

            return made(signature.return_type)

        return numba_type(kind)(words), generate

    return unpack


@instruction
def load_word(typing_context: Any, array: Any, position: Any) -> Any:
    """The 8 bytes of `array` from byte `position` on, little-endian, at any alignment."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature, arguments)
        return builder.load(builder.bitcast(address, WORD.as_pointer()), align=1)

    return types.uint64(array, types.int64), generate


@instruction
def word_at(typing_context: Any, address: Any) -> Any:
    """The 8 bytes of memory at `address`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], WORD.as_pointer()))

    return types.uint64(types.uint64), generate


@instruction
def character_at(typing_context: Any, address: Any, i: Any, like: Any) -> Any:
    """Character i of those at `address` in memory, which have the unsigned type of `like`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        characters = builder.inttoptr(arguments[0], ir.IntType(like.bitwidth).as_pointer())
        return builder.load(builder.gep(characters, [arguments[1]]))

    return like(types.uint64, types.uint64, like), generate


@instruction
def narrow_16(typing_context: Any, address: Any, i: Any, like: Any, target: Any, position: Any) -> Any:
    """Write the low bytes of 16 characters, from character i of those at `address` on, to byte `position` of `target`.

    The characters have the unsigned type of `like`. Bit j of the result says whether character i + j is beyond ASCII.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        block = ir.VectorType(ir.IntType(like.bitwidth), 16)
        first = builder.gep(builder.inttoptr(arguments[0], block.element.as_pointer()), [arguments[1]])
        characters = builder.load(builder.bitcast(first, block.as_pointer()), align=1)
        narrow = characters if like.bitwidth == 8 else builder.trunc(characters, ir.VectorType(BYTE, 16))
        write_to = _address(context, builder, signature, arguments, first=3)
        builder.store(narrow, builder.bitcast(write_to, narrow.type.as_pointer()), align=1)
        beyond = builder.icmp_unsigned(">", characters, ir.Constant(block, [0x7F] * 16))
        return builder.zext(builder.bitcast(beyond, ir.IntType(16)), WORD)

    return types.uint64(types.uint64, types.uint64, like, target, types.int64), generate


@instruction
def set_word_at(typing_context: Any, address: Any, value: Any) -> Any:
    """Write 8 bytes of memory at `address`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[1], builder.inttoptr(arguments[0], WORD.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), generate


@instruction
def copy_16_bytes(typing_context: Any, target: Any, to: Any, source: Any, position: Any) -> Any:
    """Copy 16 bytes of `source` from byte `position` on to byte `to` of `target`, at any alignment."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        block = ir.VectorType(BYTE, 16).as_pointer()
        read_from = _address(context, builder, signature, arguments, first=2)
        value = builder.load(builder.bitcast(read_from, block), align=1)
        write_to = _address(context, builder, signature, arguments)
        builder.store(value, builder.bitcast(write_to, block), align=1)
        return context.get_dummy_value()

    return types.void(target, types.int64, source, types.int64), generate


@instruction
def copy_filled(typing_context: Any, target: Any, to: Any, source: Any, position: Any, fills: Any, row: Any) -> Any:
    """Copy 16 bytes like `copy_16_bytes`, with all bits set that `fills[row]` has."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        block = ir.VectorType(BYTE, 16).as_pointer()
        offset = builder.shl(arguments[5], ir.Constant(WORD, 4))
        read_from = _address(context, builder, signature, arguments, first=2)
        fill = _address(context, builder, signature, [*arguments[:5], offset], first=4)
        value, more = (builder.load(builder.bitcast(place, block), align=1) for place in (read_from, fill))
        write_to = _address(context, builder, signature, arguments)
        builder.store(builder.or_(value, more), builder.bitcast(write_to, block), align=1)
        return context.get_dummy_value()

    return types.void(target, types.int64, source, types.int64, fills, types.int64), generate


def _word(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Pointer to the word of an array that the first two arguments name."""
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.gep(array.data, [arguments[1]])


@instruction
def load_acquire(typing_context: Any, words: Any, i: Any) -> Any:
    """words[i]; what another thread wrote before its `store_release` of this value is there to be read from now on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_word(context, builder, signature, arguments), "acquire", 8)

    return types.uint64(words, types.uint64), generate


@instruction
def store_release(typing_context: Any, words: Any, i: Any, value: Any) -> Any:
    """Write words[i] after all that was written before, for `load_acquire`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[2], _word(context, builder, signature, arguments), "release", 8)
        return context.get_dummy_value()

    return types.void(words, types.uint64, types.uint64), generate


@instruction
def claim(typing_context: Any, words: Any, i: Any, value: Any) -> Any:
    """Write words[i] if it is 0, in one step; whether it was, which it is for one thread alone."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = _word(context, builder, signature, arguments)
        return builder.extract_value(builder.cmpxchg(word, ir.Constant(WORD, 0), arguments[2], "monotonic"), 1)

    return types.boolean(words, types.uint64, types.uint64), generate


@instruction
def take(typing_context: Any, words: Any, i: Any, count: Any) -> Any:
    """Add `count` to words[i] in one step; its value before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _word(context, builder, signature, arguments), arguments[2], "monotonic")

    return types.int64(words, types.uint64, types.int64), generate


def _bit_counter(name: str, *flags: Any) -> Callable[..., Any]:
    """What writes a call of the LLVM instruction `name` on a mask of 64 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(WORD, [WORD, *(flag.type for flag in flags)])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [*arguments, *flags])

    return generate


ZERO_IS_DEFINED = ir.Constant(ir.IntType(1), 0)


@instruction
def lowest_bit(typing_context: Any, mask: Any) -> Any:
    """Position of the lowest set bit; 64 for 0."""
    return types.int64(types.uint64), _bit_counter("llvm.cttz.i64", ZERO_IS_DEFINED)


@instruction
def leading_zeros(typing_context: Any, mask: Any) -> Any:
    """Number of zeros above the highest set bit; 64 for 0."""
    return types.uint64(types.uint64), _bit_counter("llvm.ctlz.i64", ZERO_IS_DEFINED)


@instruction
def ones_of(typing_context: Any, mask: Any) -> Any:
    """Number of set bits."""
    return types.uint64(types.uint64), _bit_counter("llvm.ctpop.i64")


def _prefetch(builder: Any, address: Any) -> None:
    number = ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), number, number, number])
    hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, keep, data = (ir.Constant(number, value) for value in (0, 3, 1))
    builder.call(hint, [address, read, keep, data])


@instruction
def prefetch(typing_context: Any, array: Any, position: Any) -> Any:
    """Ask the cache for the line that holds byte `position` of `array`, and do not wait for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _prefetch(builder, _address(context, builder, signature, arguments))
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@instruction
def prefetch_at(typing_context: Any, address: Any) -> Any:
    """Ask the cache for the line that holds the memory at `address`, and do not wait for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _prefetch(builder, builder.inttoptr(arguments[0], BYTE.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.uint64), generate
