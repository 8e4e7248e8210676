"""How well tokenizers fit a text."""

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tokenizer.bpe import Tokenizer
from tokenizer.chunks import Errors, Paths
from tokenizer.encode import encode_files
from tokenizer.files import END_OF_TEXT

NUM_LONGEST = 10
NUM_SAMPLED = 10  # documents, the same ones for every tokenizer that separates them
WIDTH = 30  # characters of a token that are shown whole
PILE_BYTES = 825e9  # Gao et al. 2020
QUANTILES = {"median": 0.5, "95%": 0.95, "longest": 1.0}


def text_stats(
    tokenizer: Tokenizer,
    input_paths: Paths,
    num_threads: int | None = None,
    errors: Errors = "strict",
    progress: bool = False,
) -> dict[str, Any]:
    """Figures of one tokenizer on a text.

    `bytes_per_token`, `megabytes_per_second` (encoding to a file), `num_tokens`, `tokens_used` (how many ids of the
    vocabulary occur), over documents `tokens_per_document`: mean, median, 95th percentile and maximum, and over
    NUM_SAMPLED documents drawn at random, always the same ones, `sampled_bytes_per_token`.
    """
    tokenizer.compile()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "ids.npy"
        start = time.perf_counter()
        record = encode_files(tokenizer, input_paths, output, num_threads=num_threads, errors=errors, progress=progress)
        seconds = time.perf_counter() - start
        ids = np.load(output, mmap_mode="r")
        used = np.count_nonzero(np.bincount(ids, minlength=tokenizer.vocab_size))
        ends = np.flatnonzero(ids == tokenizer.special_ids.get(END_OF_TEXT, -1))
        bounds = np.concatenate([[-1], ends, [record["num_tokens"]]])
        lengths = (np.diff(bounds) - 1)[: record["num_documents"]]
        drawn = np.random.default_rng(0).permutation(len(lengths))[:NUM_SAMPLED]
        num_sampled_bytes = sum(len(tokenizer.decode_bytes(ids[bounds[i] + 1 : bounds[i + 1]])) for i in drawn)
    return {
        "num_bytes": record["num_bytes"],
        "num_tokens": record["num_tokens"],
        "num_documents": record["num_documents"],
        "bytes_per_token": record["num_bytes"] / max(record["num_tokens"], 1),
        "sampled_bytes_per_token": num_sampled_bytes / max(int(lengths[drawn].sum()), 1),
        "megabytes_per_second": record["num_bytes"] / seconds / 1e6,
        "tokens_used": int(used),
        "tokens_per_document": {
            "mean": float(lengths.mean()) if len(lengths) else 0.0,
            **{name: float(np.quantile(lengths, q)) if len(lengths) else 0.0 for name, q in QUANTILES.items()},
        },
    }


def longest_tokens(tokenizer: Tokenizer) -> list[bytes]:
    """The NUM_LONGEST longest tokens, special tokens apart; the longest first, equals in the order of their ids."""
    special = {token.encode() for token in tokenizer.special_tokens}
    tokens = [token for token in tokenizer.vocab.values() if token not in special]
    return sorted(tokens, key=len, reverse=True)[:NUM_LONGEST]


def overlap(a: Tokenizer, b: Tokenizer) -> float:
    """Share of the tokens of the smaller vocabulary that the other has too, single bytes and special tokens apart.

    >>> single = {i: bytes([i]) for i in range(256)}
    >>> a = Tokenizer({**single, 256: b"th", 257: b"the"}, [(b"t", b"h"), (b"th", b"e")])
    >>> b = Tokenizer({**single, 256: b"th", 257: b"in"}, [(b"t", b"h"), (b"i", b"n")])
    >>> overlap(a, b)
    0.5
    """
    products = [{left + right for left, right in tokenizer.merges} for tokenizer in (a, b)]
    return len(products[0] & products[1]) / max(min(map(len, products)), 1)


def unshared(a: Tokenizer, b: Tokenizer) -> list[bytes]:
    """The first NUM_LONGEST tokens that `a` has learned and `b` has not.

    >>> single = {i: bytes([i]) for i in range(256)}
    >>> a = Tokenizer({**single, 256: b"th", 257: b"the"}, [(b"t", b"h"), (b"th", b"e")])
    >>> b = Tokenizer({**single, 256: b"th", 257: b"in"}, [(b"t", b"h"), (b"i", b"n")])
    >>> unshared(a, b)
    [b'the']
    """
    known = set(b.vocab.values())
    return [token for token in (left + right for left, right in a.merges) if token not in known][:NUM_LONGEST]


def print_stats(
    tokenizers: Mapping[str, Tokenizer], input_paths: Paths, num_threads: int | None, errors: Errors, progress: bool
) -> None:
    """Print a table with one column per tokenizer, and for two of them how much of their vocabularies is shared."""
    from rich.console import Console
    from rich.table import Table

    figures = {
        name: text_stats(tokenizer, input_paths, num_threads, errors, progress)
        for name, tokenizer in tokenizers.items()
    }
    columns = [_cells(tokenizers[name], figures[name]) for name in tokenizers]
    table = Table("", *map(os.path.normpath, tokenizers))
    for title in columns[0]:
        table.add_row(title, *(column[title] for column in columns))
    console = Console(highlight=False, emoji=False)
    console.print(table, markup=False)
    if len(tokenizers) == 2:
        share = overlap(*tokenizers.values())
        console.print(f"merged tokens that both vocabularies have: {share:.1%} of the smaller one")
        (a, one), (b, other) = tokenizers.items()
        for name, tokens in ((a, unshared(one, other)), (b, unshared(other, one))):
            console.print(f"first ones that only {os.path.normpath(name)} has: {_shown(tokens, ', ')}", markup=False)


def _cells(tokenizer: Tokenizer, figures: dict[str, Any]) -> dict[str, str]:
    per_document = figures["tokens_per_document"]
    rate = figures["megabytes_per_second"]
    return {
        "vocabulary": f"{tokenizer.vocab_size:,}",
        "bytes": f"{figures['num_bytes']:,}",
        "tokens": f"{figures['num_tokens']:,}",
        "bytes per token": f"{figures['bytes_per_token']:.3f}",
        f"bytes per token, {NUM_SAMPLED} documents": f"{figures['sampled_bytes_per_token']:.3f}",
        "different tokens": f"{figures['tokens_used']:,}",
        "encoding, MB/s": f"{rate:.1f}",
        "the Pile (825 GB) at that rate, hours": f"{PILE_BYTES / 1e6 / rate / 3600:,.1f}" if rate else "-",
        "documents": f"{figures['num_documents']:,}",
        **{f"tokens per document, {name}": f"{number:,.1f}" for name, number in per_document.items()},
        "longest tokens": _shown(longest_tokens(tokenizer), "\n"),
    }


def _shown(tokens: list[bytes], separator: str) -> str:
    texts = [token.decode("utf-8", "backslashreplace") for token in tokens]
    return separator.join(
        repr(text) if len(text) <= WIDTH else f"{text[: WIDTH - 10]!r}… {len(token)} bytes"
        for text, token in zip(texts, tokens, strict=True)
    )
