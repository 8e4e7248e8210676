"""`Tokenizer`: text to token ids and back.

Two paths give the same ids. Small amounts of text take the plain one: `regex` finds the pre-tokens, a bounded cache
remembers their ids, and nothing has to be compiled or even imported. From `COMPILE_AFTER` characters on, or when
`compile` is called, the kernels do it, some ten times faster.
"""

import array
import codecs
import copy
import functools
import hashlib
import heapq
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import regex
from numpy.typing import NDArray

from tokenizer import files, pretokenize
from tokenizer.kernels import PADDING

COMPILE_AFTER = 1 << 18  # characters encoded or ids decoded; loading the kernels takes about as long as this much text
MAX_PLAIN_CACHE = 4096  # pre-tokens, under 1 MB
MAX_KEPT_WORK = 1 << 18  # bytes of a pre-token for which scratch space is kept
STREAM_CHARACTERS = 1 << 12  # what encode_iterable gathers before it encodes
MAX_IDS = 1 << 21  # two ids and a rank are one word of the kernels' table of merges
MAX_PIECE = 1 << 26  # characters that the kernels get at once: they count the bytes of a text in 32 bits
PADDING_BYTES = bytes(PADDING)

PRETOKENS = regex.compile(pretokenize.PATTERN)
Decoded = TypeVar("Decoded", str, bytes)
LAST_CUT = regex.compile(r"(?r)(?<=\S)\s")  # the last white space after something else: a pre-token begins there


