"""The built-in corpus: small children's stories from an unambiguous probabilistic grammar.

No network, no licence, and one thing that no other corpus has: the exact probability of every document is known. The
distance of a trained model from perfection can therefore be read off as bits per byte above the entropy floor.

A story is told left to right. Where the teller has a choice, every option begins with a different text (no beginning is
a prefix of another), so the next characters always say which option was taken. The grammar is therefore a prefix code:
a document has exactly one derivation, its probability is the product of the choices along it, the probabilities of all
documents sum to one, and the end of a document is known without looking further. `Grammar` proves the prefix property
when it is built and refuses a grammar that lacks it.

The grammar itself, `STORIES`, is data at the end of this file, in a notation of six marks:

    @toys: name | way | joy     a table: its columns, then a record a line; `Lily / Mia | she` is two records
    = mishap                    a rule: its options follow, one a line; a leading number is a weight (else 1)
    <mishap>                    choose an option of that rule here
    (big|small)                 choose one of these here, all equally likely
    <toy:toys>                  draw a record here, write its first column, remember it as `toy` to the end of the
                                story; a record that is remembered already is not drawn again
    {toy} {toy.joy} {Toy}       write the remembered record's first column, another column, with a capital letter;
                                `{he}` is short for `{hero.he}`

A column may use remembered records itself, and the name of a rule or table may be put together from them
(`<mishap {toy.way}>`): this is how what happens agrees with what happened before. `¶` is a line break in the story; an
indented line continues the one above it.
"""

import bisect
import contextlib
import functools
import math
import os
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import accumulate, combinations, product, takewhile
from typing import TypeAlias

from tokenizer.files import END_OF_TEXT, atomic_write

LOOK_INTO = 4  # choices in a row that are looked into to tell the options of another choice apart
SEPARATOR = f"\n{END_OF_TEXT}\n"
"""What follows every document of a corpus file. It is certain once a story has ended, so it costs no information."""


@dataclass(frozen=True)
class Slot:
    """`{toy.joy}`: a column of a remembered record."""

    name: str
    column: str
    capital: bool


@dataclass(frozen=True)
class Call:
    """`<mishap {toy.way}>`: an option of the rule of that name."""

    rule: "Template"


@dataclass(frozen=True)
class Draw:
    """`<toy:toys>`: a record of the table, remembered under `slot`."""

    slot: str
    table: "Template"


@dataclass(frozen=True)
class Rule:
    """Options to choose from and their weights."""

    options: "tuple[Template, ...]"
    weights: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Record:
    """One row of a table; equal only to itself."""

    columns: "dict[str, Template]"
    weight: int


Part: TypeAlias = str | Slot | Call | Draw | Rule
Template: TypeAlias = tuple[Part, ...]
Memory: TypeAlias = dict[str, Record]

_MARK = re.compile(r"\{(?P<slot>[\w.]+)\}|<(?P<choice>[^<>]+)>|\((?P<inline>[^()]+)\)")


def parse_template(source: str) -> Template:
    """The parts of a line of the grammar.

    >>> parse_template("a (red|blue) {toy}")
    ('a ', Rule(options=(('red',), ('blue',)), weights=(1, 1)), ' ', Slot(name='toy', column='', capital=False))
    """
    parts: list[Part] = []
    end = 0
    for mark in _MARK.finditer(source):
        parts.append(source[end : mark.start()].replace("¶", "\n"))
        end = mark.end()
        if mark["slot"]:
            parts.append(_slot(mark["slot"]))
        elif mark["inline"]:
            options = tuple(map(parse_template, mark["inline"].split("|")))
            parts.append(Rule(options, (1,) * len(options)))
        elif ":" in mark["choice"]:
            slot, _, table = mark["choice"].partition(":")
            parts.append(Draw(slot, parse_template(table)))
        else:
            parts.append(Call(parse_template(mark["choice"])))
    parts.append(source[end:].replace("¶", "\n"))
    if stray := [part for part in parts if isinstance(part, str) and re.search(r"[{}<>()|]", part)]:
        raise ValueError(f"a mark that is not closed or not understood in {stray[0]!r}")
    return tuple(part for part in parts if part != "")


def _slot(path: str) -> Slot:
    name, _, column = path.partition(".")
    capital, name = name != name.lower(), name.lower()
    return Slot("hero", name, capital) if name in ("he", "him", "his") else Slot(name, column, capital)


class Voice(ABC):
    """What a grammar is told with: it hears the text and takes the choices."""

    @abstractmethod
    def say(self, text: str) -> None:
        """Hear text that follows with certainty."""

    @abstractmethod
    def choose(self, weights: Sequence[int], beginnings: Callable[[], Iterable[list[str]]]) -> int:
        """The index of one of the options of these weights; `beginnings()` are the texts that each can begin with."""


@dataclass
class Teller(Voice):
    """Takes the choices of a telling at random and writes the story down."""

    rng: random.Random
    story: list[str] = field(default_factory=list)
    log_probability: float = 0.0

    def say(self, text: str) -> None:
        """Write text that follows with certainty."""
        self.story.append(text)

    def choose(self, weights: Sequence[int], beginnings: Callable[[], Iterable[list[str]]]) -> int:
        """The index of an option, drawn by weight."""
        threshold = self.rng.random() * sum(weights)
        index = bisect.bisect_right(list(accumulate(weights)), threshold)
        self.log_probability += math.log(weights[index] / sum(weights))
        return index


@dataclass
class Listener(Voice):
    """Takes the choices that a given document was told with: the text itself says which."""

    document: str
    position: int = 0
    log_probability: float = 0.0

    def say(self, text: str) -> None:
        """Step over text that must follow."""
        if not self.document.startswith(text, self.position):
            raise self.surprise([text])
        self.position += len(text)

    def choose(self, weights: Sequence[int], beginnings: Callable[[], Iterable[list[str]]]) -> int:
        """The index of the only option that can begin like the rest of the document."""
        for index, option in enumerate(beginnings()):
            if self.document.startswith(tuple(option), self.position):
                self.log_probability += math.log(weights[index] / sum(weights))
                return index
        raise self.surprise([beginning for option in beginnings() for beginning in option])

    def surprise(self, expected: list[str]) -> ValueError:
        """The error for a document that leaves the grammar at the current position."""
        found = self.document[self.position : self.position + 40]
        wanted = " or ".join(repr(text) for text in expected[:4]) + (" or ..." if len(expected) > 4 else "")
        return ValueError(f"not a story of this grammar: at character {self.position}, {found!r} is not {wanted}")


