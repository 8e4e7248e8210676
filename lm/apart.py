"""One call in a process of its own, with a limit to its time: whatever ends it costs nothing but its result."""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class LostError(Exception):
    """There is no result; the message says why in one line."""


def call_apart(function: Callable[..., Any], *args: Any, seconds: float | int | None = None) -> Any:
    """What `function(*args)` returns, called in a new process.

    Args:
        function: one that a new process can import.
        args: its arguments.
        seconds: after them the process is ended.

    Raises:
        LostError: the function raised, the process died, or its time was up.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, args))
    process.start()
    sender.close()  # the other end is the child's alone: it closes when the child is gone
    try:
        if not receiver.poll(seconds):
            raise LostError(f"not done after {seconds:.0f} seconds")
        result, error = receiver.recv()
        process.join(10)  # it may have a GPU to leave
    except EOFError:
        process.join()
        raise LostError(_how_it_ended(process.exitcode)) from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if error is not None:
        raise LostError(error)
    return result


def _call(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """In the child: send the result and None, or None and the error."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        sender.send((function(*args), None))
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        sender.send((None, f"{type(error).__name__}: {' '.join(str(error).split())}"))


def _end_with_parent() -> None:
    """Wait until the process that wants the result is gone, then end: nobody else would free the device."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _how_it_ended(exit_code: int | None) -> str:
    """Of a process that sent no result."""
    if exit_code is not None and exit_code < 0:
        return f"its process was ended by {signal.Signals(-exit_code).name}"
    return f"its process ended with exit code {exit_code}"