class Tokenizer:
    """A byte-level BPE tokenizer: a vocabulary, merges in the order of their ranks, and special tokens.

    Special tokens are found in the text first, the longest where several begin, and always become their own id. Lone
    surrogates in a string are encoded as U+FFFD, as tiktoken does.

    >>> vocab = dict(enumerate([b"<|end|>", *(bytes([byte]) for byte in range(256)), b"at", b"cat"]))
    >>> tokenizer = Tokenizer(vocab, [(b"a", b"t"), (b"c", b"at")], ["<|end|>"])
    >>> tokenizer.encode("cat<|end|>")
    [258, 0]
    >>> tokenizer.decode([258, 0])
    'cat<|end|>'
    """

    FIRST_CHARACTERS = 256  # what encode_iterable waits for at first

    def __init__(
        self,
        vocab: Mapping[int, bytes],
        merges: Sequence[tuple[bytes, bytes]],
        special_tokens: Sequence[str] | None = None,
    ) -> None:
        """Check the parts and take them over.

        Args:
            vocab: token of each id; has all 256 single bytes.
            merges: the pairs to merge, best first; the parts and the product of each are in `vocab`.
            special_tokens: those that `vocab` lacks get new ids after its last.

        Raises:
            ValueError: the parts do not fit together; names the entry.
        """
        self.special_tokens = list(special_tokens or [])
        pretokenize.check_special_tokens(special_tokens or [])
        self.vocab: dict[int, bytes] = dict(sorted(vocab.items()))
        self.merges = list(merges)
        self._add_special_tokens()
        self._index_tokens()
        self._index_merges()
        self.vocab_size = max(self.vocab) + 1
        if self.vocab_size > MAX_IDS:
            raise ValueError(f"vocab has id {self.vocab_size - 1}: ids must be below {MAX_IDS}")
        self._special_pattern = pretokenize.special_token_pattern(self.special_tokens)
        self._plain_cache: dict[str, tuple[int, ...]] = {}
        self._compiled: CompiledTokenizer | None = None
        self._work_done = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.vocab, self.merges, self.special_tokens)

    def _add_special_tokens(self) -> None:
        """Set `special_ids`, of several ids with the same bytes the lowest, and add what `vocab` lacks."""
        ids: dict[bytes, int] = {}
        for token_id, token in self.vocab.items():
            if not isinstance(token_id, int) or token_id < 0:
                raise ValueError(f"vocab has id {token_id!r}: ids are integers >= 0")
            ids.setdefault(token, token_id)
        self.special_ids: dict[str, int] = {}
        for special in self.special_tokens:
            special_id = ids.get(special.encode(), -1)
            if special_id < 0:
                special_id = max(self.vocab, default=-1) + 1
                self.vocab[special_id] = special.encode()
            self.special_ids[special] = special_id

    def _index_tokens(self) -> None:
        """Set `_ids`, the id of each token; a single byte that is also a special token has two ids."""
        special = {token_id: self.vocab[token_id] for token_id in self.special_ids.values()}
        self._ids: dict[bytes, int] = {}
        for token_id, token in self.vocab.items():
            if token_id in special:
                continue
            if token in self._ids:
                raise ValueError(f"vocab has {token!r} twice: ids {self._ids[token]} and {token_id}")
            self._ids[token] = token_id
        for token_id, token in special.items():
            self._ids.setdefault(token, token_id)
        for byte in range(256):
            if bytes([byte]) not in self._ids:
                raise ValueError(f"vocab lacks the single byte 0x{byte:02X}: some text could not be encoded")

    def _index_merges(self) -> None:
        """Set `_ranks`, {pair of ids: (rank, id of the product)}; of a repeated merge the first counts.

        And `_merge_ids`: left part, right part and product of each merge, one after the other.
        """
        ids = self._ids
        self._ranks: dict[tuple[int, int], tuple[int, int]] = {}
        self._merge_ids = array.array("q")
        for rank, (left, right) in enumerate(self.merges):
            try:
                pair, product = (ids[left], ids[right]), ids[left + right]
            except KeyError as error:
                lacking = f"merges[{rank}] is {left!r} + {right!r}, but vocab lacks {error.args[0]!r}"
                raise ValueError(lacking) from None
            self._ranks.setdefault(pair, (rank, product))
            self._merge_ids.extend((*pair, product))

    @classmethod
    def from_files(
        cls,
        vocab_filepath: str | os.PathLike[str],
        merges_filepath: str | os.PathLike[str],
        special_tokens: Sequence[str] | None = None,
    ) -> "Tokenizer":
        """The tokenizer in GPT-2's `vocab.json` and `merges.txt`; see `files.read_gpt2` for what it raises."""
        vocab, merges = files.read_gpt2(vocab_filepath, merges_filepath, special_tokens or [])
        return cls(vocab, merges, special_tokens)

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer that `save` wrote, or a folder with GPT-2's two files or a `tokenizer.json` alone.

        Without a `meta.json` the one special token is `<|endoftext|>`, if the vocabulary has it. Warns when this
        machine's `regex` classes characters otherwise than the one that the tokenizer was trained with.

        Raises:
            ValueError: a file is corrupt, or the files do not belong together.
            FileNotFoundError: no tokenizer is there.
        """
        folder = Path(path)
        meta = files.read_meta(folder)
        if not (folder / "vocab.json").exists() and (folder / "tokenizer.json").exists():
            return cls(*files.read_hf(folder / "tokenizer.json"))
        guess = [] if meta else [files.END_OF_TEXT]
        special_tokens = meta.get("special_tokens", guess)
        vocab, merges = files.read_gpt2(folder / "vocab.json", folder / "merges.txt", special_tokens)
        if not meta and files.END_OF_TEXT.encode() not in vocab.values():
            special_tokens = []
        tokenizer = cls(vocab, merges, special_tokens)
        if "sha256" in meta and meta["sha256"] != tokenizer.sha256:
            raise ValueError(f"{folder}: vocab.json and merges.txt are not those that meta.json was written for")
        _warn_of_other_classes(meta.get("unicode", {}), folder)
        return tokenizer

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `vocab.json`, `merges.txt`, `tokenizer.json` and `meta.json` into the folder `path`.

        Raises:
            ValueError: these tokens cannot be written, see `files.write_hf`.
        """
        folder = Path(path)
        files.write_hf(folder / "tokenizer.json", self.vocab, self.merges, self.special_tokens)
        files.write_gpt2(folder, self.vocab, self.merges, self.special_tokens)
        files.write_json(folder / "meta.json", self.meta())

    def meta(self) -> dict[str, Any]:
        """What `meta.json` says of the tokenizer."""
        return {
            "special_tokens": self.special_tokens,
            "vocab_size": self.vocab_size,
            "sha256": self.sha256,
            "unicode": pretokenize.unicode_version(),
        }

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of vocabulary, merges and special tokens: equal for equal tokenizers."""
        parts = [f"{token_id} {token.hex()}" for token_id, token in self.vocab.items()]
        parts += [f"{left.hex()}+{right.hex()}" for left, right in self.merges]
        parts += [f"special {token.encode().hex()}" for token in self.special_tokens]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`."""
        if self._compiled is None:
            self._work_done += len(text)
            if self._work_done < COMPILE_AFTER:
                return self._encode_plain(text)
            self.compile()
        return self._encode_compiled(text)

    def encode_iterable(self, iterable: Iterable[str]) -> Iterator[int]:
        """The token ids of the pieces of `iterable` joined, one by one, wherever the pieces were cut.

        Holds back only the text whose ids the next piece could change, so that memory stays under 1 MB unless a
        single pre-token is larger. Never loads the kernels, which alone are larger: call `compile` first for speed.
        """
        pieces: list[str] = []
        length, enough = 0, self.FIRST_CHARACTERS
        for piece in iterable:
            pieces.append(piece)
            length += len(piece)
            if length < enough:
                continue
            text = "".join(pieces)
            settled = self._settled(text)
            yield from self.encode_without_loading(text[:settled])
            pieces, length = [text[settled:]], len(text) - settled
            # Doubling what is held back keeps the time linear while no place to cut comes.
            enough = max(min(2 * enough, STREAM_CHARACTERS), 2 * length)
        yield from self.encode_without_loading("".join(pieces))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is not in the vocabulary; names it.
        """
        return self._decode(ids, _utf8_text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of token ids, whether they are UTF-8 or not.

        Raises:
            ValueError: an id is not in the vocabulary; names it.
        """
        return self._decode(ids, bytes)

    def _decode(self, ids: Iterable[int], made_of: Callable[[bytes | memoryview], Decoded]) -> Decoded:
        """`made_of` the bytes of token ids."""
        if not isinstance(ids, list | tuple):
            ids = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        if self._compiled is None:
            self._work_done += len(ids)
            if self._work_done >= COMPILE_AFTER:
                self.compile()
        if self._compiled is not None and len(ids) > 64:
            decoded = self._compiled.decode(ids, made_of)
            if decoded is not None:
                return decoded
        try:
            return made_of(b"".join(map(self.vocab.__getitem__, ids)))
        except KeyError as error:
            self._refuse_id(error.args[0])

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of token ids as it comes, in whole characters; the pieces joined are what `decode` gives.

        Raises:
            ValueError: an id is not in the vocabulary; names it.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in ids:
            if token_id not in self.vocab:
                self._refuse_id(token_id)
            if text := decoder.decode(self.vocab[token_id]):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def compile(self) -> None:
        """Load the kernels now instead of after `COMPILE_AFTER` characters; compiles them if no process has yet."""
        if self._compiled is None:
            self._compiled = CompiledTokenizer(self)

    def _refuse_id(self, token_id: object) -> NoReturn:
        raise ValueError(f"token id {token_id!r} is not in the vocabulary (ids 0 to {self.vocab_size - 1})")

    def encode_without_loading(self, text: str) -> list[int]:
        """`encode`, which never loads the kernels."""
        return self._encode_plain(text) if self._compiled is None else self._encode_compiled(text)

    def _encode_compiled(self, text: str) -> list[int]:
        assert self._compiled is not None
        if len(text) <= MAX_PIECE:
            return self._compiled.encode(text)
        ids: list[int] = []
        position, size = 0, MAX_PIECE
        while position + size < len(text):
            settled = self._settled(text[position : position + size])
            ids += self._compiled.encode(text[position : position + settled])
            position += settled
            size = MAX_PIECE if settled else 2 * size
        ids += self._compiled.encode(text[position:])
        return ids

    def _settled(self, text: str) -> int:
        """How many characters of `text` have ids that no continuation of it can change."""
        # A special token, or a longer one in its place, could still begin from `open_from` on.
        open_from = len(text) - max(map(len, self.special_tokens), default=0) + 1
        done = 0
        if self._special_pattern:
            for match in self._special_pattern.finditer(text):
                if match.start() >= open_from:
                    break
                done = match.end()
        if done >= open_from:
            return done
        if cut := LAST_CUT.search(text, done + 1, open_from):
            return cut.start()
        # One run without white space. More text can change its last pre-token, or the last two: ' + l becomes 'll.
        starts = [match.start() for match in PRETOKENS.finditer(text, done, open_from)]
        return starts[-2] if len(starts) > 2 and not text[starts[-2] - 1].isspace() else done

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        try:
            position = 0
            for match in self._special_pattern.finditer(text) if self._special_pattern else ():
                self._append_plain(text[position : match.start()], ids)
                ids.append(self.special_ids[match.group()])
                position = match.end()
            self._append_plain(text[position:], ids)
        except UnicodeEncodeError:
            return self._encode_plain(_replace_lone_surrogates(text))
        return ids

    def _append_plain(self, text: str, ids: list[int]) -> None:
        """Append the ids of `text`, which has no special tokens."""
        cache = self._plain_cache
        for pretoken in PRETOKENS.findall(text):
            known = cache.get(pretoken)
            if known is None:
                known = tuple(merge_pretoken([self._ids[b"%c" % byte] for byte in pretoken.encode()], self._ranks))
                if len(cache) >= MAX_PLAIN_CACHE:
                    cache.clear()
                if len(pretoken) <= 64:
                    cache[pretoken] = known
            ids += known