class Grammar:
    """An unambiguous probabilistic grammar over documents.

    >>> toy = Grammar("= story\\n3 A cat (sat|ran).\\n1 The end.")
    >>> round(math.exp(toy.log_probability("A cat ran.")), 6)
    0.375

    Raises:
        ValueError: two options of one choice could begin alike, or a rule, table or column is missing or never used.
    """

    def __init__(self, source: str) -> None:
        self.rules: dict[str, Rule] = {}
        self.tables: dict[str, tuple[Record, ...]] = {}
        self.heads: dict[int, list[list[Template]]] = {}  # by id of a rule: what each of its options can begin with
        self._read(source)
        self._check()

    def sample(self, rng: random.Random) -> tuple[str, float]:
        """A story and its log-probability in nats."""
        teller = Teller(rng)
        self.tell(teller)
        return "".join(teller.story), teller.log_probability

    def log_probability(self, document: str) -> float:
        """The log-probability of a document in nats, by parsing alone.

        Raises:
            ValueError: the document is not one of this grammar; names the character where it leaves it.
        """
        listener = Listener(document)
        self.tell(listener)
        if listener.position != len(document):
            raise listener.surprise(["the end"])
        return listener.log_probability

    def tell(self, voice: Voice) -> None:
        """Go through one story; `voice` takes the choices and hears the text."""
        self._expand((Call(("story",)),), {}, voice)

    def _expand(self, template: Template, memory: Memory, voice: Voice) -> None:
        for part in template:
            if isinstance(part, str):
                voice.say(part)
            elif isinstance(part, Slot):
                voice.say(_recall(part, memory))
            elif isinstance(part, Draw):
                used = set(memory.values())
                records = [r for r in self.tables[_render(part.table, memory)] if r not in used]
                names = [_cell(record, "") for record in records]
                beginnings = functools.partial(_beginnings, [[name] for name in names], memory)
                record = records[voice.choose([record.weight for record in records], beginnings)]
                memory[part.slot] = record
                voice.say(_recall(Slot(part.slot, "", False), memory))
            else:
                rule = part if isinstance(part, Rule) else self.rules[_render(part.rule, memory)]
                index = 0
                if len(rule.options) > 1:
                    index = voice.choose(rule.weights, functools.partial(_beginnings, self.heads[id(rule)], memory))
                self._expand(rule.options[index], memory, voice)

    def _heads(self, option: Template, named: Callable[[Template], Iterable[str]], depth: int) -> Iterator[Template]:
        """What an option can begin with: its parts up to the first choice in it, and what that choice can begin with.

        Args:
            option: the parts.
            named: the rules or tables that a name in the option can stand for.
            depth: how many choices deep to look.
        """
        lead = tuple(takewhile(lambda part: isinstance(part, str | Slot), option))
        if len(lead) == len(option) or depth == 0:
            yield lead
            return
        choice = option[len(lead)]
        options: Iterable[Template]
        if isinstance(choice, Draw):
            options = (_cell(record, "") for name in named(choice.table) for record in self.tables[name])
        elif isinstance(choice, Call):
            options = (option for name in named(choice.rule) for option in self.rules[name].options)
        else:
            assert isinstance(choice, Rule)
            options = choice.options
        for begin in options:
            for head in self._heads(begin, named, depth - 1):
                yield (*lead, *head)

    def _read(self, source: str) -> None:
        name, columns = "", None
        for line in filter(None, re.sub(r"\n +", " ", source).replace("¶ ", "¶").splitlines()):
            if line.startswith(("@", "=")):
                name, _, header = (part.strip() for part in line[1:].partition(":"))
                if name in self.tables or name in self.rules:
                    raise ValueError(f"{name!r} is defined twice")
                columns = [column.strip() for column in header.split("|")] if line.startswith("@") else None
                if columns:
                    self.tables[name] = ()
                else:
                    self.rules[name] = Rule((), ())
                continue
            number, _, text = line.partition(" ")
            weight, text = (int(number), text.strip()) if number.isdigit() else (1, line)
            if columns:
                cells = [cell.strip() for cell in text.split("|")]
                if len(cells) != len(columns):
                    raise ValueError(f"{line!r} has {len(cells)} columns, its table {len(columns)}")
                for first in cells[0].split(" / "):
                    values = map(parse_template, (first, *cells[1:]))
                    self.tables[name] += (Record(dict(zip(columns, values, strict=True)), weight),)
            else:
                rule = self.rules[name]
                self.rules[name] = Rule((*rule.options, parse_template(text)), (*rule.weights, weight))

    def _check(self) -> None:
        """Prove that every choice is decided by the text that follows, and that every name means something."""
        every = [part for rule in self.rules.values() for option in rule.options for part in _walk(option)]
        records: dict[str, list[Record]] = {}
        draws = [part for part in every if isinstance(part, Draw)]
        for draw in sorted(draws, key=lambda draw: len(draw.table)):  # `{kind.names}` needs the tables of `kind` first
            for table in self._named(draw.table, self.tables.keys(), records):
                seen = records.setdefault(draw.slot, [])
                seen.extend(record for record in self.tables[table] if record not in seen)
        called = {"story"}
        for part in every:
            if isinstance(part, Call):
                called |= self._named(part.rule, self.rules.keys(), records)
        if unused := self.rules.keys() - called:
            raise ValueError(f"rules that nothing calls: {sorted(unused)}")
        columns = [cell for table in self.tables.values() for row in table for cell in row.columns.values()]
        for slot in (part for template in [*columns, every] for part in template if isinstance(part, Slot)):
            for record in records.get(slot.name, [None]):
                if record is None or (slot.column and slot.column not in record.columns):
                    raise ValueError(f"{{{slot.name}.{slot.column}}} is not a column of every record of that slot")
        named = functools.partial(self._named, known=self.rules.keys() | self.tables.keys(), records=records)
        rules = [*self.rules.items(), *(("(|)", part) for part in every if isinstance(part, Rule))]
        for name, rule in rules:
            self.heads[id(rule)] = self._distinct_heads(name, rule.options, named, records)
        for name, rows in self.tables.items():
            self._distinct_heads(name, [_cell(record, "") for record in rows], named, records)

    def _distinct_heads(
        self,
        name: str,
        options: Sequence[Template],
        named: Callable[[Template], Iterable[str]],
        records: dict[str, list[Record]],
    ) -> list[list[Template]]:
        """What each option can begin with, looking into as few choices as it takes to tell the options apart."""
        for depth in range(LOOK_INTO + 1):
            heads = [list(self._heads(option, named, depth)) for option in options]
            pairs = (pair for these, those in combinations(heads, 2) for pair in product(these, those))
            alike = next((pair for pair in pairs if not _differ(*pair, records)), None)
            if alike is None:
                return heads
        raise ValueError(f"two options of {name!r} can begin alike: {alike}")

    @staticmethod
    def _named(template: Template, known: Set[str], records: dict[str, list[Record]]) -> set[str]:
        """Every name that a template such as `mishap {toy.way}` can come out as."""
        values = (
            {_certain(_cell(record, part.column)) for record in records[part.name]}
            if isinstance(part, Slot)
            else {part}
            for part in template
        )
        names = {"".join(combination) for combination in product(*values)}  # type: ignore[arg-type]
        if missing := names - known:
            raise ValueError(f"no rule or table is called {sorted(missing)}")
        return names


