"""The scanner equals `regex` with the course's pattern, byte for byte."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.kernels import PADDING
from tokenizer.kernels import scan as scan_module
from tokenizer.kernels.machine import kernel
from tokenizer.kernels.scan import character_start, find_invalid_utf8, find_special_token, scan
from tokenizer.pretokenize import PATTERN, special_token_arrays, split_special_tokens, unicode_classes

# What the pattern treats apart: contractions and what looks like them, every kind of white space, digits and letters of
# other scripts and other lengths in UTF-8, combining marks, emoji joined by U+200D, controls.
ALPHABET = [
    *"sdmtlvreaZ09'’ !-_.",
    *"\t\n\v\f\r\x1c\x1f\x00\x7f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u200b\u200d\ufeff",
    *"éßДж中́ͅ२٣½Ⅷ²𝟗𝒜😀👩🏽\u0378\ue000\U0010ffff",
    *("'s", "'ll", "'ve", "'re", "'l", "  ", "\r\n", " '", "\u3000\u3000", "文字"),
]
texts = st.lists(st.sampled_from(ALPHABET), max_size=90).map("".join)


def scanned(
    data: bytes, *, before: bytes = b"", after: bytes = b"\xff" * PADDING, kind: type = np.int64
) -> list[bytes]:
    text = np.frombuffer(before + data + after, np.uint8)
    begin, end = len(before), len(before) + len(data)
    starts = np.empty(len(data) + PADDING, kind)
    count = scan(text, begin, end, unicode_classes(), starts, 0)
    bounds = [int(start) - begin for start in starts[:count]] + [len(data)]
    return [data[a:b] for a, b in itertools.pairwise(bounds)]


def expected(text: str) -> list[bytes]:
    return [match.group().encode() for match in regex.finditer(PATTERN, text)]


@settings(max_examples=500, deadline=None)
@given(texts, st.sampled_from([b"", b"'", b" ", b"\xe4"]), st.sampled_from([b" ", b"a", b"\x85", b"s"]))
def test_equals_regex_whatever_surrounds_the_text(text: str, before: bytes, after: bytes) -> None:
    assert scanned(text.encode(), before=before, after=after * PADDING) == expected(text)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=150))
def test_equals_regex_on_any_unicode(text: str) -> None:
    assert scanned(text.encode("utf-8", "replace")) == expected(text.encode("utf-8", "replace").decode())


@pytest.mark.parametrize("filling", ["x", " ", "\n", "'", "é", "\u3000", "7", "😀"])
def test_nothing_depends_on_where_blocks_of_64_end(filling: str) -> None:
    middle = "a'll 've'd \n\u2003\u00a0 é\u3000x  中 's"
    for length in range(130):
        text = filling * length + middle
        assert scanned(text.encode()) == expected(text)


def test_random_long_texts() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(random.choice(ALPHABET, random.integers(1, 400)))
        assert scanned(text.encode()) == expected(text)


@pytest.mark.slow
def test_random_long_texts_at_length() -> None:
    random = np.random.default_rng(1)
    for _ in range(30_000):
        text = "".join(random.choice(ALPHABET, random.integers(1, 400)))
        assert scanned(text.encode()) == expected(text)


def test_real_text(fixtures) -> None:
    for name in ("corpus.en", "german.txt", "address.txt", "tinystories_sample.txt"):
        text = (fixtures / name).read_bytes()
        assert scanned(text, kind=np.uint32) == expected(text.decode())


BROKEN = [
    b"\xc3",
    b"\xa9",
    b"\xe2\x80",
    b"\x83",
    b"\xed\xa0\x80",
    b"\xf0\x9f",
    b"\xe0\x80\xa0",
    b"\xc0\xa0",
    b"\xf4\x90\x80\x80",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*BROKEN, b"\xff", b"a", b" ", b"\n", b"1", "é".encode()]), max_size=80).map(b"".join))
def test_bytes_outside_utf8_are_others(data: bytes) -> None:
    """As if each were a character that is neither letter, number nor white space."""
    stand_in = data.decode("utf-8", "surrogateescape")
    pieces = [match.group().encode("utf-8", "surrogateescape") for match in regex.finditer(PATTERN, stand_in)]
    assert scanned(data) == pieces

    try:
        data.decode()
        invalid = len(data)
    except UnicodeDecodeError as error:
        invalid = error.start
    assert find_invalid_utf8(np.frombuffer(data + b"\x80" * PADDING, np.uint8), 0, len(data)) == invalid


@pytest.mark.parametrize("text", ["aé中😀", "é中😀a😀", "中" * 5])
def test_start_of_the_character_that_a_position_is_inside(text: str) -> None:
    data = text.encode()
    starts = [len(text[:i].encode()) for i in range(len(text))]
    for position in range(len(data)):
        expected = max(start for start in starts if start <= position)
        assert character_start(np.frombuffer(data, np.uint8), position, len(data)) == expected
    stray = np.frombuffer(b"\xc3\xa9\x80\x80\x80\x80\xc3", np.uint8)
    assert [character_start(stray, position, 7) for position in range(7)] == [0, 0, 2, 3, 4, 5, 6]


def test_empty_range_appends_nothing() -> None:
    assert scanned(b"", before=b"abc") == []


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("<|ab>é", min_size=1, max_size=4), max_size=6, unique=True),
    st.lists(st.sampled_from(["<", "|", "a", "b", ">", "é", "-" * 50]), max_size=80).map("".join),
)
def test_special_tokens_leftmost_longest(special_tokens: list[str], text: str) -> None:
    data = text.encode()
    padded = np.frombuffer(data + b"<a" * PADDING, np.uint8)
    specials = special_token_arrays(special_tokens)
    position, pieces = 0, []
    while position < len(data):
        found, row = find_special_token(padded, position, len(data), specials)
        if found > position:
            pieces.append((data[position:found].decode(), False))
        if row < 0:
            break
        token = special_tokens[specials.numbers[row]]
        pieces.append((token, True))
        position = found + len(token.encode())
    assert pieces == list(split_special_tokens(text, special_tokens))


@pytest.mark.slow
def test_a_change_in_any_kernel_compiles_all_afresh(tmp_path: Path) -> None:
    """A copy of the package finds nothing in the cache after a change in a file that the kernel's own file imports."""
    source = Path(scan_module.__file__).parents[1]
    shutil.copytree(source, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("__pycache__"))
    script = "from tokenizer.kernels.scan import decode; import numpy; decode(numpy.zeros(9, numpy.uint8), 0, 1)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def announced() -> bool:
        run = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, check=True
        )
        return b"compiling" in run.stderr

    assert announced()
    assert not announced()
    for suffix in ("nbi", "nbc"):
        for path in (tmp_path / "cache").rglob(f"*decode*.{suffix}"):
            path.write_bytes(path.read_bytes()[:-50])
        assert announced(), "code cut short, by a power cut say"
        assert not announced()
    with open(tmp_path / "tokenizer/kernels/machine.py", "a") as file:
        file.write("# changed")
    assert announced()


def test_a_kernel_needs_no_place_for_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, function: object) -> None:
        raise RuntimeError("cannot cache function 'f': no locator available for file 'f.py'")

    monkeypatch.setattr("numba.core.caching.FunctionCache.__init__", refuse)

    @kernel
    def double(x: int) -> int:
        return 2 * x

    assert double(3) == 6
