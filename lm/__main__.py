"""`python -m lm`: every command, each imported only when it is called."""

import contextlib
import gc
import importlib
import inspect
import itertools
import math
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

from tokenizer.options import in_one_line

STARTED = time.monotonic()

TRAINING = {
    "fit": "train a model; with nothing else, on the built-in corpus",
    "validate": "loss over the whole validation set: the newest run's best checkpoint, or --ckpt_path",
}
TOOLS = {
    "generate": ("lm.session:run", "continue a prompt with a trained model, or many: --interactive"),
    "serve": ("lm.serve:run", "a page in the browser: type, watch the text come, see what else it could have been"),
    "prepare": ("lm.prepare:run", "get a corpus, train its tokenizer, encode it"),
    "account": ("lm.accounting:run", "parameters, FLOPs, memory and time of a model"),
    "bench": ("lm.bench:run", "speed of training and generation, beside other implementations"),
    "sweep": ("lm.sweep:sweep", "many runs from one file"),
    "report": ("lm.report:report", "curves and tables of a study's runs"),
    "export": ("lm.export:run", "a checkpoint for other tools"),
    "import": ("lm.export:run_import", "a run made of another tool's model"),
}


def usage() -> str:
    """All commands, one a line."""
    commands = TRAINING | {name: text for name, (_, text) in TOOLS.items()}
    lines = [f"  {name:<10}{text}" for name, text in commands.items()]
    return "\n".join(
        ["usage: python -m lm <command> [options]", "", *lines, "", "python -m lm <command> --help lists its options."]
    )


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Without the search for cycles, which would go through all that the libraries make again and again.

    There is nothing to save yet, so Ctrl-C ends the process at once: an exception in the middle of a library's import
    gets lost there, or aborts it.
    """
    gc.disable()
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        gc.enable()


def bare_option(tool: Callable[..., Any]) -> str | None:
    """The option whose name may be left out: the first parameter, where it has a default."""
    first = next(iter(inspect.signature(tool).parameters.values()))
    return first.name if first.default is not inspect.Parameter.empty else None


def spelled_out(tool: Callable[..., Any], args: list[str]) -> list[str]:
    """Options in full: `gpt2-xl` means `--model=gpt2-xl` where that is the first option, `--json` means `--json=true`.

    A first parameter without a default is a positional one for the parser anyway.

    Raises:
        ValueError: an option is there twice, of which the parser would drop one, or a prompt lacks its quotes.
    """
    parameters = list(inspect.signature(tool).parameters.values())
    if (first := bare_option(tool)) and args and not args[0].startswith("-"):
        words = list(itertools.takewhile(lambda arg: not arg.startswith("-"), args))
        if first == "prompt" and len(words) > 1:
            raise ValueError(f'put the prompt in quotes: --prompt "{" ".join(words)}"')
        args = [f"--{first}={args[0]}", *args[1:]]
    for parameter in parameters:
        if parameter.annotation == tuple[str, ...] | None:
            args = gathered(f"--{parameter.name}", args)
    given = Counter(arg.partition("=")[0] for arg in args)
    for parameter in parameters:
        if given[f"--{parameter.name}"] > 1:
            raise ValueError(f"--{parameter.name} is there more than once: give it one value")
    switches = {f"--{parameter.name}" for parameter in parameters if parameter.annotation is bool}
    following = [*args[1:], ""]
    return [
        f"{arg}=true" if arg in switches and value not in ("true", "false") else arg
        for arg, value in zip(args, following, strict=False)
    ]


def gathered(option: str, args: list[str]) -> list[str]:
    """Options with all values of one as a list, quoted, for the parser would take them for YAML.

    Raises:
        ValueError: a value is no UTF-8.
    """
    import yaml

    values: list[str] = []
    others: list[str] = []
    words = deque(args)
    while words:
        word = words.popleft()
        name, equals, value = word.partition("=")
        if name == option and equals:
            values.append(value)
        elif name == option and words and not words[0].startswith("--"):
            values.append(words.popleft())
        else:
            others.append(word)
    if not values:
        return others
    for value in values:
        try:
            value.encode()  # of other bytes Python has made lone surrogates
        except UnicodeEncodeError:
            raise ValueError(f"{option} {value!r} is not UTF-8: convert it, e.g. with iconv") from None
    quoted = yaml.safe_dump(values, default_style='"', default_flow_style=True, width=math.inf)
    return [*others, f"{option}={quoted.strip()}"]


def main(argv: list[str]) -> int:
    """Run a command line; the exit code, 141 when who reads it (`| head`) has seen enough."""
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that lacks a character gets a question mark
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            code = dispatch(argv)
        except SystemExit:  # of a parser, after --help
            flush()
            raise
        flush()
        return code
    except OSError as error:
        from lm.options import discard, say

        discard(sys.stdout)
        if isinstance(error, BrokenPipeError):
            return 141
        say(f"error: {error}", error=True)
        return 2


def flush() -> None:
    """Write out what has been printed, while it can still be said that this fails."""
    if sys.stdout is not None:
        sys.stdout.flush()


def dispatch(argv: list[str]) -> int:
    """Call what a command line names; the exit code."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # lightning 2.6 calls names that 5 drops
    # Threads that spin briefly while they wait, then sleep: without a limit a busy machine loses ten times the speed,
    # with no spinning at all an idle one 40 %.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if sys.platform == "win32":
        print("error: lm runs on Linux and macOS: on Windows, install and run it inside WSL2", file=sys.stderr)
        return 2
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):  # Lightning reads a number
        if os.environ.get(name) == "":
            del os.environ[name]
        elif not (rank := os.environ.get(name, "0")).isdecimal():
            print(f"error: {name}={rank!r} is no rank: `unset {name}`, or see what sets it", file=sys.stderr)
            return 2
    command = argv[0]
    if command in TRAINING:
        with importing():
            from lm import cli
        return cli.main(argv, STARTED)
    if command not in TOOLS:
        from difflib import get_close_matches

        close = get_close_matches(command, [*TRAINING, *TOOLS], n=1)
        hint = f"did you mean {close[0]}?" if close else "`python -m lm --help` lists what there is"
        print(f"error: {command!r} is no command: {hint}", file=sys.stderr)
        return 2
    module, name = TOOLS[command][0].split(":")
    try:
        with importing():
            from jsonargparse import auto_cli

            from lm.options import ToolParser

            tool = getattr(importlib.import_module(module), name)
        args = spelled_out(tool, argv[1:])
        bare = bare_option(tool)
        words = f"%(prog)s [[--{bare}] {bare.upper()}] [options]" if bare else None
        auto_cli(tool, args=args, prog=f"python -m lm {command}", usage=words, parser_class=ToolParser)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        raise  # no error of the command's
    except (ValueError, OSError) as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    gc.freeze()  # or the interpreter, on its way out, looks for cycles among all that the libraries have made
    sys.exit(exit_code)