def _cell(record: Record, column: str) -> Template:
    return record.columns[column] if column else next(iter(record.columns.values()))


def _recall(slot: Slot, memory: Memory) -> str:
    text = _render(_cell(memory[slot.name], slot.column), memory)
    return text[0].upper() + text[1:] if slot.capital else text


def _render(template: Template, memory: Memory) -> str:
    return "".join(_recall(part, memory) if isinstance(part, Slot) else str(part) for part in template)


def _beginnings(heads: Sequence[Sequence[Template]], memory: Memory) -> Iterator[list[str]]:
    """For each option, the texts that it can begin with; what speaks of things not remembered cannot come now."""
    for option in heads:
        texts = []
        for head in option:
            with contextlib.suppress(KeyError):
                texts.append(_render(head, memory))
        yield texts


def _walk(template: Template) -> Iterator[Part]:
    for part in template:
        yield part
        if isinstance(part, Rule):
            for option in part.options:
                yield from _walk(option)


def _certain(template: Template) -> str:
    """The text that a template begins with whatever is remembered."""
    return str(template[0]) if template and isinstance(template[0], str) else ""


def _differ(one: Template, other: Template, records: dict[str, list[Record]]) -> bool:
    """Whether two beginnings differ, whatever is remembered, before the shorter one ends."""
    while one and other:
        (a, *rest_a), (b, *rest_b) = one, other
        if isinstance(a, str) and isinstance(b, str):
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
            if common < min(len(a), len(b)):
                return True
            one = tuple(filter(None, (a[common:], *rest_a)))
            other = tuple(filter(None, (b[common:], *rest_b)))
        elif a == b:
            one, other = tuple(rest_a), tuple(rest_b)
        else:
            pairs = _values(a, b, records)
            return all(not x.startswith(y) and not y.startswith(x) for x, y in pairs)
    return False


def _values(a: Part, b: Part, records: dict[str, list[Record]]) -> Iterator[tuple[str, str]]:
    """The pairs of texts that two parts, at least one of them a slot, can come out as together."""
    texts_a, texts_b = _texts(a, records), _texts(b, records)
    if isinstance(a, Slot) and isinstance(b, Slot) and a.name == b.name:
        return ((x, y) for (_, x), (_, y) in zip(texts_a, texts_b, strict=True))  # two columns of one record
    # no record is in two slots at once
    return ((x, y) for (one, x), (other, y) in product(texts_a, texts_b) if one is not other)


def _texts(part: Part, records: dict[str, list[Record]]) -> list[tuple[Record | Part, str]]:
    """The beginnings of what a part can come out as, each with the record that it is from."""
    if not isinstance(part, Slot):
        return [(part, str(part))]
    texts = [(record, _certain(_cell(record, part.column))) for record in records[part.name]]
    return [(record, text[:1].upper() + text[1:] if part.capital else text) for record, text in texts]


@functools.cache
def stories() -> Grammar:
    """The grammar of the built-in corpus."""
    return Grammar(STORIES)


def log_probability(document: str) -> float:
    """The exact log-probability of a document of the built-in corpus, in nats.

    Raises:
        ValueError: the document is not a story of the grammar; names the character where it leaves it.
    """
    return stories().log_probability(document)


def write_corpus(path: str | os.PathLike[str], num_bytes: int, seed: int) -> dict[str, int | float]:
    """Write stories until the file holds at least `num_bytes`; the same seed gives the same bytes everywhere.

    Returns:
        num_bytes, num_documents, and entropy_bits_per_byte: -log2 of the probability of the file over its bytes. All
        bytes count, the separators too (they are certain and add no bits), as in `val/bits_per_byte`, which is the
        mean nats of a predicted token times all tokens / ln 2 / the bytes of the split's text. The two differ in one
        detail: the first token of a file is never predicted and counts as a mean one there.
    """
    rng = random.Random(seed)
    written, num_documents, nats = 0, 0, 0.0
    with atomic_write(path) as file:
        while written < num_bytes:
            story, log_prob = stories().sample(rng)
            written += file.write((story + SEPARATOR).encode())
            nats -= log_prob
            num_documents += 1
    bits_per_byte = nats / math.log(2) / written
    return {"num_bytes": written, "num_documents": num_documents, "entropy_bits_per_byte": bits_per_byte}


