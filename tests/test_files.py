"""`tokenizer.files`: the formats of other tools, read, written and corrupted; atomic writing."""

import base64
import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tokenizer import Tokenizer, files
from tokenizer.reference import train_bpe

TEXT = "low low low low lower lower widest widest widest newest newest newest über über it's it's 123 123\n" * 3
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    specials = [END, "<|two words|>"]
    return Tokenizer(*train_bpe(TEXT, 280, specials), specials)


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    tokenizer.save(tmp_path / "tok")
    return tmp_path / "tok"


def same(a: Tokenizer, b: Tokenizer) -> bool:
    return a.vocab == b.vocab and a.merges == b.merges and a.special_tokens == b.special_tokens


def test_byte_symbols_are_gpt2s(fixtures: Path) -> None:
    vocab = json.loads((fixtures / "gpt2_vocab.json").read_text())
    symbols = files.byte_symbols()
    assert [vocab[symbols[byte]] for byte in (33, 126, 161, 172, 174, 255, 0, 32, 127, 160, 173)] == [
        *(0, 93, 94, 105, 106, 187, 188, 220, 221, 254, 255)
    ]
    assert len(set(symbols.values())) == 256
    for token in (b" caf\xc3\xa9\n", bytes(range(256))):
        assert files.from_symbols(files.to_symbols(token)) == token


def test_a_character_that_is_no_symbol_is_named() -> None:
    symbols = {symbol: byte for byte, symbol in files.byte_symbols().items()}
    for symbol in map(chr, [*range(0x200), 0x4E2D, 0x1F600]):
        if symbol in symbols:
            assert files.from_symbols(f"a{symbol}") == bytes([ord("a"), symbols[symbol]])
        else:
            with pytest.raises(ValueError, match=rf"U\+{ord(symbol):04X}\) in .* stands for no byte"):
                files.from_symbols(f"ĠaĀ{symbol}!")