def merge_pretoken(ids: list[int], ranks: Mapping[tuple[int, int], tuple[int, int]]) -> list[int]:
    """Merge one pre-token: the pair of lowest rank first, the leftmost of equals; O(n log n).

    Merged tokens stay at the place of their left part, in a linked list; a pair in the heap that is no longer there
    is passed over.

    Args:
        ids: the id of each byte; used as the list.
        ranks: {pair of ids: (rank, id of the product)}.

    >>> merge_pretoken([1, 1, 1, 2], {(1, 1): (0, 3), (1, 2): (1, 4)})
    [3, 4]
    """
    if len(ids) < 2:
        return ids
    end = len(ids)
    after = list(range(1, end + 1))
    before = list(range(-1, end - 1))
    gone = -1
    heap: list[tuple[int, int, int, int, int]] = []

    def push(i: int, j: int) -> None:
        if (found := ranks.get((ids[i], ids[j]))) is not None:
            heapq.heappush(heap, (found[0], i, found[1], ids[i], ids[j]))

    for i in range(end - 1):
        push(i, i + 1)
    while heap:
        _, i, product, left, right = heapq.heappop(heap)
        j = after[i]
        if ids[i] != left or j == end or ids[j] != right:
            continue
        ids[i], ids[j] = product, gone
        after[i] = k = after[j]
        if k < end:
            before[k] = i
            push(i, k)
        if i > 0:
            push(before[i], i)
    return [token_id for token_id in ids if token_id != gone]


