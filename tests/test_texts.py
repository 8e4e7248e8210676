"""A text of your own, before it is prepared."""

import gzip
import json
import lzma
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from toy import disk_calls, flushed_before_it_was_named

from lm import texts as module
from lm.texts import (
    JSON_ENDINGS,
    TEXT_ENDINGS,
    count_bytes,
    dataset_name,
    describe,
    fingerprint,
    gather,
    hold_out,
    list_files,
)

END = "<|endoftext|>"
ODD = st.sampled_from(
    ["\r\n", "\u2028", "\x85", "\0", "\ufeff", "👩‍👩‍👧", "<|endoftext|>", "<|endof", " \t\n", "\\u0041", '"', "é"]
)
DOCUMENTS = st.lists(st.lists(st.one_of(ODD, st.text(max_size=5))).map("".join), max_size=8)
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
anywhere = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def joined(documents):
    """What is to be gathered, said in another way."""
    filled = [document.encode() for document in documents if document]
    return b"".join(text if text.rstrip().endswith(END.encode()) else text + END.encode() for text in filled)


def fill(folder, **files):
    """A folder of files, of which `a__b_txt` is a/b.txt."""
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def names(folder):
    return [path.relative_to(folder).as_posix() for path in list_files(folder).paths]


def gathered(text):
    gather(text, text.with_name("gathered"))
    return text.with_name("gathered").read_bytes()


@pytest.mark.parametrize(("path", "name"), [("a/b.txt", "b"), ("b.txt.gz", "b"), ("b.c.txt.xz", "b.c"), ("b", "b")])
def test_dataset_names(path, name):
    assert dataset_name(path) == name


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("one\n<|endoftext|>\ntwo\n<|endoftext|>\n", "two\n<|endoftext|>\n"),
        ("one<|endoftext|>two", "two"),
        ("one<|endoftext|>two<|endoftext|>a third that is long", "a third that is long"),
        ("one\n<|endoftext|>\n" * 100, "one\n<|endoftext|>\n" * 4),
        ("a line\nof one\n\nthen two\nof it\n", "then two\nof it\n"),
        ("a line\r\nof one\r\n\r\nthen two\r\nof it\r\n", "then two\r\nof it\r\n"),
        ("word\n" * 100, "word\n" * 4),
        ("\n\none\n\n\n  \n\ntwo\n<|endoftext|>\n", "two\n<|endoftext|>\n"),
        ("preface\n<|endoftext|>\n" + "a line of many\n" * 10_000, "a line of many\n" * 500),
        ("preface\n" + "no line " * 10_000, None),
        ("one line", None),
        ("one line\n<|endoftext|>\n", None),
        ("one line\n<|endoftext|>\n<|endoftext|>\n", None),
        ("\n\n<|endoftext|>\n\none line\n", None),
        ("a line\n" * 9000 + "<|endoftext|>\n" + "b line\n" * 1000, "b line\n" * 1000),
        ("\n\n \n", None),
    ],
)
def test_where_the_held_out_part_begins(tmp_path, text, valid):
    source, train = tmp_path / "own.txt", tmp_path / "train.txt"
    source.write_bytes(text.encode())
    if valid is None:
        with pytest.raises(ValueError, match="near its end to hold out: give valid_text"):
            hold_out(source, train, tmp_path / "valid.txt")
    else:
        hold_out(source, train, tmp_path / "valid.txt")
        assert (tmp_path / "valid.txt").read_bytes().decode() == valid
        assert train.read_bytes() + (tmp_path / "valid.txt").read_bytes() == text.encode()
    assert not (tmp_path / ".text.part").exists()


def test_of_a_large_text_less_than_its_twentieth_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HELD_OUT_BYTES", 20)
    (tmp_path / "own.txt").write_text("word\n" * 1000)
    hold_out(tmp_path / "own.txt", tmp_path / "train.txt", tmp_path / "valid.txt")
    assert (tmp_path / "valid.txt").read_text() == "word\n" * 3


