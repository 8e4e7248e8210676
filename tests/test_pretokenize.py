"""Pre-tokens are counted alike however the text is cut, and text that is not what it should be is refused clearly."""

import gzip
import lzma
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer import Tokenizer, chunks, pretokenize, reference
from tokenizer.chunks import ChunkReader, CutFinder, InvalidTextError, read_text
from tokenizer.kernels import count
from tokenizer.pretokenize import (
    PretokenCounts,
    check_special_tokens,
    count_chunks,
    count_pretokens,
    special_token_arrays,
    split_special_tokens,
    tables_to_arrays,
    unicode_classes,
    unicode_version,
)

EOT = "<|endoftext|>"


def counted(path, special_tokens, **settings) -> dict[bytes, int]:
    return count_pretokens(path, special_tokens, **settings).to_dict()


def written(folder: Path, data: bytes, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


# Classes of characters and special tokens


def test_classes_are_those_of_regex() -> None:
    classes = unicode_classes()
    for code in [*range(0x3000), *range(0xD7F0, 0x10000, 7), *range(0x10000, 0x110000, 101)]:
        character = chr(code)
        expected = [bool(regex.match(pattern, character)) for pattern in (r"\p{L}", r"\p{N}", r"\s")]
        assert [classes[code] == value for value in (1, 2, 3)] == expected


def test_version_names_regex_and_its_classes() -> None:
    version = unicode_version()
    assert version["regex"] == regex.__version__
    assert regex.fullmatch("[0-9a-f]{16}", version["classes"])


@pytest.mark.parametrize(
    ("special_tokens", "complaint"),
    [([""], "is empty"), (["<a>", "<b>", "<a>"], "twice"), ("<a>", "must be a list")],
)
def test_bad_special_tokens(special_tokens, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_special_tokens(special_tokens)


def test_special_tokens_longest_first_and_without_meaning_to_the_pattern() -> None:
    tokens = ["<|a|>", "<|a|><|a|>", ".*", "[x]", "a+b"]
    pieces = list(split_special_tokens("<|a|><|a|><|a|>x.*y[x]xaab a+b", tokens))
    specials = [piece for piece, is_special in pieces if is_special]
    assert specials == ["<|a|><|a|>", "<|a|>", ".*", "[x]", "a+b"]
    assert "".join(piece for piece, _ in pieces) == "<|a|><|a|><|a|>x.*y[x]xaab a+b"


# Counting


@pytest.mark.slow
def test_equals_the_reference_on_real_text(fixtures) -> None:
    for name in ("corpus.en", "german.txt", "tinystories_sample.txt"):
        text = (fixtures / name).read_text("utf-8")
        assert counted(fixtures / name, [EOT], num_threads=2, chunk_bytes=1000) == reference.count_pretokens(
            text, [EOT]
        )


@pytest.mark.parametrize("num_threads", [1, 2, 7])
@pytest.mark.parametrize("chunk_bytes", [1, 16, 61])
def test_neither_threads_nor_chunks_matter(tmp_path: Path, num_threads: int, chunk_bytes: int) -> None:
    text = "One day, it's 12°;  \n\n she said “we'll\u3000 see”. " * 7 + EOT + "\n" + "word " * 40 + EOT + "x" * 200
    expected = reference.count_pretokens(text, [EOT])
    path = written(tmp_path, text.encode())
    assert counted(path, [EOT], num_threads=num_threads, chunk_bytes=chunk_bytes) == expected


@pytest.mark.parametrize("special", [EOT, "<|end of text|>", " ", "\n\n", "é|\u2003x", "aa"])
def test_a_special_token_at_every_offset_around_the_border_of_a_chunk(tmp_path: Path, special: str) -> None:
    for filling in ("a", "a b ", "é ", "\u2003"):
        for offset in range(40):
            text = (filling * 40)[:offset] + special + "b c " * 8 + special + special + " d"
            path = written(tmp_path, text.encode())
            assert counted(path, [special], chunk_bytes=16) == reference.count_pretokens(text, [special]), text


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(["a", "bc", " ", "  ", "\n", "é", "中", "\u2003", "'s", "<|x|>", "<|x", "x y", "1"]),
        max_size=60,
    ),
    st.lists(st.sampled_from(["<|x|>", "<|x|><|x|>", "x y", "|>a", "a", "\n"]), unique=True, max_size=4),
    st.integers(1, 40),
)
def test_any_text_any_special_tokens_any_chunks(tmp_path_factory, pieces, special_tokens, chunk_bytes: int) -> None:
    text = "".join(pieces)
    path = written(tmp_path_factory.mktemp("text"), text.encode())
    expected = reference.count_pretokens(text, special_tokens)
    assert counted(path, special_tokens, chunk_bytes=chunk_bytes, num_threads=2) == expected


