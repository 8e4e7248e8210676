import errno
import gzip
import hashlib
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lm import VOCAB_SIZES, grammar
from lm import prepare as module
from lm.__main__ import main
from lm.prepare import default_vocab_size, prepare, prepare_validation, run
from tokenizer.bpe import Tokenizer

END = "<|endoftext|>"
STORIES = [f"Tale {i}: the fox number {i} met {i * 7 % 13} hens.\nThey had tea and {i} cakes." for i in range(200)]
TEXT = "".join(f"{story}\n{END}\n" for story in STORIES)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder for datasets, and a small built-in corpus."""
    monkeypatch.setattr(module, "BUILTIN_BYTES", {"train": 30_000, "valid": 5_000})
    return tmp_path / "data"


def own_text(folder, text=TEXT, name="tales.txt"):
    folder.mkdir(exist_ok=True)
    path = folder / name
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wb") as file:
        file.write(text.encode())
    return path


def lines(capsys):
    return [line.removeprefix("prepare: ") for line in capsys.readouterr().err.splitlines() if "prepare: " in line]


def contents(directory):
    """Hashes of all files but the notes."""
    files = [
        path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in ("stages.json", ".lock")
    ]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def decoded(directory, split):
    return Tokenizer.from_directory(directory / "tokenizer").decode(np.load(directory / f"{split}.npy").tolist())


@pytest.mark.slow
def test_builtin_corpus_from_nothing(data, capsys):
    directory = prepare("builtin", data_dir=data, vocab_size=300)
    assert directory == data / "builtin"
    assert [line.split()[0] for line in lines(capsys)] == ["writing", "writing", "training", "encoding", "encoding"]
    meta = json.loads((directory / "meta.json").read_bytes())
    assert meta["vocab_size"] == 300
    assert meta["format"] == 1
    for split in ("train", "valid"):
        text = (directory / f"{split}.txt").read_text()
        assert decoded(directory, split) == text
        record = meta["splits"][split]
        documents = text.split(grammar.SEPARATOR)[:-1]
        assert record["num_documents"] == len(documents)
        assert record["num_bytes"] == len(text.encode())
        assert record["text_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    bits = -sum(map(grammar.log_probability, documents)) / np.log(2)
    assert meta["splits"]["valid"]["entropy_bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-12)


def test_prepared_again_nothing_is_done_and_nothing_said(data, capsys):
    directory = prepare("builtin", data_dir=data, vocab_size=300)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.name != ".lock"}
    capsys.readouterr()
    prepare("builtin", data_dir=data, vocab_size=300)
    assert lines(capsys) == []
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.name != ".lock"} == before


def test_a_text_is_encoded_with_a_tokenizer_that_there_is_beside_its_own_dataset(data, tmp_path, capsys):
    text = own_text(tmp_path)
    own = prepare(None, text, data_dir=data, vocab_size=300)
    before = contents(own)
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)} | {256: b"he", 257: END.encode()}, [(b"h", b"e")], [END])
    tokenizer.save(tmp_path / "run" / "tokenizer")
    for place in (tmp_path / "run", tmp_path / "run" / "tokenizer"):  # a run's folder is as good
        directory = prepare(None, text, data_dir=data, tokenizer=place)
    assert directory == data / f"tales-for-{tokenizer.sha256[:8]}"
    assert contents(own) == before
    assert json.loads((directory / "meta.json").read_bytes())["tokenizer_sha256"] == tokenizer.sha256
    for split in ("train", "valid"):
        text_of_split = (own / f"{split}.txt").read_text()
        assert np.load(directory / f"{split}.npy").tolist() == tokenizer.encode(text_of_split)
    assert [line.split()[0] for line in lines(capsys)[-3:]] == ["taking", "encoding", "encoding"]
    before = contents(directory)
    prepare(None, text, data_dir=data, tokenizer=tmp_path / "run")
    assert lines(capsys) == []
    (directory / "tokenizer" / "vocab.json").unlink()
    prepare(None, text, data_dir=data, tokenizer=tmp_path / "run")
    assert contents(directory) == before
    text.write_text(TEXT.replace("fox", "cat"))
    prepare(None, text, data_dir=data, tokenizer=tmp_path / "run")
    assert "cat" in decoded(directory, "train")


def test_the_built_in_texts_entropy_does_not_depend_on_the_tokenizer(data, tmp_path, capsys):
    Tokenizer({i: bytes([i]) for i in range(256)} | {256: b"<|user|>"}, [], ["<|user|>"]).save(tmp_path / "bytes")
    directory = prepare("builtin", data_dir=data, tokenizer=tmp_path / "bytes")
    assert "it has no <|endoftext|>: documents will not be told apart" in lines(capsys)
    own = prepare("builtin", data_dir=data, vocab_size=300)
    metas = [json.loads((folder / "meta.json").read_bytes()) for folder in (directory, own)]
    here, there = (meta["splits"]["valid"] for meta in metas)
    assert here["entropy_bits_per_byte"] == there["entropy_bits_per_byte"]
    assert (here["num_documents"], here["num_tokens"]) == (1, here["num_bytes"])


def test_ones_own_special_tokens_are_one_token_each(data, tmp_path, capsys):
    turns = "".join(f"<|user|>How many hens?<|model|>{i % 13} hens.{END}" for i in range(100))
    text = own_text(tmp_path, turns)
    directory = prepare(None, text, data_dir=data, vocab_size=280, special_tokens=["<|user|>", "<|model|>", END])
    tokenizer = Tokenizer.from_directory(directory / "tokenizer")
    assert tokenizer.special_tokens == [END, "<|user|>", "<|model|>"]
    ids = np.load(directory / "train.npy").tolist()
    assert [ids.count(tokenizer.special_ids[token]) for token in tokenizer.special_tokens] == [96, 96, 96]
    assert decoded(directory, "train") + decoded(directory, "valid") == turns
    assert json.loads((directory / "meta.json").read_bytes())["splits"]["train"]["num_documents"] == 96
    capsys.readouterr()
    prepare(None, text, data_dir=data, vocab_size=280, special_tokens=["<|user|>"])
    said = lines(capsys)
    had, wanted = [END, "<|user|>", "<|model|>"], [END, "<|user|>"]
    assert said[0] == f"{directory} has special_tokens={had}, wanted {wanted}: making it anew"
    assert [line.split()[0] for line in said[1:]] == ["training", "encoding", "encoding"]
    for order in (["<|user|>", "<|model|>"], ["<|model|>", "<|user|>"]):
        prepare(None, text, data_dir=data, vocab_size=280, special_tokens=order)
        assert Tokenizer.from_directory(directory / "tokenizer").special_tokens == [END, *order]


def test_a_special_token_that_is_refused_costs_nothing(data, tmp_path):
    text = own_text(tmp_path)
    before = contents(prepare(None, text, data_dir=data, vocab_size=300))
    for special in ("a", " "):
        with pytest.raises(ValueError, match=r"special_tokens=\['.'\]: a single byte is a token anyway"):
            prepare(None, text, data_dir=data, vocab_size=300, special_tokens=[special])
    assert contents(data / "tales") == before


def test_a_tokenizer_of_another_size_or_none_is_refused(data, tmp_path):
    Tokenizer({i: bytes([i]) for i in range(256)}, [], []).save(tmp_path / "bytes")
    with pytest.raises(ValueError, match=r"vocab_size=300, but the tokenizer .*bytes has 256: leave it out"):
        prepare("builtin", data_dir=data, vocab_size=300, tokenizer=tmp_path / "bytes")
    with pytest.raises(ValueError, match=r"special_tokens=\['<x>'\], but the tokenizer .*bytes has its own"):
        prepare("builtin", data_dir=data, special_tokens=["<x>"], tokenizer=tmp_path / "bytes")
    with pytest.raises(ValueError, match="special_tokens lists '<x>' twice"):
        prepare("builtin", data_dir=data, special_tokens=["<x>", "<x>"])
    with pytest.raises(ValueError, match="vocab_size=257 must be at least 258"):
        prepare("builtin", data_dir=data, special_tokens=["<x>"], vocab_size=257)
    with pytest.raises(FileNotFoundError, match=r"tokenizer=.*nowhere: no tokenizer there"):
        prepare("builtin", data_dir=data, tokenizer=tmp_path / "nowhere")
    assert not data.exists()


def test_what_changed_is_redone_with_what_depends_on_it(data, capsys, monkeypatch):
    directory = prepare("builtin", data_dir=data, vocab_size=300)
    capsys.readouterr()
    prepare("builtin", data_dir=data, vocab_size=310)
    said = lines(capsys)
    assert said[0] == f"{directory} has vocab_size=300, wanted 310: making it anew"
    assert [line.split()[0] for line in said[1:]] == ["training", "encoding", "encoding"]
    assert json.loads((directory / "meta.json").read_bytes())["vocab_size"] == 310
    (directory / "valid.npy").unlink()
    prepare("builtin", data_dir=data, vocab_size=310)
    assert lines(capsys) == [f"encoding {directory / 'valid.txt'}"]
    (directory / "train.txt").write_text("cut off")
    prepare("builtin", data_dir=data, vocab_size=310)
    assert [line.split()[0] for line in lines(capsys)] == ["writing"]
    (directory / "meta.json").unlink()
    prepare("builtin", data_dir=data, vocab_size=310)
    assert [line.split()[0] for line in lines(capsys)] == ["encoding", "encoding"]
    (directory / "meta.json").write_text("{ damaged")
    prepare("builtin", data_dir=data, vocab_size=310)
    assert [line.split()[0] for line in lines(capsys)] == ["encoding", "encoding"]
    (directory / "stages.json").write_text("{ damaged")
    fresh = contents(directory)
    prepare("builtin", data_dir=data, vocab_size=310)
    assert len(lines(capsys)) == 5
    assert contents(directory) == fresh


@pytest.mark.parametrize("name", ["tales.txt", "tales.txt.gz", "tales.txt.xz"])
def test_own_text_with_its_end_held_out(data, tmp_path, name, capsys):
    directory = prepare(train_text=own_text(tmp_path / "mine", name=name), data_dir=data, vocab_size=300)
    assert directory == data / "tales"
    train, valid = decoded(directory, "train"), decoded(directory, "valid")
    assert train + valid == TEXT
    assert train.endswith(END + "\n") and valid.startswith("Tale ")
    assert 0.03 < len(valid) / len(TEXT) < 0.07
    assert f"no valid_text, so the end of {tmp_path / 'mine' / name} is held out" in lines(capsys)
    assert "entropy_bits_per_byte" not in json.loads((directory / "meta.json").read_bytes())["splits"]["valid"]


def test_own_text_with_its_own_validation_text_is_used_where_it_lies(data, tmp_path):
    train, valid = own_text(tmp_path / "mine"), own_text(tmp_path / "mine", "A tale.\n", "other.txt.gz")
    directory = prepare(train_text=train, valid_text=valid, data_dir=data, vocab_size=300)
    assert decoded(directory, "train") == TEXT
    assert decoded(directory, "valid") == "A tale.\n"
    assert not (directory / "train.txt").exists()


def test_a_changed_text_is_noticed_but_not_a_new_date(data, tmp_path, capsys):
    text = own_text(tmp_path / "mine")
    directory = prepare(train_text=text, data_dir=data, vocab_size=300)
    os.utime(text, (1, 1))
    capsys.readouterr()
    prepare(train_text=text, data_dir=data, vocab_size=300)
    assert lines(capsys) == []
    text.write_text(TEXT.replace("fox", "cat"))  # the same size
    prepare(train_text=text, data_dir=data, vocab_size=300)
    assert decoded(directory, "train").startswith("Tale 0: the cat")
    assert len(lines(capsys)) == 4


def test_a_new_date_is_no_error_where_it_cannot_be_noted(data, tmp_path, capsys, monkeypatch):
    text = own_text(tmp_path / "mine")
    prepare(train_text=text, data_dir=data, vocab_size=300)
    os.utime(text, (1, 1))
    capsys.readouterr()

    def read_only(path, value):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(module, "write_json", read_only)
    prepare(train_text=text, data_dir=data, vocab_size=300)
    assert lines(capsys) == []
    with pytest.raises(OSError, match="Read-only"):
        prepare(train_text=text, data_dir=data, vocab_size=301)


def test_texts_of_one_name_do_not_overwrite_each_other(data, tmp_path):
    first, second = own_text(tmp_path / "a"), own_text(tmp_path / "b", TEXT * 2)
    prepare(train_text=first, data_dir=data, vocab_size=300)
    with pytest.raises(ValueError, match=r"holds the dataset of .*a/tales.txt: rename"):
        prepare(train_text=second, data_dir=data, vocab_size=300)
    first.unlink()
    directory = prepare(train_text=second, data_dir=data, vocab_size=300)
    assert decoded(directory, "train") + decoded(directory, "valid") == TEXT * 2


def json_lines(folder, documents, name="tales.jsonl"):
    return own_text(folder, "".join(json.dumps({"text": text}) + "\n" for text in documents), name)


@pytest.mark.parametrize("name", ["tales.jsonl", "tales.ndjson.xz"])
def test_json_lines_with_their_end_held_out(data, tmp_path, name, capsys):
    text = json_lines(tmp_path / "mine", STORIES, name)
    directory = prepare(train_text=text, data_dir=data, vocab_size=300)
    assert directory == data / "tales"
    train, valid = (decoded(directory, split).split(END) for split in ("train", "valid"))
    assert train[:-1] + valid[:-1] == STORIES and train[-1] == valid[-1] == ""
    assert 0.03 < len(valid) / len(STORIES) < 0.07
    assert lines(capsys)[0] == f"gathering {text}; no valid_text, so the end is held out"
    prepare(train_text=text, data_dir=data, vocab_size=300)
    assert lines(capsys) == []


def test_json_lines_to_train_and_to_validate(data, tmp_path, capsys):
    odd = [
        "one\r\n",
        "\u2028two\x85",
        "\0",
        "\ufeff",
        "👩‍👩‍👧",
        '"\\',
        "  six <|endof",
        "seven \n\n",
        "text|>",
        *STORIES,
    ]
    train, valid = json_lines(tmp_path / "train", STORIES), json_lines(tmp_path / "valid", odd)
    for _ in range(2):  # the second time, after another has held out an end
        directory = prepare(train_text=train, valid_text=valid, data_dir=data, vocab_size=300)
        said = [line.split()[0] for line in lines(capsys)]
        assert said == ["gathering", "gathering", "training", "encoding", "encoding"]
        assert decoded(directory, "train").split(END)[:-1] == STORIES
        assert decoded(directory, "valid").split(END)[:-1] == odd
        prepare(train_text=train, valid_text=valid, data_dir=data, vocab_size=300)
        assert lines(capsys) == []
        prepare(train_text=train, data_dir=data, vocab_size=300)
        assert decoded(directory, "train") + decoded(directory, "valid") == "".join(text + END for text in STORIES)
        assert [line.split()[0] for line in lines(capsys)] == ["gathering", "training", "encoding", "encoding"]


@pytest.mark.parametrize("plain", [False, True])
def test_what_was_gathered_is_not_taken_for_what_was_held_out_because_it_is_as_long(data, tmp_path, plain):
    train = own_text(tmp_path) if plain else json_lines(tmp_path, STORIES)
    held_out = decoded(prepare(train_text=train, data_dir=data, vocab_size=300), "valid")
    valid = json_lines(tmp_path / "valid", ["x" * (len(held_out) - len(END))])
    for _ in range(2):
        directory = prepare(train_text=train, valid_text=valid, data_dir=data, vocab_size=300)
        assert set(decoded(directory, "valid").removesuffix(END)) == {"x"}
        assert decoded(prepare(train_text=train, data_dir=data, vocab_size=300), "valid") == held_out


def folder_of(folder, stories):
    """A folder of a file for each text, and one that is none."""
    (folder / "more").mkdir(parents=True, exist_ok=True)
    (folder / "cover.jpg").touch()
    for i, story in enumerate(stories):
        own_text(folder / "more", story, f"{i:03}.md")
    return folder


def test_a_folder_with_its_end_held_out_and_what_changes_in_it(data, tmp_path, capsys):
    folder, stories = folder_of(tmp_path / "my.notes", STORIES), list(STORIES)
    directory = data / "my.notes"

    def prepared():
        """The first words of what is said, once the dataset is that of all stories."""
        assert prepare(train_text=f"{folder}/", data_dir=data, vocab_size=300) == directory
        assert decoded(directory, "train") + decoded(directory, "valid") == "".join(text + END for text in stories)
        return [line.split()[0] for line in lines(capsys)]

    prepare(train_text=folder, data_dir=data, vocab_size=300)
    said = f"gathering 200 files of {folder}/, 1 other left out; no valid_text, so the end is held out"
    assert lines(capsys)[0] == said
    assert prepared() == []
    stories[7] = "Another."
    (folder / "more" / "007.md").write_text(stories[7])
    everything = ["gathering", "training", "encoding", "encoding"]
    assert prepared() == everything
    stories.append("One more.")
    (folder / "more" / "200.txt").write_text(stories[-1])
    assert prepared() == ["gathering", "encoding"], "the rest is as it was"
    del stories[0]
    (folder / "more" / "000.md").unlink()
    assert prepared() == everything
    (folder / "cover.png").touch()
    assert prepared() == []
    for path in (folder / "more").iterdir():
        os.utime(path, (1, 1))
    assert prepared() == []
    assert len((directory / "stages.json").read_bytes()) < 5000


def test_folders_to_train_and_to_validate(data, tmp_path, capsys):
    train, valid = folder_of(tmp_path / "notes", STORIES), folder_of(tmp_path / "others", STORIES[:9])
    directory = prepare(train_text=train, valid_text=valid, data_dir=data, vocab_size=300)
    assert lines(capsys)[:2] == [
        f"gathering 200 files of {train}/, 1 other left out",
        f"gathering 9 files of {valid}/, 1 other left out",
    ]
    assert decoded(directory, "train").split(END)[:-1] == STORIES
    assert decoded(directory, "valid").split(END)[:-1] == STORIES[:9]
    (valid / "more" / "000.md").unlink()
    prepare(train_text=train, valid_text=valid, data_dir=data, vocab_size=300)
    assert [line.split()[0] for line in lines(capsys)] == ["gathering", "encoding"]
    assert decoded(directory, "valid").split(END)[:-1] == STORIES[1:9]


def test_a_folder_that_its_dataset_lies_in(tmp_path, monkeypatch, capsys):
    """Nor the dataset of another text is taken for texts, wherever it lies."""
    folder = folder_of(tmp_path / "notes", STORIES)
    monkeypatch.chdir(folder)
    prepare(train_text=own_text(tmp_path, name="x.txt"), data_dir="elsewhere", vocab_size=300)
    for _ in range(2):
        directory = prepare(train_text=".", vocab_size=300)
        assert directory == Path("data/notes")
        assert decoded(directory, "train") + decoded(directory, "valid") == "".join(text + END for text in STORIES)
    assert [line.split()[0] for line in lines(capsys)[4:]] == ["gathering", "training", "encoding", "encoding"]


def test_a_folder_that_would_be_its_datasets_directory_is_left_as_it_is(data, tmp_path):
    folder = folder_of(data / "notes", STORIES[:3])
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=r"notes would be its dataset's directory, too: move the texts, or give anoth"):
        prepare(train_text=folder, data_dir=data)
    with pytest.raises(ValueError, match=r"notes would be its dataset's directory, too: move the texts, or give anoth"):
        prepare(train_text=own_text(tmp_path, name="notes.txt"), valid_text=folder, data_dir=data)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("valid", ["more", "more/001.md"])
def test_a_validation_text_that_is_trained_on_is_refused(data, tmp_path, monkeypatch, valid):
    folder = folder_of(tmp_path / "notes", STORIES[:3])
    for texts in ((folder, folder / valid), (folder / valid, folder)):
        with pytest.raises(
            ValueError, match=r"more.* lies in .*notes, and would be both trained and validated on: mov"
        ):
            prepare(None, *texts, data_dir=data)
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=r"more.* lies in \., and would be both trained and validated on"):
        prepare(train_text=".", valid_text=folder / valid, data_dir=data)
    assert not data.exists()


def test_any_text_is_encoded_for_a_run(data, tmp_path, capsys, monkeypatch):
    tokenizer = prepare("builtin", data_dir=data, vocab_size=300) / "tokenizer"
    folder = folder_of(tmp_path / "notes", STORIES)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    for text in (folder, ".", json_lines(tmp_path, STORIES, "my.tales.jsonl.gz")):
        directory = prepare_validation(text, tokenizer, data)
        assert directory.name.partition("-whole-for-")[0] == ("notes" if Path(text).is_dir() else "my.tales")
        assert decoded(directory, "valid").split(END)[:-1] == STORIES
    assert [line.split()[0] for line in lines(capsys)] == ["taking", "gathering", "encoding"] * 2
    (folder / "more" / "000.md").unlink()
    prepare_validation(folder, tokenizer, data)
    assert [line.split()[0] for line in lines(capsys)] == ["gathering", "encoding"]


def test_a_text_of_another_encoding_is_not_encoded_for_a_run(data, tmp_path):
    Tokenizer({i: bytes([i]) for i in range(256)}, [], []).save(tmp_path / "bytes")
    (tmp_path / "latin.txt").write_bytes("Käse\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"convert the text, e\.g\. `iconv -f LATIN1 -t UTF-8 "):
        prepare_validation(tmp_path / "latin.txt", tmp_path / "bytes", data)


def test_a_text_that_would_be_written_over_is_refused(data, tmp_path):
    (data / "tales").mkdir(parents=True)
    valid = own_text(data / "tales", name="train.txt")
    with pytest.raises(ValueError, match=r"train.txt would be overwritten: move it out of .*/data/tales"):
        prepare(train_text=json_lines(tmp_path, STORIES), valid_text=valid, data_dir=data, vocab_size=300)
    assert valid.read_text() == TEXT


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"corpus": "tinystory"}, ValueError, "corpus='tinystory' must be one of builtin, tinystories, owt"),
        ({}, ValueError, "give either a corpus or a text"),
        ({"corpus": "owt", "train_text": "full.txt"}, ValueError, "give either a corpus or a text"),
        ({"train_text": "nothing.txt"}, FileNotFoundError, "train_text=nothing.txt: no such file"),
        ({"train_text": "full.txt", "valid_text": "none.txt"}, FileNotFoundError, "valid_text=none.txt: no such file"),
        ({"train_text": "empty.txt"}, ValueError, "train_text=empty.txt is empty"),
        ({"train_text": "none"}, ValueError, r"^none has no texts in it, that is, files that end in \.txt, \.md, "),
        ({"train_text": "full.txt", "valid_text": "none"}, ValueError, "^none has no texts in it"),
        (
            {"train_text": "latin"},
            ValueError,
            "latin/a.txt .* byte 1 .* `iconv -f LATIN1 -t UTF-8 latin/a.txt > utf8.t",
        ),
        ({"train_text": "builtin.txt"}, ValueError, "rename it"),
        ({"train_text": "cut.txt.gz"}, ValueError, "cut.txt.gz is no whole .gz file"),
        ({"train_text": "cut.txt.xz"}, ValueError, "cut.txt.xz is no whole .xz file"),
        ({"train_text": "latin.txt"}, ValueError, "at byte 1 .*: convert .* `iconv -f LATIN1 -t UTF-8 latin.txt > u"),
        ({"train_text": "full.txt", "valid_text": "latin.txt"}, ValueError, "latin.txt is not .* -t UTF-8 latin.txt >"),
        ({"train_text": "latin-1"}, ValueError, "latin-1 is not .* `iconv -f LATIN1 -t UTF-8 latin-1 > utf8.txt`"),
        ({"train_text": "utf16.txt"}, ValueError, "is UTF-16, not UTF-8: .* `iconv -f UTF-16 -t UTF-8 utf16.txt >"),
        ({"train_text": "latin.txt.gz"}, ValueError, "`gzip -dc latin.txt.gz | iconv -f LATIN1 -t UTF-8 > utf8.txt`"),
        ({"train_text": "bad.jsonl"}, ValueError, 'bad.jsonl: line 2 has no "text" in it; its keys are "body"'),
        ({"train_text": "full.txt", "valid_text": "bad.jsonl"}, ValueError, "bad.jsonl: line 2 has no"),
        ({"train_text": "full.txt", "vocab_size": 256}, ValueError, "vocab_size=256 must be at least 257"),
    ],
)
def test_bad_input_is_one_clear_line(data, tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "full.txt": TEXT.encode(),
        "builtin.txt": TEXT.encode(),
        "empty.txt": b"",
        "none/image.jpg": b"",
        "latin/a.txt": "Käse".encode("latin-1"),
        "latin-1": "Käse\n\nKäse\n\n".encode("latin-1") * 9,
        "latin.txt": "Käse\n\nKäse\n\n".encode("latin-1") * 9,
        "utf16.txt": TEXT.encode("utf-16"),
        "latin.txt.gz": gzip.compress("Käse\n\nKäse\n\n".encode("latin-1") * 9),
        "bad.jsonl": b'"one"\n{"body": "two"}\n',
        "cut.txt.gz": gzip.compress(TEXT.encode())[:-9],
        "cut.txt.xz": lzma.compress(TEXT.encode())[:-9],
    }.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        prepare(**{"data_dir": data, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [b"caf\xe9.txt", b"caf\xe9/own.txt"])
@pytest.mark.parametrize(
    "words",
    [
        ["prepare"],
        ["prepare", "own.txt", "--valid_text"],
        ["fit", "--data.train_text"],
        ["fit", "--data.train_text=own.txt", "--data.valid_text"],
    ],
    ids=" ".join,
)
def test_a_name_that_is_not_utf8_is_said_in_one_line(tmp_path, monkeypatch, capsys, words, name):
    for path in (b"own.txt", name):
        text = tmp_path / os.fsdecode(path)
        own_text(text.parent, name=text.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lm"])
    assert main([*words, os.fsdecode(name)]) == 2
    option = "valid_text" if "valid" in words[-1] else "train_text"
    spelling = name.decode("utf-8", "backslashreplace")
    assert capsys.readouterr().err == f"error: {option}={spelling}: a name there is not UTF-8; rename it\n"
    assert not (tmp_path / "logs").is_dir() or not list((tmp_path / "logs").iterdir())


def test_the_folder_that_all_is_done_in_may_have_any_name(tmp_path, monkeypatch):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    own_text(folder)
    monkeypatch.chdir(folder)
    for _ in range(2):  # the second time, the notes are read
        directory = prepare(train_text="tales.txt", vocab_size=300)
    assert json.loads((directory / "stages.json").read_text("utf-8"))["source"]["path"] == str(folder / "tales.txt")
    with pytest.raises(ValueError, match=r"train_text=caf\\xe9: a name there is not UTF-8; rename it"):
        prepare(train_text=".", vocab_size=300)
    folder_of(folder / "notes", STORIES)
    monkeypatch.chdir(folder / "notes")
    for _ in range(2):
        assert prepare(train_text=".", vocab_size=300) == Path("data/notes")


def test_no_room_for_a_copy(data, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="bytes to copy, 1,000 free"):
        prepare(train_text=own_text(tmp_path / "mine"), data_dir=data, vocab_size=300)


def test_a_text_that_the_dataset_would_overwrite_is_refused(tmp_path):
    text = own_text(tmp_path / "train", name="train.txt")
    with pytest.raises(ValueError, match="would be overwritten"):
        prepare(train_text=text, data_dir=tmp_path)
    assert text.read_text() == TEXT


@pytest.mark.parametrize("corpus", ["tinystories", "owt"])
def test_downloaded_corpora(data, monkeypatch, corpus):
    texts = {"train": TEXT, "valid": TEXT[-1000:]}
    fetched = []

    def fake_download(url, path, *, num_bytes, sha256, progress):
        fetched.append((url, num_bytes, sha256))
        split = "train" if "train" in url else "valid"
        path.write_bytes(gzip.compress(texts[split].encode()) if url.endswith(".gz") else texts[split].encode())

    sources = {
        split: module.Source(source.url, source.num_bytes, source.sha256, *(
            (len(texts[split]), hashlib.sha256(texts[split].encode()).hexdigest()) if source.text_bytes else ()
        ))
        for split, source in module.SOURCES[corpus].items()
    }  # fmt: skip
    monkeypatch.setitem(module.SOURCES, corpus, sources)
    monkeypatch.setattr(module, "download", fake_download)
    directory = prepare(corpus, data_dir=data, vocab_size=300)
    assert [url for url, _, _ in fetched] == [source.url for source in sources.values()]
    assert {split: decoded(directory, split) for split in texts} == texts
    assert not list(directory.glob("*.gz"))
    prepare(corpus, data_dir=data, vocab_size=300)
    assert len(fetched) == 2


def test_sources_are_whole():
    for source in (source for splits in module.SOURCES.values() for source in splits.values()):
        assert source.url.startswith("https://huggingface.co/datasets/")
        assert len(source.sha256) == 64 and int(source.sha256, 16)
        assert source.url.endswith(".gz") == (source.text_sha256 is not None) == (source.text_bytes is not None)
        assert source.text_sha256 is None or len(source.text_sha256) == 64


def test_vocabulary_sizes(tmp_path):
    assert [default_vocab_size(corpus) for corpus in module.CORPORA] == list(VOCAB_SIZES.values())
    assert default_vocab_size(None, own_text(tmp_path)) == 1024
    assert default_vocab_size(None, tmp_path) == 1024
    with open(tmp_path / "big.txt", "wb") as file:
        file.truncate(3_000_000_000)
    assert default_vocab_size(None, tmp_path / "big.txt") == default_vocab_size(None, tmp_path) == 32_000


def test_command_reports_what_is_there(data, capsys):
    run("builtin", data_dir=data, vocab_size=300)
    out = capsys.readouterr().out
    assert "train.npy: 30," in out and "entropy floor: 0.0" in out


CHILD = """
import sys
from lm import prepare
prepare.BUILTIN_BYTES = {"train": 30_000, "valid": 5_000}
prepare.prepare("builtin", data_dir=sys.argv[1], vocab_size=300)
"""


def start_child(data):
    return subprocess.Popen([sys.executable, "-c", CHILD, str(data)], stderr=subprocess.PIPE, text=True)


def test_two_processes_prepare_one_dataset(data, tmp_path):
    children = [start_child(data) for _ in range(2)]
    said = [child.communicate(timeout=60)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    assert sorted(text.count("prepare: encoding") for text in said) == [0, 2]
    alone = prepare("builtin", data_dir=tmp_path / "alone", vocab_size=300)
    assert contents(data / "builtin") == contents(alone)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_result(data, tmp_path):
    expected = contents(prepare("builtin", data_dir=tmp_path / "alone", vocab_size=300))
    for delay in np.linspace(0.1, 1.5, 15):
        child = start_child(data)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert contents(prepare("builtin", data_dir=data, vocab_size=300)) == expected


def test_parts_of_a_killed_process_are_removed(data, tmp_path):
    folder = tmp_path / "data" / "own" / "tokenizer"
    folder.mkdir(parents=True)
    (folder / ".vocab.json.99999.part").touch()
    (tmp_path / "own.txt").write_text("a line of text\n" * 5000)
    module.prepare(train_text=tmp_path / "own.txt", data_dir=tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*.part"))


def test_a_tokenizer_of_bytes_may_be_named_with_its_size_and_parts_of_a_killed_process_are_removed(data, tmp_path):
    Tokenizer({i: bytes([i]) for i in range(256)}, [], []).save(tmp_path / "bytes")
    given = {"data_dir": data, "vocab_size": 256, "tokenizer": tmp_path / "bytes"}
    directory = prepare(None, own_text(tmp_path), **given)
    assert decoded(directory, "train") + decoded(directory, "valid") == TEXT
    (directory / ".train.npy.99999.part").touch()
    prepare(None, tmp_path / "tales.txt", **given)
    assert not list(data.rglob("*.part"))


def test_a_compressed_text_counts_three_times(tmp_path):
    for name, size in (("a.txt", 1024), ("a.txt.gz", 4096), ("a.txt.xz", 4096)):
        (tmp_path / name).write_bytes(bytes(400_000))
        assert default_vocab_size(None, tmp_path / name) == size
