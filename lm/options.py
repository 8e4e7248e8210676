"""What is said on the screen; about a wrong option one line, with a guess at what was meant."""

import contextlib
import os
import re
import sys
from argparse import Action
from typing import IO, Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from tokenizer.options import one_of, suggest, too_many


def say(text: str, error: bool = False) -> None:
    """Print a line, on stderr if asked to; that nobody is there to read it is no reason to end a run."""
    file = sys.stderr if error else sys.stdout
    if file is None:  # closed from the start
        return
    try:
        print(text, file=file, flush=True)
    except OSError:
        discard(file)


def discard(file: IO[str]) -> None:
    """Let a stream lead nowhere from now on: nor may the interpreter, at its end, flush into what has gone."""
    with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), file.fileno())


def is_first_rank() -> bool:
    """Whether this process speaks and writes for all ranks, before Lightning knows about ranks."""
    return not any(int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def refuse(problems: list[str]) -> NoReturn:
    """Leave with exit code 2 and one line per problem."""
    for problem in problems:
        say(f"error: {problem}", error=True)
    raise SystemExit(2)


def fail(problems: list[str]) -> NoReturn:
    """The same on every rank, said by the first one alone."""
    refuse(problems if is_first_rank() else [])


def known_keys(parser: Any) -> list[str]:
    """Every option of a parser and of its subcommands, by its dotted name."""
    keys: list[str] = []
    for action in parser._actions:
        keys.append(action.dest)
        for sub in (getattr(action, "_name_parser_map", None) or {}).values():
            keys += known_keys(sub)
    return sorted({key for key in keys if key not in ("help", "subcommand", "==SUPPRESS==")})


def explain(message: str, keys: list[str]) -> str:
    """A parser's message in one line, with the option or value that comes closest.

    >>> explain("unrecognized arguments: --model.optimzer.lr 3", ["model.optimizer.lr", "data.seed"])
    '--model.optimzer.lr is no option: did you mean --model.optimizer.lr?'
    >>> message = ["Parser key", '"norm":', "Expected a typing.Literal['pre', 'post'].", "Got value: pres"]
    >>> explain(" ".join(message), [])
    "norm: 'pres' must be one of pre, post: did you mean pre?"
    """
    unknown = re.search(r"unrecognized arguments: .*?(--[^\s=]+)", message)
    unknown = unknown or re.search(r"does not accept option '(.*)'", message)
    if unknown:
        name = unknown[1].removeprefix("--")
        ending = [key for key in keys if key.endswith(f".{name}")]
        hint = f"did you mean --{ending[0]}?" if ending else suggest(name, keys, "--")
        return f"--{name} is no option: {hint}"
    stray = re.search(r"[Uu]nrecognized arguments: (\S+)", message)
    if stray:
        return too_many(stray[1])
    linked = re.search(r"argument (?:\w+\()?([\w.]+).* --> ([\w.]+):", message)
    if linked:
        return f"--{linked[2]} follows from --{linked[1]}: set that instead"
    bad = re.search(r'Parser key "([^"]+)":\s', message)
    given = re.search(r"(?:Got value|Given value): (.*)", message)
    if not (bad and given):
        return re.sub(r'^Parser key "([^"]+)":', r"\1:", " ".join(message.split()))
    literals = re.findall(r"Literal\[(.*?)\]", message)
    choices = list(dict.fromkeys(choice.strip(" '") for literal in literals for choice in literal.split(",")))
    if choices:
        return f"{bad[1]}: {one_of(given[1], choices)}"
    types = list(dict.fromkeys(re.findall(r"Expected a <class '(\w+)'>", message)))
    if types and types[0] in ("tuple", "list") and types[1:] in ([], ["NoneType"]):
        return f"{bad[1]}: {given[1]!r} must be a list, with brackets: '[{given[1]}]'"
    return f"{bad[1]}: {given[1]!r} must be {' or '.join(types).replace('NoneType', 'null')}"


def plain_type(name: str) -> str:
    """A type as the help shows it: what can be written, not how Python calls it.

    >>> plain_type("Optional[Literal['scratch', 'fused']]"), plain_type("<class 'Path'>")
    ('scratch | fused | null', 'Path')
    >>> plain_type("Optional[tuple[str, ...]]")  # of an option that may be there more than once, each time
    'str | null'
    """
    name = name.replace("tuple[str, ...]", "str")
    name = re.sub(r"<class '([\w.]+)'>", r"\1", name)
    name = re.sub(r"Literal\[(.*?)\]", lambda literal: re.sub(r",\s*", " | ", literal[1].replace("'", "")), name)
    name = re.sub(r"Union\[([^\[\]]*)\]", lambda union: union[1].replace(", ", " | "), name)
    return re.sub(r"Optional\[(.*)\]", r"\1 | null", name)


class PlainHelp(DefaultHelpFormatter):
    """The help of every command, with types in plain words."""

    def _get_type_str(self, action: Action) -> str | None:
        name = super()._get_type_str(action)
        return name and plain_type(name)


class ToolParser(ArgumentParser):
    """The parser of the commands that need no Trainer, and know nothing of ranks."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        settings.setdefault("formatter_class", PlainHelp)
        super().__init__(*arguments, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the line and leave with exit code 2."""
        refuse([explain(message, known_keys(self))])
