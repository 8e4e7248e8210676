"""A text of your own, before it is prepared."""

import pytest
from toy import disk_calls, flushed_before_it_was_named

from lm.texts import dataset_name, hold_out


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
