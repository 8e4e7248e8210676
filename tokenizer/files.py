"""Files on disk: atomic writing, and the vocabulary formats that other tools read."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` whole or not at all.

    The bytes go to `.<name>.<pid>.part` in the same folder; on leaving the block they are flushed to the device, the
    file is renamed over `path` and the folder is flushed. Any exception, Ctrl-C included, removes the part and leaves
    an older `path` as it was.

    Args:
        path: the final name; missing parent folders are made.
        mode: "wb" for bytes, "w" for UTF-8 text with `\\n` line ends.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(part, mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
