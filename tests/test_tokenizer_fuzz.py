"""Differential fuzzing: ours against `regex`, tiktoken, HF tokenizers and the textbook version.

The default run is short. `LM_FUZZ=1000000 pytest -n0 -s tests/test_tokenizer_fuzz.py` draws that many strings, and a
hundredth as many corpora to train on, and prints counts and seconds.
"""

import contextlib
import io
import itertools
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex

from tokenizer import Tokenizer, reference, train_bpe
from tokenizer.kernels.scan import scan
from tokenizer.pretokenize import PATTERN, unicode_classes

NUM_STRINGS = int(os.environ.get("LM_FUZZ", "4000"))
NUM_CORPORA = max(NUM_STRINGS // 100, 60)
BATCH = 4000
END = "<|endoftext|>"

pytestmark = pytest.mark.timeout(0 if NUM_STRINGS > 100_000 else 600)


# ---------------------------------------------------------------------------------------------- text to throw at them


@pytest.fixture(scope="module")
def agreed() -> str:
    r"""Every code point on whose `\s`, `\p{L}` and `\p{N}` regex, tiktoken and HF tokenizers agree.

    Each library carries the Unicode tables of its own year; a letter new to one of them is no bug of ours.
    """
    tiktoken = pytest.importorskip("tiktoken")
    tokenizers = pytest.importorskip("tokenizers")
    everything = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    disputed: set[str] = set()
    for name in (r"\s", r"\p{L}", r"\p{N}"):
        ours = set(regex.findall(name, everything))
        finder = tiktoken.Encoding(
            "finder", pat_str=name, mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
        )
        others = tokenizers.normalizers.Replace(tokenizers.Regex(f"[^{name}]+"), "")
        disputed |= ours ^ set(bytes(finder.encode_ordinary(everything)).decode())
        disputed |= ours ^ set(others.normalize_str(everything))
    return "".join(c for c in everything if c not in disputed)


class TextSource:
    """Random strings of everything that has ever broken a tokenizer, cut from a few kinds of pieces."""

    SPACES = " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
    NEARLY_SPACES = "\u200b\u200c\u200d\u2060\ufeff\u180e\xad\x00\x7f\x08"
    CONTRACTIONS = (
        "'s",
        "'t",
        "'re",
        "'ve",
        "'m",
        "'ll",
        "'d",
        "'S",
        "'LL",
        "'",
        "''",
        "’s",
        "'l",
        "'r",
        "'v",
        "'x",
        " 's",
    )
    DIGITS = "0123456789٠١٢३४५๑๒๓６７８½²³①Ⅳ〇𝟘𝟡໑"
    MARKS = "\u0301\u0300\u0308\u0e31\u0e35\u093e\u094d\u064b\u0651\u05b0\u20dd\u3099\ufe0f"
    LETTERS = "abcxyzABCéßñøŁıſДжяΩλאבגשلمرअकषกขค中文字日本語한국어ﬁǅꙮ𝒜𐐷"
    SYMBOLS = '.,;:!?-_/\\()[]{}<>|@#$%^&*+=~`"«»—…·€£¥©™§¶†‡♥☃⚠'
    EMOJI = ("👩‍👩‍👧‍👦", "👍🏽", "🏳️‍🌈", "🇩🇪🇫🇷", "1️⃣", "❤️", "🧑🏿‍🚀", "😀")
    WORDS = (
        "the",
        " the",
        "Hello",
        " world",
        " naïve",
        " don't",
        " I'll",
        "\n\n",
        "  ",
        "   ",
        "\r\n",
        " 2026",
        " שלום",
        " مرحبا",
        " 你好",
    )
    SPECIALS = (
        END,
        END + END,
        "<|endoftext|",
        "|endoftext|>",
        "<|",
        " " + END,
        END + " ",
        "<|endoftext|><|endoftext",
        "<|end<|endoftext|>",
    )

    def __init__(self, agreed: str, seed: int):
        self.random = random.Random(seed)
        self.agreed = agreed
        known = set(agreed)
        self.alphabets = [
            "".join(c for c in text if c in known)
            for text in (
                self.SPACES,
                self.NEARLY_SPACES,
                self.DIGITS,
                self.MARKS,
                self.LETTERS,
                self.SYMBOLS,
                "ab",
                " ",
                " \n",
                "' ",
            )
        ]
        lists = (self.CONTRACTIONS, self.EMOJI, self.WORDS, self.SPECIALS)
        self.phrases = [tuple(p for p in phrases if known.issuperset(p)) for phrases in lists]

    def piece(self) -> str:
        draw = self.random.random()
        if draw < 0.4:
            return self.random.choice(self.random.choice(self.phrases))
        length = int(1 + 3 * self.random.expovariate(1))
        if draw < 0.5:
            return "".join(self.random.choices(self.agreed, k=length))
        return "".join(self.random.choices(self.random.choice(self.alphabets), k=length))

    def string(self) -> str:
        return "".join(self.piece() for _ in range(self.random.randint(0, 9)))

    def batches(self, num_strings: int) -> Iterator[list[str]]:
        for begin in range(0, num_strings, BATCH):
            yield [self.string() for _ in range(min(BATCH, num_strings - begin))]


@pytest.fixture(scope="module")
def gpt2(fixtures: Path) -> Tokenizer:
    """GPT-2's tokenizer with its kernels loaded."""
    tokenizer = Tokenizer.from_files(fixtures / "gpt2_vocab.json", fixtures / "gpt2_merges.txt", [END])
    tokenizer.compile()
    return tokenizer


@pytest.fixture
def plain_gpt2(gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """The same, kept from loading its kernels."""
    monkeypatch.setattr("tokenizer.bpe.COMPILE_AFTER", 1 << 60)
    return Tokenizer(gpt2.vocab, gpt2.merges, gpt2.special_tokens)


def report(what: str, count: int, start: float, wrong: list) -> None:
    print(f"{what}: {count} drawn, {len(wrong)} wrong, {time.monotonic() - start:.1f} s")
    assert not wrong, wrong[:5]


# ----------------------------------------------------------------------------------------------------------- encoding


def test_ids_equal_tiktoken_and_hf_tokenizers(
    agreed: str, gpt2: Tokenizer, plain_gpt2: Tokenizer, tmp_path: Path
) -> None:
    import tiktoken
    import tokenizers

    ranks = {token: index for index, token in gpt2.vocab.items() if token != END.encode()}
    theirs = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: 50256})
    gpt2.save(tmp_path / "gpt2")
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / "gpt2" / "tokenizer.json"))
    start, wrong = time.monotonic(), []
    for texts in TextSource(agreed, seed=1).batches(NUM_STRINGS):
        by_tiktoken = theirs.encode_batch(texts, num_threads=1, allowed_special="all")
        by_hf = hf.encode_batch(texts, add_special_tokens=False)
        for text, expected, encoding in zip(texts, by_tiktoken, by_hf, strict=True):
            ids = gpt2.encode(text)
            plain = plain_gpt2.encode(text)
            if not (ids == plain == expected == encoding.ids and gpt2.decode(ids) == text):
                wrong.append((text, ids, plain, expected, encoding.ids))
    report("strings encoded", NUM_STRINGS, start, wrong)


