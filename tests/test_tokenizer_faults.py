"""Whatever a text, a file, a disk or a user does: the right result or one clear line, and nothing half-written.

Black-box tests through the public API and the command line. The compiled code takes over where texts are large; a test
that could take either path runs on both.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timing import ALMOST_LINEAR, slope_of

from tokenizer import Tokenizer, reference, train_bpe
from tokenizer.encode import ShardReader, encode_files
from tokenizer.pretokenize import count_pretokens
from tokenizer.rivals import peak_memory

END = "<|endoftext|>"
EXAMPLES = int(os.environ.get("LM_FUZZ", "20000")) // 100


@pytest.fixture(params=["kernels", "plain Python"])
def path_taken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Train and encode with the compiled code, however small the text, or with plain Python."""
    if request.param == "kernels":
        monkeypatch.setattr("tokenizer.train.SMALL_BYTES", -1)
        monkeypatch.setattr("tokenizer.encode.SMALL_BYTES", -1)
        monkeypatch.setattr("tokenizer.bpe.COMPILE_AFTER", 0)
    return request.param


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small tokenizer of ordinary English."""
    path = tmp_path_factory.mktemp("tokenizer") / "text.txt"
    path.write_text(
        "the quick brown fox jumps over the lazy dogs; it's 12 o'clock, they'll say: how grand! é中文 " * 20
    )
    return Tokenizer(*train_bpe(path, 300, [END]), [END])


@pytest.fixture(scope="module")
def saved(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `tokenizer`."""
    folder = tmp_path_factory.mktemp("saved") / "tokenizer"
    tokenizer.save(folder)
    return folder


