"""The tokens of a text, seen: in colours on the terminal, or as a web page that needs no other file."""

import html
import os
from collections.abc import Iterator

from tokenizer.bpe import Tokenizer
from tokenizer.files import atomic_write

COLOURS = ("#cfe8ff", "#d9f2d0", "#ffe3c2", "#f6d6ea", "#e5dcff")  # neighbours differ; black reads well on each
SPECIAL_COLOUR = "#c8c8c8"

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{num_tokens} tokens</title>
<style>
body {{ font: 16px/1.9 ui-monospace, monospace; color: #111; background: #fff }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font: 600 1rem system-ui, sans-serif }}
p {{ white-space: pre-wrap; overflow-wrap: anywhere }}
span {{ border-radius: 3px; padding: 2px 0 }}
span:hover {{ outline: 2px solid #333 }}
{styles}
</style>
<h1>{num_tokens:,} tokens, {num_bytes:,} bytes, {bytes_per_token:.2f} bytes per token, vocabulary of {vocab_size:,}</h1>
<p>{spans}</p>
</html>
"""


def colour_tokens(tokenizer: Tokenizer, text: str) -> Iterator[tuple[int, str, int]]:
    """(id, text, colour) of each token; colour -1 is a special token's.

    Bytes of a character that lies in several tokens are written as \\\\xNN.
    """
    special = set(tokenizer.special_ids.values())
    for place, token_id in enumerate(tokenizer.encode(text)):
        shown = tokenizer.vocab[token_id].decode("utf-8", "backslashreplace")
        yield token_id, shown, -1 if token_id in special else place % len(COLOURS)


def print_tokens(tokenizer: Tokenizer, text: str) -> None:
    """Print the tokens of `text` in colours; without colours, where they are cut is shown by `|`."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True, emoji=False)
    tokens = list(colour_tokens(tokenizer, text))
    if console.color_system is None:
        console.print("|".join(shown for _, shown, _ in tokens), markup=False)
    else:
        line = Text()
        for _, shown, colour in tokens:
            line.append(shown.replace("\n", "↵\n"), f"black on {SPECIAL_COLOUR if colour < 0 else COLOURS[colour]}")
        console.print(line)
    console.print(f"{len(tokens):,} tokens, {len(text.encode('utf-8', 'replace')):,} bytes", markup=False)


def write_page(path: str | os.PathLike[str], tokenizer: Tokenizer, text: str) -> None:
    """Write an HTML page with the tokens of `text` in colours; the pointer over a token shows its id and bytes."""
    spans = []
    for token_id, shown, colour in colour_tokens(tokenizer, text):
        title = html.escape(f"{token_id}: {tokenizer.vocab[token_id]!r}")
        body = html.escape(shown).replace("\n", "↵\n")
        spans.append(f'<span class="{"s" if colour < 0 else f"c{colour}"}" title="{title}">{body}</span>')
    num_bytes = len(text.encode("utf-8", "replace"))
    styles = [f".c{i} {{ background: {colour} }}" for i, colour in enumerate(COLOURS)]
    with atomic_write(path, "w") as file:
        file.write(
            PAGE.format(
                num_tokens=len(spans),
                num_bytes=num_bytes,
                bytes_per_token=num_bytes / max(len(spans), 1),
                vocab_size=tokenizer.vocab_size,
                styles="\n".join([*styles, f".s {{ background: {SPECIAL_COLOUR} }}"]),
                spans="".join(spans),
            )
        )
