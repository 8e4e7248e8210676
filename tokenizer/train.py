"""Train a byte-level BPE tokenizer: count pre-tokens, then merge the most frequent pair again and again."""

import contextlib
import gc
import heapq
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenizer import reference
from tokenizer.chunks import Errors, Paths, check_errors, default_threads, list_paths, read_text
from tokenizer.pretokenize import PretokenCounts, check_special_tokens, count_pretokens
from tokenizer.progress import progress_bar

if TYPE_CHECKING:
    from tokenizer.kernels.merge import Pairs, State

Merge = tuple[bytes, bytes]

SMALL_BYTES = 1 << 20  # up to here plain Python is done before the compiled kernels have been loaded or compiled
LONG_BYTES = 1 << 12  # but not with longer pre-tokens, which it rewrites as a whole at every merge


def train_bpe(
    input_path: Paths,
    vocab_size: int,
    special_tokens: list[str],
    *,
    num_threads: int | None = None,
    errors: Errors = "strict",
    progress: bool = False,
) -> tuple[dict[int, bytes], list[Merge]]:
    """A vocabulary of `vocab_size` tokens and the merges that make it, learned from text files.

    Pre-tokens are counted in parallel and pairs of tokens are merged incrementally; the result is that of the textbook
    (`tokenizer.reference`) and does not depend on the number of threads. CS336 A1 section 2.4 (problem train_bpe).

    Returns:
        vocab: id -> bytes: the special tokens in the given order, the 256 bytes, then one token per merge. It has fewer
            tokens than asked for, and a line on stderr says so, if the text has no more pairs.
        merges: in the order in which they were learned. Of pairs that are equally frequent the lexicographically
            greatest pair of byte strings goes first.

    Args:
        input_path: one UTF-8 text file or several; .gz and .xz are decompressed.
        vocab_size: number of tokens, special tokens included.
        special_tokens: strings that separate pre-tokens and are not counted; the longest match goes first.
        num_threads: by default one per processor that this process may use.
        errors: "strict" refuses bytes that are no UTF-8, "replace" reads U+FFFD instead of them, as `bytes.decode`.
        progress: show progress on stderr even if it is no terminal.

    Raises:
        ValueError: for a vocabulary smaller than the special tokens and bytes, an empty or repeated special token, text
            that is not UTF-8 (with file and offset), a file that changes while it is read.
    """
    check_special_tokens(special_tokens)
    check_errors(errors, special_tokens)
    num_threads = default_threads(num_threads)
    num_merges = vocab_size - 256 - len(special_tokens)
    if num_merges < 0:
        least = f"256 bytes + {len(special_tokens)} special tokens = {256 + len(special_tokens)}"
        raise ValueError(f"vocab_size={vocab_size} must be at least {least}")
    paths = list_paths(input_path)
    if is_small(paths):
        small_counts: defaultdict[bytes, int] = defaultdict(int)
        for path in paths:
            for pretoken, count in reference.count_pretokens(read_text(path, errors), special_tokens).items():
                small_counts[pretoken] += count
        if max(map(len, small_counts), default=0) > LONG_BYTES:
            merges = train_from_counts(PretokenCounts.from_dict(small_counts), num_merges, progress=progress)
        else:
            merges = learn_merges(small_counts, num_merges)
    else:
        counts = count_pretokens(paths, special_tokens, num_threads=num_threads, errors=errors, progress=progress)
        merges = train_from_counts(counts, num_merges, progress=progress)
    if len(merges) < num_merges:
        made = vocab_size - num_merges + len(merges)
        print(f"tokenizer: the text has no more pairs to merge: {made} tokens instead of {vocab_size}", file=sys.stderr)
    tokens = [token.encode() for token in special_tokens]
    tokens += [bytes([byte]) for byte in range(256)]
    tokens += [first + second for first, second in merges]
    return dict(enumerate(tokens)), merges


def is_small(paths: Sequence[Path]) -> bool:
    """Whether the files are plain text of at most `SMALL_BYTES` together."""
    if any(path.suffix in (".gz", ".xz") for path in paths):
        return False
    return sum(path.stat().st_size for path in paths) <= SMALL_BYTES


