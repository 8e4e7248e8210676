"""`Tokenizer`: both paths against the textbook, tiktoken and HF tokenizers; streams, decoding, special tokens."""

import functools
import gc
import itertools
import pickle
import random
import re
import subprocess
import sys
import threading
import tracemalloc
import unicodedata
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timing import ALMOST_LINEAR, slope_of

from tokenizer import Tokenizer, bpe, reference
from tokenizer.bpe import BytesEncoder, merge_pretoken
from tokenizer.kernels import PADDING, lists, strings
from tokenizer.kernels.keys import hash_bytes
from tokenizer.pretokenize import PATTERN, unicode_classes

END = "<|endoftext|>"
SPECIALS = [END, "<|a|>", "<|a|><|a|>", "[x y]", "\n\n#"]
CORPUS = (
    "low low low low lower lower widest widest widest newest newest newest it's it's we'll I've 123 1234 12\n"
    "über über  naïve   café 中文 中文字 中 \t\tx\n\n  y!? ... --- aaaaaaaa abababab 😀😀 😀 e\u0301 \u00a0\u3000 "
) * 2
AWKWARD = [
    *" \n\t\r\f\v\x00\x1c\x85\xa0\u1680\u2003\u2028\u3000",
    *"aelrvstdm'’AZß中é\u0301१٣²Ⅷ😀\U0001f468\u200d\ufeff\u0600.,-!<|>[]#x",
    "'ll",
    "'re",
    "  ",
    "\r\n",
    "aaaa",
    *SPECIALS,
    "<|endoftext",
    "<|a|",
]


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer(*reference.train_bpe(CORPUS, 330, SPECIALS), SPECIALS)


@pytest.fixture(scope="module")
def compiled(small: Tokenizer) -> Tokenizer:
    twin = Tokenizer(small.vocab, small.merges, small.special_tokens)
    twin.compile()
    return twin


@pytest.fixture(scope="module")
def gpt2(fixtures: Path) -> Tokenizer:
    return Tokenizer.from_files(fixtures / "gpt2_vocab.json", fixtures / "gpt2_merges.txt", [END])


@pytest.fixture(scope="module")
def tiktoken_gpt2(gpt2: Tokenizer) -> Any:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {token: i for i, token in gpt2.vocab.items() if i != 50256}
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: 50256})