def test_every_format_round_trips(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    assert same(Tokenizer.from_directory(folder), tokenizer)
    assert same(Tokenizer.from_files(folder / "vocab.json", folder / "merges.txt", tokenizer.special_tokens), tokenizer)
    assert same(Tokenizer(*files.read_hf(folder / "tokenizer.json")), tokenizer)
    files.write_tiktoken(tmp_path / "x.tiktoken", tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens)
    vocab, merges = files.read_tiktoken(tmp_path / "x.tiktoken", tokenizer.special_tokens)
    assert same(Tokenizer(vocab, merges, tokenizer.special_tokens), tokenizer)


@pytest.mark.slow
def test_gpt2_round_trips_through_tiktokens_format(fixtures: Path, tmp_path: Path) -> None:
    gpt2 = Tokenizer.from_files(fixtures / "gpt2_vocab.json", fixtures / "gpt2_merges.txt", [END])
    assert (gpt2.vocab_size, len(gpt2.merges), gpt2.special_ids) == (50257, 50000, {END: 50256})
    files.write_tiktoken(tmp_path / "gpt2.tiktoken", gpt2.vocab, gpt2.merges, [END])
    assert Tokenizer(*files.read_tiktoken(tmp_path / "gpt2.tiktoken", [END]), [END]).merges == gpt2.merges


def test_a_folder_may_hold_gpt2s_two_files_alone(fixtures: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((fixtures / f"gpt2_{name}").read_bytes())
    assert Tokenizer.from_directory(tmp_path).encode(f"Hello world{END}") == [15496, 995, 50256]


def test_a_folder_may_hold_tokenizer_json_alone(tokenizer: Tokenizer, folder: Path) -> None:
    for name in ("vocab.json", "merges.txt", "meta.json"):
        (folder / name).unlink()
    assert same(Tokenizer.from_directory(folder), tokenizer)


def test_meta_describes_the_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["sha256"] == tokenizer.sha256
    assert meta["vocab_size"] == 280
    assert meta["special_tokens"] == tokenizer.special_tokens
    assert len(meta["unicode"]["classes"]) == 16


def test_files_that_do_not_belong_together_are_refused(folder: Path) -> None:
    lines = (folder / "merges.txt").read_text().splitlines(keepends=True)
    (folder / "merges.txt").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="not those that"):
        Tokenizer.from_directory(folder)


def test_other_unicode_tables_are_told(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    meta["unicode"] = {"regex": "2020.1.1", "classes": "0" * 16}
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.warns(UserWarning, match=r"regex 2020\.1\.1"):
        Tokenizer.from_directory(folder)


def test_missing_files_say_what_makes_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="python -m tokenizer train"):
        Tokenizer.from_directory(tmp_path)


def test_tokens_that_would_be_written_alike_are_refused(tmp_path: Path) -> None:
    vocab = {i: bytes([i]) for i in range(256)} | {256: b" t"}
    tokenizer = Tokenizer(vocab, [(b" ", b"t")], ["Ġt"])
    with pytest.raises(ValueError, match="'Ġt'"):
        tokenizer.save(tmp_path)
    assert not list(tmp_path.iterdir())


def rewrite_json(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "entry"),
    [
        (lambda d: d.update(normalizer={"type": "NFC"}), "normalizer"),
        (lambda d: d.update(truncation={"max_length": 9}), "truncation"),
        (lambda d: d.update(padding={"pad_id": 0}), "padding"),
        (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "pre_tokenizer"),
        (lambda d: d["pre_tokenizer"].pop("add_prefix_space"), "pre_tokenizer"),  # which is true then
        (lambda d: d["pre_tokenizer"].update(use_regex=False), "pre_tokenizer"),
        (lambda d: d.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}}), "pre_tokenizer"),
        (lambda d: d.update(pre_tokenizer=None), "pre_tokenizer"),
        (lambda d: d.update(post_processor={"type": "TemplateProcessing"}), "post_processor"),
        (lambda d: d.update(decoder={"type": "WordPiece"}), "decoder"),
        (lambda d: d["model"].update(type="Unigram"), "model.type"),
        (lambda d: d["model"].update(dropout=0.1), "model.dropout"),
        (lambda d: d["model"].update(byte_fallback=True), "model.byte_fallback"),
        (lambda d: d["model"].update(ignore_merges=True), "model.ignore_merges"),
        (lambda d: d["model"].update(continuing_subword_prefix="##"), "model.continuing_subword_prefix"),
        (lambda d: d["model"].update(vocab=[]), "model"),
        (lambda d: d["model"].update(merges=3), "model.merges"),
        (lambda d: d["model"]["merges"].append(["a"]), "model.merges"),
        (lambda d: d["model"]["merges"].append(["q", "zz"]), "model.merges"),
        (lambda d: d["added_tokens"][0].update(single_word=True), "added_tokens"),
        (lambda d: d["added_tokens"][0].update(lstrip=True), "added_tokens"),
        (lambda d: d["added_tokens"][0].update(rstrip=True), "added_tokens"),
        (lambda d: d["added_tokens"][0].update(id=7), "added_tokens"),
        (lambda d: d["added_tokens"].append(4), "added_tokens"),
    ],
)
def test_foreign_tokenizer_json_is_refused(folder: Path, change, entry: str) -> None:
    path = folder / "tokenizer.json"
    rewrite_json(path, change)
    with pytest.raises(ValueError) as error:
        files.read_hf(path)
    assert str(path) in str(error.value)
    assert entry in str(error.value)


def test_merges_of_old_tokenizer_json_are_strings(tokenizer: Tokenizer, folder: Path) -> None:
    rewrite_json(
        folder / "tokenizer.json", lambda d: d["model"].update(merges=[" ".join(m) for m in d["model"]["merges"]])
    )
    assert files.read_hf(folder / "tokenizer.json")[1] == tokenizer.merges


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "line 1"),
        (b"[]", "expected an object"),
        (b'{"a": 0, "a": 1}', "'a' is repeated"),
        (b'{"a": "0"}', "expected an id"),
        (b'{"a": -1}', "expected an id"),
        (b'{"a": true}', "expected an id"),
        (b'{"a": 0, "b": 0}', "already the id"),
        (b'{"a": 0, "b": 2}', "id 1 is missing"),
        (b'{"a": 0, "\xe4\xb8\xad": 1}', "stands for no byte"),
        (b'{"": 0}', "empty"),
        (b'{"a": 0}', "byte 0x00"),
        (b'{"a": 0\xff}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_corrupt_vocab_names_file_and_cause(tmp_path: Path, content: bytes, cause: str) -> None:
    (tmp_path / "vocab.json").write_bytes(content)
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ValueError) as error:
        Tokenizer.from_directory(tmp_path)
    assert str(tmp_path / "vocab.json") in str(error.value)
    assert cause in str(error.value)


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("a", "expected two tokens"),
        ("a b c", "expected two tokens"),
        ("a  b", "expected two tokens"),
        ("a 中", "stands for no byte"),
        ("q zq", "not in the vocabulary"),
        ("q z", "not in the vocabulary"),
        (None, "repeated"),
    ],
)
def test_corrupt_merges_name_the_line(folder: Path, line: str | None, cause: str) -> None:
    path = folder / "merges.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, line or lines[1], ""]))
    with pytest.raises(ValueError) as error:
        Tokenizer.from_directory(folder)
    assert f"{path}: line {len(lines) + 1}: " in str(error.value)
    assert cause in str(error.value)


