"""The textbook version against answers known from elsewhere."""

from tokenizer import reference


def test_handouts_training_example() -> None:
    """CS336 A1 section 2.4, whose pre-tokens are words between blanks."""
    counts = {b"low": 5, b"lower": 2, b"widest": 3, b"newest": 6}
    merges = [b"".join(pair) for pair in reference.learn_merges(counts, 8)]
    assert merges == [b"st", b"est", b"ow", b"low", b"west", b"ne", b"newest", b"wi"]


def test_handouts_encoding_example() -> None:
    """CS336 A1 section 2.6.1."""
    tokens = [b" ", b"a", b"c", b"e", b"h", b"t", b"th", b" c", b" a", b"the", b" at"]
    merges = [(b"t", b"h"), (b" ", b"c"), (b" ", b"a"), (b"th", b"e"), (b" a", b"t")]
    assert reference.encode("the cat ate", dict(enumerate(tokens)), merges, []) == [9, 7, 1, 5, 10, 3]


def test_a_tie_goes_to_the_greater_pair_of_byte_strings() -> None:
    """CS336 A1 section 2.4: of A B, A C, B ZZ and BA A the merge is BA A."""
    counts = {b"AB": 1, b"AC": 1}
    assert reference.learn_merges(counts, 1) == [(b"A", b"C")]
    assert max([(b"A", b"B"), (b"A", b"C"), (b"B", b"ZZ"), (b"BA", b"A")]) == (b"BA", b"A")


def test_no_more_merges_than_pairs() -> None:
    assert reference.learn_merges({b"abc": 1, b"x": 9}, 10) == [(b"b", b"c"), (b"a", b"bc")]


def test_special_tokens_separate_and_do_not_count() -> None:
    assert reference.count_pretokens("ab<|x|>ab c", ["<|x|>"]) == {b"ab": 2, b" c": 1}


def test_decode_replaces_what_is_no_utf8() -> None:
    assert reference.decode([0, 1, 0], {0: b"\xc3", 1: b"\xa9"}) == "é\ufffd"


def test_first_merges_of_the_courses_corpus(fixtures) -> None:
    """The whole of the reference takes a minute; `tests/test_train.py` compares all of it with the fast version."""
    text = (fixtures / "corpus.en").read_text("utf-8")
    vocab, merges = reference.train_bpe(text, 256 + 1 + 12, ["<|endoftext|>"])
    expected = (fixtures / "train-bpe-reference-merges.txt").read_text("utf-8").splitlines()[:12]
    assert [" ".join(token.decode().replace(" ", "Ġ") for token in pair) for pair in merges] == expected
    assert len(vocab) == 269