@pytest.fixture(scope="module")
def hf_small(small: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tok")
    small.save(folder)
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@functools.cache
def agreed_characters() -> str:
    """Characters that Unicode 3.2 had already, so that all libraries know them, and that kept their class."""
    old = unicodedata.ucd_3_2_0
    characters = map(chr, range(0x3100))
    return "".join(c for c in characters if unicodedata.category(c)[0] == old.category(c)[0] != "C")


def texts() -> st.SearchStrategy[str]:
    pieces = st.one_of(st.sampled_from(AWKWARD), st.sampled_from(CORPUS.split(" ")), st.characters(codec="utf-8"))
    return st.lists(pieces, max_size=30).map("".join)


def agreed_texts() -> st.SearchStrategy[str]:
    awkward = [piece for piece in AWKWARD if piece not in SPECIALS[1:]]
    old = st.sampled_from(agreed_characters())
    pieces = st.one_of(st.sampled_from(awkward), st.sampled_from(CORPUS.split(" ")), old)
    return st.lists(pieces, max_size=40).map("".join)


class TestEncode:
    @settings(max_examples=300, deadline=None)
    @given(text=texts())
    def test_both_paths_equal_the_textbook(self, small: Tokenizer, compiled: Tokenizer, text: str) -> None:
        expected = reference.encode(text, small.vocab, small.merges, SPECIALS)
        assert small.encode(text) == expected
        assert compiled.encode(text) == expected
        assert small.decode(expected) == text

    @settings(max_examples=300, deadline=None)
    @given(text=agreed_texts())
    def test_gpt2_equals_tiktoken(self, gpt2: Tokenizer, tiktoken_gpt2: Any, text: str) -> None:
        expected = tiktoken_gpt2.encode(text, allowed_special="all")
        assert gpt2.encode(text) == expected
        assert BytesOfTwin.of(gpt2).encode(text) == expected
        assert gpt2.decode(expected) == text

    @settings(max_examples=200, deadline=None)
    @given(text=agreed_texts())
    def test_equals_hf_through_our_tokenizer_json(self, small: Tokenizer, hf_small: Any, text: str) -> None:
        assert small.encode(text) == hf_small.encode(text).ids

    def test_known_gpt2_ids(self, gpt2: Tokenizer) -> None:
        assert gpt2.encode("") == []
        assert gpt2.encode("Hello, how are you?") == [15496, 11, 703, 389, 345, 30]
        assert gpt2.encode(f"Héllò hôw {END}{END} are ü? 🙃{END}") == [
            *(39, 2634, 297, 127, 110, 289, 27083, 86, 220, 50256, 50256, 389, 6184, 120, 30, 12520, 247, 225, 50256)
        ]

    @pytest.mark.parametrize("name", ["address.txt", "german.txt", "tinystories_sample.txt", "corpus.en"])
    def test_sample_texts_equal_tiktoken(self, gpt2: Tokenizer, tiktoken_gpt2: Any, fixtures: Path, name: str) -> None:
        text = (fixtures / name).read_bytes().decode()
        expected = tiktoken_gpt2.encode(text, allowed_special="all")
        assert gpt2.encode(text) == expected == list(gpt2.encode_iterable(text.splitlines(keepends=True)))
        assert gpt2.decode(expected) == text

    def test_text_larger_than_the_scratch_space(self, compiled: Tokenizer, small: Tokenizer) -> None:
        text = CORPUS * (2 * bpe.CompiledTokenizer.SCRATCH // len(CORPUS))
        assert compiled.encode(text) == small.encode_without_loading(text)

    @settings(max_examples=200, deadline=None)
    @given(text=texts(), size=st.integers(1, 40))
    def test_text_too_long_for_the_kernels_is_cut(
        self, small: Tokenizer, compiled: Tokenizer, text: str, size: int
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bpe, "MAX_PIECE", size)
            assert compiled.encode(text) == small.encode(text)

    def test_more_than_4_gib_without_a_place_to_cut_are_refused(self, compiled: Tokenizer) -> None:
        twin = Tokenizer(compiled.vocab, compiled.merges)
        twin.compile()
        twin._compiled._utf8 = lambda text: (np.zeros(64, np.uint8), 1 << 32)  # type: ignore[union-attr,method-assign]
        with pytest.raises(ValueError, match="more than 4 GiB"):
            twin.encode("a")

    @pytest.mark.parametrize("text", ["low lower " * 200, "über " * 400, "中文 " * 500])
    def test_what_is_not_quite_a_str(self, small: Tokenizer, compiled: Tokenizer, text: str) -> None:
        class Text(str):
            pass

        assert compiled.encode(Text(text)) == compiled.encode(np.str_(text)) == small.encode(text)

    def test_long_texts_load_the_kernels(self, small: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer = Tokenizer(small.vocab, small.merges, SPECIALS)
        monkeypatch.setattr(bpe, "COMPILE_AFTER", 100)
        assert tokenizer.encode("low lower") == small.encode("low lower")
        assert tokenizer._compiled is None
        assert tokenizer.encode("low lower" * 20) == small.encode("low lower" * 20)
        assert tokenizer._compiled is not None

    def test_lone_surrogates_become_replacement_characters(self, small: Tokenizer, compiled: Tokenizer) -> None:
        for tokenizer in (small, compiled):
            assert tokenizer.encode("a\ud83d b\udc00") == tokenizer.encode("a\ufffd b\ufffd")
            assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")

    def test_lone_surrogates_as_tiktoken(self, gpt2: Tokenizer, tiktoken_gpt2: Any) -> None:
        for text in ("a\ud83d b\udc00", "\ud83d\ude00", "\udc00\ud83d"):
            assert gpt2.encode(text) == tiktoken_gpt2.encode(text)


class BytesOfTwin:
    """A compiled twin of each tokenizer, made once."""

    twins: dict[int, Tokenizer] = {}  # noqa: RUF012

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Tokenizer:
        if id(tokenizer) not in cls.twins:
            twin = Tokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens)
            twin.compile()
            cls.twins[id(tokenizer)] = twin
        return cls.twins[id(tokenizer)]


class TestSpecialTokens:
    def test_longest_first(self, small: Tokenizer) -> None:
        one, two = small.special_ids["<|a|>"], small.special_ids["<|a|><|a|>"]
        assert small.encode("<|a|><|a|><|a|>") == [two, one]

    def test_regex_metacharacters_are_plain(self, small: Tokenizer) -> None:
        tokenizer = Tokenizer(small.vocab, small.merges, [".*", "(", "$^"])
        ids = tokenizer.encode("a.*($^b")
        assert ids[1:-1] == [tokenizer.special_ids[token] for token in (".*", "(", "$^")]

    def test_new_ones_come_last(self, small: Tokenizer) -> None:
        tokenizer = Tokenizer(small.vocab, small.merges, [END, "<new>"])
        assert tokenizer.special_ids == {END: 0, "<new>": small.vocab_size}
        assert tokenizer.vocab_size == small.vocab_size + 1

    def test_none_are_split_without_being_asked_for(self, small: Tokenizer) -> None:
        tokenizer = Tokenizer(small.vocab, small.merges)
        assert 0 not in tokenizer.encode(END)
        assert tokenizer.decode(tokenizer.encode(END)) == END

    @pytest.mark.parametrize("compile_first", [False, True])
    def test_one_that_is_a_single_byte(self, compile_first: bool) -> None:
        vocab, merges = reference.train_bpe("banana banana", 260, ["a"])
        tokenizer = Tokenizer(vocab, merges, ["a"])
        if compile_first:
            tokenizer.compile()
        ids = tokenizer.encode("banana")
        assert ids == [tokenizer.special_ids["a"] if c == "a" else 1 + ord(c) for c in "banana"]
        assert tokenizer.decode(ids) == "banana"

    def test_one_that_has_several_ids_is_the_lowest(self, small: Tokenizer) -> None:
        tokenizer = Tokenizer({**small.vocab, 400: END.encode()}, small.merges, SPECIALS)
        assert tokenizer.encode(END) == small.encode(END)

    @pytest.mark.parametrize("special_tokens", [[""], ["x", "x"], "x"])
    def test_bad_ones_are_refused(self, small: Tokenizer, special_tokens: list[str]) -> None:
        with pytest.raises(ValueError, match="special_tokens"):
            Tokenizer(small.vocab, small.merges, special_tokens)


class TestEncodeIterable:
    @settings(max_examples=150, deadline=None)
    @given(pieces=st.lists(texts(), max_size=6), enough=st.integers(0, 20))
    def test_any_pieces(self, small: Tokenizer, pieces: list[str], enough: int) -> None:
        assert list(eager(small, enough).encode_iterable(pieces)) == small.encode("".join(pieces))

    @pytest.mark.parametrize("compile_first", [False, True])
    def test_every_cut_into_three(self, small: Tokenizer, compile_first: bool) -> None:
        tokenizer = eager(small, 0)
        if compile_first:
            tokenizer.compile()
        for text in (
            "a  \n b",
            "it'll  've",
            f"x {END} <|a|><|a|><|a|> y",
            "[x y]\n\n#\n\n x",
            "😀\u3000\u3000é  1",
            "   ",
        ):
            expected = small.encode(text)
            for i, j in itertools.combinations_with_replacement(range(len(text) + 1), 2):
                assert list(tokenizer.encode_iterable([text[:i], text[i:j], text[j:]])) == expected, (text, i, j)

    def test_single_characters(self, small: Tokenizer) -> None:
        text = (CORPUS + END + "中文字中文字" * 50 + "1,2,3;" * 300 + " " * 400 + "\n" * 300 + "x") * 3
        assert list(eager(small, 0).encode_iterable(text)) == small.encode(text)
        assert list(small.encode_iterable(text)) == small.encode(text)

    def test_surrogate_pairs_cut_in_two(self, small: Tokenizer) -> None:
        assert list(eager(small, 0).encode_iterable(["x \ud83d", "\ude00 y"])) == small.encode("x 😀 y")

    def test_lazy(self, small: Tokenizer) -> None:
        taken = 0

        def endless():
            nonlocal taken
            while True:
                taken += 1
                yield "low lower lowest "

        ids = list(itertools.islice(small.encode_iterable(endless()), 100))
        assert ids == small.encode("low lower lowest " * 100)[:100]
        assert taken < 2000

    @pytest.mark.parametrize("compile_first", [False, True])
    def test_memory_is_constant(self, small: Tokenizer, compile_first: bool) -> None:
        tokenizer = Tokenizer(small.vocab, small.merges, SPECIALS)
        if compile_first:
            tokenizer.compile()
        tokenizer.encode("warm up")
        rng = random.Random(0)
        words = ("".join(rng.choices("etaoinshrdlu", k=rng.randrange(2, 12))) + " " for _ in range(15_000))
        tracemalloc.start()
        try:
            for _ in tokenizer.encode_iterable(words):
                pass
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 1_000_000

    @pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
    @pytest.mark.parametrize("compile_first", [False, True])
    @pytest.mark.slow
    def test_works_when_the_system_gives_1_mb(self, fixtures: Path, compile_first: bool) -> None:
        """As the course's own suite measures it: one more megabyte of address space than is resident."""
        code = f"""
import os, resource
from tokenizer import Tokenizer
tokenizer = Tokenizer.from_files({str(fixtures / "gpt2_vocab.json")!r}, {str(fixtures / "gpt2_merges.txt")!r})
if {compile_first}:
    tokenizer.compile()
with open({str(fixtures / "corpus.en")!r}) as file:
    resident = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (resident + 1_000_000, resource.RLIM_INFINITY))
    assert sum(1 for _ in tokenizer.encode_iterable(file)) > 30_000
"""
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_never_loads_the_kernels(self, small: Tokenizer) -> None:
        tokenizer = Tokenizer(small.vocab, small.merges, SPECIALS)
        for _ in tokenizer.encode_iterable(itertools.repeat("low lower ", 2 * bpe.COMPILE_AFTER // 10)):
            pass
        assert tokenizer._compiled is None


def eager(tokenizer: Tokenizer, enough: int) -> Tokenizer:
    """A tokenizer whose `encode_iterable` encodes as soon as `enough` characters are there."""

    class Eager(Tokenizer):
        FIRST_CHARACTERS = enough

    return Eager(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens)


class TestDecode:
    @settings(max_examples=200, deadline=None)
    @given(data=st.data())
    def test_any_ids_never_raise(self, small: Tokenizer, compiled: Tokenizer, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.integers(0, small.vocab_size - 1), max_size=100))
        expected = reference.decode(ids, small.vocab)
        assert small.decode(ids) == expected
        assert compiled.decode(ids) == expected
        assert compiled.decode(np.array(ids * 5, np.uint16)) == reference.decode(ids * 5, small.vocab)
        assert "".join(small.decode_stream(ids)) == expected

    @pytest.mark.parametrize("bad", [-1, 330, 10**6, 2**32, 2**70])
    def test_an_unknown_id_is_named(self, small: Tokenizer, compiled: Tokenizer, bad: int) -> None:
        for tokenizer, ids in itertools.product((small, compiled), ([bad], [5] * 100 + [bad])):
            with pytest.raises(ValueError, match=str(bad)):
                tokenizer.decode(ids)
            with pytest.raises(ValueError, match=str(bad)):
                list(tokenizer.decode_stream(ids))

    def test_a_hole_in_the_vocabulary_is_named(self, small: Tokenizer) -> None:
        tokenizer = Tokenizer({**small.vocab, 400: b"far"}, small.merges, SPECIALS)
        tokenizer.compile()
        assert tokenizer.decode([400] * 100) == "far" * 100
        with pytest.raises(ValueError, match="id 350"):
            tokenizer.decode([350] * 100)

    def test_a_text_that_just_fits_the_room_for_it(self, small: Tokenizer, compiled: Tokenizer) -> None:
        assert compiled._compiled is not None
        room = len(compiled._compiled._room)
        for size in (room - 15, room):
            text = compiled.decode(small.encode("b") * size)
            assert text.count("b") == len(text) == size

    def test_invalid_utf8_is_replaced(self, small: Tokenizer) -> None:
        byte = {small.vocab[i]: i for i in reversed(range(small.vocab_size))}
        assert small.decode([byte[b"\xf0"], byte[b"\x9f"], byte[b"a"]]) == "\ufffda"

    def test_stream_yields_whole_characters(self, small: Tokenizer) -> None:
        ids = [5 + byte for byte in "é中😀x".encode()]
        assert list(small.decode_stream(ids)) == ["é", "中", "😀", "x"]
        assert list(small.decode_stream(ids[:3])) == ["é", "\ufffd"]

    def test_decodes_any_iterable(self, small: Tokenizer) -> None:
        assert small.decode(iter(small.encode("low lower"))) == "low lower"


class TestLists:
    """Ids to and from the memory of Python's lists, and what is done instead where that is not known."""

    @pytest.fixture(params=[True, False])
    def known(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
        monkeypatch.setattr(lists, "KNOWN", lists.KNOWN and request.param)
        return lists.KNOWN

    def test_known_here(self) -> None:
        assert lists.KNOWN or not (3, 11) <= sys.version_info[:2] <= (3, 13)

    def test_lists_are_like_any_other(self, gpt2: Tokenizer, known: bool) -> None:
        twin = BytesOfTwin.of(gpt2)
        text = "the quick brown fox é中文 " * 500
        ids = twin.encode(text)
        expected = np.array(ids).tolist()
        assert ids == expected and type(ids) is list and {type(token_id) for token_id in ids} == {int}
        ids.append(3)
        ids.sort()
        assert ids == sorted([*expected, 3])
        assert twin.decode(expected) == twin.decode(tuple(expected)) == twin.decode(iter(expected)) == text
        assert twin.decode(np.array(expected)) == text

    def test_references_are_counted(self, compiled: Tokenizer) -> None:
        """Each element is one reference more, and deleting the list takes all of them back."""
        text = "low lower newest widest über 中文 " * 100
        ids = compiled.encode(text)
        objects = list({token_id: token_id for token_id in ids if token_id > 256}.values())
        expected = [ids.count(token_id) for token_id in objects]
        before = [sys.getrefcount(one) for one in objects]
        again = compiled.encode(text)
        with_both = [sys.getrefcount(one) for one in objects]
        del again
        after = [sys.getrefcount(one) for one in objects]
        assert [many - few for many, few in zip(with_both, before, strict=True)] == expected
        assert after == before

    def test_what_is_not_quite_an_int(self, compiled: Tokenizer, known: bool) -> None:
        """A bool or a NumPy int is the id it equals; a text, a fraction or a number of any size is refused by name."""
        good = compiled.encode("low lower newest " * 100)
        expected = compiled.decode(good)
        for one in (True, np.uint16(1), np.int64(1), 1.0):
            assert compiled.decode([*good, one]) == expected + compiled.decode([1])  # type: ignore[list-item]
        for bad in (-1, 1 << 31, 1 << 32, 1 << 63, -(1 << 63), 1 << 64, 1 << 200, "1", None, 0.5, np.int64(-1)):
            with pytest.raises(ValueError, match=re.escape(repr(bad))):
                compiled.decode([*good, bad])  # type: ignore[list-item]
            with pytest.raises(ValueError, match=re.escape(repr(bad))):
                compiled.decode([bad, *good])  # type: ignore[list-item]


class TestStrings:
    """Texts to UTF-8 from the memory of Python, and what is done instead where that is not known."""

    def test_known_here(self) -> None:
        assert strings.KNOWN == lists.KNOWN

    @settings(max_examples=400, deadline=None)
    @given(st.data(), st.sampled_from(["\x7f", "\xff", "\uffff", "\U0010ffff"]))
    def test_any_width(self, data: st.DataObject, greatest: str) -> None:
        others = st.characters(max_codepoint=ord(greatest), exclude_categories=["Cs"])
        pieces = st.one_of(st.text(st.characters(max_codepoint=0x7F), max_size=40), others, others)
        text = data.draw(st.lists(pieces, max_size=40).map("".join))
        out = np.full(strings.max_bytes(text) + 17, 0xA5, np.uint8)
        size = strings.to_utf8(text, out)
        assert out[:size].tobytes() == text.encode()
        assert out[-1] == 0xA5

    def test_at_any_place(self) -> None:
        for one, length in itertools.product("\x80\xff\u0100\u07ff\u0800\uffff\U00010000\U0010ffff", range(1, 36)):
            for place in range(length):
                text = "a" * place + one + "z" * (length - place - 1)
                out = np.empty(strings.max_bytes(text) + 16, np.uint8)
                size = strings.to_utf8(text, out)
                assert out[:size].tobytes() == text.encode()

    @pytest.mark.parametrize("one", "\x7f\x80\xff\u0100\uffff\U00010000\U0010ffff")
    def test_there_is_room_for_all_of_them(self, one: str) -> None:
        assert len((one * 100).encode()) <= strings.max_bytes(one * 100) <= 400

    @pytest.mark.parametrize("last", ["", "\U0001f600"])
    def test_surrogates_are_left_to_python(self, compiled: Tokenizer, last: str) -> None:
        for surrogate in ("\ud800", "\udfff"):
            text = f"low lower {surrogate} widest {last}"
            assert strings.to_utf8(text, np.empty(1000, np.uint8)) == -1
            assert compiled.encode(text) == compiled.encode(text.replace(surrogate, "\ufffd"))
        for neighbour in ("\ud7ff", "\ue000"):
            assert compiled.decode(compiled.encode(neighbour + last)) == neighbour + last

    def test_without_knowing(self, compiled: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        texts = [CORPUS, CORPUS[:40], "a" * 300, "\xff" * 300, "\ud800 low"]
        expected = [compiled.encode(text) for text in texts]
        monkeypatch.setattr(strings, "KNOWN", False)
        assert [compiled.encode(text) for text in texts] == expected


class TestLongPretokens:
    @pytest.mark.parametrize("length", [15, 16, 17, 64, 65, 256, 257, 1024, 1025, 5000])
    @pytest.mark.parametrize("alphabet", ["a", "ab", "lowerst", "中"])
    def test_equal_the_textbook(self, small: Tokenizer, compiled: Tokenizer, alphabet: str, length: int) -> None:
        rng = random.Random(length)
        for _ in range(3):
            text = "".join(rng.choices(alphabet, k=length))
            expected = reference.encode(text, small.vocab, small.merges, SPECIALS)
            assert small.encode(text) == expected
            assert compiled.encode(f"{text} {text}") == reference.encode(
                f"{text} {text}", small.vocab, small.merges, SPECIALS
            )

    @pytest.mark.parametrize("text", ["a", " ", "\n", "ab", "^"])
    def test_time_is_nearly_linear(self, gpt2: Tokenizer, text: str) -> None:
        tokenizer = BytesOfTwin.of(gpt2)
        run = text * 300_000
        assert tokenizer.decode(tokenizer.encode(run)) == run
        assert slope_of(lambda size: tokenizer.encode(run[:size]), 30_000, 300_000) < ALMOST_LINEAR

    def test_plain_path_is_nearly_linear(self, small: Tokenizer) -> None:
        run = "a" * 100_000
        assert small.decode(small.encode_without_loading(run)) == run
        assert slope_of(lambda size: small.encode_without_loading(run[:size]), 10_000, 100_000) < ALMOST_LINEAR

    @given(
        st.lists(st.integers(0, 3), max_size=30), st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=6)
    )
    def test_the_heap_merges_as_the_plain_loop(self, ids: list[int], pairs: list[tuple[int, int]]) -> None:
        """Also for merges that no training gives, such as one that a later one makes possible."""
        ranks = {pair: (rank, 4 + rank) for rank, pair in enumerate(dict.fromkeys(pairs))}
        expected = list(ids)
        while True:
            found = [(ranks[pair][0], i) for i, pair in enumerate(itertools.pairwise(expected)) if pair in ranks]
            if not found:
                break
            _, i = min(found)
            expected[i : i + 2] = [ranks[expected[i], expected[i + 1]][1]]
        assert merge_pretoken(list(ids), ranks) == expected


class TestCache:
    def test_plain_cache_is_bounded(self, small: Tokenizer) -> None:
        tokenizer = Tokenizer(small.vocab, small.merges)
        tokenizer.encode_without_loading(" ".join(map(str, range(3 * bpe.MAX_PLAIN_CACHE))))
        assert len(tokenizer._plain_cache) <= bpe.MAX_PLAIN_CACHE

    def test_compiled_cache_grows_empties_and_stays_right(self, small: Tokenizer) -> None:
        rng = random.Random(1)
        letters = "etaoinshrdlucmfwypvbgkjqxz"
        words = ["".join(rng.choices(letters, k=rng.randrange(1, 30))) for _ in range(60_000)]
        text = " ".join(words + words[:20_000]).encode()
        expected = small.encode_without_loading(text.decode())
        starts, ids = np.empty(len(text) + PADDING, np.uint32), np.empty(len(text) + 3, np.uint16)
        for max_slots in (1 << 14, 1 << 18):
            encoder = BytesEncoder(small, first_slots=1 << 12, max_slots=max_slots)
            count = encoder.encode(np.frombuffer(text + bytes(PADDING), np.uint8), len(text), starts, ids)
            assert ids[:count].tolist() == expected
            assert len(encoder._cache.slots) <= 4 * max_slots

    def test_memory_error_empties_the_cache(self, small: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of words; the tokens of the vocabulary stay, as they were in the fresh cache."""
        encoder = BytesEncoder(small)
        encoder.learn_vocabulary(small)
        fresh = encoder._cache.used[0]
        assert 256 < fresh <= len(small.vocab)
        text = np.frombuffer(CORPUS.encode() + bytes(PADDING), np.uint8)
        starts, ids = np.empty(len(text), np.uint32), np.empty(len(text), np.uint16)
        count = encoder.encode(text, len(text) - PADDING, starts, ids)
        assert encoder._cache.used[0] > fresh

        def fail(words: int) -> None:
            raise MemoryError

        monkeypatch.setattr(encoder._shared, "empty", fail)
        encoder._shared.make_room(encoder._cache)
        assert encoder._cache.used[0] == fresh
        expected = ids[:count].copy()
        assert encoder.encode(text, len(text) - PADDING, starts, ids) == count and (ids[:count] == expected).all()

    @pytest.mark.parametrize("max_slots", [1 << 12, 1 << 19])
    def test_threads_share_a_cache_that_grows_and_is_emptied_under_them(self, small: Tokenizer, max_slots: int) -> None:
        """All begin the same new words at once: ids would be wrong if one could see half a slot of another's."""
        rng, letters, num_threads = random.Random(2), "etaoinshrdlucmfwypvbgkjqxz", 4
        words = ["".join(rng.choices(letters, k=rng.randrange(1, 30))) for _ in range(100_000)]
        text = " ".join(words).encode()
        padded = np.frombuffer(text + bytes(PADDING), np.uint8)
        starts = np.empty((num_threads, len(text) + PADDING), np.uint32)
        ids = np.empty((num_threads, len(text) + 3), np.uint16)
        count = BytesEncoder(small).encode(padded, len(text), starts[0], ids[0])
        expected = ids[0, :count].copy()
        for _ in range(3):
            first = BytesEncoder(small, first_slots=1 << 8, max_slots=max_slots)
            encoders = [first, *(first.copy() for _ in range(num_threads - 1))]
            barrier = threading.Barrier(num_threads)

            def work(i: int) -> bool:
                barrier.wait()  # noqa: B023
                found = encoders[i].encode(padded, len(text), starts[i], ids[i])  # noqa: B023
                return found == count and bool((ids[i, :count] == expected).all())

            with ThreadPoolExecutor(num_threads) as pool:
                assert all(pool.map(work, range(num_threads)))

    def test_the_kernels_get_no_address_of_what_has_been_freed(
        self, small: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Threads that ask for the classes of characters at once each get an array; one of them stays in the cache."""
        classes, made = unicode_classes(), []

        def another() -> Any:
            array = classes.copy()
            made.append((array.ctypes.data, weakref.ref(array)))
            return array

        monkeypatch.setattr("tokenizer.pretokenize.unicode_classes", another)
        encoder = BytesEncoder(small)
        encoders = [encoder, encoder.copy()]
        gc.collect()
        alive = {address for address, array in made if array() is not None}
        assert {int(encoder._tables[0]) for encoder in encoders} <= alive

    def test_an_interrupt_amid_a_change_leaves_the_tables_whole(
        self, small: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = b"ab" * 40_000 + b" low"
        padded = np.frombuffer(text + bytes(PADDING), np.uint8)
        starts, ids = np.empty(len(text) + PADDING, np.uint32), np.empty(len(text) + 3, np.uint16)
        encoder = BytesEncoder(small)

        def interrupted(*tables: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(encoder, "_words_of", interrupted)
            encoder.encode(padded, len(text), starts, ids)
        parts = encoder._classes, encoder._special_tokens, encoder._special_ids, encoder._rules
        tables = encoder._kernels.Tables(*parts, encoder._cache, encoder._work)
        assert encoder._words_of(tables).tolist() == encoder._tables.tolist()
        count = encoder.encode(padded, len(text), starts, ids)
        assert ids[:count].tolist() == small.encode_without_loading(text.decode())

    def test_a_word_of_memory_is_claimed_by_one_thread(self) -> None:
        from numba import njit

        from tokenizer.kernels.machine import claim, take

        @njit(nogil=True)
        def claims(words: Any, taken: Any, mine: Any) -> int:
            won = 0
            for i in range(len(words)):
                won += claim(words, i, mine)
                take(taken, 0, 3)
            return won

        words, taken = np.zeros(300_000, np.uint64), np.zeros(1, np.int64)
        with ThreadPoolExecutor(4) as pool:
            won = list(pool.map(lambda mine: claims(words, taken, np.uint64(mine)), range(1, 5)))
        assert won == [int((words == mine).sum()) for mine in range(1, 5)]
        assert sum(won) == len(words)
        assert taken[0] == 3 * 4 * len(words)

    def test_long_pretokens_of_one_hash_have_each_their_own_ids(self, small: Tokenizer, compiled: Tokenizer) -> None:
        words = ["jntxbqdvaaaaaaaa", "yydfcsxfkexrnukc"]
        assert len({int(hash_bytes(np.frombuffer(word.encode(), np.uint8), 0, 16)) for word in words}) == 1
        assert compiled.encode("\n".join(words)) == small.encode("\n".join(words))

    def test_a_token_that_no_merge_makes_is_no_word_of_the_vocabulary(self) -> None:
        tokenizer = Tokenizer({i: bytes([i]) for i in range(256)} | {256: b"abcd"}, [])
        tokenizer.compile()
        assert tokenizer.encode("wxyz\nabcd") == list(b"wxyz\nabcd")

    def test_a_vocabulary_larger_than_the_cache(self, small: Tokenizer) -> None:
        encoder = BytesEncoder(small, first_slots=1 << 8, max_slots=1 << 8)
        encoder.learn_vocabulary(small)
        assert 0 < encoder._cache.used[0] <= 64
        text = np.frombuffer(CORPUS.encode() + bytes(PADDING), np.uint8)
        starts, ids = np.empty(len(text), np.uint32), np.empty(len(text), np.uint16)
        count = encoder.encode(text, len(text) - PADDING, starts, ids)
        assert ids[:count].tolist() == Tokenizer(small.vocab, small.merges).encode(CORPUS)


class TestConstruction:
    def test_parts_that_do_not_fit(self, small: Tokenizer) -> None:
        with pytest.raises(ValueError, match="byte 0x41"):
            Tokenizer({i: token for i, token in small.vocab.items() if token != b"A"}, [])
        with pytest.raises(ValueError, match=r"merges\[1\].*b'zq'"):
            Tokenizer(small.vocab, [small.merges[0], (b"z", b"q")])
        with pytest.raises(ValueError, match="twice"):
            Tokenizer({**small.vocab, 1000: b"A"}, [])
        with pytest.raises(ValueError, match="-1"):
            Tokenizer({**small.vocab, -1: b"far"}, [])
        with pytest.raises(ValueError, match="below 2097152"):
            Tokenizer({**small.vocab, 1 << 21: b"far"}, [])

    def test_pickles(self, compiled: Tokenizer) -> None:
        copied = pickle.loads(pickle.dumps(compiled))
        assert (copied.sha256, copied.encode("low <|a|>")) == (compiled.sha256, compiled.encode("low <|a|>"))

    def test_sha256_tells_tokenizers_apart(self, small: Tokenizer) -> None:
        hashes = {
            small.sha256,
            Tokenizer(small.vocab, small.merges[:-1], SPECIALS).sha256,
            Tokenizer(small.vocab, small.merges, SPECIALS[:-1]).sha256,
            Tokenizer({**small.vocab, 330: b"far"}, small.merges, SPECIALS).sha256,
        }
        assert len(hashes) == 4
        assert Tokenizer(small.vocab, small.merges, SPECIALS).sha256 == small.sha256

    @pytest.mark.slow
    def test_ids_above_16_bits(self, small: Tokenizer) -> None:
        vocab = {i if i < 100 else i + 70_000: token for i, token in small.vocab.items()}
        tokenizer = Tokenizer(vocab, small.merges, SPECIALS)
        expected = [i if i < 100 else i + 70_000 for i in small.encode(CORPUS)]
        assert tokenizer.encode(CORPUS) == expected
        tokenizer.compile()
        assert tokenizer.encode(CORPUS) == expected
        assert tokenizer.decode(expected) == CORPUS

    def test_ids_in_any_order(self, small: Tokenizer) -> None:
        """The ids of the merges follow each other in most vocabularies, which saves the kernels a look-up."""
        others = list(small.vocab)
        random.Random(0).shuffle(others)
        new_id = dict(zip(small.vocab, others, strict=True))
        tokenizer = Tokenizer({new_id[i]: token for i, token in small.vocab.items()}, small.merges, SPECIALS)
        texts = [CORPUS, "lowerlowest" * 20, *AWKWARD]
        expected = [[new_id[i] for i in small.encode(text)] for text in texts]
        assert [tokenizer.encode(text) for text in texts] == expected
        tokenizer.compile()
        assert tokenizer._compiled is not None
        assert tokenizer._compiled.encoder._rules.first_product == -1
        assert [tokenizer.encode(text) for text in texts] == expected

    def test_of_a_repeated_merge_the_first_counts(self, small: Tokenizer) -> None:
        vocab = {**small.vocab, 400: b"qx", 401: b"xz"}
        tokenizer = Tokenizer(vocab, [(b"q", b"x"), (b"x", b"z"), (b"q", b"x")])
        assert tokenizer.encode("qxz") == [400, *small.encode("z")]

    def test_importing_and_small_work_load_neither_numba_nor_torch(self) -> None:
        code = (
            "import sys; from tokenizer import Tokenizer; "
            "t = Tokenizer({i: bytes([i]) for i in range(256)}, []); t.decode(t.encode('x' * 1000)); "
            "assert not {'numba', 'torch', 'rich'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
