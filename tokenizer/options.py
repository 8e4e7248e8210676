"""What is said about a wrong word on a command line, or about a file that cannot be used: one line each."""

import argparse
import difflib
import errno
import itertools
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn


def suggest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a line about an unknown `word`: a guess at what was meant, or where to look.

    >>> suggest("trian", ["train", "encode"])
    'did you mean train?'
    """
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {prefix}{close[0]}?" if close else "`--help` lists what there is"


def one_of(value: str, choices: Sequence[str]) -> str:
    """What is said about a value that is none of the choices.

    >>> one_of("pres", ["pre", "post"])
    "'pres' must be one of pre, post: did you mean pre?"
    """
    close = difflib.get_close_matches(value, choices, n=1)
    hint = f": did you mean {close[0]}?" if close else ""
    return f"{value!r} must be one of {', '.join(choices)}{hint}"


def too_many(word: str) -> str:
    """What is said about a word that belongs to no option."""
    return f"{word!r} is one word too many: a value with blanks in it goes in quotes"


def in_one_line(error: Exception) -> str:
    """What an error says; of the system's, the file's name and what is wrong with it, in words.

    >>> in_one_line(FileNotFoundError(errno.ENOENT, "No such file or directory", "nope.txt"))
    'nope.txt: there is no such file'
    >>> in_one_line(OSError(errno.ENOSPC, "No space left on device", "x.npy"))
    'x.npy: No space left on device'
    """
    if not isinstance(error, OSError) or not error.strerror:
        return " ".join(str(error).split())
    place = error.filename if error.filename2 is None else error.filename2  # a part was to get this name
    if not isinstance(place, str | bytes | os.PathLike):
        return error.strerror
    name = os.fsdecode(place)
    if error.errno == errno.ENOENT:
        return f"{name}: there is no such file"
    if error.errno == errno.EISDIR:
        return f"{name} is a folder, not a file"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        in_the_way = [path for path in (Path(name), *Path(name).parents) if path.exists() and not path.is_dir()]
        if in_the_way:
            return f"{in_the_way[0]} is a file, not a folder"
    return f"{name}: {error.strerror}"


class Help(argparse.HelpFormatter):
    """Ends the text of an option with its default, where it has one and the text does not say it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, value = action.help, action.default
        if text is None or "default" in text or value is None or value is False or value == argparse.SUPPRESS:
            return text
        words = value if isinstance(value, list) else [value]
        return f"{text} (default: {' '.join(map(str, words))})"


class Parser(argparse.ArgumentParser):
    """A parser, and its subcommands' parsers, that answer a wrong command line with one line and exit code 2."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("allow_abbrev", False)
        settings.setdefault("formatter_class", Help)
        super().__init__(**settings)
        self.words: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in the base class; an unknown option is named before anything is missed."""
        self.words = list(sys.argv[1:] if args is None else args)
        known = self._option_string_actions
        for word in itertools.takewhile(lambda word: word != "--", self.words):
            if self._subparsers and not word.startswith("-"):
                break  # the rest is for the subcommand
            name = word.partition("=")[0]
            if re.fullmatch(r"--?[A-Za-z][\w.-]*", name) and name not in known:
                names = [option.removeprefix("--") for option in known if option.startswith("--")]
                self.error(f"{name} is no option: {suggest(name.lstrip('-'), names, '--')}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the line and leave with exit code 2."""
        self.exit(2, f"error: {self.explain(message)}\n")

    def explain(self, message: str) -> str:
        """A message of argparse in one line and in this project's words."""
        if choice := re.fullmatch(r"argument (\S+): invalid choice: (.*) \(choose from (.*)\)", message):
            value, choices = choice[2].strip("'\""), re.findall(r"[^\s,']+", choice[3])
            if self._subparsers:
                return f"{value!r} is no command: {suggest(value, choices)}"
            return f"{choice[1]}: {one_of(value, choices)}"
        if kind := re.fullmatch(r"argument (\S+): invalid (\w+) value: (.*)", message):
            return f"{kind[1]}: {kind[3]} must be {kind[2]}"
        if stray := re.fullmatch(r"unrecognized arguments: (\S+).*", message, re.DOTALL):
            return too_many(stray[1])
        if missing := re.fullmatch(r"the following arguments are required: (.*)", message):
            return f"missing {missing[1]}: {self._way_out(missing[1].split(', '))}"
        return " ".join(message.removeprefix("argument ").split())

    def _way_out(self, missing: Sequence[str]) -> str:
        """What to do about missing arguments: another order, where an option has taken all the words."""
        actions = self._option_string_actions
        greedy = [word for word in self.words if word in actions and actions[word].nargs in ("*", "+")]
        positional = [name for name in missing if not name.startswith("-")]
        if greedy and positional:
            return f"{greedy[0]} takes every word after it, so put {positional[0]} before it"
        return f"`{self.prog} --help` says more"
