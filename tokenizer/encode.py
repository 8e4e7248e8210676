"""Text files to a file of token ids: streamed, in parallel, resumable.

Threads take chunks of text from a `ChunkReader`, encode them without the GIL, and append their ids to the output in the
order of the text. The ids grow in a hidden part file beside the output, with a journal of how far they are good; a run
that was killed goes on from there when it is started again. The final name appears when everything is in it.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenizer import files
from tokenizer.bpe import BytesEncoder, Tokenizer
from tokenizer.chunks import (
    ChunkReader,
    CompressedFile,
    Errors,
    Paths,
    PlainFile,
    default_threads,
    list_paths,
    read_text,
)
from tokenizer.kernels import PADDING
from tokenizer.progress import progress_bar

CHUNK_BYTES = 1 << 21
FLUSH_SECONDS = 0.05
JOURNAL_SECONDS = 5.0  # at most this much work is lost when the process is killed
SMALL_BYTES = 1 << 19  # up to here no kernel is loaded: it would take longer than the work
HEADER_BYTES = 128  # of an .npy file, whatever the number of ids in it


class Shard(NamedTuple):
    """Part `part` of a text in `of` parts, counted from 1."""

    part: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """The shard written like 3/64.

        >>> Shard.parse("3/64")
        Shard(part=3, of=64)
        """
        part, _, of = text.partition("/")
        if not (part.isdecimal() and of.isdecimal() and 1 <= int(part) <= int(of)):
            raise ValueError(f"shard={text!r} must be like 3/64, from 1/64 to 64/64")
        return cls(int(part), int(of))


def encode_files(
    tokenizer: Tokenizer,
    input_paths: Paths,
    output_path: str | os.PathLike[str],
    *,
    num_threads: int | None = None,
    shard: Shard | str | None = None,
    errors: Errors = "strict",
    progress: bool = False,
) -> dict[str, Any]:
    """Write the token ids of text files, one after the other, as a one-dimensional .npy file; its record.

    The ids are uint16, or uint32 (said on stderr) where the vocabulary has more than 65,536 ids. The record, token,
    byte and document counts, the greatest id, and the hash of the text, also goes into `meta.json` beside the output,
    under `splits` and the output's name. No pre-token spans two files. The ids do not depend on the number of threads.

    Called again after being killed or interrupted, it goes on where the killed run was, if text, tokenizer and options
    are the same, and ends with the same bytes.

    Args:
        tokenizer: what to encode with.
        input_paths: UTF-8 text files; .gz and .xz are decompressed.
        output_path: name of the .npy file; an older file of that name is replaced at the end.
        num_threads: by default one per processor.
        shard: encode only this part of the text; the ids of all shards, joined in order, are those of the whole. A
            compressed file is decompressed twice for it, once to learn its size and then up to the shard's end.
        errors: refuse bytes that are no UTF-8 ("strict"), or encode U+FFFD instead ("replace").
        progress: draw a progress bar also where stderr is no terminal.

    Raises:
        ValueError: bad text (with file and offset), a file that changed while it was read, another process that writes
            the same output, or a folder that holds something else.
        IsADirectoryError: `output_path` is a folder.
        OSError: the disk has too little room, found out early from the first chunk, or at the end.
    """
    paths, output = list_paths(input_paths), Path(output_path)
    if output.suffix != ".npy":
        raise ValueError(f"output_path={os.fspath(output_path)!r} must end in .npy")
    if output.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(output))
    if isinstance(shard, str):
        shard = Shard.parse(shard)
    threads = default_threads(num_threads)
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 1 << 16 else np.dtype("<u4")
    if dtype.itemsize > 2:
        print(f"tokenizer: {tokenizer.vocab_size} ids do not fit uint16; {output} will be uint32", file=sys.stderr)
    check_dataset_meta(output, tokenizer)

    def open_reader() -> ShardReader:
        return ShardReader(paths, tokenizer.special_tokens, errors, shard)

    reader = open_reader()
    job = {
        "inputs": [[str(file.path.resolve()), file.before.st_size, file.before.st_mtime_ns] for file in reader.files],
        "tokenizer": tokenizer.sha256,
        "options": [dtype.str, errors, shard, CHUNK_BYTES],
    }
    with TokenWriter(output, dtype, job, tokenizer, reader.num_bytes) as writer:
        if reader.num_bytes is not None and reader.num_bytes <= SMALL_BYTES and shard is None:
            writer.start_over()
            for path in paths:
                text = read_text(path, errors)
                ids = np.array(tokenizer.encode_without_loading(text), dtype)
                writer.append(np.frombuffer(text.encode(), np.uint8), ids)
        else:
            if not writer.skip_done(reader):
                writer.start_over()
                reader = open_reader()
            _encode_chunks(tokenizer, reader, writer, threads, progress)
        reader.check_unchanged()
        record = writer.finish()
    if shard is not None:
        record["shard"] = f"{shard.part}/{shard.of}"
    write_dataset_meta(output, tokenizer, record)
    return record


def _encode_chunks(
    tokenizer: Tokenizer, reader: "ShardReader", writer: "TokenWriter", num_threads: int, progress: bool
) -> None:
    """Encode the chunks of `reader` into `writer` in threads. An error stops all; the first in the text is raised."""
    errors: list[tuple[int, BaseException]] = []
    first = BytesEncoder(tokenizer)
    encoders = [first, *(first.copy() for _ in range(num_threads - 1))]
    # Room for a text and its ids: one for each thread, and some for chunks that wait for their turn to be written.
    rooms: SimpleQueue[tuple[NDArray[np.uint8], NDArray[Any]] | None] = SimpleQueue()
    for _ in range(num_threads + 2):
        rooms.put((np.empty(0, np.uint8), np.empty(0, writer.dtype)))

    def work(encoder: BytesEncoder) -> None:
        starts = np.empty(0, np.uint32)
        number = -1
        try:
            while (room := rooms.get()) is not None and (taken := reader.take(room[0])) is not None:
                number, chunk = taken
                text, ids = chunk.text, room[1]
                chunk = reader.check(chunk)
                if len(starts) < chunk.length + PADDING:
                    starts = np.empty(chunk.length + PADDING, np.uint32)
                if len(ids) < chunk.length + 3:
                    ids = np.empty(chunk.length + 3, writer.dtype)
                count = encoder.encode(chunk.text, chunk.length, starts, ids)
                give_back = functools.partial(rooms.put, (text, ids))
                writer.hand_in(number, chunk.text[: chunk.length], ids[:count], give_back)
        except BaseException as error:
            errors.append((number, error))
            reader.stopped = True
        finally:
            rooms.put(None)  # that the text has ended, or nothing more is wanted, for one that waits for room

    with (
        ThreadPoolExecutor(num_threads) as pool,
        progress_bar("encoding", reader.num_bytes, "bytes", progress) as show,
    ):
        try:
            futures = [pool.submit(work, encoder) for encoder in encoders]
            while wait(futures, timeout=FLUSH_SECONDS).not_done:
                os.fsync(writer.file)  # the device writes while the threads encode, and has little left at the end
                show(writer.done.num_bytes)
        except BaseException:
            reader.stopped = True
            raise
    if errors:
        raise min(errors, key=lambda failure: failure[0])[1]


class ShardReader(ChunkReader):
    """A `ChunkReader` that can be held to one shard of the text."""

    def __init__(self, paths: list[Path], special_tokens: list[str], errors: Errors, shard: Shard | None) -> None:
        super().__init__(paths, special_tokens, errors, CHUNK_BYTES)
        self.stop = (len(self.files), 0)  # the file, and the byte in it, after which the next cut ends the shard
        self.last: int | None = None  # that cut, once it is known
        if shard is not None:
            sizes = [file.measure() if isinstance(file, CompressedFile) else file.before.st_size for file in self.files]
            self.num_bytes = sum(sizes) // shard.of
            self.stop = self._place(sum(sizes) * shard.part // shard.of, sizes)
            self.current, position = self._place(sum(sizes) * (shard.part - 1) // shard.of, sizes)
            if position > 0:
                file = self.files[self.current]
                if isinstance(file, CompressedFile):
                    file.skip(position - self.finder.margin)
                self.offset = self._first_cut(file, position)

    @staticmethod
    def _place(position: int, sizes: list[int]) -> tuple[int, int]:
        """Number of the file that has byte `position` of all files, and the offset in it."""
        for number, size in enumerate(sizes):
            if position < size:
                return number, position
            position -= size
        return len(sizes), 0

    def _first_cut(self, file: PlainFile, position: int) -> int:
        """The first place to cut `file` from `position` on: the same for the shards on both sides."""
        self.chunk_bytes, usual = position, self.chunk_bytes
        try:
            return self._end_of_chunk(file, 0)
        finally:
            self.chunk_bytes = usual

    def _next_piece(self) -> tuple[PlainFile, int, int] | None:
        piece = super()._next_piece()
        if piece is None or (self.current, piece[2]) < self.stop:
            return piece
        file, begin, end = piece
        last_file, position = self.stop
        if self.current > last_file or position == 0:
            return None
        if self.last is None:
            self.last = self._first_cut(file, position)
        end = self.offset = min(end, self.last)
        return (file, begin, end) if begin < end else None


@dataclasses.dataclass
class Done:
    """How far a part file is good: the first `num_chunks` chunks of the text are in it."""

    num_chunks: int = 0
    num_bytes: int = 0
    num_tokens: int = 0
    num_documents: int = 0
    in_document: bool = False  # there is text after the last separator
    max_id: int = -1


class Contents(NamedTuple):
    """What the ids of a chunk are."""

    num_separators: int
    text_at_end: bool  # more than white space after the last separator
    max_id: int


class TokenWriter:
    """Appends the ids of chunks to the part file of `output`, in the order of their numbers.

    Used as a context. When it is left by an error the part stays, to be gone on with, unless the disk is full.

    Args:
        output: the final name.
        dtype: of the ids.
        job: what must be equal for a part file to be gone on with.
        tokenizer: whose ids.
        num_bytes: size of the text, to see early whether the disk has room; None if not known.
    """

    def __init__(
        self, output: Path, dtype: np.dtype[Any], job: dict[str, Any], tokenizer: Tokenizer, num_bytes: int | None
    ) -> None:
        self.output, self.dtype = output, dtype
        self.part = output.with_name(f".{output.name}.part")
        self.journal = output.with_name(f".{output.name}.journal")
        self.job = json.loads(json.dumps(job))
        self.expected_bytes = num_bytes
        self.separator_id = tokenizer.special_ids.get(files.END_OF_TEXT, -1)
        self.vocab = tokenizer.vocab
        self.lock = threading.Lock()
        self.handed_in: dict[int, tuple[NDArray[np.uint8], NDArray[Any], Contents, Callable[[], None]]] = {}
        self.busy = False  # a thread appends what has been handed in
        self._forget()

    def _forget(self) -> None:
        self.done = Done()
        self.text_hash = hashlib.sha256()
        self.saved_at = time.monotonic()

    def start_over(self) -> None:
        """Take nothing over from the part file, nor let a later run do so by the journal of what was in it."""
        self.journal.unlink(missing_ok=True)
        files.flush_folder(self.output.parent)
        self._forget()

    def __enter__(self) -> "TokenWriter":
        self.output.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self.file = os.open(self.part, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self.file)
                raise ValueError(f"another process is writing {self.output}") from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self.file), self.part.stat()):
                    return self
            os.close(self.file)  # another process gave it its final name before this one had the lock

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if isinstance(error, OSError) and error.errno and error.filename is None:
                error.filename = os.fspath(self.output)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                self.part.unlink(missing_ok=True)
                self.journal.unlink(missing_ok=True)
            elif error is not None and self.done.num_chunks > 0:
                self._save_journal()
        finally:
            os.close(self.file)

    def skip_done(self, reader: ShardReader) -> bool:
        """Read over what an earlier run has done, if its part file is good for the same job and the same text."""
        try:
            state = json.loads(self.journal.read_text())
            noted = dict(state["done"])
            text_sha256 = noted.pop("text_sha256")
            done = Done(**noted)
            size = HEADER_BYTES + done.num_tokens * self.dtype.itemsize
            if state["job"] != self.job or os.fstat(self.file).st_size < size:
                return False
        except (OSError, ValueError, KeyError, TypeError):
            return False
        buffer = np.empty(0, np.uint8)
        for _ in range(done.num_chunks):
            taken = reader.take(buffer)
            if taken is None:
                return False
            buffer = taken[1].text
            chunk = reader.check(taken[1])
            self.text_hash.update(chunk.text[: chunk.length].data)
        if self.text_hash.hexdigest() != text_sha256:
            return False
        self.done = done
        print(f"tokenizer: going on with {self.output} after {done.num_tokens} ids", file=sys.stderr)
        return True

    def hand_in(self, number: int, text: NDArray[np.uint8], ids: NDArray[Any], written: Callable[[], None]) -> None:
        """`append` chunk `number` when its turn comes, and call `written` then.

        Nobody waits: where an earlier chunk is missing, or another thread is at one, that thread will do this one, too.
        """
        contents = self._contents(ids)
        with self.lock:
            self.handed_in[number] = text, ids, contents, written
            if self.busy:
                return
            self.busy = True
        while True:
            with self.lock:
                if self.done.num_chunks not in self.handed_in:
                    self.busy = False
                    return
                text, ids, contents, written = self.handed_in.pop(self.done.num_chunks)
            self._append(text, ids, contents)
            written()

    def append(self, text: NDArray[np.uint8], ids: NDArray[Any]) -> None:
        """Add the ids of the next chunk, whose bytes are `text`."""
        self._append(text, ids, self._contents(ids))

    def _append(self, text: NDArray[np.uint8], ids: NDArray[Any], contents: Contents) -> None:
        done = self.done
        self._write(ids.data.cast("B"), HEADER_BYTES + done.num_tokens * self.dtype.itemsize)
        self.text_hash.update(text.data)
        self.done = Done(
            num_chunks=done.num_chunks + 1,
            num_bytes=done.num_bytes + len(text),
            num_tokens=done.num_tokens + len(ids),
            num_documents=done.num_documents + contents.num_separators,
            in_document=contents.text_at_end or (done.in_document and contents.num_separators == 0),
            max_id=max(done.max_id, contents.max_id),
        )
        if done.num_chunks == 0:
            self._check_room()
        if time.monotonic() - self.saved_at > JOURNAL_SECONDS:
            self._save_journal()

    def finish(self) -> dict[str, Any]:
        """Put the part file under its final name; the record of the ids."""
        done = self.done
        os.ftruncate(self.file, HEADER_BYTES + done.num_tokens * self.dtype.itemsize)
        self._write(memoryview(_npy_header(self.dtype, done.num_tokens)), 0)
        os.fsync(self.file)
        os.replace(self.part, self.output)
        self.journal.unlink(missing_ok=True)
        for stray in self.output.parent.glob(f".{self.journal.name}.*.part"):  # of a run killed while it wrote one
            stray.unlink(missing_ok=True)
        files.flush_folder(self.output.parent)
        return {
            "file": self.output.name,
            "num_tokens": done.num_tokens,
            "num_bytes": done.num_bytes,
            "num_documents": done.num_documents + done.in_document,
            "dtype": self.dtype.name,
            "max_id": done.max_id,
            "text_sha256": self.text_hash.hexdigest(),
        }

    def _write(self, data: memoryview, position: int) -> None:
        while data:
            written = os.pwrite(self.file, data, position)
            data, position = data[written:], position + written

    def _contents(self, ids: NDArray[Any]) -> Contents:
        separators = np.flatnonzero(ids == self.separator_id) if self.separator_id >= 0 else ids[:0]
        tail = ids[separators[-1] + 1 :] if len(separators) else ids
        return Contents(
            num_separators=len(separators),
            text_at_end=self._is_visible(tail[:64]) or self._is_visible(np.unique(tail[64:])),
            max_id=int(ids.max(initial=0)) if len(ids) else -1,
        )

    def _is_visible(self, ids: NDArray[Any]) -> bool:
        """Whether one of the tokens is more than white space."""
        return any(self.vocab[token_id].strip() for token_id in ids.tolist())

    def _check_room(self) -> None:
        """Raise OSError if the rest of the text, at the rate of the first chunk, does not fit on the disk."""
        if self.expected_bytes is None or not self.done.num_bytes:
            return
        bytes_per_byte = self.done.num_tokens * self.dtype.itemsize / self.done.num_bytes
        needed = int(bytes_per_byte * (self.expected_bytes - self.done.num_bytes))
        free = shutil.disk_usage(self.output.parent).free
        if needed > free:
            message = f"{self.output} needs about {needed >> 20} MB more, but {free >> 20} MB are free on its disk"
            raise OSError(errno.ENOSPC, message)

    def _save_journal(self) -> None:
        os.fsync(self.file)
        done = dataclasses.asdict(self.done) | {"text_sha256": self.text_hash.hexdigest()}
        files.write_json(self.journal, {"job": self.job, "done": done})
        self.saved_at = time.monotonic()


def _npy_header(dtype: np.dtype[Any], length: int) -> bytes:
    """Version 1.0 of the .npy format, padded to HEADER_BYTES so that ids can be written before they are counted."""
    entries = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({length},), }}".encode()
    size = HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + entries.ljust(size - 1) + b"\n"


def check_dataset_meta(output: Path, tokenizer: Tokenizer) -> None:
    """Raise ValueError if the folder of `output` is a tokenizer's, or its ids are those of another tokenizer."""
    path = output.parent / "meta.json"
    meta = files.read_meta(output.parent)
    if meta and "splits" not in meta:
        raise ValueError(f"{path} is no dataset's: write {output.name} into a folder of its own")
    if meta and meta.get("tokenizer_sha256") != tokenizer.sha256:
        others = ", ".join(split for split in meta["splits"] if split != output.stem)
        if others:
            raise ValueError(f"{path}: {others} has the ids of another tokenizer: write into another folder")


def write_dataset_meta(output: Path, tokenizer: Tokenizer, record: dict[str, Any]) -> None:
    """Put `record` into the `meta.json` beside `output`, under `splits`; other processes may do the same."""
    folder = os.open(output.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        meta = files.read_meta(output.parent)
        described = tokenizer.meta()
        files.write_json(
            output.parent / "meta.json",
            {
                "format": 1,
                "vocab_size": tokenizer.vocab_size,
                "tokenizer_sha256": tokenizer.sha256,
                "special_tokens": tokenizer.special_tokens,
                "unicode": described["unicode"],
                "splits": {**meta.get("splits", {}), output.stem: record},
            },
        )
    finally:
        os.close(folder)
