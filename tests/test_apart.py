"""A call in a process of its own: its result, or one line about what became of it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

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


def count(numbers: list[int], keep: Callable[[int], None]) -> str:
    for number in numbers:
        keep(number)
        if number == 3:
            time.sleep(600)
    return "counted"


def test_what_it_sends_on_its_way_is_kept_whatever_ends_it() -> None:
    kept: list[int] = []
    assert call_apart(count, [1, 2], seconds=60, keep=kept.append) == "counted"
    assert kept == [1, 2]
    with pytest.raises(LostError, match="not done after 20 seconds"):
        call_apart(count, [3, 4], seconds=20, keep=kept.append)
    with pytest.raises(LostError, match="TypeError"):
        call_apart(count, [5, "six", None], 7, keep=kept.append)
    assert kept == [1, 2, 3]


def test_one_that_takes_too_long_is_ended() -> None:
    began = time.monotonic()
    with pytest.raises(LostError, match="not done after 0 seconds"):
        call_apart(time.sleep, 600, seconds=0.4)
    assert time.monotonic() - began < 300
    assert not multiprocessing.active_children()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_one_whose_caller_is_killed_ends_too() -> None:
    call = "import time; from lm.apart import call_apart; call_apart(time.sleep, 600)"
    caller = subprocess.Popen([sys.executable, "-c", call])
    try:
        children: list[int] = []
        while not children:  # the first one may keep track of resources
            assert caller.poll() is None
            pids = map(int, Path(f"/proc/{caller.pid}/task/{caller.pid}/children").read_text().split())
            children = [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            time.sleep(0.05)
        time.sleep(0.5)
    finally:
        caller.kill()
        caller.wait()
    deadline = time.monotonic() + 60
    while any(map(is_running, children)):
        assert time.monotonic() < deadline, f"{children} are left"
        time.sleep(0.05)
