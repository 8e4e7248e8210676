"""The merge loop of training: which pair is the most frequent, where it stands, and what changes when it is joined.

Each distinct pre-token is laid out once, a slot per byte, with a SEPARATOR before and after. A token that covers
several slots writes its id into the first and the last of them; so from any token its two neighbours are found at once,
and joining two tokens is a matter of four writes, however long the pre-token is.

`places` lists where each pair of tokens stands. A pair (x, C) can only come into being when C does: its list and its
count are complete from then on. Later merges take occurrences away; a place where the pair no longer stands is passed
over. Counts only fall, therefore the queue may hold counts that are too high: what comes up with a count that is not
right any more goes back with the right one. And pairs rarer than a `cutoff` need no list until the queue has nothing
better left; then all pairs are counted afresh and the cutoff is lowered.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenizer.kernels.machine import NONE, ONE, kernel, prefetch

Word = np.uint64

SEPARATOR, INSIDE = -1, -2  # slots between pre-tokens; slots that are neither first nor last of their token
DONE, PAUSED, NEEDS_ROOM, NEEDS_LOWER_CUTOFF = 0, 1, 2, 3
AHEAD = 12  # places that are asked for before they are visited


class Words(NamedTuple):
    """The distinct pre-tokens of two bytes and more."""

    slots: NDArray[np.int32]  # token ids: a byte is its own value, merge number i makes token 256 + i
    word_at: NDArray[np.uint32]  # which pre-token each slot belongs to
    counts: NDArray[np.int64]  # how often each pre-token stands in the text


class Tokens(NamedTuple):
    """The byte strings of all tokens so far."""

    text: NDArray[np.uint8]
    offsets: NDArray[np.int64]  # token i is text[offsets[i] : offsets[i + 1]]


class Pairs(NamedTuple):
    """The pairs of tokens that are known, numbered as they come, and a hash table of their numbers."""

    firsts: NDArray[np.int32]
    seconds: NDArray[np.int32]
    counts: NDArray[np.int64]  # how often the pair stands in the text now
    begins: NDArray[np.int64]  # its list is places[begin : begin + length]
    lengths: NDArray[np.int64]
    table: NDArray[np.uint64]  # 2**n slots of two words: key (0 if empty) and number


class Queue(NamedTuple):
    """A binary heap of pairs, the best on top, by counts that may be out of date."""

    counts: NDArray[np.int64]
    pairs: NDArray[np.int64]


class Side(NamedTuple):
    """What stands on one side of the occurrences that a merge joins."""

    neighbours: NDArray[np.int32]  # neighbour of each occurrence, in order
    places: NDArray[np.uint32]  # and where the new pair stands
    tokens: NDArray[np.int32]  # the distinct neighbours
    counts: NDArray[np.int64]  # by token: how often it is a neighbour, counted in the text
    lengths: NDArray[np.int64]  # by token: the same, counted in places
    cursors: NDArray[np.int64]  # by token: where the next place of its new pair goes; -1 if it needs no list


class State(NamedTuple):
    """Everything the merge loop works on; `tokenizer.train` allocates it and makes it larger."""

    words: Words
    tokens: Tokens
    pairs: Pairs
    queue: Queue
    places: NDArray[np.uint32]
    left: Side
    right: Side
    merges: NDArray[np.int32]  # (num_merges, 2)
    numbers: NDArray[np.int64]  # see below


# What `State.numbers` holds.
NUM_MERGES, NUM_PAIRS, QUEUE_SIZE, PLACES_USED, CUTOFF, NEEDED_PLACES, NEEDED_BYTES = range(7)


@kernel
def table_slot(table: NDArray[np.uint64], first: int, second: int) -> Word:
    """Position in `table` of the pair, or of the empty slot where it belongs."""
    key = ((Word(first) + ONE) << Word(32)) | Word(second)
    mixed = key * Word(0x9E3779B97F4A7C15)
    mixed ^= mixed >> Word(32)
    wrap = Word(len(table) - 1)
    slot = (mixed << ONE) & wrap
    while table[slot] != Word(0) and table[slot] != key:
        slot = (slot + Word(2)) & wrap
    return slot


@kernel
def find_pair(pairs: Pairs, first: int, second: int) -> Any:
    """Number of the pair; -1 if it is not known."""
    slot = table_slot(pairs.table, first, second)
    return -1 if pairs.table[slot] == Word(0) else np.int64(pairs.table[slot + ONE])


@kernel
def enter_pair(table: NDArray[np.uint64], first: int, second: int, number: int) -> None:
    """Make `number` the number of a pair that is not in the table."""
    slot = table_slot(table, first, second)
    table[slot] = ((Word(first) + ONE) << Word(32)) | Word(second)
    table[slot + ONE] = Word(number)


@kernel
def enter_all_pairs(pairs: Pairs, num_pairs: int) -> None:
    """Enter the first `num_pairs` pairs into the hash table, which is empty."""
    for number in range(num_pairs):
        enter_pair(pairs.table, pairs.firsts[number], pairs.seconds[number], number)


@kernel
def new_pair(
    pairs: Pairs, numbers: NDArray[np.int64], first: int, second: int, count: int, begin: int, length: int
) -> int:
    """The number of a pair that was not known before."""
    number = numbers[NUM_PAIRS]
    numbers[NUM_PAIRS] += 1
    pairs.firsts[number], pairs.seconds[number] = first, second
    pairs.counts[number], pairs.begins[number], pairs.lengths[number] = count, begin, length
    enter_pair(pairs.table, first, second, number)
    return number


@kernel
def compare_tokens(tokens: Tokens, a: int, b: int) -> Any:
    """Negative, 0 or positive as the byte string of token `a` is less than, equal to or greater than that of `b`."""
    a_length = tokens.offsets[a + 1] - tokens.offsets[a]
    b_length = tokens.offsets[b + 1] - tokens.offsets[b]
    for i in range(min(a_length, b_length)):
        difference = np.int64(tokens.text[tokens.offsets[a] + i]) - np.int64(tokens.text[tokens.offsets[b] + i])
        if difference != 0:
            return difference
    return a_length - b_length


@kernel
def is_better(count_a: int, pair_a: int, count_b: int, pair_b: int, pairs: Pairs, tokens: Tokens) -> Any:
    """Whether pair `a` is merged before pair `b`: more frequent, or else greater as a pair of byte strings."""
    if count_a != count_b:
        return count_a > count_b
    order = np.int64(0)
    if pairs.firsts[pair_a] != pairs.firsts[pair_b]:
        order = compare_tokens(tokens, pairs.firsts[pair_a], pairs.firsts[pair_b])
    if order == 0 and pairs.seconds[pair_a] != pairs.seconds[pair_b]:
        order = compare_tokens(tokens, pairs.seconds[pair_a], pairs.seconds[pair_b])
    return order > 0


@kernel
def sift_up(queue: Queue, position: int, pairs: Pairs, tokens: Tokens) -> None:
    """Move the entry at `position` towards the top while it is better than what is above it."""
    count, pair = queue.counts[position], queue.pairs[position]
    while position > 0:
        above = (position - 1) >> 1
        if not is_better(count, pair, queue.counts[above], queue.pairs[above], pairs, tokens):
            break
        queue.counts[position], queue.pairs[position] = queue.counts[above], queue.pairs[above]
        position = above
    queue.counts[position], queue.pairs[position] = count, pair


@kernel
def sift_down(queue: Queue, position: int, size: int, pairs: Pairs, tokens: Tokens) -> None:
    """Move the entry at `position` away from the top while what is below it is better."""
    count, pair = queue.counts[position], queue.pairs[position]
    while 2 * position + 1 < size:
        below = 2 * position + 1
        if below + 1 < size and is_better(
            queue.counts[below + 1], queue.pairs[below + 1], queue.counts[below], queue.pairs[below], pairs, tokens
        ):
            below += 1
        if not is_better(queue.counts[below], queue.pairs[below], count, pair, pairs, tokens):
            break
        queue.counts[position], queue.pairs[position] = queue.counts[below], queue.pairs[below]
        position = below
    queue.counts[position], queue.pairs[position] = count, pair


@kernel
def push(state: State, pair: int) -> None:
    """Put a pair into the queue."""
    size = state.numbers[QUEUE_SIZE]
    state.queue.counts[size], state.queue.pairs[size] = state.pairs.counts[pair], pair
    state.numbers[QUEUE_SIZE] = size + 1
    sift_up(state.queue, size, state.pairs, state.tokens)


@kernel
def best_pair(state: State) -> int:
    """The pair to merge next, which stays on top of the queue; -1 if none has a count of at least the cutoff."""
    queue, pairs, numbers = state.queue, state.pairs, state.numbers
    while numbers[QUEUE_SIZE] > 0:
        pair = queue.pairs[0]
        if queue.counts[0] == pairs.counts[pair]:
            return pair
        queue.counts[0] = pairs.counts[pair]
        if pairs.counts[pair] < numbers[CUTOFF]:
            last = numbers[QUEUE_SIZE] - 1
            queue.counts[0], queue.pairs[0] = queue.counts[last], queue.pairs[last]
            numbers[QUEUE_SIZE] = last
        if numbers[QUEUE_SIZE] > 0:
            sift_down(queue, 0, numbers[QUEUE_SIZE], pairs, state.tokens)
    return -1


@kernel
def lay_out(text: NDArray[np.uint8], offsets: NDArray[np.int64], counts: NDArray[np.int64], words: Words) -> None:
    """Lay out the pre-tokens text[offsets[i] : offsets[i + 1]] that have two bytes and more, a slot per byte."""
    slot, word = NONE, NONE  # unsigned: of each signed index Numba asks whether it is negative
    words.slots[slot] = SEPARATOR
    for i in range(Word(len(counts))):
        begin, end = Word(offsets[i]), Word(offsets[i + ONE])
        if end - begin < Word(2):
            continue
        words.counts[word] = counts[i]
        for position in range(begin, end):
            slot += ONE
            words.slots[slot], words.word_at[slot] = text[position], word
        slot += ONE
        words.slots[slot] = SEPARATOR
        word += ONE


@kernel
def index_pairs(state: State) -> int:
    """Count all pairs, list the places of those that reach the cutoff, and put these into the queue.

    Returns:
        DONE, or NEEDS_ROOM for more pairs or places.
    """
    slots, word_at, counts = state.words
    pairs, numbers, offsets = state.pairs, state.numbers, state.tokens.offsets
    numbers[NUM_PAIRS] = numbers[QUEUE_SIZE] = numbers[PLACES_USED] = 0
    for slot in range(0, len(pairs.table), 2):
        pairs.table[slot] = 0
    for counting in (True, False):
        first_place = ONE
        while first_place < Word(len(slots)):
            first = slots[first_place]
            if first == SEPARATOR:
                first_place += ONE
                continue
            second_place = first_place + Word(offsets[Word(first) + ONE] - offsets[Word(first)])
            second = slots[second_place]
            if second != SEPARATOR:
                pair = find_pair(pairs, first, second)
                if pair < 0:
                    if numbers[NUM_PAIRS] == len(pairs.firsts):
                        return NEEDS_ROOM
                    pair = new_pair(pairs, numbers, first, second, 0, 0, 0)
                i = Word(pair)
                if counting:
                    pairs.counts[i] += counts[Word(word_at[first_place])]
                    pairs.lengths[i] += 1
                elif pairs.counts[i] >= numbers[CUTOFF]:
                    state.places[Word(pairs.begins[i] + pairs.lengths[i])] = first_place
                    pairs.lengths[i] += 1
            first_place = second_place
        if counting:
            for pair in range(numbers[NUM_PAIRS]):
                if pairs.counts[pair] >= numbers[CUTOFF]:
                    pairs.begins[pair] = numbers[PLACES_USED]
                    numbers[PLACES_USED] += pairs.lengths[pair]
                pairs.lengths[pair] = 0
            if numbers[PLACES_USED] > len(state.places):
                numbers[NEEDED_PLACES] = numbers[PLACES_USED]
                return NEEDS_ROOM
    for pair in range(numbers[NUM_PAIRS]):
        if pairs.counts[pair] >= numbers[CUTOFF]:
            push(state, pair)
    return DONE


@kernel
def note_neighbour(side: Side, num: int, num_tokens: int, token: int, place: int, count: int) -> int:
    """Add a neighbour to a side of which `num` are known; the new number of distinct ones."""
    side.neighbours[num], side.places[num] = token, place
    if side.lengths[token] == 0:
        side.tokens[num_tokens] = token
        num_tokens += 1
    side.counts[token] += count
    side.lengths[token] += 1
    return num_tokens


@kernel
def join_occurrences(state: State, pair: int, token: int) -> tuple[int, int, int, int]:
    """Join `pair` to `token` wherever it stands, from left to right, and note the neighbours on both sides.

    Returns:
        For the left and for the right: the number of neighbours, and of distinct ones.
    """
    slots, word_at, counts = state.words
    left, right, places = state.left, state.right, state.places
    first, second = state.pairs.firsts[pair], state.pairs.seconds[pair]
    offsets = state.tokens.offsets
    first_length, second_length = offsets[first + 1] - offsets[first], offsets[second + 1] - offsets[second]
    num_left = left_tokens = num_right = right_tokens = 0
    begin, end = state.pairs.begins[pair], state.pairs.begins[pair] + state.pairs.lengths[pair]
    for i in range(begin, end):
        if i + AHEAD < end:
            ahead = np.int64(places[i + AHEAD]) * 4
            prefetch(slots, ahead)
            prefetch(word_at, ahead)
        place = np.int64(places[i])
        second_place = place + first_length
        if slots[place] != first or slots[second_place] != second:
            continue
        after = second_place + second_length
        count = counts[word_at[place]]
        slots[second_place - 1] = slots[second_place] = INSIDE
        slots[place] = slots[after - 1] = token

        neighbour = slots[place - 1]
        if neighbour != SEPARATOR:
            neighbour_place = place - (offsets[neighbour + 1] - offsets[neighbour])
            left_tokens = note_neighbour(left, num_left, left_tokens, neighbour, neighbour_place, count)
            num_left += 1
        neighbour = slots[after]
        if neighbour != SEPARATOR:
            right_tokens = note_neighbour(right, num_right, right_tokens, neighbour, place, count)
            num_right += 1
    return num_left, left_tokens, num_right, right_tokens


@kernel
def enter_new_pair(state: State, side: Side, neighbour: int, first: int, second: int, count: int) -> None:
    """Make the pair that `neighbour` forms with the new token known, unless it is too rare to matter."""
    side.cursors[neighbour] = -1
    if count >= state.numbers[CUTOFF]:
        begin, length = state.numbers[PLACES_USED], side.lengths[neighbour]
        side.cursors[neighbour] = begin
        state.numbers[PLACES_USED] += length
        push(state, new_pair(state.pairs, state.numbers, first, second, count, begin, length))


@kernel
def lose_occurrences(pairs: Pairs, first: int, second: int, count: int) -> None:
    """Take `count` occurrences from a pair."""
    pair = find_pair(pairs, first, second)
    if pair >= 0:
        pairs.counts[pair] -= count


@kernel
def list_places(side: Side, num: int, num_tokens: int, places: NDArray[np.uint32]) -> None:
    """Write the places of the new pairs into their lists, and forget the neighbours."""
    for i in range(num):
        cursor = side.cursors[side.neighbours[i]]
        if cursor >= 0:
            places[cursor] = side.places[i]
            side.cursors[side.neighbours[i]] = cursor + 1
    for i in range(num_tokens):
        side.counts[side.tokens[i]] = side.lengths[side.tokens[i]] = 0


@kernel
def merge(state: State, pair: int) -> None:
    """Carry out one merge: x A B z becomes x C z.

    The pairs (x, A) and (B, z) lose occurrences, (x, C) and (C, z) come into being. Where two occurrences touch,
    A B A B, the first sees the A of the second on its right, and the second sees a C on its left: these (C, A) are
    not there in the end, and the (B, A) between them is lost once.
    """
    pairs, left, right, numbers = state.pairs, state.left, state.right, state.numbers
    first, second = pairs.firsts[pair], pairs.seconds[pair]
    token = 256 + numbers[NUM_MERGES]
    num_left, left_tokens, num_right, right_tokens = join_occurrences(state, pair, token)
    touching = left.counts[token]
    for i in range(left_tokens):
        neighbour = left.tokens[i]
        if neighbour != token:
            lose_occurrences(pairs, neighbour, first, left.counts[neighbour])
        enter_new_pair(state, left, neighbour, neighbour, token, left.counts[neighbour])
    for i in range(right_tokens):
        neighbour = right.tokens[i]
        lose_occurrences(pairs, second, neighbour, right.counts[neighbour])
        count = right.counts[neighbour] - (touching if neighbour == first else 0)
        enter_new_pair(state, right, neighbour, token, neighbour, count)
    list_places(left, num_left, left_tokens, state.places)
    list_places(right, num_right, right_tokens, state.places)
    pairs.counts[pair] = 0


@kernel
def add_token(tokens: Tokens, token: int, first: int, second: int) -> None:
    """Write the byte string of `token`, which is that of `first` and then that of `second`."""
    position = tokens.offsets[token]
    for part in (first, second):
        for i in range(tokens.offsets[part], tokens.offsets[part + 1]):
            tokens.text[position] = tokens.text[i]
            position += 1
    tokens.offsets[token + 1] = position


@kernel
def has_room(state: State, num_places: int, token_bytes: int) -> bool:
    """Whether all arrays suffice for a merge at `num_places` places that makes a token of `token_bytes` bytes."""
    numbers, pairs = state.numbers, state.pairs
    num_pairs = numbers[NUM_PAIRS] + 2 * min(num_places, 256 + len(state.merges))
    return (
        num_places <= len(state.left.places)
        and numbers[PLACES_USED] + 2 * num_places <= len(state.places)
        and num_pairs <= len(pairs.firsts)
        and numbers[QUEUE_SIZE] + num_pairs - numbers[NUM_PAIRS] <= len(state.queue.pairs)
        and state.tokens.offsets[256 + numbers[NUM_MERGES]] + token_bytes <= len(state.tokens.text)
    )


@kernel
def learn_merges(state: State, max_places: int) -> int:
    """Merge the best pair again and again.

    Returns:
        DONE when all merges have been learned or no pair is left; PAUSED after some `max_places` places, so that the
        caller can show progress or be interrupted; NEEDS_ROOM and NEEDS_LOWER_CUTOFF when the caller has to act.
    """
    numbers, pairs, tokens = state.numbers, state.pairs, state.tokens
    while numbers[NUM_MERGES] < len(state.merges):
        if max_places <= 0:
            return PAUSED
        pair = best_pair(state)
        if pair < 0:
            return NEEDS_LOWER_CUTOFF if numbers[CUTOFF] > 1 else DONE
        first, second = pairs.firsts[pair], pairs.seconds[pair]
        num_places = pairs.lengths[pair]
        token_bytes = (
            tokens.offsets[first + 1] - tokens.offsets[first] + tokens.offsets[second + 1] - tokens.offsets[second]
        )
        if not has_room(state, num_places, token_bytes):
            numbers[NEEDED_PLACES], numbers[NEEDED_BYTES] = num_places, token_bytes
            return NEEDS_ROOM
        add_token(tokens, 256 + numbers[NUM_MERGES], first, second)
        merge(state, pair)
        state.merges[numbers[NUM_MERGES], 0] = first
        state.merges[numbers[NUM_MERGES], 1] = second
        numbers[NUM_MERGES] += 1
        max_places -= num_places + 100
    return DONE