def test_the_held_out_texts_are_on_the_device_before_they_have_their_names(tmp_path, monkeypatch):
    calls = disk_calls(monkeypatch)
    (tmp_path / "own.txt").write_text("a line\n" * 5000)
    hold_out(tmp_path / "own.txt", tmp_path / "train.txt", tmp_path / "valid.txt")
    assert flushed_before_it_was_named(calls, "train.txt")
    assert flushed_before_it_was_named(calls, "valid.txt")


@anywhere
@example(["two\n<|endoftext|>\n", "", "a<|endoftext|>b", "one\r\n", "\ud7ff\ue000"], "", True, True, "\n")
@given(
    DOCUMENTS.filter(any),
    st.sampled_from(list(PACK)),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["\n", "\r\n", "\n\n \n"]),
)
def test_json_lines_are_joined(tmp_path, documents, packing, escaped, bare, line_end):
    values = documents if bare else [{"id": i, "text": text, "meta": {"text": 1}} for i, text in enumerate(documents)]
    lines = line_end.join(json.dumps(value, ensure_ascii=escaped) for value in values)
    path = tmp_path / f"own.jsonl{packing}"
    path.write_bytes(PACK[packing](lines.encode()))
    assert gathered(path) == joined(documents)


def test_json_lines_may_begin_with_a_mark_of_their_encoding_and_have_long_numbers(tmp_path):
    path = tmp_path / "own.ndjson"
    path.write_text('\ufeff{"text": "one", "id": ' + "1" * 5000 + '}\n"\ufefftwo"\n')
    assert gathered(path) == joined(["one", "\ufefftwo"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b'"one"\n\nthis is no JSON\n', "own.jsonl: line 3 is no JSON (Expecting value at character 1)"),
        (b'"one"\n{"text": "tw', "line 2 is no JSON (Unterminated string starting at at character 10)"),
        (b'{"text": "one"} {"text": "two"}\n', "line 1 is no JSON (Extra data at character 17)"),
        (b"[" * 100_000, "line 1 is nested too deeply"),
        (b'{"content": "one", "id": 3}', 'line 1 has no "text" in it; its keys are "content", "id"'),
        (b"{}", 'line 1 has no "text" in it; it is empty'),
        (json.dumps({"a" * 99: 1, "b": 2}).encode(), f'its keys are "{"a" * 99}...'),
        (b'{"text": null}', 'line 1: "text" is null, not a string'),
        (b'{"text": ["one", "two"]}', 'line 1: "text" is an array, not a string'),
        (b'{"text": 5}', 'line 1: "text" is a number, not a string'),
        (b'{"text": {"en": "one"}}', 'line 1: "text" is an object, not a string'),
        (b"false", "line 1 is true or false, not a string"),
        (b'["one", "two"]', "line 1 is an array, not a string"),
        (b'"one"\n{"text": "\\ud83d"}', 'line 2: "text" has \\ud83d, half of a surrogate pair, which is no character'),
        (b'"one"\n"\xed\xa0\x80"', "own.jsonl is not UTF-8 at byte 7 (ed a0 80 22)"),
        ('"one"\n'.encode("utf-16"), "own.jsonl is UTF-16, not UTF-8"),
        (b'""\n\n{"text": ""}\n', "own.jsonl has no documents in it"),
    ],
)
@pytest.mark.parametrize("packing", PACK)
def test_what_are_no_json_lines_is_named_with_its_line(tmp_path, packing, lines, message):
    path = tmp_path / f"own.jsonl{packing}"
    path.write_bytes(PACK[packing](lines))
    with pytest.raises(ValueError) as raised:
        gathered(path)
    assert message.replace("own.jsonl", path.name) in str(raised.value)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == [path.name]


def test_a_file_without_line_ends_is_not_read_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_LINE", 1000)
    (tmp_path / "own.jsonl").write_text('"one"\n[' + "1, " * 1000)
    with pytest.raises(ValueError, match=r"own.jsonl: line 2 has 1,000 bytes and no end: are these JSON Lines\?"):
        gathered(tmp_path / "own.jsonl")


