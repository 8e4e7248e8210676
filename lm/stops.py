"""Stop strings: where a text ends that comes token by token.

A stop string may begin and end in the middle of tokens, and of several the one that is complete first ends the text, so
where that is depends on the characters alone and not on the tokens they come in.
"""

import re
from collections.abc import Sequence

MEANINGS = {"n": "\n", "t": "\t", "\\": "\\"}


def typed(text: str) -> str:
    r"""A stop string as it was typed on one line: `\n`, `\t` and `\\` are a line feed, a tab and a backslash.

    >>> typed(r"\n\nQ:"), typed(r"\\n")
    ('\n\nQ:', '\\n')
    """
    return re.sub(r"\\([nt\\])", lambda escape: MEANINGS[escape[1]], text)


def check_stop(stop: Sequence[str]) -> None:
    """Refuse what can be no stop strings.

    Raises:
        ValueError: they are no list, or one is empty or no UTF-8.
    """
    if isinstance(stop, str):  # a sequence of strings as well, its characters
        raise ValueError(f"stop={stop!r} must be a list of strings: [{stop!r}]")
    if not all(stop):
        raise ValueError("a stop string is empty: leave it out")
    try:
        "".join(stop).encode()  # of other bytes Python may have made lone surrogates
    except UnicodeEncodeError:
        raise ValueError(f"stop={stop!r} is not all UTF-8: convert it, e.g. with iconv") from None


class StopString:
    """A string to be found in a text that comes character by character (Knuth, Morris and Pratt 1977).

    What has been found of it so far is one number, its first so many characters, with which the text ends.

    >>> stop, found = StopString("abac"), [0]
    >>> for character in "ababac":
    ...     found.append(stop.advance(found[-1], character))
    >>> found
    [0, 1, 2, 3, 2, 3, 4]
    """

    def __init__(self, string: str) -> None:
        self.string = string
        self._borders = [0]  # of the first 1, 2, ... characters: how long a beginning of theirs is their end, too
        for character in string[1:]:
            self._borders.append(self.advance(self._borders[-1], character))

    def advance(self, found: int, character: str) -> int:
        """How many of its characters the text ends with after one more, where it was `found` before."""
        while found and self.string[found] != character:
            found = self._borders[found - 1]
        return found + (self.string[found] == character)


class TextUntilStop:
    """A text as it comes, up to the first stop string; what may be the beginning of one waits.

    Attributes:
        stopped: whether a stop string is complete.
    """

    def __init__(self, stops: Sequence[StopString]) -> None:
        self.stopped = False
        self._stops = stops
        self._first = {stop.string[0] for stop in stops}
        self._found = [0] * len(stops)
        self._waiting = ""

    def take(self, new: str, final: bool = False) -> str:
        """What more of the text is certain with these characters; if they are the last, all that waits."""
        if not self._waiting and self._first.isdisjoint(new):
            return new
        text = self._waiting + new
        for end, character in enumerate(new, len(self._waiting) + 1):
            self._found = [stop.advance(n, character) for stop, n in zip(self._stops, self._found, strict=True)]
            complete = [n for stop, n in zip(self._stops, self._found, strict=True) if n == len(stop.string)]
            if complete:
                self.stopped = True
                return text[: end - max(complete)]
        certain = len(text) - (0 if final else max(self._found))
        self._waiting = text[certain:]
        return text[:certain]
