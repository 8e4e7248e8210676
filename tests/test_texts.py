"""A text of your own, before it is prepared."""

import gzip
import json
import lzma
import shutil
import tracemalloc

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from toy import disk_calls, flushed_before_it_was_named

from lm import texts as module
from lm.texts import dataset_name, gather, hold_out

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
        ("one\n<|endoftext|>\n" * 100, "one\n<|endoftext|>\n" * 4),
        ("a line\nof one\n\nthen two\nof it\n", "then two\nof it\n"),
        ("a line\r\nof one\r\n\r\nthen two\r\nof it\r\n", "then two\r\nof it\r\n"),
        ("word\n" * 100, "word\n" * 4),
        ("\n\none\n\n\n  \n\ntwo\n<|endoftext|>\n", "two\n<|endoftext|>\n"),
        ("preface\n<|endoftext|>\n" + "a line of many\n" * 10_000, "a line of many\n" * 500),
        ("preface\n" + "no line " * 10_000, None),
        ("one line", None),
        ("one line\n<|endoftext|>\n", None),
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


def test_gathering_takes_little_memory(tmp_path):
    (tmp_path / "own.jsonl").write_bytes(b'{"text": "a document of few words"}\n' * 300_000)
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


def test_no_room_to_gather(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5))
    (tmp_path / "own.jsonl").write_text('"one"\n')
    with pytest.raises(OSError, match="6 bytes to copy, 5 free"):
        gathered(tmp_path / "own.jsonl")