@pytest.mark.parametrize("name", ["own.jsonl.gz", "own.jsonl.xz", "own.txt.gz"])
def test_a_compressed_text_that_is_cut_off_is_named(tmp_path, name):
    packing = name[-3:]
    (tmp_path / name).write_bytes(PACK[packing](b'"one"\n' * 1000)[:-9])
    with pytest.raises(ValueError, match=f"{name} is no whole {packing} file"):
        gathered(tmp_path / name)


@pytest.mark.parametrize(("packing", "place"), [(".gz", 10), (".gz", -8), (".xz", 30), (".xz", 0)])
def test_a_compressed_text_that_is_damaged_is_named(tmp_path, packing, place):
    packed = bytearray(PACK[packing](b'"one"\n' * 1000))
    packed[place] ^= 0xFF
    (tmp_path / f"own.txt{packing}").write_bytes(packed)
    with pytest.raises(ValueError, match=f"own.txt{packing} is no whole {packing} file"):
        gathered(tmp_path / f"own.txt{packing}")


def test_gathering_takes_little_memory(tmp_path):
    (tmp_path / "own.jsonl").write_bytes(b'{"text": "a document of few words"}\n' * 60_000)
    tracemalloc.start()
    gather(tmp_path / "own.jsonl", tmp_path / "gathered")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20 < (tmp_path / "gathered").stat().st_size


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_characters_at_the_edge_of_a_block(tmp_path, monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    text = "é€👩x" * 9
    (tmp_path / "own.txt").write_text(text)
    assert gathered(tmp_path / "own.txt").decode() == text
    (tmp_path / "own.txt").write_bytes(text.encode() + b"\xf0\x9f")
    with pytest.raises(ValueError, match=f"own.txt is not UTF-8 at byte {len(text.encode())} "):
        gathered(tmp_path / "own.txt")


def test_gathering_says_how_far_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tokenizer.progress.SECONDS_BETWEEN_LINES", 0.0)
    folder = fill(
        tmp_path / "notes", a_txt="a" * 3_000_000, b_jsonl=f'"{"b" * 3_000_000}"\n' * 2, c_txt_gz=gzip.compress(b"c")
    )
    gather(folder, tmp_path / "gathered", progress=True)
    said = capsys.readouterr().err.splitlines()
    shares = [int(line.split()[2].rstrip("%,")) for line in said if "%" in line]
    assert len(shares) > 2 and shares == sorted(set(shares))
    assert said[-1].startswith("gathering notes: 9 MB, ")


def test_no_room_to_gather(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5))
    (tmp_path / "own.jsonl").write_text('"one"\n')
    with pytest.raises(OSError, match="6 bytes to copy, 5 free"):
        gathered(tmp_path / "own.jsonl")


# ---------------------------------------------------------------------------------------------------------- folders


def test_the_texts_of_a_folder_come_in_the_order_of_their_names(tmp_path):
    folder = fill(
        tmp_path / "notes", b_txt="b", a__z_md="z", a__b__c_TEXT="c", B_jsonl='"B"', z_ndjson_xz=b"", c_txt_gz=b""
    )
    fill(folder, a_pdf="", a__x_json="", _hidden_txt="", _git__a_txt="", a___b_txt="")
    os.mkfifo(folder / "pipe.txt")
    (folder / "gone.txt").symlink_to("nowhere.txt")
    assert names(folder) == ["B.jsonl", "a/b/c.TEXT", "a/z.md", "b.txt", "c.txt.gz", "z.ndjson.xz"]
    assert names(fill(tmp_path / "two", a__b_txt="", a_txt="")) == ["a.txt", "a/b.txt"], "as they are written"
    assert describe(folder) == f"6 files of {folder}/, 4 others left out"
    assert describe(fill(tmp_path / "one", a_txt="a")) == f"1 file of {tmp_path}/one/"
    assert describe(folder / "b.txt") == f"{folder}/b.txt"


