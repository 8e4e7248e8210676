"""`python -m tokenizer`: train a tokenizer, encode and decode files, and look at what a tokenizer does."""

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizer.files import END_OF_TEXT
from tokenizer.options import Parser, in_one_line

if TYPE_CHECKING:
    from tokenizer.bpe import Tokenizer

BLOCK_IDS = 1 << 16  # decoded at a time


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code: 0 done, 2 bad input (one line on stderr says which), 130 interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    open_closed_streams()
    try:
        options = build_parser(argv).parse_args(argv)
    finally:
        flush_stdout()  # of --help
    if sys.platform == "win32":
        print("error: tokenizer runs on Linux and macOS: on Windows, install and run it inside WSL2", file=sys.stderr)
        return 2
    try:
        options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        again = "; the same command goes on from here" if options.verb == "encode" else ""
        print(f"interrupted{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        flush_stdout()
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "new thread" not in str(error):
            raise
        print("error: the system gives no more threads: pass a smaller --num_threads", file=sys.stderr)
        return 2
    except MemoryError:
        print("error: out of memory: give it more, or less text at a time (--shard)", file=sys.stderr)
        return 2
    return 0


def open_closed_streams() -> None:
    """Put nothing in the place of standard streams that the caller has closed, as `<&-` and `2>&-` do."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def flush_stdout() -> None:
    """Write out what is left; into nothing, now and at the end, where the reader, `head` say, has seen enough."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser(argv: Sequence[str]) -> Parser:
    """The command line; the options of `bench` are added when `argv` asks for it."""
    parser = Parser(prog="python -m tokenizer", description="Exact byte-level BPE, fast.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    verb = verbs.add_parser("train", help="learn a vocabulary from text files", description=train.__doc__)
    verb.set_defaults(run=train)
    add_text(verb)
    verb.add_argument("--vocab_size", type=int, required=True, help="tokens in all: special ones, 256 bytes, merges")
    verb.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write the tokenizer into")
    add_special_tokens(verb)
    add_work(verb)

    verb = verbs.add_parser("encode", help="turn text into token ids", description=encode.__doc__)
    verb.set_defaults(run=encode)
    add_text(verb)
    add_tokenizer(verb)
    verb.add_argument("--output", type=Path, metavar="FILE.npy", help="where the ids go; without it they are printed")
    verb.add_argument("--shard", metavar="I/N", help="encode only part I of N; all parts joined are the whole")
    add_work(verb)

    verb = verbs.add_parser("decode", help="turn token ids into text", description=decode.__doc__)
    verb.set_defaults(run=decode)
    verb.add_argument("ids", nargs="+", metavar="IDS", help="an .npy file of ids, or the ids themselves")
    add_tokenizer(verb)
    verb.add_argument("--output", type=Path, metavar="FILE", help="where the text goes; without it, it is printed")

    verb = verbs.add_parser("stats", help="how well a tokenizer fits a text", description=stats.__doc__)
    verb.set_defaults(run=stats)
    add_text(verb)
    add_tokenizer(verb)
    verb.add_argument("--other", metavar="PATH", help="a second tokenizer, to compare with")
    add_work(verb)

    verb = verbs.add_parser("show", help="see where a text is cut into tokens", description=show.__doc__)
    verb.set_defaults(run=show)
    verb.add_argument("text", nargs="?", help="the text; by default standard input")
    add_tokenizer(verb)
    verb.add_argument("--html", type=Path, metavar="FILE", help="write a page instead; it needs nothing else")

    verb = verbs.add_parser("export", help="write a tokenizer for other tools", description=export.__doc__)
    verb.set_defaults(run=export)
    verb.add_argument(
        "format", choices=("hf", "tiktoken", "gpt2"), help="tokenizer.json, .tiktoken, or GPT-2's two files"
    )
    add_tokenizer(verb)
    verb.add_argument("--output", type=Path, required=True, metavar="PATH", help="file to write; for gpt2 a folder")

    verb = verbs.add_parser(
        "bench",
        help="speed and memory beside every tokenizer library that is installed",
        description="Measure this tokenizer and each installed rival on the same text, on the same cores, in turn.",
    )
    if "bench" in argv[:1]:
        from tokenizer import bench

        bench.add_arguments(verb)
        verb.set_defaults(run=bench.run)
    return parser


def add_text(verb: argparse.ArgumentParser) -> None:
    """The text files that a verb reads."""
    verb.add_argument("input", nargs="+", type=Path, metavar="TEXT", help="UTF-8 text files (.txt, .gz, .xz), one text")


def add_tokenizer(verb: argparse.ArgumentParser) -> None:
    """The tokenizer that a verb uses."""
    verb.add_argument(
        "--tokenizer", required=True, metavar="PATH", help="tokenizer folder, tokenizer.json, or .tiktoken file"
    )


def add_special_tokens(verb: argparse.ArgumentParser) -> None:
    """The special tokens that a verb keeps whole."""
    verb.add_argument(
        "--special_tokens",
        nargs="*",
        default=[END_OF_TEXT],
        metavar="TOKEN",
        help="strings that are never cut; all words up to the next option",
    )


def add_work(verb: argparse.ArgumentParser) -> None:
    """How a verb works through files."""
    verb.add_argument("--num_threads", type=int, metavar="N", help="default: one per processor")
    verb.add_argument(
        "--errors", choices=("strict", "replace"), default="strict", help="bytes that are no UTF-8: refuse, or U+FFFD"
    )
    verb.add_argument("--progress", action="store_true", help="draw a progress bar also where stderr is no terminal")


def load(path: str) -> "Tokenizer":
    """The tokenizer in a folder, a `tokenizer.json`, or a `.tiktoken` file, where `<|endoftext|>` takes a free id."""
    from tokenizer import files
    from tokenizer.bpe import Tokenizer

    if path.endswith(".tiktoken"):
        vocab, merges = files.read_tiktoken(path, [END_OF_TEXT])
        return Tokenizer(vocab, merges, [END_OF_TEXT])
    if path.endswith(".json"):
        return Tokenizer(*files.read_hf(path))
    return Tokenizer.from_directory(path)


def train(options: argparse.Namespace) -> None:
    """Learn byte-level BPE merges from text files and write the tokenizer's folder."""
    from tokenizer import files
    from tokenizer.bpe import Tokenizer
    from tokenizer.train import train_bpe

    if (options.output / "meta.json").exists() and "sha256" not in files.read_meta(options.output):
        raise ValueError(f"{options.output} is a dataset's folder: write the tokenizer into {options.output}/tokenizer")
    for token in options.special_tokens:
        if os.path.isfile(token):  # noqa: PTH113 - which, unlike Path.is_file, bears a token too long for a name
            raise ValueError(f"--special_tokens takes every word after it, so put {token} before it")
    vocab, merges = train_bpe(
        options.input,
        options.vocab_size,
        options.special_tokens,
        num_threads=options.num_threads,
        errors=options.errors,
        progress=options.progress,
    )
    tokenizer = Tokenizer(vocab, merges, options.special_tokens)
    tokenizer.save(options.output)
    print(f"{tokenizer.vocab_size} tokens, {len(merges)} of them merges, in {options.output}")


def encode(options: argparse.Namespace) -> None:
    """Print the token ids of text files, or write them to a one-dimensional .npy file and describe it in meta.json.

    The file is of uint16, or of uint32 where the vocabulary has more than 65,536 ids.
    """
    if options.shard is not None and options.output is None:
        raise ValueError(f"--shard {options.shard} needs --output FILE.npy")
    tokenizer = load(options.tokenizer)
    if options.output is None:
        from tokenizer.chunks import default_threads, read_text

        default_threads(options.num_threads)  # refuses what is no number of threads
        for path in options.input:
            print(*tokenizer.encode(read_text(path, options.errors)))
        return
    from tokenizer.encode import encode_files

    record = encode_files(
        tokenizer,
        options.input,
        options.output,
        num_threads=options.num_threads,
        shard=options.shard,
        errors=options.errors,
        progress=options.progress,
    )
    print(
        f"{record['num_tokens']:,} {record['dtype']} ids from {record['num_bytes']:,} bytes "
        f"in {record['num_documents']:,} documents: {options.output}"
    )


def decode(options: argparse.Namespace) -> None:
    """Write the text of token ids."""
    import contextlib
    import tokenize

    import numpy as np

    from tokenizer.files import atomic_write

    tokenizer = load(options.tokenizer)
    if len(options.ids) == 1 and options.ids[0].endswith(".npy"):
        try:
            ids = np.load(options.ids[0], mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, SyntaxError, tokenize.TokenError) as error:
            raise ValueError(f"{options.ids[0]} is no .npy file: {error}") from None
        if not isinstance(ids, np.ndarray):
            raise ValueError(f"{options.ids[0]} is no .npy file, but an archive of several")
        if ids.ndim != 1 or ids.dtype.kind != "u":
            raise ValueError(f"{options.ids[0]} has no token ids: shape {ids.shape}, dtype {ids.dtype}")
    else:
        bad = [token for token in options.ids if not token.isdecimal()]
        if bad:
            raise ValueError(f"{bad[0]!r} is neither a token id nor an .npy file")
        try:
            ids = np.array([int(token) for token in options.ids], np.uint64)
        except (ValueError, OverflowError):
            raise ValueError(f"token id {max(options.ids, key=len)} is not in the vocabulary") from None
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(atomic_write(options.output)) if options.output else sys.stdout.buffer
        for first in range(0, len(ids), BLOCK_IDS):
            out.write(tokenizer.decode_bytes(ids[first : first + BLOCK_IDS].tolist()))
    if not options.output and sys.stdout.isatty():
        print()


def stats(options: argparse.Namespace) -> None:
    """Bytes per token, speed, document lengths and longest tokens; with --other, two tokenizers side by side."""
    from tokenizer.stats import print_stats

    paths = [options.tokenizer, *([options.other] if options.other else [])]
    print_stats(
        {path: load(path) for path in paths}, options.input, options.num_threads, options.errors, options.progress
    )


def show(options: argparse.Namespace) -> None:
    """Print the tokens of a text in colours, or write them as an HTML page."""
    from tokenizer.show import print_tokens, write_page

    tokenizer = load(options.tokenizer)
    text = sys.stdin.buffer.read().decode("utf-8", "replace") if options.text is None else options.text
    if options.html:
        write_page(options.html, tokenizer, text)
        print(options.html)
    else:
        print_tokens(tokenizer, text)


def export(options: argparse.Namespace) -> None:
    """Write a tokenizer in the format of another tool."""
    from tokenizer import files

    tokenizer = load(options.tokenizer)
    write = {"hf": files.write_hf, "tiktoken": files.write_tiktoken, "gpt2": files.write_gpt2}[options.format]
    write(options.output, tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens)
    if options.format == "tiktoken" and tokenizer.special_tokens:
        given = ", ".join(f"{token!r}: {token_id}" for token, token_id in tokenizer.special_ids.items())
        print(f"a .tiktoken file has no special tokens: give tiktoken.Encoding special_tokens={{{given}}}")
    print(options.output)


if __name__ == "__main__":
    gc.set_threshold(100_000)  # from 700: vocabularies and Numba are a million objects, none of them garbage
    sys.exit(main())
