"""Byte-level BPE from scratch: train a tokenizer, turn text into ids and ids into text."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizer.bpe import Tokenizer
    from tokenizer.train import train_bpe

__all__ = ["Tokenizer", "train_bpe"]


def __getattr__(name: str) -> Any:
    """Import on first use: `python -m tokenizer --help` and `tokenizer.files` need neither."""
    if name == "Tokenizer":
        from tokenizer.bpe import Tokenizer

        return Tokenizer
    if name == "train_bpe":
        from tokenizer.train import train_bpe

        return train_bpe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