def test_chunks_cover_the_text_once_and_are_about_as_large_as_asked(tmp_path: Path) -> None:
    text = b"It was a day. " * 5000
    reader = ChunkReader(written(tmp_path, text), [EOT], chunk_bytes=1000)
    pieces = [chunk.text[: chunk.length].tobytes() for chunk in reader.chunks()]
    assert b"".join(pieces) == text
    assert all(1000 <= len(piece) < 1010 for piece in pieces[:-1])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_room_for_a_chunk_depends_on_its_length_not_on_where_it_lies(tmp_path: Path, suffix: str) -> None:
    compress = gzip.compress if suffix else bytes
    path = written(tmp_path, compress(b"It was a day. " * 5000), f"text.txt{suffix}")
    reader = ChunkReader(path, [EOT], chunk_bytes=1000)
    taken = list(iter(lambda: reader.take(np.empty(0, np.uint8)), None))
    assert [number for number, _ in taken] == list(range(len(taken)))
    assert taken[-1][1].offset > 60_000
    assert max(len(chunk.text) for _, chunk in taken) < 1250


def test_text_without_a_place_to_cut_is_one_chunk() -> None:
    finder = CutFinder([])
    assert finder.find("中文字\u3000\u3000中文字".encode(), 0, 24) is None
    assert finder.find(b"\n\n\n\n", 0, 4) is None
    assert finder.find("\u3000\n".encode(), 0, 4) is None  # the run of white space began before
    assert finder.find("中\n".encode(), 0, 4) == 3


@pytest.mark.parametrize("chunk_bytes", range(1, 12))
def test_a_run_of_white_space_is_not_cut_after_a_character_of_many_bytes(tmp_path: Path, chunk_bytes: int) -> None:
    text = "a\u2003\n b " * 9
    path = written(tmp_path, text.encode())
    assert counted(path, [], chunk_bytes=chunk_bytes) == reference.count_pretokens(text, [])


def test_several_files_are_one_text_each(tmp_path: Path) -> None:
    paths = [written(tmp_path, b"ab ab", "1.txt"), written(tmp_path, b"ab", "2.txt")]
    assert counted(paths, []) == counted(paths[::-1], []) == {b"ab": 2, b" ab": 1}


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_files(tmp_path: Path, suffix: str, compress) -> None:
    text = ("some words\u2003and " + EOT) * 500
    path = written(tmp_path, compress(text.encode()), "text.txt" + suffix)
    assert counted(path, [EOT], chunk_bytes=100, num_threads=3) == reference.count_pretokens(text, [EOT])
    assert read_text(path) == text
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=f"is not a whole {suffix} file"):
        counted(path, [EOT], chunk_bytes=100)
    with pytest.raises(ValueError, match=f"is not a whole {suffix} file"):
        read_text(path)


@pytest.mark.parametrize("text", ["", " ", "\n" * 5000, EOT, EOT * 300, "a", "\x00", "\r\n\x85\u2028x", "\ufeffbom a"])
def test_texts_of_hardly_anything(tmp_path: Path, text: str) -> None:
    assert counted(written(tmp_path, text.encode()), [EOT], chunk_bytes=64) == reference.count_pretokens(text, [EOT])


