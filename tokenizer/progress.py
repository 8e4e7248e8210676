"""How far a long task is, on stderr: a bar on a terminal, lines elsewhere; with rate and time left."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Literal

SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def progress_bar(
    description: str, total: int | None, unit: Literal["bytes", "merges"], shown: bool
) -> Iterator[Callable[[int], None]]:
    """A function to call with how much is done.

    Args:
        description: what is being done.
        total: how much there is to do; None if that is not known.
        unit: what is counted.
        shown: report also where stderr is no terminal, a line every ten seconds and one at the end.
    """
    if sys.stderr.isatty():
        with _bar(description, total, unit) as show:
            yield show
    elif shown:
        with _lines(description, total, unit) as show:
            yield show
    else:
        yield lambda done: None


@contextlib.contextmanager
def _bar(description: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    from rich import console, progress

    sizes = [progress.DownloadColumn(), progress.TransferSpeedColumn()]
    counted = sizes if unit == "bytes" else [progress.MofNCompleteColumn()]
    columns = [progress.TextColumn(description), progress.BarColumn(), *counted, progress.TimeRemainingColumn()]
    with progress.Progress(*columns, console=console.Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, completed=done)


@contextlib.contextmanager
def _lines(description: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    start = last = time.monotonic()
    latest = 0

    def line(done: int) -> str:
        seconds = max(time.monotonic() - start, 1e-9)
        amount = f"{done / 1e6:.0f} MB, {done / 1e6 / seconds:.0f} MB/s" if unit == "bytes" else f"{done} {unit}"
        if not total or not done or done >= total:
            return f"{description}: {amount}, {seconds:.0f} s"
        return f"{description}: {done / total:.0%}, {amount}, {seconds * (total - done) / done:.0f} s left"

    def show(done: int) -> None:
        nonlocal last, latest
        latest = done
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(line(done), file=sys.stderr, flush=True)

    yield show
    print(line(latest), file=sys.stderr, flush=True)
