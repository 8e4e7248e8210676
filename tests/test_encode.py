"""`encode_files`: equal to `Tokenizer.encode`, whatever the threads, chunks, shards, interruptions and bad files."""

import errno
import fcntl
import gzip
import hashlib
import json
import lzma
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import disk_calls

from tokenizer import Tokenizer, encode, reference
from tokenizer.encode import Shard, encode_files

END = "<|endoftext|>"
SPECIALS = [END, "<|a b|>", "<|a b|><|a b|>"]
WORDS = [
    *("low", "lower", "lowest", "newest", "widest", "it's", "we'll", "123", "12", "...", "!?", "x"),
    *("über", "中文", "é", "😀", "a" * 24),
    *(" ", "\n", "\n\n", "\t", "\u3000", "\r\n", END, "<|a b|>", "<|a b|><|a b|>", "<|a ", "'", "\x00"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(*reference.train_bpe(" ".join(WORDS) * 3, 300, SPECIALS), SPECIALS)


def random_text(seed: int, num_words: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice(["", " ", " "]) for _ in range(num_words))


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything takes the way of large files, in chunks of some 64 bytes."""
    monkeypatch.setattr(encode, "SMALL_BYTES", -1)
    monkeypatch.setattr(encode, "CHUNK_BYTES", 64)


def read_ids(path: Path) -> list[int]:
    return np.load(path, allow_pickle=False).tolist()


class TestIds:
    @pytest.mark.parametrize("num_threads", [1, 2, 7])
    def test_equal_encode(self, tokenizer: Tokenizer, tmp_path: Path, tiny_chunks: None, num_threads: int) -> None:
        for seed in range(5):
            text = random_text(seed, 400)
            (tmp_path / "x.txt").write_bytes(text.encode())
            encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy", num_threads=num_threads)
            assert read_ids(tmp_path / "x.npy") == tokenizer.encode(text)

    def test_small_files_take_the_plain_path(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        text = random_text(0, 400)
        (tmp_path / "x.txt").write_bytes(text.encode())
        record = encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy")
        assert read_ids(tmp_path / "x.npy") == tokenizer.encode(text)
        assert record["num_bytes"] == len(text.encode())

    def test_files_of_chunks_of_usual_size(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        text = random_text(1, 20_000) * 50
        (tmp_path / "x.txt").write_bytes(text.encode())
        encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy", num_threads=2)
        assert read_ids(tmp_path / "x.npy") == tokenizer.encode(text)

    @pytest.mark.parametrize("text", ["", " ", "\n" * 500, END * 100, "a", "a" * 100_000, "中" * 5000])
    def test_extremes(self, tokenizer: Tokenizer, tmp_path: Path, tiny_chunks: None, text: str) -> None:
        (tmp_path / "x.txt").write_bytes(text.encode())
        record = encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy", num_threads=2)
        assert read_ids(tmp_path / "x.npy") == tokenizer.encode(text)
        assert record["num_tokens"] == len(tokenizer.encode(text))

    def test_several_files_are_one_text_cut_between_them(
        self, tokenizer: Tokenizer, tmp_path: Path, tiny_chunks: None
    ) -> None:
        texts = [random_text(seed, 100) for seed in range(3)]
        paths = [tmp_path / name for name in ("a.txt", "b.txt.gz", "c.txt.xz")]
        for path, text, compress in zip(paths, texts, (bytes, gzip.compress, lzma.compress), strict=True):
            path.write_bytes(compress(text.encode()))
        record = encode_files(tokenizer, paths, tmp_path / "x.npy", num_threads=2)
        assert read_ids(tmp_path / "x.npy") == [i for text in texts for i in tokenizer.encode(text)]
        assert record["num_bytes"] == sum(len(text.encode()) for text in texts)

    @pytest.mark.parametrize("compressed", [False, True])
    @pytest.mark.parametrize("count", [1, 2, 3, 7, 30])
    def test_shards_concatenate(
        self, tokenizer: Tokenizer, tmp_path: Path, tiny_chunks: None, count: int, compressed: bool
    ) -> None:
        texts = [random_text(3, 200), "", random_text(4, 3), random_text(5, 60)] * 2  # two equal halves
        paths = [tmp_path / f"{i}.{suffix}" for i, suffix in enumerate(("txt.gz", "txt.xz", "txt", "txt.gz") * 2)]
        if not compressed:
            paths = [path.with_suffix("") for path in paths]
        for path, text in zip(paths, texts, strict=True):
            compress = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
            path.write_bytes(compress(text.encode()))
        ids, num_bytes = [], 0
        for number in range(1, count + 1):
            record = encode_files(tokenizer, paths, tmp_path / "x.npy", shard=f"{number}/{count}", num_threads=2)
            assert record["shard"] == f"{number}/{count}"
            ids += read_ids(tmp_path / "x.npy")
            num_bytes += record["num_bytes"]
        assert ids == [i for text in texts for i in tokenizer.encode(text)]
        assert num_bytes == sum(len(text.encode()) for text in texts)

    def test_ids_above_16_bits_make_uint32(
        self, tokenizer: Tokenizer, tmp_path: Path, tiny_chunks: None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        vocab = {i if i < 260 else i + 70_000: token for i, token in tokenizer.vocab.items()}
        large = Tokenizer(vocab, tokenizer.merges, SPECIALS)
        text = random_text(2, 300)
        (tmp_path / "x.txt").write_bytes(text.encode())
        record = encode_files(large, tmp_path / "x.txt", tmp_path / "x.npy")
        assert np.load(tmp_path / "x.npy").dtype == np.uint32
        assert read_ids(tmp_path / "x.npy") == large.encode(text)
        assert record["dtype"] == "uint32"
        assert record["max_id"] > 1 << 16
        assert "uint32" in capsys.readouterr().err

    def test_65536_ids_fit_uint16(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        (tmp_path / "x.txt").write_text("a<z>")
        full = Tokenizer({**tokenizer.vocab, 65_535: b"<z>"}, tokenizer.merges, ["<z>"])
        assert encode_files(full, tmp_path / "x.txt", tmp_path / "x.npy")["dtype"] == "uint16"
        assert read_ids(tmp_path / "x.npy")[-1] == 65_535


class TestRecord:
    def test_describes_the_file(self, tokenizer: Tokenizer, tmp_path: Path, tiny_chunks: None) -> None:
        import hashlib

        text = f"low lower{END}newest{END}\nwidest x"
        (tmp_path / "x.txt").write_text(text)
        record = encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "d" / "train.npy")
        ids = tokenizer.encode(text)
        assert record == {
            "file": "train.npy",
            "num_tokens": len(ids),
            "num_bytes": len(text),
            "num_documents": 3,
            "dtype": "uint16",
            "max_id": max(ids),
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
        meta = json.loads((tmp_path / "d" / "meta.json").read_text())
        assert meta["splits"] == {"train": record}
        assert meta["tokenizer_sha256"] == tokenizer.sha256
        assert (meta["format"], meta["vocab_size"], meta["special_tokens"]) == (1, 300, SPECIALS)
        assert set(meta["unicode"]) == {"regex", "classes"}
        assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["meta.json", "train.npy"]

    @pytest.mark.parametrize(
        ("text", "documents"),
        [
            ("", 0),
            ("\n \n", 0),
            ("a", 1),
            (f"a{END}", 1),
            (f"a{END}\n", 1),
            (f"a{END}\nb", 2),
            (END, 1),
            (END * 3, 3),
            ("low" * 30 + "\n", 1),
            (END + "\n" * 200 + "a" + "\n" * 200, 2),
        ],
    )
    def test_counts_documents(
        self, tokenizer: Tokenizer, tmp_path: Path, tiny_chunks: None, text: str, documents: int
    ) -> None:
        for padding in ("", " " * 300):
            (tmp_path / "x.txt").write_text(text + padding)
            record = encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy")
            assert record["num_documents"] == documents

    def test_splits_are_added(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        (tmp_path / "x.txt").write_text("low")
        for split in ("train", "valid"):
            encode_files(tokenizer, tmp_path / "x.txt", tmp_path / f"{split}.npy")
        assert set(json.loads((tmp_path / "meta.json").read_text())["splits"]) == {"train", "valid"}

    def test_another_tokenizers_dataset_is_refused(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        (tmp_path / "x.txt").write_text("low")
        encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "train.npy")
        other = Tokenizer(tokenizer.vocab, tokenizer.merges, [END])
        with pytest.raises(ValueError, match="train has the ids of another tokenizer"):
            encode_files(other, tmp_path / "x.txt", tmp_path / "valid.npy")
        encode_files(other, tmp_path / "x.txt", tmp_path / "train.npy")

    def test_a_tokenizers_folder_is_refused(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        (tmp_path / "x.txt").write_text("low")
        tokenizer.save(tmp_path)
        with pytest.raises(ValueError, match="is no dataset's"):
            encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "train.npy")


class TestBadInput:
    @pytest.mark.parametrize("small", [True, False])
    def test_invalid_utf8_names_file_and_offset(
        self, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool
    ) -> None:
        if not small:
            monkeypatch.setattr(encode, "SMALL_BYTES", -1)
            monkeypatch.setattr(encode, "CHUNK_BYTES", 64)
        good = b"low lower newest " * 40
        for bad in (b"\x80", b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe4\xb8"):
            (tmp_path / "x.txt").write_bytes(good + bad + b" low" + good + b"\xff")
            with pytest.raises(ValueError, match=f"x.txt is not UTF-8 at byte {len(good)} "):
                encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy", num_threads=2)
            assert not (tmp_path / "x.npy").exists()
            record = encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy", errors="replace")
            text = (tmp_path / "x.txt").read_bytes().decode("utf-8", "replace")
            assert read_ids(tmp_path / "x.npy") == tokenizer.encode(text)
            assert record["num_tokens"] == len(tokenizer.encode(text))
            (tmp_path / "x.npy").unlink()

    def test_utf16_gets_a_hint(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        (tmp_path / "x.txt").write_bytes("low lower".encode("utf-16"))
        with pytest.raises(ValueError, match=r"UTF-16.*iconv"):
            encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy")

    def test_a_byte_order_mark_and_line_ends_are_text(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbflow\r\nlower\r")
        encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy")
        assert read_ids(tmp_path / "x.npy") == tokenizer.encode("\ufefflow\r\nlower\r")

    def test_a_cut_gz_file(self, tokenizer: Tokenizer, tmp_path: Path, tiny_chunks: None) -> None:
        (tmp_path / "x.txt.gz").write_bytes(gzip.compress(random_text(0, 1000).encode())[:-20])
        with pytest.raises(ValueError, match=r"x\.txt\.gz"):
            encode_files(tokenizer, tmp_path / "x.txt.gz", tmp_path / "x.npy")
        assert not (tmp_path / "x.npy").exists()

    def test_a_file_that_changes_while_it_is_read(
        self, tokenizer: Tokenizer, tmp_path: Path, tiny_chunks: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "x.txt"
        for change in (lambda: path.write_text("short"), lambda: os.utime(path, ns=(1, 1))):
            path.write_text("low lower " * 100)
            real = encode.BytesEncoder.encode

            def encode_then_change(*args: Any, change: Any = change, real: Any = real) -> int:
                change()
                return real(*args)

            monkeypatch.setattr(encode.BytesEncoder, "encode", encode_then_change)
            with pytest.raises(ValueError, match="changed while it was read"):
                encode_files(tokenizer, path, tmp_path / "x.npy", num_threads=1)
            monkeypatch.setattr(encode.BytesEncoder, "encode", real)
            assert not (tmp_path / "x.npy").exists()

    @pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "a/b", "-1/2", "1/0", ""])
    def test_bad_shards(self, shard: str) -> None:
        with pytest.raises(ValueError, match="shard="):
            Shard.parse(shard)

    def test_other_arguments(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        (tmp_path / "x.txt").write_text("low")
        with pytest.raises(ValueError, match=r"\.npy"):
            encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.bin")
        with pytest.raises(FileNotFoundError, match="missing"):
            encode_files(tokenizer, tmp_path / "missing.txt", tmp_path / "x.npy")
        with pytest.raises(ValueError, match="errors="):
            encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy", errors="ignore")  # type: ignore[arg-type]

    def test_a_folder_in_the_place_of_the_output_is_refused_before_anything_is_read(
        self, tokenizer: Tokenizer, tmp_path: Path
    ) -> None:
        (tmp_path / "x.npy").mkdir()
        with pytest.raises(IsADirectoryError, match=r"x\.npy"):
            encode_files(tokenizer, tmp_path / "missing.txt", tmp_path / "x.npy")
        assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]

    def test_the_first_error_in_the_text_is_told(self, tokenizer: Tokenizer, tmp_path: Path, tiny_chunks: None) -> None:
        (tmp_path / "x.txt").write_bytes((b"low " * 50 + b"\xff ") * 20)
        for _ in range(5):
            with pytest.raises(ValueError, match="byte 200 "):
                encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy", num_threads=4)


class TestInterruption:
    def interrupt(
        self, monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException, tokenizer: Tokenizer, folder: Path
    ) -> None:
        """Fail in the encoder after `after` chunks."""
        real, calls = encode.BytesEncoder.encode, [0]

        def fail(*args: Any) -> int:
            calls[0] += 1
            if calls[0] > after:
                raise error
            return real(*args)

        monkeypatch.setattr(encode.BytesEncoder, "encode", fail)
        with pytest.raises(type(error)):
            encode_files(tokenizer, folder / "x.txt", folder / "x.npy", num_threads=2)
        monkeypatch.setattr(encode.BytesEncoder, "encode", real)

    @pytest.mark.parametrize("after", [0, 5, 30])
    def test_goes_on_where_it_was(
        self,
        tokenizer: Tokenizer,
        tmp_path: Path,
        tiny_chunks: None,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        after: int,
    ) -> None:
        text = random_text(7, 1500)
        (tmp_path / "x.txt").write_bytes(text.encode())
        whole = encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy")
        expected = (tmp_path / "x.npy").read_bytes()
        (tmp_path / "x.npy").unlink()
        self.interrupt(monkeypatch, after, RuntimeError("stop"), tokenizer, tmp_path)
        assert not (tmp_path / "x.npy").exists()
        capsys.readouterr()
        assert encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy") == whole
        assert ("going on" in capsys.readouterr().err) == (after > 0)
        assert (tmp_path / "x.npy").read_bytes() == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "x.npy", "x.txt"]

    @pytest.mark.parametrize("change", ["text", "tokenizer", "journal", "part", "option"])
    def test_starts_over_when_anything_changed(
        self, tokenizer: Tokenizer, tmp_path: Path, tiny_chunks: None, monkeypatch: pytest.MonkeyPatch, change: str
    ) -> None:
        text = random_text(7, 500)
        (tmp_path / "x.txt").write_bytes(text.encode())
        self.interrupt(monkeypatch, 10, RuntimeError("stop"), tokenizer, tmp_path)
        errors: Any = "strict"
        if change == "text":  # same size, same time
            before = (tmp_path / "x.txt").stat()
            text = text.replace("low", "wol")
            (tmp_path / "x.txt").write_bytes(text.encode())
            os.utime(tmp_path / "x.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
        elif change == "tokenizer":
            tokenizer = Tokenizer(tokenizer.vocab, tokenizer.merges[:-5], SPECIALS)
        elif change == "journal":
            (tmp_path / ".x.npy.journal").write_text('{"job": 3')
        elif change == "part":
            os.truncate(tmp_path / ".x.npy.part", 140)
        else:
            errors = "replace"
        record = encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy", errors=errors)
        assert read_ids(tmp_path / "x.npy") == tokenizer.encode(text)
        assert record["text_sha256"] == hashlib.sha256(text.encode()).hexdigest()
        assert record["num_tokens"] == len(tokenizer.encode(text))

    def test_goes_on_with_nothing_that_another_job_wrote(
        self, tokenizer: Tokenizer, tmp_path: Path, tiny_chunks: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The other one is killed before it has a journal, and what it wrote is as long."""
        text = random_text(7, 500)
        (tmp_path / "x.txt").write_bytes(text.encode())
        self.interrupt(monkeypatch, 10, RuntimeError("stop"), tokenizer, tmp_path)
        other = Tokenizer(tokenizer.vocab, [], SPECIALS)
        with monkeypatch.context() as patch:
            patch.setattr(encode.TokenWriter, "_save_journal", lambda self: None)
            self.interrupt(monkeypatch, 20, RuntimeError("killed"), other, tmp_path)
        encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy")
        assert read_ids(tmp_path / "x.npy") == tokenizer.encode(text)

    def test_an_interrupt_while_reading_over_what_is_done_loses_nothing(
        self, tokenizer: Tokenizer, tmp_path: Path, tiny_chunks: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "x.txt").write_bytes(random_text(7, 500).encode())
        self.interrupt(monkeypatch, 10, RuntimeError("stop"), tokenizer, tmp_path)
        journal = (tmp_path / ".x.npy.journal").read_bytes()

        def interrupted(*args: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(encode.ShardReader, "check", interrupted)
            encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy")
        assert (tmp_path / ".x.npy.journal").read_bytes() == journal

    def test_a_part_file_that_got_its_final_name_is_not_written_to(
        self, tokenizer: Tokenizer, tmp_path: Path, tiny_chunks: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another process ends between this one's opening of the part file and its lock."""
        (tmp_path / "x.txt").write_bytes(random_text(7, 500).encode())
        real, part = encode.fcntl.flock, tmp_path / ".x.npy.part"
        part.write_bytes(b"whole")

        def flock(file: int, kind: int) -> None:
            if part.exists() and part.read_bytes() == b"whole":
                part.rename(tmp_path / "theirs.npy")
            real(file, kind)

        monkeypatch.setattr(encode.fcntl, "flock", flock)
        encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy")
        assert (tmp_path / "theirs.npy").read_bytes() == b"whole"
        assert len(read_ids(tmp_path / "x.npy")) > 0

    def test_two_writers_of_one_file(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        import fcntl

        (tmp_path / "x.txt").write_text("low")
        with open(tmp_path / ".x.npy.part", "wb") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(ValueError, match="another process"):
                encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy")

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
    @pytest.mark.parametrize("call", ["pwrite", "fsync", "replace", "ftruncate"])
    def test_a_full_disk_leaves_nothing_behind(
        self,
        tokenizer: Tokenizer,
        tmp_path: Path,
        tiny_chunks: None,
        monkeypatch: pytest.MonkeyPatch,
        call: str,
        number: int,
    ) -> None:
        (tmp_path / "x.txt").write_bytes(random_text(1, 300).encode())
        (tmp_path / "x.npy").write_bytes(b"old")

        def fail(*args: Any) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(encode.os, call, fail)
        with pytest.raises(OSError, match=os.strerror(number)):
            encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy", num_threads=2)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npy", "x.txt"]
        assert (tmp_path / "x.npy").read_bytes() == b"old"

    def test_too_little_room_is_seen_from_the_first_chunk(
        self, tokenizer: Tokenizer, tmp_path: Path, tiny_chunks: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = "low " * 4000
        (tmp_path / "x.txt").write_text(text)
        usage = type("Usage", (), {"free": 2 * len(tokenizer.encode(text)) * 9 // 10})
        monkeypatch.setattr(encode.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(OSError, match=r"needs about .* MB more"):
            encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x.txt"]


PEAKS = """
import re, sys
from pathlib import Path
from tokenizer import Tokenizer
from tokenizer.encode import encode_files
tokenizer, (small, large, output) = Tokenizer.from_directory(sys.argv[1]), sys.argv[2:]
encode_files(tokenizer, small, output, num_threads=2)
for path in (small, large):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    encode_files(tokenizer, path, output, num_threads=2)
    print(re.search("VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc")
@pytest.mark.slow
def test_four_times_the_text_takes_no_more_memory(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The same words in 24 and in 96 MB: the peaks differ by buffers that came to be used, not by the further text."""
    tokenizer.save(tmp_path / "tok")
    text = random_text(3, 50_000).encode()
    for name, num_bytes in (("small", 24_000_000), ("large", 96_000_000)):
        (tmp_path / name).write_bytes(text * (num_bytes // len(text)))
    command = [
        sys.executable,
        "-c",
        PEAKS,
        tmp_path / "tok",
        tmp_path / "small",
        tmp_path / "large",
        tmp_path / "x.npy",
    ]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    small, large = map(int, child.stdout.split())
    assert large - small < 25_000  # of 72 MB


def test_ids_are_on_the_device_before_anything_says_that_they_are_there(
    tokenizer: Tokenizer, tmp_path: Path, tiny_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "JOURNAL_SECONDS", -1.0)
    calls = disk_calls(monkeypatch)
    (tmp_path / "x.txt").write_bytes(random_text(1, 100).encode())
    encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy", num_threads=1)
    named = [i for i, (_, _, name) in enumerate(calls) if name in (".x.npy.journal", "x.npy")]
    assert len(named) > 3
    assert calls[named[-1]][2] == "x.npy"
    ids = calls[named[-1]][1]
    for i in named:
        written = max(j for j in range(i) if calls[j][0] == "write")
        assert ("flush", ids, "") in calls[written:i]
    described = [name for _, _, name in calls].index("meta.json")
    assert ("flush", tmp_path.stat().st_ino, "") in calls[named[-1] : described]


def test_the_journal_of_another_job_is_gone_from_the_device_before_anything_is_written(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.txt").write_text("low")
    (tmp_path / ".x.npy.journal").write_text("{}")
    calls = disk_calls(monkeypatch)
    encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy")
    written = [what for what, _, _ in calls].index("write")
    assert ("flush", tmp_path.stat().st_ino, "") in calls[:written]


def test_nothing_remains_of_a_journal_that_was_being_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("low")
    (tmp_path / "..x.npy.journal.1234.part").touch()
    encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy")
    assert {path.name for path in tmp_path.iterdir()} == {"x.txt", "x.npy", "meta.json"}


def test_processes_that_describe_one_dataset_wait_for_each_other(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("low")
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    other = threading.Thread(target=encode_files, args=(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy"))
    other.start()
    other.join(0.5)
    waits = not (tmp_path / "meta.json").exists()
    os.close(folder)
    other.join()
    assert waits
    assert (tmp_path / "meta.json").exists()


def test_of_two_errors_the_first_in_the_text_is_said(
    tokenizer: Tokenizer, tmp_path: Path, tiny_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff" + b"low " * 30 + b"\xff " + b"low " * 30)
    check, second = encode.ShardReader.check, threading.Event()

    def slow_at_first(self: Any, chunk: Any) -> Any:
        if chunk.offset == 0:
            second.wait(5)
        try:
            return check(self, chunk)
        except ValueError:
            second.set()
            raise

    monkeypatch.setattr(encode.ShardReader, "check", slow_at_first)
    with pytest.raises(ValueError, match="at byte 0 "):
        encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy", num_threads=2)


def test_a_write_that_takes_a_part_is_gone_on_with(
    tokenizer: Tokenizer, tmp_path: Path, tiny_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, pwrite = random_text(1, 100), os.pwrite
    (tmp_path / "x.txt").write_bytes(text.encode())
    monkeypatch.setattr(os, "pwrite", lambda fd, data, position: pwrite(fd, data[:7], position))
    encode_files(tokenizer, tmp_path / "x.txt", tmp_path / "x.npy")
    assert read_ids(tmp_path / "x.npy") == tokenizer.encode(text)