def test_long_pretokens_and_many_distinct_ones(tmp_path: Path) -> None:
    """More than the table holds at first, longer than the piece that is scanned at first."""
    text = " ".join(["y" * 100_000, "é" * 70_000, "y" * 100_000, *(f"n{i} {'long' * 5}{i}" for i in range(60_000))])
    expected = Counter(match.group().encode() for match in regex.finditer(pretokenize.PATTERN, text))
    path = written(tmp_path, text.encode())
    assert counted(path, [], num_threads=2, chunk_bytes=50_000) == expected


def test_colliding_hashes(tmp_path: Path) -> None:
    """Two bits of hash for every pre-token: long ones are then told apart by their bytes alone."""
    words = [f" {'w' * (i % 30)}{i % 97}" for i in range(3000)]
    reader = ChunkReader(written(tmp_path, "".join(words).encode()), [])
    table = count_chunks(reader.chunks(), unicode_classes(), special_token_arrays([]), hash_mask=3 << 62)
    assert tables_to_arrays([table]).to_dict() == reference.count_pretokens("".join(words), [])


def test_keys_of_every_length(tmp_path: Path) -> None:
    """What fills a key up is no byte of a pre-token, be it zeros or the highest code point."""
    characters = ["\0", "é", "\U0010ffff"]
    text = "\n".join(character * length for length in range(1, 20) for character in characters for _ in range(length))
    assert counted(written(tmp_path, text.encode()), []) == reference.count_pretokens(text, [])
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)}, [])
    tokenizer.compile()
    assert tokenizer.encode(text) == tokenizer.encode(text) == list(text.encode())


def test_arrays_and_dictionaries_say_the_same() -> None:
    for counts in ({}, {b"a": 1, b"\xff\x00": 1 << 40, b"long" * 9: 3}):
        assert PretokenCounts.from_dict(counts).to_dict() == counts


# Text that is not what it should be


@pytest.mark.parametrize("bad", [b"\x80", b"\xc3", b"\xed\xa0\x80", b"\xc0\xa0", b"\xff"])
def test_broken_text_is_refused_with_file_and_offset(tmp_path: Path, bad: bytes) -> None:
    data = b"word " * 700 + bad + b" word" * 700 + bad
    path = written(tmp_path, data)
    for num_threads in (1, 4):
        with pytest.raises(InvalidTextError, match=f"text.txt is not UTF-8 at byte 3500 \\({bad[:1].hex()}") as caught:
            counted(path, [EOT], num_threads=num_threads, chunk_bytes=100)
        assert "errors='replace'" in str(caught.value)
    with pytest.raises(InvalidTextError, match="at byte 3500 "):
        read_text(path)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([b"a", b" ", b"\xc3", b"\xa9", b"\xe2\x80", b"\xf0\x9f", b"\xff", b"<|x|>"]), max_size=60)
)
def test_broken_text_is_replaced_as_python_does(tmp_path_factory, pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    path = written(tmp_path_factory.mktemp("text"), data)
    expected = reference.count_pretokens(data.decode("utf-8", "replace"), ["<|x|>"])
    assert counted(path, ["<|x|>"], errors="replace", chunk_bytes=5) == expected
    assert reference.count_pretokens(read_text(path, "replace"), ["<|x|>"]) == expected


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_utf16_gets_a_hint(tmp_path: Path, encoding: str, errors) -> None:
    data = ("\ufeff" if encoding == "utf-16-be" else "").encode(encoding) + "héllo wörld".encode(encoding)
    path = written(tmp_path, data)
    for read in (lambda: counted(path, [], errors=errors), lambda: read_text(path, errors)):
        with pytest.raises(ValueError, match="is UTF-16, not UTF-8: convert it"):
            read()


def test_bad_arguments(tmp_path: Path) -> None:
    path = written(tmp_path, b"a")
    with pytest.raises(ValueError, match="errors='ignore' must be 'strict' or 'replace'"):
        counted(path, [], errors="ignore")
    with pytest.raises(ValueError, match=r"must not contain U\+FFFD"):
        counted(path, ["\ufffd"], errors="replace")
    with pytest.raises(ValueError, match="num_threads=0 must be at least 1"):
        counted(path, [], num_threads=0)
    with pytest.raises(ValueError, match="must name at least one text file"):
        counted([], [])
    with pytest.raises(FileNotFoundError):
        counted(tmp_path / "nothing.txt", [])
    with pytest.raises(ValueError, match="is not a regular file"):
        counted(tmp_path, [])


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b"b " * 50),
        lambda path: path.write_bytes(b"b " * 70_000),
        lambda path: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)),  # another text may be as long
    ],
)
def test_a_file_that_changes_is_noticed(tmp_path: Path, change) -> None:
    path = written(tmp_path, b"a " * 60_000)
    reader = ChunkReader(path, [], chunk_bytes=100)

    def work(pieces) -> int:
        for i, _ in enumerate(pieces):
            if i == 3:
                change(path)
        return 0

    with pytest.raises(ValueError, match=r"text\.txt changed while it was read"):
        chunks.work_on_chunks(reader, work, 1, "reading", False)