class _Candidate:
    """A pair in the queue of `learn_merges`; the least is merged first."""

    __slots__ = ("count", "pair")

    def __init__(self, count: int, pair: Merge):
        self.count, self.pair = count, pair

    def __lt__(self, other: "_Candidate") -> bool:
        return self.count > other.count if self.count != other.count else self.pair > other.pair


def learn_merges(pretoken_counts: Mapping[bytes, int], num_merges: int) -> list[Merge]:
    """The merges that `reference.learn_merges` learns, incrementally, without compiled code: quick for small texts.

    It remembers in which pre-tokens each pair stands, so that a merge touches only these; and it keeps a queue of pairs
    by count, where a count that has become less is corrected when it comes up.

    >>> learn_merges({b"low": 5, b"lower": 2, b"widest": 3, b"newest": 6}, 3)
    [(b's', b't'), (b'e', b'st'), (b'o', b'w')]
    """
    words = [tuple(bytes([byte]) for byte in pretoken) for pretoken in pretoken_counts]
    counts = list(pretoken_counts.values())
    pair_counts: defaultdict[Merge, int] = defaultdict(int)
    standing_in: defaultdict[Merge, set[int]] = defaultdict(set)
    for i, word in enumerate(words):
        for pair in itertools.pairwise(word):
            pair_counts[pair] += counts[i]
            standing_in[pair].add(i)
    queue = [_Candidate(count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(queue)
    merges: list[Merge] = []
    while queue and len(merges) < num_merges:
        best = heapq.heappop(queue)
        count = pair_counts[best.pair]
        if count != best.count:
            if count > 0:
                heapq.heappush(queue, _Candidate(count, best.pair))
            continue
        merges.append(best.pair)
        appeared: set[Merge] = set()
        for i in standing_in.pop(best.pair):
            for pair in itertools.pairwise(words[i]):
                pair_counts[pair] -= counts[i]
            words[i] = reference.merge_pair(words[i], best.pair)
            for pair in itertools.pairwise(words[i]):
                pair_counts[pair] += counts[i]
                if i not in standing_in[pair]:
                    standing_in[pair].add(i)
                    appeared.add(pair)
        for pair in appeared:
            heapq.heappush(queue, _Candidate(pair_counts[pair], pair))
    return merges


def train_from_counts(counts: PretokenCounts, num_merges: int, *, progress: bool = False) -> list[Merge]:
    """The merges learned from counts of pre-tokens: what `train_bpe` does after counting."""
    from tokenizer.kernels import merge

    state = indexed(new_state(counts, num_merges))
    with progress_bar("merging", num_merges, "merges", progress) as show:
        while (situation := merge.learn_merges(state, 5_000_000)) != merge.DONE:
            if situation == merge.NEEDS_ROOM:
                state = with_more_room(state)
            elif situation == merge.NEEDS_LOWER_CUTOFF:
                state.numbers[merge.CUTOFF] = max(1, state.numbers[merge.CUTOFF] // 4)
                state = indexed(state)
            show(int(state.numbers[merge.NUM_MERGES]))
        show(int(state.numbers[merge.NUM_MERGES]))
    with no_garbage_collection():
        pairs = state.merges[: state.numbers[merge.NUM_MERGES]].tolist()
        text, offsets = state.tokens.text.tobytes(), state.tokens.offsets[: 256 + len(pairs) + 1].tolist()
        tokens = [text[begin:end] for begin, end in itertools.pairwise(offsets)]
        return [(tokens[first], tokens[second]) for first, second in pairs]


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Many new tuples make Python look for garbage among all that Numba keeps: a tenth of the time of a training."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def new_state(counts: PretokenCounts, num_merges: int) -> "State":
    """What the merge loop works on, before the first merge and with no pair indexed."""
    from tokenizer.kernels import merge

    lengths = np.diff(counts.offsets)
    long_enough = lengths >= 2
    num_words, num_bytes = int(long_enough.sum()), int(lengths[long_enough].sum())
    num_slots = num_bytes + num_words + 1
    if num_slots >= 1 << 32:
        raise ValueError(f"{num_bytes} bytes of distinct pre-tokens are more than the 4 GiB that can be trained on")
    words = merge.Words(np.empty(num_slots, np.int32), np.empty(num_slots, np.uint32), np.empty(num_words, np.int64))
    merge.lay_out(*counts, words)

    num_merges = min(num_merges, num_bytes - num_words)  # a merge makes at least one pre-token shorter
    num_tokens = 256 + num_merges
    offsets = np.zeros(num_tokens + 1, np.int64)
    offsets[:257] = np.arange(257)
    text = np.zeros(256 + 16 * num_merges, np.uint8)
    text[:256] = np.arange(256)

    def side() -> merge.Side:
        return merge.Side(
            np.empty(1 << 16, np.int32),
            np.empty(1 << 16, np.uint32),
            np.empty(num_tokens, np.int32),
            *np.zeros((3, num_tokens), np.int64),
        )

    num_pairs = 1 << min(num_bytes.bit_length(), 17)
    numbers = np.zeros(7, np.int64)
    numbers[merge.CUTOFF] = first_cutoff(int(counts.counts.sum()), num_merges)
    return merge.State(
        words=words,
        tokens=merge.Tokens(text, offsets),
        pairs=new_pairs(num_pairs),
        queue=merge.Queue(*np.empty((2, num_pairs), np.int64)),
        places=np.empty(2 * num_bytes + 1, np.uint32),  # memory that is not written to costs nothing
        left=side(),
        right=side(),
        merges=np.empty((num_merges, 2), np.int32),
        numbers=numbers,
    )


def first_cutoff(num_pretokens: int, num_merges: int) -> int:
    """A guess at a count that the last merge exceeds; too high costs a recount of pairs, too low memory and time."""
    return max(1, num_pretokens // (32 * (num_merges + 1)))


def indexed(state: "State") -> "State":
    """`state` with the pairs that reach its cutoff counted, listed and queued."""
    from tokenizer.kernels import merge

    while merge.index_pairs(state) == merge.NEEDS_ROOM:
        state = with_more_room(state)
    return state


def new_pairs(capacity: int) -> "Pairs":
    """Room for `capacity` pairs, a power of two."""
    from tokenizer.kernels import merge

    firsts, seconds = np.empty((2, capacity), np.int32)
    counts, begins, lengths = np.empty((3, capacity), np.int64)
    return merge.Pairs(firsts, seconds, counts, begins, lengths, np.zeros(4 * capacity, np.uint64))


def with_more_room(state: "State") -> "State":
    """`state` with every array that does not suffice for the next step made at least twice as large."""
    from tokenizer.kernels import merge

    numbers, pairs, tokens = state.numbers, state.pairs, state.tokens
    places, token_bytes = int(numbers[merge.NEEDED_PLACES]), int(numbers[merge.NEEDED_BYTES])
    new_tokens = 2 * min(places, len(tokens.offsets))
    if numbers[merge.NUM_PAIRS] + max(new_tokens, 1) > len(pairs.firsts):
        larger = new_pairs(2 * len(pairs.firsts))
        for field in ("firsts", "seconds", "counts", "begins", "lengths"):
            getattr(larger, field)[: len(pairs.firsts)] = getattr(pairs, field)
        merge.enter_all_pairs(larger, numbers[merge.NUM_PAIRS])
        pairs = larger
    queue_size = max(int(numbers[merge.QUEUE_SIZE]) + new_tokens, len(pairs.firsts))
    queue = [lengthened(array, queue_size) for array in state.queue]
    sides = [
        side._replace(neighbours=lengthened(side.neighbours, places), places=lengthened(side.places, places))
        for side in (state.left, state.right)
    ]
    return state._replace(
        tokens=tokens._replace(
            text=lengthened(tokens.text, int(tokens.offsets[256 + numbers[merge.NUM_MERGES]]) + token_bytes)
        ),
        pairs=pairs,
        queue=merge.Queue(*queue),
        places=lengthened(state.places, int(numbers[merge.PLACES_USED]) + 2 * places),
        left=sides[0],
        right=sides[1],
    )


def lengthened(array: NDArray[Any], length: int) -> NDArray[Any]:
    """`array` if it has at least `length` entries, else one that begins with the same and has twice as many."""
    if len(array) >= length:
        return array
    longer = np.empty(2 * length, array.dtype)
    longer[: len(array)] = array
    return longer