def test_ids_of_a_long_text_equal_tiktoken(agreed: str, gpt2: Tokenizer) -> None:
    """One long string takes other paths (blocks of 64 bytes, threads, tables that grow) than many short ones."""
    import tiktoken

    ranks = {token: index for index, token in gpt2.vocab.items() if token != END.encode()}
    theirs = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: 50256})
    for batch in TextSource(agreed, seed=2).batches(min(NUM_STRINGS, 40_000)):
        text = "".join(batch)
        assert gpt2.encode(text) == theirs.encode(text, allowed_special="all")


def test_pretokens_equal_regex(agreed: str) -> None:
    """All strings of a batch lie in one buffer: a scan must not look past its `end` at the neighbour's bytes."""
    pattern, classes = regex.compile(PATTERN), unicode_classes()
    start, wrong = time.monotonic(), []
    for texts in TextSource(agreed, seed=3).batches(NUM_STRINGS):
        encoded = [text.encode() for text in texts]
        buffer = np.frombuffer(b"".join(encoded) + b"a" * 64, dtype=np.uint8)
        starts = np.empty(len(buffer) + 64, dtype=np.int64)
        begin = 0
        for text, data in zip(texts, encoded, strict=True):
            end = begin + len(data)
            count = scan(buffer, begin, end, classes, starts, 0)
            bounds = [*starts[:count].tolist(), end]
            found = [buffer[a:b].tobytes().decode() for a, b in itertools.pairwise(bounds)]
            if found != pattern.findall(text):
                wrong.append((text, found))
            begin = end
    report("strings split", NUM_STRINGS, start, wrong)


