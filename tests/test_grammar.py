import importlib.util
import math
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import pytest

import lm.grammar
from lm.grammar import STORIES, Grammar, Voice

SMALL = """
@who: name | he | him | his | kind
3 Ann / Eve | she | her | her | girl
1 Bob | he | him | his | boy
@fruits: name
2 pear
1 fig
1 apricot
= story
2 Once <hero:who> met <friend:who>. {He} ate a <fruit:fruits> <and then {hero.kind}>
1 Nobody met <hero:who>.¶(Not|Never) {him}, the {hero.kind}.
= and then girl
and (slept|sang).
with a <second:fruits>. {Hero} was full.
= and then boy
with {friend}; {friend.he} liked the {fruit}.
"""


class Scripted(Voice):
    """A voice that takes given choices, then the first option, and notes how many options there were."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script, self.taken, self.counts, self.text, self.probability = list(script), [], [], "", 1.0

    def say(self, text: str) -> None:
        self.text += text

    def choose(self, weights: Sequence[int], beginnings: Callable[[], Iterable[list[str]]]) -> int:
        index = self.script[len(self.taken)] if len(self.taken) < len(self.script) else 0
        self.taken.append(index)
        self.counts.append(len(weights))
        self.probability *= weights[index] / sum(weights)
        return index


def every_telling(grammar: Grammar) -> Iterator[Scripted]:
    script: list[int] = []
    while True:
        voice = Scripted(script)
        grammar.tell(voice)
        yield voice
        script = voice.taken
        while script and script[-1] + 1 == voice.counts[len(script) - 1]:
            script.pop()
        if not script:
            return
        script[-1] += 1


@pytest.fixture(scope="module")
def fast():
    """The module without the test run's type checks, which cost ten times the work itself."""
    spec = importlib.util.spec_from_file_location("grammar_without_checks", lm.grammar.__file__)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_probabilities_of_all_documents_sum_to_one_and_each_is_found_by_parsing():
    grammar = Grammar(SMALL)
    tellings = list(every_telling(grammar))
    assert len(tellings) > 50
    assert len({voice.text for voice in tellings}) == len(tellings)
    assert math.fsum(voice.probability for voice in tellings) == pytest.approx(1, abs=1e-12)
    for voice in tellings:
        assert math.exp(grammar.log_probability(voice.text)) == pytest.approx(voice.probability, rel=1e-12)
    documents = sorted(voice.text for voice in tellings)
    assert not any(b.startswith(a) for a, b in pairwise(documents)), "a prefix code knows its ends"


def test_memory_decides_what_follows():
    texts = [voice.text for voice in every_telling(Grammar(SMALL))]
    assert "Once Ann met Bob. She ate a fig and slept." in texts
    assert "Once Bob met Eve. He ate a pear with Eve; she liked the pear." in texts
    assert "Nobody met Bob.\nNever him, the boy." in texts
    assert not any("Ann met Ann" in text or "fig and a fig" in text for text in texts)


def test_sampling_follows_the_weights(fast):
    grammar, rng = fast.Grammar(SMALL), random.Random(1)
    expected = {voice.text: voice.probability for voice in every_telling(grammar)}
    n, counts = 20_000, dict.fromkeys(expected, 0)
    for _ in range(n):
        counts[grammar.sample(rng)[0]] += 1
    for text, probability in expected.items():
        assert abs(counts[text] - n * probability) < 5 * math.sqrt(n * probability * (1 - probability)), text


def test_sampling_is_the_same_everywhere():
    rng = random.Random(7)
    assert [Grammar(SMALL).sample(rng)[0] for _ in range(2)] == [
        "Once Ann met Eve. She ate a pear with a fig. Ann was full.",
        "Once Eve met Ann. She ate a pear and slept.",
    ]


@pytest.mark.parametrize("num_stories", [300, pytest.param(3_000, marks=pytest.mark.slow)])
def test_parsing_a_story_finds_the_very_number_it_was_sampled_with(fast, num_stories):
    rng = random.Random(num_stories)
    for _ in range(num_stories):
        story, log_prob = fast.stories().sample(rng)
        assert fast.log_probability(story) == log_prob


def test_every_option_and_record_of_the_stories_is_reached(fast):
    seen: set[int] = set()

    class Watched(fast.Grammar):
        def _expand(self, template, memory, voice) -> None:
            seen.add(id(template))
            super()._expand(template, memory, voice)
            seen.update(map(id, memory.values()))

    grammar, rng = Watched(STORIES), random.Random(0)
    for _ in range(2500):
        grammar.sample(rng)
    wanted = [(name, option) for name, rule in grammar.rules.items() for option in rule.options]
    wanted += [(name, record) for name, table in grammar.tables.items() for record in table]
    missing = [(name, what) for name, what in wanted if id(what) not in seen]
    assert not missing


