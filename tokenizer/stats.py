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
from tokenizer.encode import SEPARATOR, encode_files

NUM_LONGEST = 10
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
    vocabulary occur), and over documents `tokens_per_document`: mean, median, 95th percentile and maximum.
    """
    tokenizer.compile()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "ids.npy"
        start = time.perf_counter()
        record = encode_files(tokenizer, input_paths, output, num_threads=num_threads, errors=errors, progress=progress)
        seconds = time.perf_counter() - start
        ids = np.load(output, mmap_mode="r")
        used = np.count_nonzero(np.bincount(ids, minlength=tokenizer.vocab_size))
        ends = np.flatnonzero(ids == tokenizer.special_ids.get(SEPARATOR, -1))
    bounds = np.concatenate([[-1], ends, [record["num_tokens"]]])
    lengths = (np.diff(bounds) - 1)[: record["num_documents"]]
    return {
        "num_bytes": record["num_bytes"],
        "num_tokens": record["num_tokens"],
        "num_documents": record["num_documents"],
        "bytes_per_token": record["num_bytes"] / max(record["num_tokens"], 1),
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
    console = Console(highlight=False)
    console.print(table, markup=False)
    if len(tokenizers) == 2:
        share = overlap(*tokenizers.values())
        console.print(f"merged tokens that both vocabularies have: {share:.1%} of the smaller one")


def _cells(tokenizer: Tokenizer, figures: dict[str, Any]) -> dict[str, str]:
    per_document = figures["tokens_per_document"]
    longest = [token.decode("utf-8", "backslashreplace") for token in longest_tokens(tokenizer)]
    return {
        "vocabulary": f"{tokenizer.vocab_size:,}",
        "bytes": f"{figures['num_bytes']:,}",
        "tokens": f"{figures['num_tokens']:,}",
        "bytes per token": f"{figures['bytes_per_token']:.3f}",
        "different tokens": f"{figures['tokens_used']:,}",
        "encoding, MB/s": f"{figures['megabytes_per_second']:.1f}",
        "documents": f"{figures['num_documents']:,}",
        **{f"tokens per document, {name}": f"{number:,.1f}" for name, number in per_document.items()},
        "longest tokens": "\n".join(map(repr, longest)),
    }