def test_merges_may_have_the_line_ends_of_windows(tokenizer: Tokenizer, folder: Path) -> None:
    lines = (folder / "merges.txt").read_bytes().splitlines()
    (folder / "merges.txt").write_bytes(b"\r\n".join([*lines, b""]))
    assert same(Tokenizer.from_directory(folder), tokenizer)


def test_a_merge_may_begin_as_the_first_line_does(tmp_path: Path) -> None:
    vocab = dict(enumerate([*(bytes([byte]) for byte in range(256)), b"#version", b"ab", b"#versions"]))
    merges = [(b"a", b"b"), (b"#version", b"s")]
    files.write_gpt2(tmp_path, vocab, merges, [])
    assert files.read_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt") == (vocab, merges)


def test_a_folders_name_may_have_braces(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "run{}{5}{a}"
    tokenizer.save(folder)
    (folder / "merges.txt").write_text("q zq\n")
    with pytest.raises(ValueError, match=r"line 1: .* not in the vocabulary"):
        Tokenizer.from_directory(folder)
    rewrite_json(folder / "tokenizer.json", lambda d: d["model"].update(merges=["q zq"]))
    with pytest.raises(ValueError, match=r"merges\[0\]: .* not in the vocabulary"):
        files.read_hf(folder / "tokenizer.json")


@pytest.mark.parametrize("entry", ["unicode", "splits"])
def test_meta_of_another_shape_is_refused(folder: Path, entry: str) -> None:
    rewrite_json(folder / "meta.json", lambda d: d.update({entry: None}))
    with pytest.raises(ValueError, match=f"entry '{entry}': expected an object, found None"):
        files.read_meta(folder)


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("AA", "expected a base64 token"),
        ("AA== x", "expected a base64 token"),
        ("AA== -1", "expected a base64 token"),
        ("?A== 900", "is not base64"),
        ("AA== 900", "repeated"),
        ("enp6 3", "rank 3 is repeated"),
        ("enp6 280", "no merge of two tokens"),
        ("eno= 900", "id 280 is missing"),
    ],
)
def test_corrupt_tiktoken_names_the_line(tokenizer: Tokenizer, tmp_path: Path, line: str, cause: str) -> None:
    path = tmp_path / "x.tiktoken"
    files.write_tiktoken(path, tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError) as error:
        files.read_tiktoken(path, tokenizer.special_tokens)
    assert str(path) in str(error.value)
    assert cause in str(error.value)