@anywhere
@given(
    st.lists(
        st.tuples(st.sampled_from(TEXT_ENDINGS + JSON_ENDINGS), st.sampled_from(list(PACK)), DOCUMENTS), max_size=6
    )
)
@example([(".txt", "", ["one\n<|endoftext|>\n \n"]), (".md", ".gz", [""]), (".jsonl", ".xz", ["", "two"])])
def test_the_texts_of_a_folder_are_joined(tmp_path, files):
    shutil.rmtree(tmp_path / "notes", ignore_errors=True)
    (tmp_path / "notes").mkdir()
    expected = []
    for number, (ending, packing, documents) in enumerate(files):
        text = "\n".join(map(json.dumps, documents)) if ending in JSON_ENDINGS else "".join(documents)
        expected += documents if ending in JSON_ENDINGS else [text]
        place = tmp_path / "notes" / f"{number // 2}" / f"{number}{ending}{packing}"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(PACK[packing](text.encode()))
    if any(expected):
        assert gathered(tmp_path / "notes") == joined(expected)
    else:
        with pytest.raises(ValueError, match=r"notes has no (documents|texts) in it"):
            gathered(tmp_path / "notes")


def test_endings_may_be_in_capitals(tmp_path):
    folder = fill(tmp_path / "notes", A_TXT_GZ=gzip.compress(b"one"), B_JSONL_XZ=lzma.compress(b'"two"'))
    assert gathered(folder) == joined(["one", "two"])


def test_links_are_followed_but_no_folder_is_entered_twice(tmp_path):
    folder = fill(tmp_path / "notes", a__b__one_txt="1")
    elsewhere = fill(tmp_path / "elsewhere", two_txt="2", three_txt="3")
    (folder / "loop").symlink_to(folder)
    (folder / "a" / "up").symlink_to("..")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "linked too").symlink_to(elsewhere)
    (folder / "file.txt").symlink_to(elsewhere / "two.txt")
    assert names(folder) == ["a/b/one.txt", "file.txt", "linked/three.txt", "linked/two.txt"]


def test_what_this_project_makes_is_no_text(tmp_path):
    folder = fill(tmp_path / "notes", a_txt="a")
    fill(folder, data__x__stages_json="{}", data__x__train_txt="", data__y__meta_json="", data__y__tokenizer__a_txt="")
    fill(folder, tok__vocab_json="{}", tok__merges_txt="", run__config_yaml="", run__metrics_jsonl="", run__s__a_md="")
    fill(folder, study__run__record_json="{}", study__run__output_txt="")
    fill(folder, site__config_yaml="", site__vocab_json="", site__post_md="")
    assert names(folder) == ["a.txt", "site/post.md"], "one of two names is not enough"
    for made in ("data/x", "data/y", "tok", "run", "study/run"):
        with pytest.raises(ValueError, match=f"{made} is a dataset, a tokenizer or a run, no folder of texts"):
            list_files(folder / made)


