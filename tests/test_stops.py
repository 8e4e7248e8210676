"""lm.stops: against searches in the whole text, however its bytes are cut."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from timing import ALMOST_LINEAR, slope_of

from lm.stops import StopString, TextUntilStop, check_stop

strings = st.text("ab猫", min_size=1, max_size=4)  # of few characters, so that they are found
pieces = st.lists(st.text("ab猫", max_size=3), max_size=12)


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the string that is complete first, of several the longest."""
    found = [(text.find(string) + len(string), -len(string)) for string in stop if string in text]
    return text[: sum(min(found))] if found else text


@given(st.text("ab", min_size=1, max_size=6), st.text("ab", max_size=30))
def test_what_is_found_is_the_longest_beginning_that_the_text_ends_with(string: str, text: str) -> None:
    stop, found = StopString(string), 0
    for end, character in enumerate(text, 1):
        if found == len(string):
            return
        found = stop.advance(found, character)
        assert found == max(n for n in range(len(string) + 1) if text[:end].endswith(string[:n]))


@given(pieces, st.lists(strings, max_size=3))
def test_a_text_ends_before_the_first_stop_string_however_it_is_cut(pieces: list[str], stop: list[str]) -> None:
    text, shown = TextUntilStop([StopString(string) for string in stop]), ""
    for piece, final in [*((piece, False) for piece in pieces), ("", True)]:
        if not text.stopped:
            shown += text.take(piece, final)
    assert shown == before_stop("".join(pieces), stop)
    assert text.stopped == any(string in "".join(pieces) for string in stop)


@given(pieces, st.lists(strings, max_size=3))
def test_only_what_may_be_the_beginning_of_a_stop_string_waits(pieces: list[str], stop: list[str]) -> None:
    text, shown, so_far = TextUntilStop([StopString(string) for string in stop]), "", ""
    for piece in pieces:
        shown += text.take(piece)
        so_far += piece
        if text.stopped:
            return
        beginnings = {string[:n] for string in stop for n in range(len(string))} | {""}
        assert so_far == shown + max((end for end in beginnings if so_far.endswith(end)), key=len)


def test_a_stop_string_is_found_in_the_middle_of_a_token_and_across_several() -> None:
    text = TextUntilStop([StopString("\n\nQ:")])
    tokens = "yes.\n", "\n", "Now\n", "\nQ", ":\n"
    assert [text.take(token) for token in tokens] == ["yes.", "", "\n\nNow", "", ""]
    assert text.stopped


def test_the_string_that_is_complete_first_counts_and_of_those_the_longest() -> None:
    for stop, shown in ((["abcd", "bc"], "xa"), (["bc", "abc"], "x"), (["c", "abcd"], "xab")):
        for pieces in (["xabcde"], ["x", "a", "b", "c"]):
            text = TextUntilStop([StopString(string) for string in stop])
            assert "".join(text.take(piece) for piece in pieces if not text.stopped) == shown
            assert text.stopped


def test_time_grows_with_the_text_and_not_with_its_square() -> None:
    def write(length: int) -> None:
        text = TextUntilStop([StopString("a" * 1000 + "b")])
        assert len("".join(text.take("a") for _ in range(length))) == length - 1000

    assert slope_of(write, 2_000, 40_000) < ALMOST_LINEAR


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("END", r"stop='END' must be a list of strings: \['END'\]"),
        (["a", ""], "a stop string is empty: leave it out"),
        (["caf\udce9"], r"stop=\['caf\\udce9'\] is not all UTF-8: convert it, e"),
    ],
)
def test_what_is_no_stop_string_is_refused_in_one_line(stop: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        check_stop(stop)
    assert "\n" not in str(error.value)