def test_stories_read_like_stories(fast):
    rng = random.Random(3)
    seen = [fast.stories().sample(rng)[0] for _ in range(2000)]
    assert len(set(seen)) == len(seen)
    for story in seen:
        assert story.count('"') % 2 == 0, story
        assert not re.search(
            r"  | [.,!?]|[.,!?][.,?]|[{}<>()|¶]|\ba [aeiou]|\ban (?!hour)[^aeiou]|\n\n|^\s|\s$", story
        ), story
        assert all(line[0].isupper() or line[0] == '"' for line in story.split("\n")), story
        assert all(line[-1] in '.!?"' for line in story.split("\n")), story
        assert 400 < len(story) < 2500
        assert story.isascii()


@pytest.mark.parametrize("at", [0, 40, 200])
def test_text_outside_the_grammar_is_refused_with_its_position(fast, at):
    story, _ = fast.stories().sample(random.Random(5))
    with pytest.raises(ValueError, match=r"at character \d+") as error:
        fast.log_probability(story[:at] + "§" + story[at + 1 :])
    assert int(re.search(r"character (\d+)", str(error.value))[1]) <= at
    with pytest.raises(ValueError, match="at character"):
        fast.log_probability(story[:at])
    with pytest.raises(ValueError, match=f"at character {len(story)}, .* is not 'the end'"):
        fast.log_probability(story + " And then?")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("= story\nA cat\nA cat sat", "can begin alike"),
        ("= story\nA (big|bigger) cat", "can begin alike"),
        ("= story\nA (very |)big cat", "can begin alike"),
        ("= story\n(A|b) cat\nA dog", "can begin alike"),
        ("= story\n<animal> ran\nA dog\n= animal\nA (cat|dog)\nSam", "can begin alike"),
        ("@t: name\nAnn / Bob\n= story\n<x:t> ran\nBob", "can begin alike"),
        ("@t: name\nball / balloon\n= story\n<x:t>", "can begin alike"),
        ("@t: name\nOne / Two\n= story\n<x:t> <next>\n= next\n{x} is it\nOne is it", "can begin alike"),
        ("@t: name | he\nAnn | She\n= story\n<x:t> <next>\n= next\n{x.he} is\n{x.he}", "can begin alike"),
        ("@t: name\nAnn\nBob\n@u: name\nAnn\n= story\n<x:t> <y:u> <n>\n= n\n{x} is\n{y} was", "can begin alike"),
        ("= story\n<nothing>", "no rule or table is called"),
        ("= story\n<x:nothing>", "no rule or table is called"),
        ("@t: name\nAnn\n= story\n<x:t> <go {x}>\n= go Eve\nA", "no rule or table is called"),
        ("= story\nA (cat|dog", "not closed"),
        ("= story\nA {cat mouse}", "not closed"),
        ("= story\nA\n= lonely\nB", "nothing calls"),
        ("= story\n{x}", "not a column"),
        ("@t: name\nAnn\n= story\n<x:t> {x.age}", "not a column"),
        ("@t: name | age\nAnn\n= story\n<x:t>", "has 1 columns, its table 2"),
        ("= story\nA\n= story\nB", "defined twice"),
    ],
)
def test_a_grammar_that_cannot_be_parsed_back_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        Grammar(source)


def test_options_that_only_memory_tells_apart_are_fine():
    Grammar("@t: name\nAnn / Bob\n= story\n<x:t> <y:t> <n>\n= n\n{x} won\n{y} won")
    Grammar("@t: name | he\nAnn | She\nBob | He\n= story\n<x:t> <n>\n= n\n{x} won\n{x.he} won")


def test_a_corpus_file_is_reproducible_and_its_entropy_is_exact(fast, tmp_path):
    record = fast.write_corpus(tmp_path / "a.txt", 30_000, seed=11)
    assert fast.write_corpus(tmp_path / "b.txt", 30_000, seed=11) == record
    fast.write_corpus(tmp_path / "c.txt", 30_000, seed=12)
    data = (tmp_path / "a.txt").read_bytes()
    assert data == (tmp_path / "b.txt").read_bytes() != (tmp_path / "c.txt").read_bytes()
    *documents, rest = data.decode().split(fast.SEPARATOR)
    assert rest == ""
    assert (record["num_bytes"], record["num_documents"]) == (len(data), len(documents))
    assert 30_000 <= len(data) < 33_000
    bits = -math.fsum(map(fast.log_probability, documents)) / math.log(2)
    assert record["entropy_bits_per_byte"] == pytest.approx(bits / len(data), rel=1e-12)