STORIES = """
@kinds: name | names | home
6 girl | girls | house
6 boy | boys | house
2 rabbit | animals | burrow
2 bear | animals | cave
2 mouse | animals | hole in the wall
1 fox | animals | den
1 duck | animals | nest
1 hedgehog | animals | heap of leaves
1 squirrel | animals | hollow tree
1 beaver | animals | lodge
1 hamster | animals | shoe box

@girls: name | he | him | his
2 Lily / Mia / Anna / Rosa / Zoe / Ruby / Clara / Nora | she | her | her
1 Ivy / Molly / Ella / Hannah / Frida / Tilda / Greta / Sofia / Amina / Yuki / Lucy / Kate | she | her | her

@boys: name | he | him | his
2 Tom / Ben / Max / Leo / Sam / Finn / Jack / Oscar | he | him | his
1 Theo / Hugo / Noah / Emil / Anton / Willy / Omar / Kenji / Pablo / Arthur / Felix / Gus | he | him | his

@animals: name | he | him | his
1 Pip / Bramble / Biscuit / Barnaby / Thistle / Mortimer / Crumb / Rufus / Fidget / Otto | he | him | his
1 Dot / Clover / Nutmeg / Pepper / Willow / Tansy / Olive / Poppy / Maple / Zinnia | she | her | her

@families: name | he | him | call
4 mother | she | her | Mama
4 father | he | him | Papa
3 grandmother | she | her | Grandma
2 grandfather | he | him | Grandpa
1 aunt | she | her | Auntie
1 uncle | he | him | Uncle

@wheres: name
2 by the sea
2 at the edge of the forest
2 on a green hill
2 near the old mill
2 behind the church
1 in the long lane
1 beside a slow brown river
1 under the railway bridge
1 across from the bakery
1 in the middle of nowhere
1 below the castle
1 next to the fire station

@traits: name | habit | after
2 shy | hid behind {his} {family} whenever a stranger said hello | And when a stranger came by the next day,
    {hero} was the first to say hello.
2 curious | asked a hundred questions before breakfast | The next morning {he} asked a hundred and one questions
    before breakfast.
2 proud | thought that {he} could do everything alone | "Nobody can do everything alone," said {hero}, and it
    did not even hurt to say so.
2 forgetful | never knew where {he} had left {his} shoes | {He} forgot many things after that, but {he} never
    forgot this day.
2 impatient | could not even wait for the soup to cool | And that evening {hero} sat quite still and waited for
    the soup to cool.
1 clumsy | fell over {his} own feet twice a day | On the way to bed {he} fell over {his} own feet, and nobody
    laughed louder than {hero}.
1 noisy | sang in the morning, at noon and in the bath | Then {he} sang about it until even the moon seemed to
    listen.
1 sleepy | could fall asleep in the middle of lunch | {He} was asleep before anyone could say good night.
1 generous | always gave away the bigger half | At supper {he} gave away the bigger half of {his} {treat}, as
    {he} always did.
1 messy | had jam on {his} nose from Monday to Sunday | There was still jam on {his} nose, of course.
1 careful | looked left and right even in the garden | {He} looked left and right, and then {he} climbed into bed.
1 polite | said thank you even to the doors | "Thank you," {he} said to the door, and closed it softly.
1 lazy | had once slept through a whole summer | The next day {he} stayed in bed until noon, and nobody minded.
1 stubborn | said no even when {he} meant yes | And when {he} was asked whether {he} was happy, {hero} said,
    "No!" and meant yes.
1 grumpy | had not laughed since Tuesday | And {hero}, who had not laughed since Tuesday, laughed and laughed.

@colors: name
2 red
2 blue
2 green
2 yellow
1 purple
1 silver
1 white
1 striped
1 spotted
1 golden
1 pink
1 rainbow

@toys: name | way | spot | joy | broke | mend
2 ball | rolls | low | kicked it along the path | burst with a bang | a round patch
2 wagon | rolls | low | pulled it along and let a snail ride in it | lost a wheel | a new wheel
1 marble | rolls | low | rolled it from one hand to the other | cracked in two | a drop of glue
1 hoop | rolls | low | ran beside it with a stick | bent out of shape | a small hammer
1 drum | rolls | low | beat it until the pigeons left | got a hole in it | a piece of leather
2 kite | flies | high | let it dance in the wind | tore right down the middle | a needle and thread
2 paper plane | flies | high | threw it again and again | crumpled into a lump | a hot iron
1 feather | flies | high | blew it up into the air | bent in the middle | a thin straw
1 scarf | flies | high | let it flutter like a flag | came undone at one end | two knitting needles
1 umbrella | flies | high | twirled it over one shoulder | turned inside out | a bit of wire
2 whistle | slips | low | blew it at every pigeon | broke at the tip | a lump of wax
1 bell | slips | low | rang it at every corner | lost its clapper | a shiny button
1 yo-yo | slips | low | made it go up and down, up and down | snapped its string | a longer string
1 lantern | slips | low | carried it in front like a queen | went out | a new candle

@places: name | low | high
2 park | the rose bushes | the old chestnut tree
2 beach | a pool between the rocks | the lifeguard's tower
2 meadow | a ditch full of nettles | the lonely poplar
2 forest | a hollow log | the tallest pine
2 market | the drain behind the fish stall | the clock tower
2 river | the thick reeds | the big willow
1 orchard | a heap of windfall apples | the crooked pear tree
1 castle | the dry moat | the ivy wall
1 station | the gap below the rails | the signal mast
1 harbour | a basket of crabs | the yellow crane
1 farm | the pig trough | the weathercock
1 museum | the mouth of a stone lion | the biggest dinosaur

@climbers: name | how | voice | food
2 crow | flapped up in three beats of its wings | cawed | bread crumbs
2 cat | climbed up without a sound | purred | a saucer of milk
1 owl | rose on soft wings | hooted | a warm pair of socks
1 monkey | swung up by its tail | chattered | a ripe banana
1 woodpecker | hopped up the side | rattled | a box of beetles
1 giraffe | simply stretched its neck | hummed | a bunch of leaves

@diggers: name | how | voice | food
2 frog | jumped right in | croaked | a cushion of moss
2 mole | dug a tunnel | grunted | a pair of glasses
1 otter | slid in on its belly | whistled | a fresh fish
1 beetle | crawled in on six legs | buzzed | a crumb of sugar
1 weasel | slipped in like a piece of string | hissed | a bit of bacon
1 turtle | walked in slowly but surely | mumbled | a leaf of lettuce

@riddles: name | answer
What has hands but cannot clap? | A clock
What has teeth but cannot bite? | A comb
What gets wetter the more it dries? | A towel
What has a neck but no head? | A bottle
What goes up but never comes down? | Your age
What has one eye but cannot see? | A needle
What can you catch but never throw? | A cold
What has legs but never walks? | A table
What is full of holes but still holds water? | A sponge
What has ears but hears nothing? | A field of corn

@noises: name | maker | busy | gift
2 Tap, tap, tap | woodpecker | looking for beetles in the wood | speckled feather
2 Crunch, crunch | hedgehog | eating the last of the biscuits | shiny beetle
2 Hoo, hoo | baby owl | practising its very first song | soft grey feather
1 Clink, clink | magpie | counting stolen spoons | silver spoon
1 Squeak, squeak | mouse | riding on a rusty toy train | piece of cheese
1 Flap, flap | bat | hanging up its washing | tiny clean sock
1 Rumble, rumble | badger | snoring with its mouth open | funny snore
1 Drip, drip | frog | taking a shower under the pipe | water lily
1 Scratch, scratch | kitten | sharpening its claws on a chair | ball of wool

@rooms: name
2 under the bed
2 behind the curtain
2 in the kitchen cupboard
1 up in the attic
1 down in the cellar
1 below the stairs
1 inside the chimney

@monsters: name
2 dragon
2 ghost
2 giant
2 witch
1 troll
1 pirate
1 wolf
1 robber
1 sea monster
1 bear with a cold
1 vampire

@traders: name | goods | place
2 baker | plum cake | in a shop that smelled of sugar
2 beekeeper | jar of honey | among the humming hives
2 potter | painted cup | at the turning wheel
1 gardener | pot of lavender | between the bean poles
1 weaver | woollen shawl | at the big loom
1 shoemaker | pair of slippers | on a three-legged stool
1 fisherman | string of shells | in a boat full of nets
1 carpenter | wooden spoon | under a cloud of sawdust
1 miller | bag of flour | below the creaking sails
1 farmer | basket of eggs | in the middle of the hens

@shows: name | did
2 sing me a song | sang a song about a whale
2 dance for me | danced until the dust flew
1 make me laugh | stood on one hand and made a face
1 tell me a secret | whispered a very small secret
1 let me hold your {color} {toy} for a while | held out the {color} {toy}

@babies: name | parent | clue | home | thanks
2 duckling | duck | wet and green, with whispering reeds | pond | a smooth white egg shell
2 kitten | cat | dry and dusty and full of hay | barn | a whisker for luck
2 lamb | sheep | wide and windy, with a little bell ringing | hillside | a tuft of wool
1 puppy | dog | small and wooden, with a round door | kennel | an old chewed bone
1 bat | mother bat | high and dark, with a window to the moon | belfry | a pinch of night air
1 chick | hen | warm and feathery, with poles to sit on | henhouse | a fresh egg
1 piglet | sow | soft and muddy, with a trough in the middle | sty | a lucky mud pie
1 foal | mare | big and strawy, with a row of half doors | stable | a rusty horseshoe
1 tadpole | frog | cool and round, with a bucket on a rope | well | a drop of moonlight

@players: name | noise | voice
2 goat | chewing | bleated
2 goose | honking | honked
2 turtle | breathing | mumbled
1 pony | snorting | neighed
1 donkey | sneezing | brayed
1 toad | gulping | croaked
1 hen | clucking | clucked
1 raccoon | giggling | giggled
1 sparrow | chirping | chirped

@spots: name
2 behind the barn door
2 under a bucket
2 in the tall grass
1 inside an empty barrel
1 up in the apple tree
1 below the bridge
1 between two haystacks
1 beneath the washing on the line

@thieves: name | animal | part | excuse
2 a long blue feather | peacock | feathers | I only wanted to look beautiful while eating
2 a silver trail of slime | snail | slime | I was on my way for three days and very hungry
2 a tuft of white wool | lamb | wool | I thought it was grass
1 a milky paw print | cat | milk on my paws | I was only cleaning the dishes
1 a pile of wood chips | woodchuck | wood chips | I wanted to taste the table
1 a heap of fresh earth | mole | earth on my nose | I could not see what it was
1 a shiny button | magpie | buttons | I paid for it with a button
1 two wet footprints | penguin | wet feet | I took it for a fish

@seeds: name | plant | grown | use
2 flat and striped | sunflower | taller than the roof | fed all the birds of the street
2 small and round | pea plant | as thick as a curtain | filled eleven bowls with peas
2 big and white | pumpkin | as wide as a cart | made soup for the whole village
1 tiny and black | poppy | as red as a fire engine | lit up the whole yard
1 long and thin | row of carrots | deep and crisp and orange | gave every horse in the lane a bite
1 brown and wrinkled | peach tree | full of pink blossom | gave shade to the cat
1 shiny and speckled | bean plant | right up to the window of the attic | made a green ladder for the snails

@numbers: name | ordinal
2 three | third
2 four | fourth
2 five | fifth
2 six | sixth
1 seven | seventh
1 eight | eighth
1 nine | ninth
1 ten | tenth

@treats: name
2 pancakes
2 noodle soup
2 plum dumplings
1 carrot cake
1 honey bread
1 melted cheese
1 blackberry pie
1 barley porridge
1 mushroom stew
1 walnut buns
1 rice pudding
1 baked apples
1 fried fish
1 lemon jelly
1 tomato salad
1 hot potatoes

@clothes: name
2 straw hat
2 yellow raincoat
2 woollen cap
1 patched waistcoat
1 blue apron
1 pair of odd socks
1 long grey coat
1 paper crown
1 bow tie
1 green cape
1 pair of big boots
1 red bandana

@sights: name
1 black cat
1 milk cart
1 stone bridge
1 sleeping dog
1 field of poppies
1 broken fence
1 post office
1 statue with no nose
1 very tall hedge
1 row of beehives
1 puddle shaped like a heart
1 man on a ladder
1 lady with nine hats
1 tractor
1 windmill
1 scarecrow

@dreams: name
1 blue elephant
1 talking teapot
1 flying bed
1 whale with wings
1 city made of cheese
1 ladder to the moon
1 singing pumpkin
1 tiny tiger
1 river of lemonade
1 king without a crown
1 library for cats
1 train full of bears
1 house on chicken legs
1 garden of umbrellas
1 snowman in July
1 very small volcano

= story
<opening> <home> <portrait>¶<plot>

= portrait
2 <nature> <looks and treasure>
1 <looks> <nature> <treasure>
1 <treasure> <nature> <looks>

= looks and treasure
<looks> <treasure>
<treasure> <looks>

= opening
6 Once upon a time, there was a <hero>.
2 There once was a <hero>.
2 Long ago, there lived a <hero>.
1 Do you know the story of the <hero>? Here it is.
1 Far away, behind (seven hills|the blue mountains|the great forest|a hundred rivers|the last bus stop), there
    lived a <hero>.

= hero
(little|small|young|tiny|merry|round|brave) <kind:kinds> named <hero:{kind.names}>

= home
3 {Hero} lived in a (cosy|narrow|crooked|quiet|sunny|draughty|spotless|cluttered) {kind.home} <where:wheres>
    with {his} <family:families>.
2 {He} lived with {his} <family:families> in a (cosy|narrow|crooked|quiet|sunny|draughty|spotless|cluttered)
    {kind.home} <where:wheres>.
1 {His} home was a (cosy|narrow|crooked|quiet|sunny|draughty|spotless|cluttered) {kind.home} <where:wheres>, and
    {he} shared it with {his} <family:families>.

= nature
3 {He} was a very <trait:traits> {kind}: {he} {trait.habit}.
2 Everyone knew that {hero} was <trait:traits>. {He} {trait.habit}.
1 {Hero} was so <trait:traits> that {he} {trait.habit}.

= looks
3 {He} (always|often|usually|only ever) wore a <wear:clothes> and liked nothing better than <treat:treats>.
2 You could tell {him} by {his} <wear:clothes>, and {his} favourite food was <treat:treats>.
1 For <treat:treats> {he} would have given away {his} <wear:clothes>.

= treasure
3 {His} favourite thing in the world was a <color:colors> <toy:toys>.
2 More than anything else, {hero} loved {his} <color:colors> <toy:toys>.
2 For {his} (third|fourth|fifth|last) birthday, {his} {family} had given {him} a <color:colors> <toy:toys>.
1 Wherever {he} went, {he} carried a <color:colors> <toy:toys>.

= plot
3 One morning, when the (sun was out|wind was blowing|grass was wet|birds were singing|air was fresh|milk had
    boiled over|bells were ringing|fog had lifted), <lost>
3 One night, when the (moon was full|rain was falling|wind was howling|house was quiet|stars were out|snow lay
    deep|fire had gone out|frogs were silent), <noise>
3 One afternoon, when (it was warm|the rain had stopped|there was nothing to do|the work was done|everyone was
    asleep|school was over|the bees were humming|lunch was over), <quarrel>
3 The next day was the birthday of {his} {family}. <birthday>
3 On the way (home|to school|to the <outing:places>) one day, <baby>
3 Every (Saturday|Sunday|summer|holiday|Friday after school|now and then), <seek>
2 At (noon|six o'clock|breakfast|tea time) on (Monday|Tuesday|Wednesday|Thursday) <theft>
3 In (spring|March|April|May|the last week of winter), <seed>

= lost
{hero} took the {color} {toy} to the <place:places>. There {he} {toy.joy}, and (the sun laughed|everyone
    smiled|all was well|the day was fine|time flew|nobody was happier). <aside>¶<mishap {toy.way}> <upset>¶
    <try {toy.spot}> <helper {toy.spot}>

= mishap rolls
2 But the ground was (steep|uneven|bumpy). The {toy} rolled away, (faster and faster|bump, bump, bump|round and
    round), and vanished into {place.low}.
1 A (big|muddy|cheerful|three-legged|wet|black) dog ran past and bumped into {hero}. The {toy} rolled straight
    into {place.low}.
1 {Hero} tripped over a (root|stone|sleeping cat|bucket|garden gnome|loose shoelace), let go of the {toy}, and
    watched it roll into {place.low}.

= mishap flies
2 But then the wind (came|woke up|grew strong). It took the {toy}, (higher and higher|up, up, up|over all the
    heads), and dropped it on top of {place.high}.
1 A (cheeky|hungry|big|one-eyed|greedy) seagull snatched the {toy}, did not like the taste, and left it on top
    of {place.high}.
1 {Hero} let go for just one moment, and the {toy} sailed away to the top of {place.high}.

= mishap slips
2 But {he} had (a hole in|too much jam in|forgotten to close|a mouse in) {his} pocket. The {toy} slipped out,
    (plop|clink|without a sound), and fell into {place.low}.
1 A bee flew by, {hero} jumped, and the {toy} flew out of {his} hand into {place.low}.
1 {Hero} sneezed so hard that the {toy} popped out of {his} hand and into {place.low}.

= upset
2 "Oh no!" <said> {hero}.
1 "My {toy}! My {color} {toy}!" <said> {hero}.
1 {Hero} sat down (on the ground|on a stone|right there) and began to cry.
1 A (big|fat|small|hot) tear ran down the nose of {hero}.

= try high
2 {He} jumped and (jumped|stretched|hopped), but {place.high} was (much|far|a little) too tall.
1 {He} threw (a shoe|a stick|an apple|a pebble|a sandwich|{his} {wear}) at it, and now {he} had to find that, too.
1 {He} tried to climb, but {he} slid down (once|twice|three times).

= try low
2 {He} reached in as (far|deep) as {he} could, but {he} only found (a snail|an old boot|cold mud|a rusty
    key|half a comb|three buttons|a sleeping newt|nothing).
1 {He} poked around with (a stick|a long twig|a spoon), but it was too deep.
1 {He} looked and looked, but {place.low} was too dark.

= helper high
Just then, a (friendly|wise old|plump|very polite|tired|famous|bald|well-dressed) <helper:climbers> came by. <talk>

= helper low
Just then, a (friendly|wise old|plump|very polite|tired|famous|bald|well-dressed) <helper:diggers> came by. <talk>

= talk
"<why>" {helper.voice} the {helper} <how>.¶
    "My {color} {toy} is <stuck {toy.spot}>," said {hero}, "and (I cannot get it back|I do not know what to do|I am
    too small)."¶<price>

= why
2 Why are you so (sad|quiet|unhappy)?
1 What is the matter, little {kind}?
1 Dear me, who is crying here?
1 Can I help you?

= stuck high
on top of {place.high}

= stuck low
lost in {place.low}

= price
2 "I will help you," {helper.voice} the {helper}, "if you can answer my riddle. <riddle:riddles>"¶
    {Hero} thought (hard|for a while|until {his} head was hot). "{riddle.answer}!" {he} <said>.¶
    "(Right|Correct|Clever {kind})!" <rescue>
2 "I will get it for you," {helper.voice} the {helper}, "but I would like {helper.food}."¶
    "I promise," said {hero} <how>. <rescue>
1 "Say please," {helper.voice} the {helper}.¶"Please!" said {hero} <how>. <rescue>

= rescue
The {helper} {helper.how} and (came back with|brought back|returned with) the {color} {toy}.¶<thanks>

= thanks
2 "Thank you, dear {helper}!" <said> {hero}, and {he} gave the {helper} {helper.food}. <return>
1 {Hero} hugged the {toy} first and the {helper} second. <return>
1 "You are the best {helper} at the {place}!" <said> {hero}. From then on they met there every
    (day|week|Sunday). <return>

= noise
{hero} woke up. <noise:noises>! It came from somewhere <room:rooms>.¶
    <fear> {He} (held|hugged|pressed) {his} {color} {toy} tightly.¶"<monster>" <said> {hero}.¶<look>

= fear
1 {His} heart beat like a (drum|little hammer|wooden clock|bird in a box|train).
1 {He} pulled the blanket over {his} (head|ears|nose).
1 All the hair on {his} neck stood up.

= monster
2 Is it a <mood> <monster:monsters>?
1 Surely that is a <mood> <monster:monsters>!
1 What if it is a <mood> <monster:monsters>?

= look
2 {He} called for {his} {family}. {Family.he} came with a (candle|lamp|torch|match|broom|frying pan), and
    together they looked {room}. <reveal>
1 But {he} was too curious to stay in bed. {He} took a (candle|lamp|torch|match|broom|frying pan) and looked
    {room}. <reveal>
1 Slowly {he} counted to <number:numbers>. At {number} {he} took a (candle|lamp|torch|match|broom|frying pan)
    and looked {room}. <reveal>

= reveal
2 It was not a {monster} at all. It was a (little|fat|cheerful|surprised|sleepy|young|hairy|rather rude)
    {noise.maker}, {noise.busy}!¶<meet>
1 There was no {monster} there. There was only a (little|fat|cheerful|surprised|sleepy|young|hairy|rather rude)
    {noise.maker}, {noise.busy}!¶<meet>

= meet
2 "Did I wake you?" asked the {noise.maker}. "I am so sorry."¶
    "(It does not matter|I was not afraid|Only a little)," said {hero} <how>. <share>
1 "Good evening," said the {noise.maker} <how>. "I thought that you were a {monster}!"¶
    They both laughed until the (windows|cups|stairs) shook. <share>

= share
2 They (shared|ate|finished) the {treat} from supper, and the {noise.maker} gave {hero} a {noise.gift}.¶<bed>
1 {Hero} let the {noise.maker} play with the {color} {toy}, and in return {he} got a {noise.gift}.¶<bed>

= bed
2 After that, whenever {he} heard "{noise}" {room}, {hero} only smiled and turned over. <moral>
1 When it was quiet again, {hero} put the {noise.gift} next to the {color} {toy}. <moral>

= quarrel
{hero} was playing with the {color} {toy}. <aside> A (tall|round|friendly|bored|freckled|lonely) <pal:kinds>
    named <friend:{pal.names}> came by.¶"(May|Can) I have the {toy}?" asked {friend} <how>.¶
    "<no>" said {hero} <how>.¶<pull>

= no
2 No, it is mine,
1 Not today,
1 Maybe when you are bigger,
1 But you had it yesterday,

= pull
2 {Friend} (pulled|tugged) on one side, and {hero} (pulled|tugged) on the other, until the {toy} {toy.broke}.¶
    <silence>
1 They both (shouted|yelled) so loudly that the {toy} fell to the ground and {toy.broke}.¶<silence>
1 So {friend} just took it and ran. After (ten|twenty|a hundred|four|thirteen) steps {friend.he} stumbled, and
    the {toy} {toy.broke}.¶<silence>

= silence
2 {Hero} went and sat <sulk:spots>, and {friend} went and sat <pout:spots>. <sorry>
1 Nobody said a word for (an hour|a long time|the rest of the day|ten minutes|five whole minutes|as long as it
    takes to eat an apple). <sorry>

= sorry
1 Then {hero} (came back|coughed|took a deep breath). "I am sorry, {friend}," {he} said. "I should have
    (shared|waited|said yes)."¶<mend>
1 Then {friend} (came back|coughed|took a deep breath). "I am sorry, {hero}," {friend.he} said. "I should have
    (asked nicely|waited|been careful)."¶<mend>

= mend
2 {His} {family} gave them {toy.mend}, and together they mended the {color} {toy}. <turns>
1 They carried the {color} {toy} to the <mender:traders>. The {mender}, {mender.place}, mended it with
    {toy.mend}. <turns>

= turns
2 After that they took turns: first {friend}, then {hero}, then {friend} again.¶<evening>
1 "You first," said {hero} <how>. "No, you first," said {friend}. So they (played something else|shared the
    {treat}|both laughed) instead.¶<evening>

= theft
somebody had eaten all of the {treat}. Only the empty (plate|bowl|pot|pan) was left, and beside it
    <thief:thieves>.¶
    "(This is a case for me|This cannot be|We shall see|Not again)!" <said> {hero}. <aside> {He} went to a <mood>
    <one:players> first.¶"It was not me," {one.voice} the {one} <how>. "I have no {thief.part}."¶<suspects>

= suspects
1 <confession>
1 So {hero} asked a <mood> <two:players>. "Not me," {two.voice} the {two} <how>. "Do I have {thief.part}?"¶
    <confession>

= confession
At last {hero} found the {thief.animal}, (under the table|behind a tree|fast asleep|in the cellar|on the roof).
    "{thief.excuse}," <said> the {thief.animal}. "I am sorry."¶<forgiven>

= forgiven
2 {Hero} thought about it. "Next time, ask me," {he} said, and {his} {family} made new {treat} for everyone: for
    the {one}, for the {thief.animal} and for {hero}.¶<evening>
1 "Then you must (wash the plates|tell a story|carry my {toy}|sing for us)," said {hero}, and the {thief.animal}
    did.¶<evening>

= birthday
{Hero} wanted to give {family.him} something (special|wonderful|lovely|unusual|useful|splendid). {He} found the
    <mood> <first:traders> {first.place}.¶"May I have a {first.goods}?" asked {hero} <how>.¶
    "<yes>" said the {first}, "but first I need something from the <second:traders>: a {second.goods}."¶
    So {hero} went on, past a <sight:sights> and a <next:sights>, and found the <mood> {second} {second.place}.
    <deal>

= yes
2 Of course,
1 Gladly,
1 Why not,

= deal
2 "You may have a {second.goods}," said the {second}, "if you <show:shows>."¶
    {Hero} {show.did}. The {second} (smiled|laughed|clapped|nodded|sighed|bowed) and gave {him} the {second.goods}.
    <back>
2 "I need something, too," said the {second}. "Go to the <third:traders> and ask for a {third.goods}."¶
    <aside> {Hero} found the <mood> {third} {third.place}. "You may have a {third.goods}," said the {third}, "if you
    <show:shows>."¶
    {Hero} {show.did}. The {third} (smiled|laughed|clapped|nodded|sighed|bowed) and gave {him} the {third.goods}.
    The {second} took the {third.goods} and gave {him} the {second.goods}. <back>

= back
{Hero} walked back, past the {next} and the {sight}. The {first} took the {second.goods} and gave {him} the
    {first.goods}.¶<present>

= present
2 In the morning, {his} {family} unwrapped the {first.goods}. "Where did you get this?" {family.he} asked.¶
    "From the {first}," said {hero}, "(and it was a long way|and from the {second}, too|but that is a long story)."¶
    <evening>
1 The next morning, {hero} put the {first.goods} on the table, beside the {treat}. "For you, {family.call}!"
    {he} <said>.¶<evening>

= baby
{hero} heard somebody crying. (Under a bush|Beside the road|Behind a fence|In a puddle|On the bottom
    step|Between two dustbins|In an old hat|Below a bench) sat a
    (tiny|lonely|dusty|shivering|hungry|muddy|soft|frightened) <baby:babies>.¶"I am lost," <said> the {baby}.¶
    "What does your home look like?" asked {hero} <how>.¶"It is {baby.clue}," said the {baby} <how>.¶
    <comfort> <walk>

= comfort
2 {Hero} let it hold the {color} {toy}, and it stopped crying.
1 "Do not cry," said {hero} <how>. "We will find it together."
1 {Hero} gave it a (bit|spoonful|mouthful) of {treat}.

= walk
2 They passed a <sight:sights> and met a <mood> <wrong:babies>. But the {wrong.home} was {wrong.clue}, and the
    {baby} shook its head. <arrive>
2 {Hero} knew the way. They passed a <sight:sights>, a <next:sights> and a <farther:sights>. <arrive>
1 They asked a <mood> <guide:players>. "{Baby.home}? That way," {guide.voice} the {guide}. <arrive>

= arrive
Then they came to the {baby.home}. It was {baby.clue}.¶
    "My (dear|sweet|own) little {baby}!" cried the {baby.parent}. <reward>

= reward
2 "How can I thank you, {hero}?" And the {baby.parent} gave {him} {baby.thanks}.¶<return>
1 The {baby.parent} danced, the {baby} danced, and {hero} danced with them. "Take {baby.thanks}," said the
    {baby.parent}.¶<return>

= seek
{hero} played hide-and-seek with {his} friends. This time <guests>

= guests
1 two friends came: a <mood> <one:players> and a <mood> <two:players>. <count>¶
    {He} found the {one} first, <near:spots>. <found two>
2 three friends came: a <mood> <one:players>, a <mood> <two:players> and a <mood> <three:players>. <count>¶
    <find three>

= count
{Hero} put down the {color} {toy}, closed {his} eyes and counted to <number:numbers>. {He} was so {trait} that
    {he} (nearly lost count|skipped a number|had to start again|counted twice).

= found two
"(Found you|There you are|I see you)!" said {hero}, and the {one} {one.voice}. <but where> the {two}? <hunt>
    Then {he} heard something {two.noise}, and there was the {two}, <last:spots>!¶The {two} had won <prize>

= find three
2 {He} found the {one} first, <near:spots>. {He} found the {two} next, <far:spots>. <but where> the {three}?
    <hunt> Then {he} heard something {three.noise}, and there was the {three}, <last:spots>!¶
    The {three} had won <prize>
1 {He} found the {three} first, <near:spots>. {He} found the {one} next, <far:spots>. <but where> the {two}?
    <hunt> Then {he} heard something {two.noise}, and there was the {two}, <last:spots>!¶The {two} had won <prize>
1 {He} found the {two} first, <near:spots>. {He} found the {three} next, <far:spots>. <but where> the {one}?
    <hunt> Then {he} heard something {one.noise}, and there was the {one}, <last:spots>!¶The {one} had won <prize>

= but where
2 But where was
1 Now who had seen
1 And what about

= hunt
2 {Hero} looked <empty:spots>, but there was only (a spider|a worm|an old hat|a bee|a sandwich|a lost sock|half
    a kite|a sleeping cat).
1 Not <empty:spots>, and not <bare:spots>.
1 {Hero} listened.

= prize
2 and was allowed to play with the {color} {toy} until (supper|sunset|six o'clock).¶<evening>
1 at last, and (laughed|danced|jumped about) until {hero} had to laugh, too.¶<evening>

= seed
{his} {family} gave {hero} a seed. It was <seed:seeds>. "What will it be?" asked {hero} <how>.¶
    "(Plant it|Water it|Be patient) and wait <number:numbers> weeks," said {his} {family} <how>.¶
    {Hero} put it into the ground {where} and stuck the {color} {toy} beside it, to know the place. <waiting>

= waiting
2 In the first week, <nothing> In the second week, <nothing> But in the {number.ordinal} week, <growth>
1 Day after day {he} (watered it|sang to it|told it stories|read to it|danced around it|said hello to it), and
    day after day <nothing> Then, in the {number.ordinal} week, <growth>

= nothing
2 nothing happened at all.
1 it rained (cats and dogs|without end|a little|only at night|hailstones).
1 a snail (came to look|ate the label|moved in next door|lost its way|fell asleep there).
1 {hero} wanted to dig it up, but {his} {family} said, "(Wait|Not yet|Soon)."

= growth
there was a (tiny|small|bright|shy) green (tip|leaf|dot|finger). <aside> It grew and grew, and one morning <wonder>

= wonder
2 there stood a {seed.plant}, {seed.grown}! It {seed.use}.¶<evening>
1 {hero} could not find the {color} {toy} any more, for in its place stood a {seed.plant}, {seed.grown}! It
    {seed.use}.¶<evening>

= aside
2 Somewhere a (clock|bell|cuckoo|gate|dog|piano|kettle|trumpet) could be heard.
2 A (fat|thin|lazy|lonely|brown|noisy) (pigeon|snail|bee|goat|spider|cat|hen|fly) (watched|passed
    by|yawned|turned round|said nothing|hurried home).
2 The air smelled of (rain|toast|smoke|apples|soap|cut grass|wet dog|tar|roses|tea).
1 Past {him} went (two|three|five|ten|twelve) (ants|ducks|clouds|sparrows|soldiers|aunts) in a row.
1 Down came a (leaf|feather|button|blossom|drop|nut) (and landed on {his} nose|and stuck to {his} {wear}|from
    the sky).

= mood
cheerful
sleepy
serious
busy
famous
skinny
tall
plump
whistling
nervous
hungry
very old
bearded
lonely

= how
2 softly
2 loudly
2 politely
2 at once
1 slowly
1 quickly
1 kindly
1 after a while
1 in one breath
1 in a small voice
1 in a deep voice
1 with a smile
1 with a blink
1 with both eyes shut
1 behind one hand
1 three times

= said
6 said
3 cried
2 whispered
2 called
1 sighed
1 sobbed
1 gasped
1 mumbled
1 repeated
1 thought

= return
2 <tell>
2 When {hero} came back to the {kind.home} {where}, {his} {family} had made {treat}. <tell>
1 It was already (late|dark|evening) when {hero} came home. "Where have you been, {hero}?" asked {his} {family}.
    <tell>
1 At home {his} {family} was waiting (at the door|with a lamp|with {treat}|in the bath tub|on the roof). <tell>

= evening
3 <tell>
2 In the evening, {hero} and {his} {family} ate {treat}. <tell>
1 That night {hero} (could not sleep at first|slept very well|looked at the stars|snored a little|counted
    sheep). <tell>
1 Later, in the {kind.home} {where}, {hero} drew a picture of it all. <tell>

= tell
8 {Hero} took off {his} {wear} and dreamt of a <dream:dreams>, a <sweet:dreams> and the {color} {toy}. <moral>
2 "That was a (good|long|strange|fine|lovely|busy) day," said {hero} <how>. <moral>
1 {Hero} (laid|put|hid) the {color} {toy} under {his} pillow. <moral>
1 "I am proud of you, {hero}," said {his} {family}. <moral>

= moral
{trait.after}<the end>

= the end
3 ¶The end.
2 ¶"Good night, {hero}," said {his} {family}.¶"Good night, {family.call}," said {hero}.
1 ¶And the {color} {toy} slept beside {him}.
1 ¶And that is the story of {hero}, the {trait} {kind}.
"""