class CompiledTokenizer:
    """The kernels with the tables of one tokenizer; safe to use from several threads, one at a time."""

    SCRATCH = 1 << 20  # bytes of text for which the arrays are kept from call to call
    SHORT = 1 << 10  # bytes of text up to which the call itself matters

    def __init__(self, tokenizer: Tokenizer) -> None:
        # All of the cache at once, so that encoding takes no more memory later.
        self.encoder = BytesEncoder(tokenizer, first_slots=1 << 18, max_slots=1 << 18)
        self.encoder.learn_vocabulary(tokenizer)
        from tokenizer.kernels import encode, lists, strings

        self._kernels, self._lists, self._strings = encode, lists, strings
        self._lock = threading.Lock()
        self._room = np.empty(self.SCRATCH + PADDING, np.uint8)
        self._text = self._room.view()
        self._text.flags.writeable = False  # one compiled kernel for all texts
        self._starts = np.empty(self.SCRATCH + PADDING, np.uint32)
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self._ids = np.empty(self.SCRATCH + 3, self._dtype)
        tokens = [tokenizer.vocab.get(token_id, b"") for token_id in range(tokenizer.vocab_size)]
        self._token_bytes = np.frombuffer(b"".join(tokens) + PADDING_BYTES, np.uint8)
        self._token_ends = np.cumsum([0, *map(len, tokens)], dtype=np.uint32)
        self._has_every_id = len(tokenizer.vocab) == tokenizer.vocab_size
        self._ints = list(range(tokenizer.vocab_size))  # keeps alive what the next line has the addresses of
        self._int_addresses = np.fromiter(map(id, self._ints), np.uint64, len(self._ints))
        # Load every kernel now, so that none has to be later, when memory may be short.
        nothing = np.frombuffer(PADDING_BYTES, np.uint8)
        self.encoder.encode(nothing, 0, self._starts, self._ids)
        for text in ("a", "\u0100", "\U00010000"):
            self._utf8(text * (self.SHORT + 1))
        self._as_list(self._ids[:0], 0)
        self.decode([], bytes)
        self.decode((), bytes)

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`."""
        with self._lock:
            buffer, size = self._utf8(text)
            if size >= 1 << 32:
                raise ValueError(f"text has a pre-token or special tokens of {size} bytes in a row, more than 4 GiB")
            starts, ids = self._starts, self._ids
            if size > self.SCRATCH:
                starts, ids = np.empty(size + PADDING, np.uint32), np.empty(size + 3, self._dtype)
            count = self.encoder.encode(buffer, size, starts, ids)
            return ids[:count].tolist() if size <= self.SHORT else self._as_list(ids, count)

    def _utf8(self, text: str) -> tuple[NDArray[np.uint8], int]:
        """`text` as UTF-8, and its size; PADDING bytes after it are readable. Good until the next call."""
        compact = type(text) is str and self._strings.KNOWN  # a subclass's characters lie elsewhere
        if compact and len(text) > self.SHORT and self._strings.max_bytes(text) <= self.SCRATCH:
            size = self._strings.to_utf8(text, self._room)
            if size >= 0:
                return self._text, size
        try:
            data = text.encode()
        except UnicodeEncodeError:
            data = _replace_lone_surrogates(text).encode()
        return np.frombuffer(data + PADDING_BYTES, np.uint8), len(data)

    def _as_list(self, ids: NDArray[Any], count: int) -> list[int]:
        if not self._lists.KNOWN:
            return ids[:count].tolist()
        target: list[int] = self._lists.new_list(count)
        self._lists.fill_list(id(target), self._int_addresses, ids, count)
        return target

    def decode(self, ids: Sequence[int], made_of: Callable[[bytes | memoryview], Decoded]) -> Decoded | None:
        """`made_of` the bytes of token ids; None if one of them is no id, or is not quite an int."""
        if not self._has_every_id:
            return None
        decode: Callable[[NDArray[np.uint8]], int]
        tables = self._token_bytes, self._token_ends
        if self._lists.KNOWN and isinstance(ids, list):
            decode = functools.partial(self._lists.decode_list, id(ids), id(int), *tables)
        else:
            try:
                packed = np.frombuffer(array.array("I", ids), np.uint32)
            except (TypeError, OverflowError):
                return None
            decode = functools.partial(self._kernels.decode_ids, packed, *tables)
        with self._lock:
            out = self._room
            size = decode(out)
            while size + 15 > len(out):
                out = np.empty(size + 15, np.uint8)
                size = decode(out)
            return made_of(out.data[:size]) if size >= 0 else None


class BytesEncoder:
    """UTF-8 bytes to ids by the kernels, with a cache of pre-tokens. For one thread; others work with copies of it.

    Args:
        tokenizer: whose ids.
        first_slots: size of the empty cache, a power of two; a slot takes 32 bytes, and half of them get filled.
        max_slots: size at which a full cache is emptied instead of enlarged.
    """

    def __init__(self, tokenizer: Tokenizer, first_slots: int = 1 << 20, max_slots: int = 1 << 21) -> None:
        from tokenizer.kernels import encode as kernels
        from tokenizer.kernels.machine import words_of

        self._kernels, self._words_of = kernels, words_of
        ids = tokenizer._ids
        lefts, rights, products = np.array(tokenizer._merge_ids, np.uint32).reshape(-1, 3).T.copy()
        first_product = int(products[0]) if len(products) else 0
        in_order = np.array_equal(products, first_product + np.arange(len(products)))
        self._rules = kernels.Rules(
            # At most four fifths full, and no larger: what does not fit the processor's nearer cache is slow.
            pairs=_zeroed_words(1 << max(10, (5 * len(products) // 4).bit_length())),
            products=products,
            first_product=first_product if in_order else -1,
            byte_ids=np.array([ids[bytes([byte])] for byte in range(256)], np.uint32),
            byte_pairs=np.empty(1 << 16, np.uint32),
        )
        kernels.fill_rules(lefts, rights, self._rules)
        work = self._empty_work(self._kernels.PIECE)
        self._classes = pretokenize.unicode_classes()
        self._special_tokens = pretokenize.special_token_arrays(tokenizer.special_tokens)
        self._special_ids = np.array([tokenizer.special_ids[token] for token in tokenizer.special_tokens], np.uint32)
        self._shared = SharedCache(kernels, kernels.SLOT * first_slots, kernels.SLOT * max_slots)
        self._set_tables(work)

    def learn_vocabulary(self, tokenizer: Tokenizer) -> None:
        """Fill a quarter of the empty cache with pre-tokens that are tokens, for good: those with the lowest ids."""
        room, longest = len(self._cache.slots) // self._kernels.SLOT // 4, self._kernels.INLINE_BYTES
        tokens = [token for token in tokenizer.vocab.values() if 0 < len(token) <= longest and b"\xff" not in token]
        tokens = tokens[:room]
        text = np.frombuffer(b"".join(tokens) + PADDING_BYTES, np.uint8)
        starts = np.cumsum([0, *map(len, tokens)], dtype=np.uint32)
        ids = np.empty(len(text) + 3, np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self._kernels.encode_pretokens(text, starts, len(tokens), self._tables, ids, np.uint64(0))
        slots = self._shared.cache.slots.reshape(-1, self._kernels.SLOT)
        own = slots[slots[:, -1] >> np.uint64(32) == 1]  # one id: the others are not what the merges make of them
        self._shared.own_words = own.reshape(-1)
        self._shared.forget()

    def _set_tables(self, work: Any) -> None:
        """Say to the kernel where its tables are: after each change of the cache or of the scratch space (`work`)."""
        cache = self._shared.cache
        parts = self._classes, self._special_tokens, self._special_ids, self._rules, cache, work
        tables = self._words_of(self._kernels.Tables(*parts))
        # Last: Ctrl-C must not leave addresses of what has been freed. What `parts` holds, this object keeps alive.
        self._cache, self._work, self._tables = cache, work, tables

    def copy(self) -> "BytesEncoder":
        """One for another thread, made before this one begins: the same tables and cache."""
        self._shared.num_users += 1
        other = copy.copy(self)
        other._set_tables(self._empty_work(self._kernels.PIECE))
        return other

    def _empty_work(self, longest: int) -> Any:
        num_ranks = len(self._rules.products)
        return self._kernels.Work(
            keys=np.empty(2 * self._kernels.BATCH, np.uint64),
            homes=np.empty(self._kernels.BATCH, np.uint64),
            needed=np.zeros(1, np.int64),
            ids=np.empty(longest, np.uint32),
            ranks=np.empty(longest, np.uint32),
            after=np.empty(longest, np.int32),
            before=np.empty(longest, np.int32),
            later=np.empty(longest, np.int32),
            earlier=np.empty(longest, np.int32),
            heap=np.empty(longest, np.uint64),
            first=np.full(num_ranks, -1, np.int32),
            last=np.full(num_ranks, -1, np.int32),
            waiting=np.zeros(num_ranks // 64 + 1, np.uint64),
        )

    def encode(self, text: NDArray[np.uint8], size: int, starts: NDArray[np.uint32], ids: NDArray[Any]) -> int:
        """Write the ids of text[:size] to `ids`; their number.

        Args:
            text: UTF-8, after which PADDING bytes must be readable.
            size: length of the text.
            starts: scratch, room for size + PADDING.
            ids: of an integer type that holds every id; room for size + 3.
        """
        if text.flags.writeable:  # one compiled kernel for all callers
            text = text.view()
            text.flags.writeable = False
        if self._cache is not self._shared.cache:
            self._set_tables(self._work)
        position, count = self._kernels.encode_text(text, 0, size, self._tables, starts, ids)
        while position < size:
            if self._work.needed[0] > len(self._work.ids):
                self._set_tables(self._empty_work(int(self._work.needed[0])))
            else:
                self._shared.make_room(self._cache)
                self._set_tables(self._work)
            position, added = self._kernels.encode_text(text, position, size, self._tables, starts, ids[count:])
            count += added
        if len(self._work.ids) > MAX_KEPT_WORK:
            self._set_tables(self._empty_work(self._kernels.PIECE))
        return count


class SharedCache:
    """The cache of pre-tokens that all threads use now; it grows, or is emptied when it has grown enough.

    Args:
        kernels: `tokenizer.kernels.encode`.
        first_words: size of the empty cache, a power of two.
        max_words: size at which a full cache is emptied instead of enlarged.
    """

    def __init__(self, kernels: Any, first_words: int, max_words: int) -> None:
        self._kernels, self._max_words = kernels, max_words
        self._lock = threading.Lock()
        self.num_users = 1
        self.own_words = np.empty(0, np.uint64)  # slots that are never forgotten
        self.cache = self._with_own_words(self.empty(first_words))  # loads the kernel now, not amid the text

    def empty(self, words: int) -> Any:
        """A cache with nothing in it."""
        spill, used = np.empty(words // 2, np.uint32), np.zeros(2, np.int64)
        return self._kernels.Cache(_zeroed_words(words), spill, used, 65 - words.bit_length())

    def make_room(self, full: Any) -> None:
        """Put another cache in place of `full`, unless another thread has done so: twice as large, or an empty one.

        The other threads use and fill `full` until they see that; what they put there meanwhile is met anew.
        """
        with self._lock:
            if self.cache is not full:
                return
            slots, spill, used, _ = full
            try:
                if 2 * len(slots) > self._max_words:
                    raise MemoryError
                larger = self.empty(2 * len(slots))
            except MemoryError:
                if self.num_users == 1:
                    self.forget()
                else:
                    self.cache = self._with_own_words(self.empty(len(slots)))
                return
            self._kernels.rebuild(slots, larger.slots, larger.shift)
            # After the slots: what these refer to has been written.
            size = min(int(used[1]), len(spill))
            larger.spill[:size] = spill[:size]
            larger.used[:] = int(used[0]), size
            self.cache = larger

    def forget(self) -> None:
        """Leave nothing in the cache but its own words; no other thread may be using it."""
        self.cache.slots[:] = 0
        self._with_own_words(self.cache)

    def _with_own_words(self, cache: Any) -> Any:
        self._kernels.rebuild(self.own_words, cache.slots, cache.shift)
        cache.used[:] = len(self.own_words) // self._kernels.SLOT, 0
        return cache


def _zeroed_words(count: int) -> NDArray[np.uint64]:
    """So many words, of which none but the first of each eight begins a line of the processor's cache."""
    room = np.zeros(count + 8, np.uint64)
    begin = -room.ctypes.data % 64 // 8
    return room[begin : begin + count]


def _utf8_text(data: bytes | memoryview) -> str:
    """UTF-8 as a string, with U+FFFD for bytes that are none."""
    return str(data, "utf-8", "replace")


def _replace_lone_surrogates(text: str) -> str:
    """Pairs of surrogates become their character, single ones U+FFFD.

    >>> _replace_lone_surrogates("\\ud83d\\ude00 \\ud83d")
    '😀 �'
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _warn_of_other_classes(recorded: Mapping[str, str], folder: Path) -> None:
    if recorded.get("regex", regex.__version__) == regex.__version__:
        return
    here = pretokenize.unicode_version()
    if recorded.get("classes") != here["classes"]:
        warnings.warn(
            f"{folder} was made with regex {recorded['regex']}; regex {here['regex']} here takes some characters for "
            "other kinds, so text that has them may get other ids",
            stacklevel=3,
        )