def write(folder: Path, data: bytes | str, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def encoded(tokenizer: Tokenizer, path: Path, **options: object) -> list[int]:
    output = path.with_suffix(".npy")
    encode_files(tokenizer, path, output, **options)  # type: ignore[arg-type]
    return np.load(output).tolist()


def cli(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenizer", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, **options)  # type: ignore[call-overload]


def refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2 and one line on stderr that has all `words`."""
    assert result.returncode == 2, result
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in lines[0], lines[0]


# ------------------------------------------------------------------------------- text that is hardly any (T1, T2, T5)

ODD_TEXTS = {
    "empty": "",
    "one byte": "x",
    "white space": " \n\t\r\n   \u3000\u2028 \x85\n\n",
    "special tokens": END * 500,
    "special tokens and blanks": f" {END}\n{END} \n" * 50,
    "no special token": "the fox and the dog " * 30,
    "carriage returns": "one\r\ntwo\r\n\r\nthree\r" * 20,
    "byte order mark": "\ufeffthe fox",
    "zero bytes": "a\0b\0\0 c\0" * 20,
    "separators of Unicode": "a\u2028b\u2029c\u0085d\u00a0e\u3000f " * 20,
    "noncharacters": "a\ufffeb\uffffc\U0010ffff d" * 20,
    "cut special token": "<|endoftext|<|endoftext|><|endoftext" * 20,
}


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_odd_texts_train_and_encode_like_the_textbook(name: str, path_taken: str, tmp_path: Path) -> None:
    text = ODD_TEXTS[name]
    path = write(tmp_path, text)
    vocab, merges = train_bpe(path, 300, [END])
    assert (vocab, merges) == reference.train_bpe(text, 300, [END])
    tokenizer = Tokenizer(vocab, merges, [END])
    expected = reference.encode(text, vocab, merges, [END])
    assert tokenizer.encode(text) == expected
    assert list(tokenizer.encode_iterable(text)) == expected
    assert encoded(tokenizer, path) == expected
    assert tokenizer.decode(expected) == text


BAD_BYTES = {
    "lone continuation": b"\x80",
    "overlong": b"\xc0\x80",
    "overlong of three": b"\xe0\x80\xaf",
    "surrogate": b"\xed\xa0\x80",
    "above U+10FFFF": b"\xf4\x90\x80\x80",
    "never a byte": b"\xff",
    "cut character": b"\xe4\xb8",
}


@pytest.mark.parametrize("size", [0, 63, 5000, 2_200_000])
@pytest.mark.parametrize("name", BAD_BYTES)
def test_invalid_utf8_is_refused_with_file_and_offset(
    name: str, size: int, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    before = "é fox " * (size // 7) + "x" * (size % 7)
    path = write(tmp_path, before.encode() + BAD_BYTES[name] + b" and more")
    for work in (lambda: train_bpe(path, 300, [END]), lambda: encoded(tokenizer, path)):
        with pytest.raises(ValueError, match=f"text.txt.* byte {len(before.encode())} ") as error:
            work()
        assert "\n" not in str(error.value)
    assert not path.with_suffix(".npy").exists()


@pytest.mark.parametrize("name", BAD_BYTES)
def test_invalid_utf8_is_replaced_as_python_does(
    name: str, path_taken: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    data = (b"the fox " + BAD_BYTES[name] + b"jumps" + BAD_BYTES[name]) * 20 + BAD_BYTES[name]
    text = data.decode("utf-8", "replace")
    path = write(tmp_path, data)
    assert train_bpe(path, 300, [END], errors="replace") == reference.train_bpe(text, 300, [END])
    assert encoded(tokenizer, path, errors="replace") == tokenizer.encode(text)


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_utf16_is_refused_with_a_hint(codec: str, errors: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    for count in (20, 300_000):  # plain Python and kernels
        text = ("\ufeff" if codec == "utf-16-be" else "") + "the fox " * count
        path = write(tmp_path, text.encode(codec))
        for work in (train_bpe, lambda p, v, s, errors: encoded(tokenizer, p, errors=errors)):
            with pytest.raises(ValueError, match=r"text\.txt.*UTF-16"):
                work(path, 300, [END], errors=errors)  # type: ignore[operator]


@pytest.mark.parametrize(
    "specials",
    [
        ["<|a|>", "<|a|><|a|>"],
        ["<|a|><|a|>", "<|a|>"],
        ["ab", "b", "abc", "bcab"],
        [".*", "a+", "[x]", "(", "\\", "$^", "|"],
        [" ", "\n"],
        ["x", "e"],
        ["é", "\U0001f600"],
        ["the fox", " the"],
        ["a" * 300],
    ],
)
def test_special_tokens_of_every_kind(specials: list[str], path_taken: str, tmp_path: Path) -> None:
    draw = random.Random(0)
    parts = [*specials, "the fox", "abcab ", "é", " x.* ", "\n\n", "[xe]", "a" * 299]
    text = "".join(draw.choices(parts, k=400))
    path = write(tmp_path, text)
    vocab, merges = train_bpe(path, 256 + len(specials) + 40, specials)
    assert (vocab, merges) == reference.train_bpe(text, 256 + len(specials) + 40, specials)
    tokenizer = Tokenizer(vocab, merges, specials)
    for i, special in enumerate(specials):
        assert tokenizer.encode(special) == [i]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert encoded(tokenizer, path) == ids
    pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
    assert list(tokenizer.encode_iterable(pieces)) == ids


def test_bad_special_tokens_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "some text")
    for specials, message in (([""], "empty"), (["<a>", ""], "empty"), (["<a>", "<b>", "<a>"], "twice")):
        with pytest.raises(ValueError, match=message):
            train_bpe(path, 300, specials)
    refused(cli("train", path, "--vocab_size", 300, "--output", tmp_path / "t", "--special_tokens", "x", "x"), "twice")
    assert not (tmp_path / "t").exists()


# ----------------------------------------------------------------------------------- where a text is cut (T3, T4, T9)


def counts_of(path: Path, specials: list[str], **options: int) -> dict[bytes, int]:
    return count_pretokens(path, specials, **options).to_dict()


def test_chunks_leave_no_trace(tmp_path: Path) -> None:
    """The separator, a character of four bytes and runs of white space, at every offset around the ends of chunks."""
    specials = [END, "<|endoftext|><|x|>", "\n\n"]
    middle = f"a \U0001f600é  \n{END}<|x|> it's{END}{END}\n\n\n 12\u3000\u3000x"
    for offset in range(64):
        text = "w" * offset + middle + " the end" * 8 + middle
        path = write(tmp_path, text)
        expected = dict(reference.count_pretokens(text, specials))
        for chunk_bytes in (1, 16, 17, 100):
            assert counts_of(path, specials, chunk_bytes=chunk_bytes, num_threads=2) == expected


@pytest.mark.slow
def test_result_depends_on_nothing_but_the_text(tmp_path: Path, corpora: Path) -> None:
    """Threads, hash seeds and processes."""
    import lzma

    with lzma.open(corpora / "stories-valid.txt.xz") as file:
        path = write(tmp_path, file.read() * 2)
    seen = set()
    for threads, seed in ((1, "0"), (2, "1"), (7, "random")):
        output = tmp_path / f"{threads}"
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        words = ["train", path, "--vocab_size", 500, "--output", output, "--num_threads", threads]
        assert cli(*words, env=environment).returncode == 0
        words = ["encode", path, "--tokenizer", output, "--output", output / "ids" / "x.npy", "--num_threads", threads]
        assert cli(*words, env=environment).returncode == 0
        files = [output / "vocab.json", output / "merges.txt", output / "ids" / "x.npy"]
        seen.add(b"".join(file.read_bytes() for file in files))
    assert len(seen) == 1


def test_shards_joined_are_the_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    draw = random.Random(1)
    pieces = ["the fox ", "  \n", END, "é", "jumps", "'ll", "x" * 5000, "\U0001f600", f" {END}\n"]
    paths = [write(tmp_path, "".join(draw.choices(pieces, k=count)), f"{count}.txt") for count in (300, 0, 1, 60)]
    encode_files(tokenizer, paths, tmp_path / "whole" / "ids.npy")
    whole = np.load(tmp_path / "whole" / "ids.npy")
    for count in (1, 2, 7, 16):
        parts = []
        for i in range(1, count + 1):
            output = tmp_path / f"{count}" / f"part{i}.npy"
            encode_files(tokenizer, paths, output, shard=f"{i}/{count}", num_threads=2)
            parts.append(np.load(output))
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    for shard in ("0/3", "4/3", "x", "1/0", "-1/2", "1/2/3"):
        with pytest.raises(ValueError, match="shard="):
            encode_files(tokenizer, paths, tmp_path / "ids.npy", shard=shard)


# --------------------------------------------------------------------------------------------- sizes (T6, T7, E4, E8)


UNITS = {"letter": "a", "blank": " ", "line feed": "\n", "two letters": "ab", "quote": "'", "digit": "7", "wide": "中"}


@pytest.fixture(scope="module")
def runs_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer that has merges for every run in `UNITS`."""
    path = tmp_path_factory.mktemp("runs") / "text.txt"
    path.write_text("x".join(unit * 4096 for unit in UNITS.values()))
    tokenizer = Tokenizer(*train_bpe(path, 340, [END]), [END])
    tokenizer.compile()
    return tokenizer


@pytest.mark.parametrize("name", ["letter", "two letters", "wide"])
def test_encoding_equal_characters_takes_linear_time(name: str, runs_tokenizer: Tokenizer) -> None:
    text = UNITS[name] * 2_000_000
    assert slope_of(lambda n: runs_tokenizer.encode(text[:n]), 200_000, 2_000_000) < ALMOST_LINEAR


@pytest.mark.slow
@pytest.mark.parametrize("name", UNITS)
def test_ten_million_equal_characters(name: str, runs_tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = UNITS[name] * 10_000_000
    assert slope_of(lambda n: runs_tokenizer.encode(text[:n]), 1_000_000, 10_000_000, enough=1.2) < 1.2
    ids = runs_tokenizer.encode(text)
    assert len(ids) < len(text.encode()) // 8, "the merges of runs are used"
    assert runs_tokenizer.decode(ids) == text
    assert encoded(runs_tokenizer, write(tmp_path, text)) == ids


@pytest.mark.slow
@pytest.mark.parametrize("name", ["letter", "blank", "wide", "random letters"])
def test_training_on_equal_characters_takes_linear_time(name: str, tmp_path: Path) -> None:
    sizes = (1_200_000, 9_600_000)
    letters = np.random.default_rng(0).integers(ord("a"), ord("k"), sizes[1], dtype=np.uint8).tobytes()
    text = letters.decode() if name == "random letters" else UNITS[name] * sizes[1]
    paths = {size: write(tmp_path, text[:size], f"{size}.txt") for size in sizes}
    train_bpe(paths[sizes[0]], 300, [END], num_threads=1)
    assert slope_of(lambda n: train_bpe(paths[n], 300, [END], num_threads=1), *sizes) < ALMOST_LINEAR


@pytest.mark.slow
def test_fifty_megabytes_on_one_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """No line feed and no separator: chunks are cut at blanks, all threads work, memory stays bounded."""
    text = "the quick brown fox's 12 jumps, " * 1_600_000
    path = write(tmp_path, text)
    _, merges = train_bpe(path, 300, [END])
    expected = {pretoken: 1_600_000 * count for pretoken, count in reference.count_pretokens(text[:32], []).items()}
    expected[b"the"], expected[b" the"], expected[b" "] = 1, 1_600_000 - 1, 1
    assert merges == reference.learn_merges(expected, 300 - 257)
    assert encoded(tokenizer, path)[:1000] == tokenizer.encode(text[:32_000])[:1000]
    script = f"""
from tokenizer.pretokenize import count_pretokens
from tokenizer.rivals import peak_memory
count_pretokens({os.fspath(path)!r}, ["<|endoftext|>"], num_threads=2)
print(peak_memory())
"""
    peak = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert peak < 300_000_000


@pytest.mark.slow
def test_a_million_special_tokens_and_nothing_else(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, END * 1_000_000)
    assert train_bpe(path, 300, [END])[1] == []
    assert encoded(tokenizer, path) == tokenizer.encode(END) * 1_000_000


def distinct_words(count: int) -> bytes:
    """Random words of nine letters, each after a blank; next to none comes twice."""
    letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, (count, 10), dtype=np.uint8)
    letters[:, 0] = ord(" ")
    return letters.tobytes()


@pytest.mark.slow
def test_a_million_distinct_pretokens(tmp_path: Path) -> None:
    """Each stands once: nothing but ties, and a cache of pre-tokens that never helps."""
    text = distinct_words(1_000_000).decode()
    path = write(tmp_path, text)
    vocab, merges = train_bpe(path, 500, [END])
    _, merges_again = train_bpe(path, 500, [END], num_threads=1)
    assert merges == merges_again and len(merges) == 500 - 257
    tokenizer = Tokenizer(vocab, merges, [END])
    start = peak_memory()
    ids = encoded(tokenizer, path)
    assert tokenizer.decode(ids) == text
    assert peak_memory() - start < 700_000_000


@pytest.mark.parametrize("vocab_size", [-1, 0, 255, 256])
def test_a_vocabulary_too_small_is_refused(vocab_size: int, tmp_path: Path) -> None:
    path = write(tmp_path, "some text")
    with pytest.raises(ValueError, match=f"vocab_size={vocab_size} must be at least .*257"):
        train_bpe(path, vocab_size, [END])
    output = tmp_path / "out"
    refused(cli("train", path, f"--vocab_size={vocab_size}", "--output", output), "vocab_size")
    assert not output.exists()


def test_the_smallest_vocabulary_has_no_merges(tmp_path: Path, path_taken: str) -> None:
    vocab, merges = train_bpe(write(tmp_path, "some text"), 257, [END])
    assert merges == [] and len(vocab) == 257


def test_more_tokens_than_pairs_is_said(tmp_path: Path, path_taken: str, capsys: pytest.CaptureFixture[str]) -> None:
    vocab, merges = train_bpe(write(tmp_path, "ab abc"), 1000, [END])
    assert len(vocab) == 257 + len(merges) < 1000
    assert f"{len(vocab)} tokens instead of 1000" in capsys.readouterr().err


def test_a_vocabulary_beyond_uint16_gives_uint32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = [bytes([i]) for i in range(256)]
    tokens += [bytes([i, j]) for i in range(256) for j in range(256)][: 65_536 - 256]
    for extra, dtype in ((0, "uint16"), (1, "uint32")):
        vocab = dict(enumerate([*tokens, *([b"abc"] * extra)]))
        merges = [(token[:1], token[1:]) for token in vocab.values() if len(token) > 1]
        tokenizer = Tokenizer(vocab, merges)
        path = write(tmp_path, "abc abc \xff")
        record = encode_files(tokenizer, path, tmp_path / dtype / "ids.npy")
        ids = np.load(tmp_path / dtype / "ids.npy")
        assert record["dtype"] == ids.dtype.name == dtype
        assert ids.tolist() == tokenizer.encode("abc abc \xff")
        assert ("uint32" in capsys.readouterr().err) == bool(extra)


def test_counts_beyond_32_and_53_bits() -> None:
    """A pair that leads by one occurrence at 2**54 still leads."""
    from tokenizer.pretokenize import PretokenCounts
    from tokenizer.train import train_from_counts

    counts = {b"ab": 2**33 + 1, b"yz": 2**33, b"cd": 2**54 + 1, b"xy": 2**54, b"uv": 2**31 - 1, b"st": 2**31}
    merges = train_from_counts(PretokenCounts.from_dict(counts), 6)
    assert [a + b for a, b in merges] == [b"cd", b"xy", b"ab", b"yz", b"st", b"uv"]


# ----------------------------------------------------------------------------------------- encode and decode (E1, E5)


@settings(max_examples=EXAMPLES, deadline=None)
@given(text=st.text())
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode_stream(ids)) == text


@settings(max_examples=EXAMPLES, deadline=None)
@given(ids=st.lists(st.integers(0, 299)))
def test_decode_of_any_ids(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Bytes that are no UTF-8 become U+FFFD; a stream gives the same, in pieces without half characters."""
    expected = b"".join(tokenizer.vocab[i] for i in ids).decode("utf-8", "replace")
    assert tokenizer.decode(ids) == expected
    assert "".join(tokenizer.decode_stream(iter(ids))) == expected
    many = ids * 100
    assert tokenizer.decode(many) == b"".join(tokenizer.vocab[i] for i in many).decode("utf-8", "replace")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bad", [-1, 300, 1 << 16, 1 << 40, 1 << 70])
def test_an_id_that_does_not_exist_is_named(bad: int, compiled: bool, saved: Path) -> None:
    tokenizer = Tokenizer.from_directory(saved)
    if compiled:
        tokenizer.compile()
    for ids in ([bad], [0, bad, 1], [0] * 1000 + [bad]):
        with pytest.raises(ValueError, match=str(bad)):
            tokenizer.decode(ids)
        with pytest.raises(ValueError, match=str(bad)):
            list(tokenizer.decode_stream(ids))


@pytest.mark.parametrize("compiled", [False, True])
def test_lone_surrogates_are_replaced(compiled: bool, saved: Path) -> None:
    tokenizer = Tokenizer.from_directory(saved)
    if compiled:
        tokenizer.compile()
    for text, meant in (("\ud800", "\ufffd"), ("a\udfff b", "a\ufffd b"), ("\ud83d\ude00x", "\U0001f600x")):
        assert tokenizer.encode(text) == tokenizer.encode(meant)
        assert list(tokenizer.encode_iterable([text])) == tokenizer.encode(meant)


@pytest.mark.slow
def test_the_cache_of_pretokens_is_bounded(saved: Path) -> None:
    """Ever new words: memory stops growing."""
    script = f"""
import random
from tokenizer import Tokenizer
from tokenizer.rivals import peak_memory
tokenizer, draw, peaks = Tokenizer.from_directory({os.fspath(saved)!r}), random.Random(0), []
for _ in range(8):
    for _ in range(20):
        tokenizer.encode(" ".join(f"{{draw.getrandbits(48):x}}" for _ in range(10_000)))
    peaks.append(peak_memory())
assert peaks[-1] - peaks[1] < 20_000_000, peaks
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=110)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_encode_iterable_needs_one_megabyte(saved: Path) -> None:
    """50 MB streamed through under a limit of address space 1 MB above what the loaded tokenizer has."""
    script = f"""
import resource
from tokenizer import Tokenizer
tokenizer = Tokenizer.from_directory({os.fspath(saved)!r})
lines = ["the quick brown fox %d jumps\\n" % i for i in range(1000)]
assert sum(1 for _ in tokenizer.encode_iterable(lines)) > 1000
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 1_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(sum(1 for _ in tokenizer.encode_iterable(line for _ in range(1800) for line in lines)))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=110)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 1_000_000


# --------------------------------------------------------------------------------------------- corrupt files (E6, E7)


def mutations(text: str, draw: random.Random) -> Iterator[str]:
    """Ways in which a file gets broken: cut, emptied, lines dropped or doubled, characters changed, no text at all."""
    lines = text.split("\n")
    for size in (0, 1, len(text) // 2, len(text) - 2):
        yield text[:size]
    for _ in range(40):
        i = draw.randrange(len(lines))
        yield "\n".join([*lines[:i], *lines[i + 1 :]])
        yield "\n".join([*lines[: i + 1], *lines[i:]])
        yield "\n".join([*lines[:i], lines[i] + draw.choice([" x", "\t", ",", " ", "é", '"']), *lines[i + 1 :]])
    for _ in range(80):
        i = draw.randrange(len(text))
        yield text[:i] + draw.choice(['"', "9", "-", "Ġ", "\0", "{", "[", ",", "", " ", "\u2603"]) + text[i + 1 :]
    yield "\0" * 100
    yield "[]"
    yield "null"
    yield '{"a": 1e999}'


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json", "meta.json"])
def test_a_corrupt_file_is_refused_or_harmless(name: str, saved: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """No mutation gives anything but a ValueError of one line that names a file, or a tokenizer that works."""
    refusals = 0
    for number, broken in enumerate(mutations((saved / name).read_text(), random.Random(name))):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        if name == "tokenizer.json":
            for other in ("vocab.json", "merges.txt", "meta.json"):
                (folder / other).unlink()
        (folder / name).write_text(broken)
        try:
            loaded = Tokenizer.from_directory(folder)
        except ValueError as error:
            assert os.fspath(folder) in str(error) and len(str(error)) < 500, str(error)
            assert "\n" not in str(error), str(error)
            refusals += 1
        else:
            assert loaded.decode(loaded.encode("the fox")) == "the fox"
            if name != "tokenizer.json" and (folder / "meta.json").read_text().count("sha256"):
                assert loaded.sha256 == tokenizer.sha256, "meta.json has the hash of the files: a change must be seen"
        shutil.rmtree(folder)
    assert refusals > 60


def test_bytes_that_are_no_text_in_every_file(saved: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "meta.json"):
        folder = tmp_path / name
        shutil.copytree(saved, folder)
        (folder / name).write_bytes(b"\xff\xfe" + bytes(range(256)) * 10)
        with pytest.raises(ValueError, match=name):
            Tokenizer.from_directory(folder)


@pytest.mark.parametrize("path", ["pre_tokenizer", "normalizer", "model.type", "model.byte_fallback", "decoder"])
def test_a_foreign_tokenizer_json_is_refused(path: str, saved: Path, tmp_path: Path) -> None:
    data = json.loads((saved / "tokenizer.json").read_text())
    foreign = {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Isolated", "invert": False},
        "normalizer": {"type": "NFC"},
        "model.type": "WordPiece",
        "model.byte_fallback": True,
        "decoder": {"type": "Metaspace"},
    }[path]
    part = data
    for key in path.split(".")[:-1]:
        part = part[key]
    part[path.split(".")[-1]] = foreign
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)


def test_missing_files_say_what_makes_them(tmp_path: Path, saved: Path) -> None:
    text = write(tmp_path, "text")
    refused(cli("encode", text, "--tokenizer", tmp_path / "none", "--output", tmp_path / "x.npy"), "none")
    refused(cli("encode", tmp_path / "none.txt", "--tokenizer", saved, "--output", tmp_path / "x.npy"), "none.txt")
    refused(cli("train", tmp_path / "none.txt", "--vocab_size", 300, "--output", tmp_path / "t"), "none.txt")
    refused(cli("train", tmp_path, "--vocab_size", 300, "--output", tmp_path / "t"), str(tmp_path))
    refused(cli("encode", text, "--tokenizer", saved, "--output", tmp_path / "x.txt"), "x.txt", ".npy")


# -------------------------------------------------------------------- files, disks and users that misbehave (T10-T14)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """30 MB."""
    draw = random.Random(2)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(50_000)]
    block = " ".join(draw.choices(words, k=200_000)) + f"\n{END}\n"
    return write(tmp_path, block * 25, "large.txt")


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "encode"])
def test_a_file_that_grows_while_it_is_read_is_noticed(verb: str, large: Path, tokenizer: Tokenizer) -> None:
    stop = threading.Event()

    def grow() -> None:
        with open(large, "ab") as file:
            while not stop.is_set():
                file.write(b"more text ")
                file.flush()
                time.sleep(0.001)

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        with pytest.raises(ValueError, match=r"large\.txt changed"):
            train_bpe(large, 400, [END]) if verb == "train" else encoded(tokenizer, large)
    finally:
        stop.set()
        thread.join()
    assert not large.with_suffix(".npy").exists()


@pytest.mark.slow
def test_a_file_that_shrinks_while_it_is_read_kills_nobody(
    large: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, taken = ShardReader.take, iter(range(1000))

    def shrink_then_take(*arguments: Any) -> Any:
        if next(taken) == 4:
            os.truncate(large, large.stat().st_size // 4)
        return take(*arguments)

    monkeypatch.setattr(ShardReader, "take", shrink_then_take)
    with pytest.raises(ValueError, match=r"large\.txt changed"):
        encoded(tokenizer, large, num_threads=2)


def start(*words: object) -> subprocess.Popen[str]:
    """A command in the background that notes its progress often, and reads so slowly that it can be met at work.

    Once it is well at it, it says "reading" on stderr.
    """
    script = """
import itertools, sys, time
from tokenizer import __main__, chunks, encode
encode.JOURNAL_SECONDS, end_of_chunk, calls = 0.05, chunks.ChunkReader._end_of_chunk, itertools.count()

def slowly(*arguments):
    time.sleep(0.02)
    if next(calls) == 10:
        print("reading", file=sys.stderr, flush=True)
    return end_of_chunk(*arguments)

chunks.ChunkReader._end_of_chunk = slowly
sys.exit(__main__.main())
"""
    command = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "encode"])
def test_ctrl_c_stops_at_once(verb: str, large: Path, saved: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "ids.npy"
    options = ["--vocab_size", 30_000] if verb == "train" else ["--tokenizer", saved]
    assert cli(verb, large, *options, "--output", tmp_path / "warm" / "ids.npy").returncode == 0  # compiled from now on
    child = start(verb, *[large] * 30, *options, "--output", output.parent if verb == "train" else output)
    assert child.stderr is not None and "reading\n" in iter(child.stderr.readline, "")
    child.send_signal(signal.SIGINT)
    begin = time.monotonic()
    _, stderr = child.communicate(timeout=60)
    assert time.monotonic() - begin < 20  # the rest of the work would take longer
    assert child.returncode == 130
    assert "Traceback" not in stderr and "interrupted" in stderr
    assert not output.exists() and not (output.parent / "vocab.json").exists()


@pytest.mark.slow
def test_encoding_resumes_after_sigkill_with_the_same_bytes(large: Path, saved: Path, tmp_path: Path) -> None:
    """Killed again and again at random moments, then left to end: the same file as in one go."""
    words = ["encode", *[large] * 6, "--tokenizer", saved, "--output"]
    for name in ("compiled", "one"):
        begin = time.monotonic()
        assert cli(*words, tmp_path / name / "ids.npy").returncode == 0
        seconds = time.monotonic() - begin
    whole = (tmp_path / "one" / "ids.npy").read_bytes()
    draw = random.Random(3)
    output = tmp_path / "killed" / "ids.npy"
    journal = output.with_name(".ids.npy.journal")
    said = []
    for _ in range(5):
        before = journal.read_bytes() if journal.exists() else b""
        child = start(*words, output)
        wait_for(lambda: child.poll() is not None or (journal.exists() and journal.read_bytes() != before))  # noqa: B023
        time.sleep(draw.uniform(0, 0.1) * seconds)
        child.kill()
        said.append(child.communicate()[1])
        if child.returncode == 0:
            break
        if output.exists():
            assert output.read_bytes() == whole, "nothing under the final name before it is whole"
    assert any("going on" in text for text in said)
    last = cli(*words, output)
    assert last.returncode == 0, last.stderr
    assert output.read_bytes() == whole
    records = [json.loads((tmp_path / name / "meta.json").read_text())["splits"] for name in ("one", "killed")]
    assert records[0] == records[1]
    assert sorted(path.name for path in output.parent.iterdir()) == ["ids.npy", "meta.json"]


@pytest.mark.slow
def test_a_resumed_run_goes_on_only_with_the_same_work(large: Path, saved: Path, tmp_path: Path) -> None:
    """A part file of another text, or one cut or changed since, is not gone on with."""
    output = tmp_path / "out" / "ids.npy"
    part, journal = output.with_name(".ids.npy.part"), output.with_name(".ids.npy.journal")
    words = ["encode", *[large] * 2, "--tokenizer", saved, "--output", output]
    for spoil in ("nothing", "text", "part", "journal"):
        child = start(*words)
        wait_for(lambda: (part.exists() and part.stat().st_size > 2_000_000) or child.poll() is not None)  # noqa: B023
        child.send_signal(signal.SIGINT)
        child.communicate()
        assert child.returncode == 130 and journal.exists()
        if spoil == "text":
            text = large.read_bytes()
            large.write_bytes(b"x" + text[1:])
        elif spoil == "part":
            os.truncate(part, 1000)
        elif spoil == "journal":
            journal.write_text(journal.read_text()[:-30])
        result = cli(*words)
        assert result.returncode == 0, result.stderr
        assert ("going on" in result.stderr) == (spoil == "nothing")
        encode_files(Tokenizer.from_directory(saved), [large] * 2, tmp_path / "again" / "ids.npy")
        assert output.read_bytes() == (tmp_path / "again" / "ids.npy").read_bytes()
        output.unlink()


@pytest.mark.parametrize("verb", ["train", "encode"])
def test_a_full_disk_is_one_line_and_no_file(verb: str, saved: Path, tmp_path: Path) -> None:
    """On a file system of 64 kB where user namespaces allow one, else with a limit on the size of files."""
    text = write(tmp_path, "the quick brown fox jumps over the lazy dog; it's 12 o'clock. " * 30_000)
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["--vocab_size", 3000] if verb == "train" else ["--tokenizer", saved]
    if verb == "train":  # enough distinct words for files that do not fit
        draw = random.Random(4)
        words = " ".join("".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(20_000))
        text = write(tmp_path, words)
    output = disk / ("tokenizer" if verb == "train" else "ids.npy")
    command = [sys.executable, "-m", "tokenizer", verb, text, *options, "--output", output]
    namespaces = subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode == 0
    if namespaces:
        script = f'mount -t tmpfs -o size=64k none {disk} && "$@"; code=$?; find {disk} >&3; exit $code'
        command = ["unshare", "-Urm", "sh", "-c", script, "sh", *command]
    with open(tmp_path / "listing", "w+") as listing:

        def prepare() -> None:
            os.dup2(listing.fileno(), 3)
            if not namespaces:
                resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        result = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            timeout=100,
            preexec_fn=prepare,
            close_fds=False,
        )
    refused(result, "space" if namespaces else "large", str(disk))
    left = (tmp_path / "listing").read_text() if namespaces else "\n".join(path.name for path in disk.iterdir())
    assert ".npy" not in left and ".part" not in left and "tokenizer.json" not in left, left


def test_too_little_room_is_said_before_the_work(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write(tmp_path, "the quick brown fox " * 400_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    with pytest.raises(OSError, match=r"ids\.npy needs about .* MB"):
        encode_files(Tokenizer.from_directory(saved), text, tmp_path / "ids.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.slow
def test_out_of_memory_is_advice(tmp_path: Path, saved: Path) -> None:
    """A limit on address space that the tables of distinct pre-tokens do not fit into."""
    text = write(tmp_path, distinct_words(2_000_000))
    script = """
import resource, sys
import tokenizer.__main__, tokenizer.train, tokenizer.kernels.count, tokenizer.kernels.merge
from tokenizer.pretokenize import count_pretokens
sample = sys.argv.pop(1)
count_pretokens(sample, [], num_threads=2)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 150_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(tokenizer.__main__.main(sys.argv[1:]))
"""
    sample = write(tmp_path, "the fox " * 300_000, "sample.txt")
    words_ = ["train", text, "--vocab_size", 400, "--output", tmp_path / "t"]
    command = [sys.executable, "-c", script, sample, *map(str, words_)]
    refused(subprocess.run(command, capture_output=True, text=True, timeout=100), "memory")
    assert not (tmp_path / "t").exists()


def test_two_writers_of_one_file(saved: Path, tmp_path: Path) -> None:
    """The second is refused while the first writes."""
    import fcntl

    text = write(tmp_path, "the fox " * 100)
    part = tmp_path / ".ids.npy.part"
    with open(part, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(cli("encode", text, "--tokenizer", saved, "--output", tmp_path / "ids.npy"), "another process")
    assert cli("encode", text, "--tokenizer", saved, "--output", tmp_path / "ids.npy").returncode == 0