def test_tokenizer_json_cannot_have_a_special_token_that_merges_spell_otherwise(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """HF tokenizers looks for the merge's spelling in a vocabulary that has the special token's instead."""
    token = next(left + right for left, right in tokenizer.merges if left == b" ")
    again = Tokenizer(tokenizer.vocab, tokenizer.merges, [token.decode()])
    with pytest.raises(ValueError, match="both as a special token and in a merge"):
        again.save(tmp_path / "new")
    assert not list((tmp_path / "new").glob("*"))


def test_tiktoken_needs_ids_in_the_order_of_the_merges(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="order of the merges"):
        files.write_tiktoken(tmp_path / "x", tokenizer.vocab, tokenizer.merges[::-1], tokenizer.special_tokens)


def test_mutated_files_never_crash(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    """Flip, delete and repeat bytes: the file is refused with its name, or read as a tokenizer that works."""
    (folder / "meta.json").unlink()
    files.write_tiktoken(tmp_path / "x.tiktoken", tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens)
    readers = {
        folder / "vocab.json": lambda: Tokenizer.from_directory(folder),
        folder / "merges.txt": lambda: Tokenizer.from_directory(folder),
        folder / "tokenizer.json": lambda: Tokenizer(*files.read_hf(folder / "tokenizer.json")),
        tmp_path / "x.tiktoken": lambda: Tokenizer(*files.read_tiktoken(tmp_path / "x.tiktoken", [END]), [END]),
    }
    rewrite_json(folder / "vocab.json", lambda d: d.update({"zq": d.pop("<|two words|>")}))
    rng = random.Random(0)
    refused = 0
    for path, read in readers.items():
        good = path.read_bytes()
        for _ in range(60):
            bad = bytearray(good)
            at = rng.randrange(len(bad))
            kind = rng.randrange(4)
            if kind == 0:
                bad[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del bad[at : at + rng.randrange(1, 40)]
            elif kind == 2:
                bad[at:at] = bad[at // 2 : at // 2 + rng.randrange(1, 40)]
            else:
                del bad[at:]
            path.write_bytes(bad)
            try:
                changed = read()
            except ValueError as error:
                assert "\n" not in str(error)
                refused += 1
            else:
                assert changed.decode(changed.encode(TEXT)) == TEXT
        path.write_bytes(good)
    assert refused > 100


def test_tiktoken_file_is_tiktokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    load = pytest.importorskip("tiktoken.load")
    path = tmp_path / "x.tiktoken"
    files.write_tiktoken(path, tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens)
    ranks = load.load_tiktoken_bpe(str(path))
    assert ranks == {token: i for i, token in tokenizer.vocab.items() if i not in tokenizer.special_ids.values()}
    assert base64.b64decode(path.read_text().split()[0]) == b"\0"


class TestAtomicWrite:
    def test_appears_whole(self, tmp_path: Path) -> None:
        with files.atomic_write(tmp_path / "a" / "x") as file:
            file.write(b"1\n")
            assert not (tmp_path / "a" / "x").exists()
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"]
        assert (tmp_path / "a" / "x").read_bytes() == b"1\n"

    def test_a_pipe_is_written_to(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "x")
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit((tmp_path / "x").read_bytes)
            with files.atomic_write(tmp_path / "x") as file:
                file.write(b"1")
            assert read.result() == b"1"
        assert (tmp_path / "x").is_fifo()

    def test_a_link_goes_on_leading_to_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "x").symlink_to(tmp_path / "a" / "y")
        for content in (b"1", b"2"):
            with files.atomic_write(tmp_path / "x") as file:
                file.write(content)
            assert (tmp_path / "x").is_symlink()
            assert (tmp_path / "a" / "y").read_bytes() == content

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
    def test_an_error_leaves_the_old_file(self, tmp_path: Path, error: type[BaseException]) -> None:
        (tmp_path / "x").write_text("old")
        with pytest.raises(error), files.atomic_write(tmp_path / "x", "w") as file:
            file.write("new")
            raise error
        assert [path.name for path in tmp_path.iterdir()] == ["x"]
        assert (tmp_path / "x").read_text() == "old"

    def test_an_error_names_the_file_and_not_its_part(self, tmp_path: Path) -> None:
        (tmp_path / "x").mkdir()
        with pytest.raises(IsADirectoryError) as error, files.atomic_write(tmp_path / "x") as file:
            file.write(b"1")
        assert error.value.filename == str(tmp_path / "x")

    def test_survives_a_failure_of_any_call(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The n-th call to the system fails, n = 1, 2, ...: always the old or the new file, never a part."""
        for name in ("fsync", "replace"):
            (tmp_path / "x").write_text("old")
            real = getattr(os, name)

            def fail(*args, **kwargs):
                raise OSError("injected")

            monkeypatch.setattr(os, name, fail)
            with pytest.raises(OSError, match="injected"), files.atomic_write(tmp_path / "x", "w") as file:
                file.write("new")
            monkeypatch.setattr(os, name, real)
            assert [path.name for path in tmp_path.iterdir()] == ["x"]
            assert (tmp_path / "x").read_text() == "old"


def test_everything_is_flushed_to_the_device_before_the_file_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: sizes.append(os.fstat(fd).st_size) or fsync(fd))
    with files.atomic_write(tmp_path / "x") as file:
        file.write(b"12345")
    assert sizes[0] == 5


def test_a_special_token_of_one_byte_stays_a_byte_in_tiktokens_format(tmp_path: Path) -> None:
    vocab = dict(enumerate(bytes([byte]) for byte in range(256)))
    files.write_tiktoken(tmp_path / "x.tiktoken", vocab, [], ["a"])
    assert files.read_tiktoken(tmp_path / "x.tiktoken", ["a"]) == (vocab, [])
