"""One call in a process of its own, with a limit to its time: whatever ends it costs nothing but its result."""

import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Literal


class LostError(Exception):
    """There is no result; the message says why in one line."""


def call_apart(
    function: Callable[..., Any],
    *args: Any,
    seconds: float | int | None = None,
    keep: Callable[[Any], object] | None = None,
) -> Any:
    """What `function(*args)` returns, called in a new process.

    Args:
        function: one that a new process can import.
        args: its arguments.
        seconds: after them the process is ended.
        keep: called here with what the function sends before its end; it is given what sends as its last argument.

    Raises:
        LostError: the function raised, the process died, or its time was up.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, args, keep is not None))
    deadline = None if seconds is None else time.monotonic() + seconds
    process.start()
    sender.close()  # the other end is the child's alone: it closes when the child is gone
    try:
        while True:
            if not receiver.poll(None if deadline is None else max(0, deadline - time.monotonic())):
                raise LostError(f"not done after {seconds:.0f} seconds")
            kind, message = receiver.recv()
            if kind != "on its way":
                break
            assert keep is not None
            keep(message)
        process.join(10)  # it may have a GPU to leave
    except EOFError:
        process.join()
        raise LostError(_how_it_ended(process.exitcode)) from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if kind == "error":
        raise LostError(message)
    return message


def _call(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...], keeps: bool) -> None:
    """In the child: send what comes on the way, then the result or the error."""

    def send(kind: Literal["on its way", "result", "error"], message: Any) -> None:
        sender.send((kind, message))

    threading.Thread(target=_end_with_parent, daemon=True).start()
    if keeps:
        args = (*args, functools.partial(send, "on its way"))
    try:
        send("result", function(*args))
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        send("error", f"{type(error).__name__}: {' '.join(str(error).split())}")


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
