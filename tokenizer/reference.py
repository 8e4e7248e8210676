"""Byte-level BPE as the textbook tells it: what to read first, and what the tests compare everything fast with.

Training counts pre-tokens, then merges the most frequent pair of neighbours again and again. Encoding splits text into
pre-tokens and applies the merges to each, in the order in which they were learned. CS336 A1 section 2.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

from tokenizer.pretokenize import pretokens, split_special_tokens

Pair = tuple[bytes, bytes]


def count_pretokens(text: str, special_tokens: Sequence[str]) -> Counter[bytes]:
    """How often each pre-token stands in `text`; special tokens separate pre-tokens and are not counted."""
    counts: Counter[bytes] = Counter()
    for piece, is_special in split_special_tokens(text, special_tokens):
        if not is_special:
            counts.update(pretoken.encode() for pretoken in pretokens(piece))
    return counts


def count_pairs(words: Mapping[tuple[bytes, ...], int]) -> Counter[Pair]:
    """How often each pair of neighbours stands in all words together."""
    pairs: Counter[Pair] = Counter()
    for word, count in words.items():
        for pair in itertools.pairwise(word):
            pairs[pair] += count
    return pairs


def merge_pair(word: tuple[bytes, ...], pair: Pair) -> tuple[bytes, ...]:
    """`word` with every occurrence of `pair` joined, from left to right.

    >>> merge_pair((b"a", b"a", b"a", b"b"), (b"a", b"a"))
    (b'aa', b'a', b'b')
    """
    merged: list[bytes] = []
    position = 0
    while position < len(word):
        if word[position : position + 2] == pair:
            merged.append(pair[0] + pair[1])
            position += 2
        else:
            merged.append(word[position])
            position += 1
    return tuple(merged)


def learn_merges(pretoken_counts: Mapping[bytes, int], num_merges: int) -> list[Pair]:
    """The merges in the order in which they are learned; fewer than `num_merges` if no pair is left.

    The most frequent pair goes first; of several, the lexicographically greatest pair of byte strings.

    >>> counts = {b"low": 5, b"lower": 2, b"widest": 3, b"newest": 6}
    >>> [(first + b" " + second).decode() for first, second in learn_merges(counts, 6)]
    ['s t', 'e st', 'o w', 'l ow', 'w est', 'n e']
    """
    words = {tuple(bytes([byte]) for byte in pretoken): count for pretoken, count in pretoken_counts.items()}
    merges: list[Pair] = []
    while len(merges) < num_merges:
        pairs = count_pairs(words)
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = {merge_pair(word, best): count for word, count in words.items()}
    return merges


def train_bpe(text: str, vocab_size: int, special_tokens: Sequence[str]) -> tuple[dict[int, bytes], list[Pair]]:
    """Vocabulary (the special tokens, the 256 bytes, then a token per merge) and merges learned from `text`."""
    merges = learn_merges(count_pretokens(text, special_tokens), vocab_size - 256 - len(special_tokens))
    tokens = [token.encode() for token in special_tokens]
    tokens += [bytes([byte]) for byte in range(256)]
    tokens += [first + second for first, second in merges]
    return dict(enumerate(tokens)), merges


def encode(text: str, vocab: Mapping[int, bytes], merges: Sequence[Pair], special_tokens: Sequence[str]) -> list[int]:
    """The token ids of `text`.

    >>> vocab, merges = train_bpe("at the cat<|end|>", 259, ["<|end|>"])
    >>> [vocab[i] for i in encode("that hat<|end|>", vocab, merges, ["<|end|>"])]
    [b'th', b'at', b' ', b'h', b'at', b'<|end|>']
    """
    ids = {token: i for i, token in vocab.items()}
    result: list[int] = []
    for piece, is_special in split_special_tokens(text, special_tokens):
        if is_special:
            result.append(ids[piece.encode()])
            continue
        for pretoken in pretokens(piece):
            word = tuple(bytes([byte]) for byte in pretoken.encode())
            for pair in merges:
                word = merge_pair(word, pair)
            result.extend(ids[token] for token in word)
    return result


def decode(ids: Sequence[int], vocab: Mapping[int, bytes]) -> str:
    """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
    return b"".join(vocab[i] for i in ids).decode(errors="replace")