def test_iterable_equals_whole_at_any_cut(agreed: str, gpt2: Tokenizer, plain_gpt2: Tokenizer) -> None:
    source, wrong, start = TextSource(agreed, seed=4), [], time.monotonic()
    count = NUM_STRINGS // 10
    for _ in range(count):
        text = source.string() + source.string()
        cuts = sorted(source.random.choices(range(len(text) + 1), k=source.random.randint(0, 6)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        whole = gpt2.encode(text)
        if list(gpt2.encode_iterable(pieces)) != whole or list(plain_gpt2.encode_iterable(pieces)) != whole:
            wrong.append(pieces)
    report("cuts", count, start, wrong)


def test_iterable_equals_whole_at_every_cut(gpt2: Tokenizer) -> None:
    text = f"Hi{END}  \n\n don't \t 12{END}{END}\u3000 é👩‍👧 x's"
    whole = gpt2.encode(text)
    for i in range(len(text) + 1):
        for j in range(i, len(text) + 1):
            assert list(gpt2.encode_iterable([text[:i], text[i:j], text[j:]])) == whole


# ----------------------------------------------------------------------------------------------------------- training


def random_corpus(source: TextSource) -> SimpleNamespace:
    """A small text full of ties: few letters, repeated words, equal counts, runs of one letter."""
    draw = source.random
    alphabet = draw.choice(
        ["a", "ab", "abc", "ab ", "abcd \n", "aé", "中文 ", "01a' s", "".join(draw.choices(source.agreed, k=5))]
    )
    words = ["".join(draw.choices(alphabet, k=draw.randint(1, 9))) for _ in range(draw.randint(1, 25))]
    words += draw.choices(words, k=draw.randint(0, 40))
    specials = draw.choice([[], [END], [END], ["<a>", "<a><a>", "a"], ["b", END]])
    text = draw.choice(["", " ", " ", "\n"]).join(draw.choices([*words, *specials], k=len(words) * 2))
    return SimpleNamespace(text=text, specials=specials, vocab_size=256 + len(specials) + draw.randint(0, 60))


def train_and_compare(tmp_path: Path, corpora: list[SimpleNamespace]) -> list:
    wrong = []
    path = tmp_path / "corpus.txt"
    for corpus in corpora:
        path.write_bytes(corpus.text.encode())
        with contextlib.redirect_stderr(io.StringIO()):  # "no more pairs to merge"
            vocab, merges = train_bpe(path, corpus.vocab_size, corpus.specials, num_threads=1)
        expected = reference.train_bpe(corpus.text, corpus.vocab_size, corpus.specials)
        if (vocab, merges) != expected:
            wrong.append((corpus, merges, expected))
    return wrong


@pytest.mark.parametrize("small_bytes", [0, 1 << 20], ids=["kernels", "plain Python"])
def test_training_equals_the_textbook_on_ties(
    small_bytes: int, agreed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenizer.train.SMALL_BYTES", small_bytes)
    source, start = TextSource(agreed, seed=5), time.monotonic()
    corpora = [random_corpus(source) for _ in range(NUM_CORPORA)]
    report("corpora trained on", NUM_CORPORA, start, train_and_compare(tmp_path, corpora))
