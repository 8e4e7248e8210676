"""Transformer language models from scratch: layers, optimizer, training, generation."""

from pathlib import Path

VOCAB_SIZES = {"builtin": 2048, "tinystories": 10_000, "owt": 32_000}  # of each corpus, unless said otherwise
DIVERGED_EXIT_CODE = 3  # of a run whose loss was no longer finite


def default_config() -> Path:
    """The configuration below every fit's own: beside the package in a checkout, within it where it is installed."""
    package = Path(__file__).parent
    checkout = package.parent / "configs" / "builtin.yaml"
    return checkout if checkout.is_file() else package / "configs" / "builtin.yaml"