def test_a_folder_without_texts_is_named_with_the_endings(tmp_path):
    fill(tmp_path, a_pdf="", _hidden_txt="a")
    with pytest.raises(
        ValueError, match=r"no texts in it, that is, files that end in \.txt, \.md, \.text, \.jsonl, \.ndj"
    ):
        list_files(tmp_path)


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch):
    folder = fill(tmp_path / "notes", a_txt="a", b__c_txt="c")
    scandir = os.scandir

    def faulty(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", faulty)
    with pytest.raises(PermissionError, match="Permission denied"):
        list_files(folder)


def test_in_a_folder_the_file_is_named_that_cannot_be_read(tmp_path):
    folder = fill(tmp_path / "notes", a_txt="ä" * 1000, b_txt="ä".encode("latin-1"))
    with pytest.raises(ValueError, match=r"notes/b.txt is not UTF-8 at byte 0 \(e4\)"):
        gathered(folder)
    (folder / "b.txt").rename(folder / "b.jsonl")
    with pytest.raises(ValueError, match=r"notes/b.jsonl is not UTF-8 at byte 0 \(e4\)"):
        gathered(folder)
    (folder / "b.jsonl").write_text("\n{}")
    with pytest.raises(ValueError, match=r'notes/b.jsonl: line 2 has no "text" in it'):
        gathered(folder)
    (folder / "b.jsonl").rename(folder / "b.md.gz")
    with pytest.raises(ValueError, match=r"notes/b.md.gz is no whole .gz file"):
        gathered(folder)


def test_a_file_that_changes_while_it_is_gathered_is_named(tmp_path, monkeypatch):
    folder = fill(tmp_path / "notes", a_txt="a", b_txt="b")
    monkeypatch.setattr(module, "_separator", lambda document: fill(folder, b_txt="other") and b"")
    with pytest.raises(ValueError, match=r"notes/b.txt changed while it was read"):
        gathered(folder)


def test_a_fingerprint_is_of_names_and_contents(tmp_path, monkeypatch):
    folder, memory, read = fill(tmp_path / "notes", a_txt="a", b__c_md="c"), tmp_path / "files.json", []
    sha256 = module._sha256
    monkeypatch.setattr(module, "_sha256", lambda path: read.append(path.name) or sha256(path))
    seen = [fingerprint(folder, memory)]

    def changed(*names):
        """Whether it is another than all before; `names` have been read for it."""
        read.clear()
        seen.append(fingerprint(folder, memory))
        assert read == list(names)
        return seen[-1] not in seen[:-1]

    assert not changed()
    os.utime(folder / "a.txt", (1, 1))
    assert not changed("a.txt")
    (folder / "a.txt").write_text("A")
    assert changed("a.txt")
    (folder / "b" / "d.txt").write_text("d")
    assert changed("d.txt")
    (folder / "b" / "d.txt").rename(folder / "b" / "e.txt")
    assert changed("e.txt")
    (folder / "b" / "e.txt").unlink()
    assert not changed() and seen[-1] == seen[3]
    assert len(json.loads(memory.read_bytes())["files"]) == 2, "what is gone is forgotten"
    (folder / "a.pdf").touch()
    assert not changed()
    memory.write_text("{ damaged")
    assert not changed("a.txt", "c.md")
    folder.rename(tmp_path / "other")
    assert fingerprint(tmp_path / "other", memory) == seen[3]


def test_a_folder_that_took_the_place_of_another_is_read_anew(tmp_path):
    folder, other = fill(tmp_path / "notes", a_txt="a"), fill(tmp_path / "others", a_txt="b")
    for path in (folder / "a.txt", other / "a.txt"):
        os.utime(path, (1, 1))
    memory = tmp_path / "files.json"
    assert fingerprint(folder, memory) != fingerprint(other, memory)


def test_a_fingerprint_needs_no_memory_and_files_may_have_any_name(tmp_path, monkeypatch):
    folder = fill(tmp_path / "notes", a_txt="a")
    (folder / "a.txt").rename(folder / os.fsdecode(b"caf\xe9.txt"))
    first = fingerprint(folder, tmp_path / "files.json")
    monkeypatch.setattr(module, "_sha256", None)
    assert fingerprint(folder, tmp_path / "files.json") == first
    monkeypatch.undo()

    def read_only(path, value):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(module, "write_json", read_only)
    assert fingerprint(folder, tmp_path / "none.json") == first


def test_the_size_of_a_folder(tmp_path):
    assert count_bytes(fill(tmp_path, a_txt="12345", b_md_gz="12345", c_pdf="1")) == 5 + 3 * 5


def test_a_folder_names_its_dataset(tmp_path, monkeypatch):
    folder = fill(tmp_path / "my.notes" / "new", a_txt="a")
    assert dataset_name(f"{folder.parent}/") == "my.notes"
    monkeypatch.chdir(folder)
    assert [dataset_name(path) for path in (".", "..", "../new")] == ["new", "my.notes", "new"]
    (folder / "owt").mkdir()
    for path in ("owt", "/"):
        with pytest.raises(ValueError, match=f"train_text={path}: rename it"):
            dataset_name(path)
