"""A call in a process of its own: its result, or one line about what became of it."""

import multiprocessing
import os
import signal
import time

import pytest

from lm.apart import LostError, call_apart


def test_the_result_comes_back_from_another_process() -> None:
    assert call_apart(os.getpid, seconds=60) != os.getpid()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ((int, "one"), "ValueError: invalid literal for int"),
        ((os._exit, 9), "its process ended with exit code 9"),
        ((signal.raise_signal, signal.SIGKILL), "its process was ended by SIGKILL"),
    ],
)
def test_what_ends_it_is_said(call: tuple, message: str) -> None:
    with pytest.raises(LostError, match=message):
        call_apart(*call, seconds=60)


def test_one_that_takes_too_long_is_ended() -> None:
    began = time.monotonic()
    with pytest.raises(LostError, match="not done after 0 seconds"):
        call_apart(time.sleep, 600, seconds=0.4)
    assert time.monotonic() - began < 300
    assert not multiprocessing.active_children()
