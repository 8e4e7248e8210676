"""A progress bar on stderr with rate and time left."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Literal


@contextlib.contextmanager
def progress_bar(
    description: str, total: int | None, unit: Literal["bytes", "merges"], shown: bool
) -> Iterator[Callable[[int], None]]:
    """A function to call with how much is done; it draws a bar if `shown`, or if stderr is a terminal.

    Args:
        description: what is being done.
        total: how much there is to do; None if that is not known.
        unit: what is counted.
        shown: draw also where stderr is no terminal.
    """
    if not (shown or sys.stderr.isatty()):
        yield lambda done: None
        return
    from rich import console, progress

    counted = (
        [progress.DownloadColumn(), progress.TransferSpeedColumn()]
        if unit == "bytes"
        else [progress.MofNCompleteColumn()]
    )
    columns = [progress.TextColumn(description), progress.BarColumn(), *counted, progress.TimeRemainingColumn()]
    with progress.Progress(*columns, console=console.Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, completed=done)