def test_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, b"some words to count " * 100_000)
    script = f"""
import sys, time
from tokenizer import pretokenize, chunks
original = chunks.ChunkReader.check
def slow(self, chunk):
    print("at work", flush=True)
    time.sleep(0.2)
    return original(self, chunk)
chunks.ChunkReader.check = slow
pretokenize.count_pretokens({str(path)!r}, [], num_threads=2, chunk_bytes=2000)
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    start = time.monotonic()
    os.kill(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert time.monotonic() - start < 15  # the rest of the work would take minutes
    assert b"KeyboardInterrupt" in errors


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """Ten times the text, the same words: the peak of the process grows by less than a tenth of the text."""
    script = """
import re, sys
from pathlib import Path
from tokenizer.pretokenize import count_pretokens
count_pretokens(sys.argv[1], [], num_threads=2)
print(re.search("VmHWM: *([0-9]+) kB", Path("/proc/self/status").read_text().replace("\\t", " "))[1])
"""
    peaks = []
    for num_bytes in (4_000_000, 40_000_000):
        path = written(tmp_path, b"the same old words, again and again. " * (num_bytes // 37))
        run = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, check=True, timeout=60)
        peaks.append(int(run.stdout) * 1024)
    assert peaks[1] - peaks[0] < 4_000_000


@pytest.mark.parametrize("piece", [2, 3, 5, 16, 67])
def test_where_a_piece_is_scanned_to_does_not_matter(tmp_path: Path, piece: int, monkeypatch) -> None:
    """Pieces end anywhere: inside contractions, characters and the white space that the lookahead is about."""
    monkeypatch.setattr(count, "PIECE", piece)
    random = np.random.default_rng(piece)
    parts = [
        "a",
        "'",
        "'s",
        "'ll",
        "'ve'd",
        "é",
        "中",
        "😀",
        " ",
        "  ",
        "\n",
        "\u2003",
        "\u2003\u2003",
        "\x85",
        "!",
        "12",
        EOT,
    ]
    for _ in range(200):
        text = "".join(random.choice(parts, random.integers(1, 120)))
        assert counted(written(tmp_path, text.encode()), [EOT]) == reference.count_pretokens(text, [EOT])


def test_random_cuts_of_random_text(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    parts = ["a", "é", "中", " ", "\n", "\u2003", "'ll", EOT, EOT[:5], "word"]
    for _ in range(60):
        text = "".join(random.choice(parts, random.integers(1, 120)))
        path = written(tmp_path, text.encode())
        settings = {"num_threads": int(random.integers(1, 4)), "chunk_bytes": int(random.integers(1, 64))}
        assert counted(path, [EOT], **settings) == reference.count_pretokens(text, [EOT])
