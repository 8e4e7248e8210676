"""What the benchmark measures: the same task done by this project and by each tokenizer library that is installed.

Every function here runs in a process of its own, started by `tokenizer.bench`. It imports its library, makes ready what
the task takes for granted (a loaded vocabulary, compiled kernels), starts the clock, and returns seconds per stage.
Only this file knows the libraries' own ways.
"""

import hashlib
import importlib
import json
import operator
import re
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tokenizer.files import END_OF_TEXT, atomic_write, from_symbols
from tokenizer.pretokenize import PATTERN

WARM_UP_BYTES = 8_000_000


@dataclass
class Job:
    """One measured run."""

    task: str
    rival: str
    file: Path
    threads: int
    vocab_size: int
    tokenizer: Path  # a directory with vocab.json, merges.txt and tokenizer.json
    scratch: Path  # an empty folder for what the run writes
    limit_seconds: float

    def documents(self) -> list[str]:
        """The file's documents, decoded: what libraries that take strings get."""
        return self.file.read_bytes().decode("utf-8", "replace").split(END_OF_TEXT)

    def sample(self) -> Path:
        """A file with the last megabytes of the text, to warm up with."""
        path = self.scratch / "sample.txt"
        size = self.file.stat().st_size
        with open(self.file, "rb") as source:
            source.seek(max(size - WARM_UP_BYTES, 0))
            data = source.read()
        path.write_bytes(data[data.find(END_OF_TEXT.encode()) :] if END_OF_TEXT.encode() in data else data)
        return path

    def tokenizer_json(self) -> Path:
        """The vocabulary to encode with, in the format of HF tokenizers."""
        return self.tokenizer / "tokenizer.json"


@dataclass
class Outcome:
    """What a run measured and made."""

    seconds: dict[str, float]  # stage → seconds
    num_bytes: dict[str, int] = field(default_factory=dict)  # stage → bytes of text it worked on, for MB/s
    merges: list[tuple[bytes, bytes]] = field(
        default_factory=list
    )  # training: the pairs in order, where the library tells them
    tokens: list[bytes] = field(default_factory=list)  # training: the tokens in order of their ids
    ids: Path | None = None  # encoding: the .npy file written
    note: str = ""


Run = Callable[[Job], Outcome]


def seconds_of(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds `action` takes, and its result."""
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def processor_seconds(action: Callable[[], Any]) -> float:
    """Seconds of the processor that `action` takes: other work on the machine does not count."""
    start = time.process_time()
    action()
    return time.process_time() - start


def single(seconds: float, num_bytes: int, **made: Any) -> Outcome:
    """The outcome of a task of one stage."""
    return Outcome({"": seconds}, {"": num_bytes}, **made)


# --------------------------------------------------------------------------------------------------- pre-token counts


def _count_ours(job: Job) -> Outcome:
    from tokenizer.pretokenize import count_pretokens

    first, _ = seconds_of(lambda: count_pretokens(job.sample(), [END_OF_TEXT], num_threads=job.threads))
    seconds, counts = seconds_of(lambda: count_pretokens(job.file, [END_OF_TEXT], num_threads=job.threads))
    size = job.file.stat().st_size
    return Outcome(
        {"": seconds, "first call (8 MB)": first}, {"": size}, note=f"{len(counts.counts):,} distinct pre-tokens"
    )


def _count_physical_limit(job: Job) -> Outcome:
    """Read the file through a buffer and touch each byte once, on all threads: nothing that looks at text is faster."""
    size, step = job.file.stat().st_size, 1 << 22

    def touch(thread: int) -> int:
        buffer, total = np.empty(step, np.uint8), 0
        with open(job.file, "rb", buffering=0) as file:
            for begin in range(thread * step, size, job.threads * step):
                file.seek(begin)
                count = file.readinto(buffer.data)
                total += int(np.bitwise_xor.reduce(buffer[: count // 8 * 8].view(np.uint64)))
        return total

    def read() -> list[int]:
        with ThreadPoolExecutor(job.threads) as pool:
            return list(pool.map(touch, range(job.threads)))

    seconds, _ = seconds_of(read)
    return single(seconds, size)


def _count_gigatoken(job: Job) -> Outcome:
    from gigatoken.gigatoken_rs import pretokenized_counts

    seconds, counts = seconds_of(lambda: pretokenized_counts(job.file.read_bytes(), END_OF_TEXT.encode()))
    return single(seconds, job.file.stat().st_size, note=f"{len(counts):,} distinct pre-tokens")


def _count_regex(job: Job) -> Outcome:
    """The loop that the course's handout suggests, on one thread and a part of the file."""
    import collections

    import regex

    text = job.file.read_bytes()[:WARM_UP_BYTES].decode("utf-8", "ignore")
    pattern = regex.compile(PATTERN)

    def count() -> collections.Counter[str]:
        return collections.Counter(m.group() for part in text.split(END_OF_TEXT) for m in pattern.finditer(part))

    seconds, _ = seconds_of(count)
    return single(seconds, len(text.encode()), note="one thread, first 8 MB")


# ----------------------------------------------------------------------------------------------------------- training


def _train_ours(job: Job) -> Outcome:
    from tokenizer.train import train_bpe

    first, _ = seconds_of(lambda: train_bpe(job.sample(), 1000, [END_OF_TEXT], num_threads=job.threads))
    seconds, (vocab, merges) = seconds_of(
        lambda: train_bpe(job.file, job.vocab_size, [END_OF_TEXT], num_threads=job.threads)
    )
    tokens = [vocab[i] for i in range(len(vocab))]
    size = job.file.stat().st_size
    return Outcome({"": seconds, "first call (8 MB)": first}, {"": size}, merges=merges, tokens=tokens)


def _train_ours_fresh(job: Job) -> Outcome:
    """The first call of a process: getting the compiled kernels, from their cache or anew, is part of the time."""
    from tokenizer.train import train_bpe

    seconds, (vocab, merges) = seconds_of(
        lambda: train_bpe(job.file, job.vocab_size, [END_OF_TEXT], num_threads=job.threads)
    )
    return single(seconds, job.file.stat().st_size, merges=merges, tokens=[vocab[i] for i in range(len(vocab))])


STAGES = {
    "count: read and count": ("tokenizer.pretokenize", "work_on_chunks"),
    "count: add up the threads' tables": ("tokenizer.pretokenize", "tables_to_arrays"),
    "merge: lay out the words": ("tokenizer.train", "new_state"),
    "merge: index the pairs": ("tokenizer.train", "indexed"),
    "merge: larger arrays": ("tokenizer.train", "with_more_room"),
    "merge: merge": ("tokenizer.kernels.merge", "learn_merges"),
}
"""Stage of training → the function that does it, without what it calls for other stages."""


def _profile_ours(job: Job) -> Outcome:
    """Train with a clock around each stage."""
    from tokenizer.train import train_bpe

    train_bpe(job.sample(), 1000, [END_OF_TEXT], num_threads=job.threads)
    spent = dict.fromkeys(STAGES, 0.0)
    inside = [0.0]  # seconds of the stages called by each stage that runs

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            inside.append(0.0)
            seconds, result = seconds_of(lambda: function(*arguments, **options))
            spent[stage] += seconds - inside.pop()
            inside[-1] += seconds
            return result

        return call

    for stage, (name, function) in STAGES.items():
        module = importlib.import_module(name)
        setattr(module, function, timed(stage, getattr(module, function)))
    total, _ = seconds_of(lambda: train_bpe(job.file, job.vocab_size, [END_OF_TEXT], num_threads=job.threads))
    return Outcome({**spent, "the rest": total - inside[0], "in all": total}, {"in all": job.file.stat().st_size})


def _train_huggingface(job: Job) -> Outcome:
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=job.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    seconds, _ = seconds_of(lambda: model.train_from_iterator(job.documents(), trainer))
    merges = [(from_symbols(a), from_symbols(b)) for a, b in json.loads(model.to_str())["model"]["merges"]]
    return single(seconds, job.file.stat().st_size, merges=merges)


def _train_gigatoken(job: Job) -> Outcome:
    import gigatoken

    source = gigatoken.TextFileSource([job.file], END_OF_TEXT)
    seconds, (_, merges) = seconds_of(
        lambda: gigatoken.train_bpe(source, job.vocab_size, [END_OF_TEXT], tie_breaking="assembled_bytes")
    )
    return single(seconds, job.file.stat().st_size, merges=merges)


def _train_rustbpe(job: Job) -> Outcome:
    import rustbpe

    model = rustbpe.Tokenizer()
    seconds, _ = seconds_of(
        lambda: model.train_from_iterator(iter(job.documents()), vocab_size=job.vocab_size - 1, pattern=PATTERN)
    )
    ranks = model.get_mergeable_ranks()
    return single(seconds, job.file.stat().st_size, tokens=[bytes(token) for token, _ in ranks])


def _train_bpeasy(job: Job) -> Outcome:
    import bpeasy

    seconds, ranks = seconds_of(lambda: bpeasy.train_bpe(iter(job.documents()), PATTERN, 1 << 20, job.vocab_size - 1))
    return single(seconds, job.file.stat().st_size, tokens=sorted(ranks, key=ranks.get))


def _train_sentencepiece(job: Job) -> Outcome:
    import sentencepiece

    def train() -> None:
        sentencepiece.SentencePieceTrainer.train(
            input=str(job.file),
            model_prefix=str(job.scratch / "model"),
            model_type="bpe",
            vocab_size=job.vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            max_sentence_length=1 << 24,
            num_threads=job.threads,
            minloglevel=2,
        )

    seconds, _ = seconds_of(train)
    return single(seconds, job.file.stat().st_size, note="another algorithm: words of characters, line by line")


def _train_quicktok(job: Job) -> Outcome:
    import quicktok

    model = quicktok.BasicTokenizer(job.threads)
    seconds, _ = seconds_of(lambda: model.train(job.file.read_bytes().decode("utf-8", "replace"), job.vocab_size - 1))
    model.save_model(str(job.scratch / "model"))
    pairs = [line.split() for line in (job.scratch / "model").read_text().splitlines()[3:]]
    tokens = [bytes([i]) for i in range(256)]
    for left, right in pairs:
        tokens.append(tokens[int(left)] + tokens[int(right)])
    return single(seconds, job.file.stat().st_size, tokens=tokens)


# ------------------------------------------------------------------------------------------------------- files to ids


def write_ids(job: Job, ids: np.ndarray) -> Path:
    """Write ids as every entry does it: uint16, flushed to the device, under the final name only when whole."""
    path = job.scratch / "ids.npy"
    with atomic_write(path) as file:
        np.save(file, ids.astype(np.uint16))
    return path


def encode_twice(job: Job, encode: Callable[[], Path | None], **made: Any) -> Outcome:
    """Encode the same file two times: caches of pre-tokens are empty in the first run and full in the second."""
    cold, path = seconds_of(encode)
    warm, path = seconds_of(encode)
    size = job.file.stat().st_size
    return Outcome({"cold": cold, "warm": warm}, {"cold": size, "warm": size}, ids=path, **made)


def _encode_ours(job: Job) -> Outcome:
    from tokenizer import Tokenizer
    from tokenizer.encode import encode_files

    tokenizer = Tokenizer.from_directory(job.tokenizer)
    first, _ = seconds_of(  # this loads the kernels; the cache of pre-tokens does not outlive a call
        lambda: encode_files(tokenizer, [job.sample()], job.scratch / "sample.npy", num_threads=job.threads)
    )

    def encode() -> Path:
        path = job.scratch / "ids.npy"
        path.unlink(missing_ok=True)
        encode_files(tokenizer, [job.file], path, num_threads=job.threads)
        return path

    outcome = encode_twice(job, encode)
    outcome.seconds["first call (8 MB)"] = first
    return outcome


def _encode_gigatoken(job: Job) -> Outcome:
    import gigatoken

    awkward = importlib.import_module("awkward")  # comes with gigatoken
    tokenizer = gigatoken.Tokenizer(job.tokenizer_json())

    def encode() -> Path:
        rows = tokenizer.encode_files(gigatoken.TextFileSource([job.file], END_OF_TEXT))
        return write_ids(job, awkward.flatten(rows).to_numpy())

    return encode_twice(job, encode, note="without the ids of separators")


def _encode_fastokens(job: Job) -> Outcome:
    import fastokens

    tokenizer = fastokens.Tokenizer.from_file(str(job.tokenizer_json()))

    def encode() -> Path:
        ids, _ = tokenizer.encode_batch_flat(job.documents())
        return write_ids(job, np.frombuffer(ids, np.uint32))

    return encode_twice(job, encode, note="without the ids of separators")


def in_batches(job: Job, encode: Callable[[list[str]], list[list[int]]]) -> np.ndarray:
    """The ids of all documents, some thousands at a time: as lists, all of them would take gigabytes."""
    documents = job.documents()
    rows = []
    for first in range(0, len(documents), 2000):
        rows += [np.array(row, np.uint16) for row in encode(documents[first : first + 2000])]
    return np.concatenate(rows)


def _encode_tiktoken(job: Job) -> Outcome:
    encoding = load_tiktoken(job)

    def encode() -> Path:
        return write_ids(
            job, in_batches(job, lambda texts: encoding.encode_ordinary_batch(texts, num_threads=job.threads))
        )

    seconds, path = seconds_of(encode)
    return Outcome({"cold": seconds}, {"cold": job.file.stat().st_size}, ids=path, note="without the ids of separators")


def _encode_huggingface(job: Job) -> Outcome:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(job.tokenizer_json()))

    def encode_some(texts: list[str]) -> list[list[int]]:
        return [row.ids for row in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    seconds, path = seconds_of(lambda: write_ids(job, in_batches(job, encode_some)))
    return Outcome({"cold": seconds}, {"cold": job.file.stat().st_size}, ids=path, note="without the ids of separators")


def load_tiktoken(job: Job) -> Any:
    """The vocabulary to encode with as a tiktoken encoding."""
    import tiktoken

    from tokenizer import Tokenizer

    tokenizer = Tokenizer.from_directory(job.tokenizer)
    specials = {token: tokenizer.encode(token)[0] for token in tokenizer.special_tokens}
    ranks = {token: i for i, token in tokenizer.vocab.items() if i not in specials.values()}
    return tiktoken.Encoding("bench", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)


# ----------------------------------------------------------------------------------------- one document, and decoding

DOCUMENT_BYTES = {"100 B": 100, "10 kB": 10_000, "100 kB": 100_000}
PIECES = 400  # documents of one size


def document_pieces(job: Job, size: int) -> list[str]:
    """Documents of about `size` bytes from all over the file."""
    count = max(min(PIECES, 20_000_000 // size), 1)
    total = job.file.stat().st_size
    with open(job.file, "rb") as file:
        pieces = []
        for i in range(count):
            file.seek(i * max(total - size, 0) // count)
            pieces.append(file.read(size).decode("utf-8", "ignore").replace(END_OF_TEXT, ""))
    return pieces


def time_documents(job: Job, encode: Callable[[str], Any]) -> Outcome:
    """Mean processor seconds per document of each size, on one thread.

    Each group of documents is encoded seven times in a row: the first pass and the best one.
    """
    seconds, num_bytes = {}, {}
    for name, size in DOCUMENT_BYTES.items():
        pieces = document_pieces(job, size)
        group = max(10_000 // size, 1)
        passes = []
        for first in range(0, len(pieces), group):
            some = pieces[first : first + group]
            passes.append([processor_seconds(lambda some=some: [encode(piece) for piece in some]) for _ in range(7)])  # type: ignore[misc]
        for stage, choose in ((name, min), (f"{name}, first pass", operator.itemgetter(0))):
            seconds[stage] = sum(map(choose, passes)) / len(pieces)
            num_bytes[stage] = sum(len(piece.encode()) for piece in pieces) // len(pieces)
    return Outcome(seconds, num_bytes)


def _document_ours(job: Job) -> Outcome:
    from tokenizer import Tokenizer

    tokenizer = Tokenizer.from_directory(job.tokenizer)
    tokenizer.compile()
    return time_documents(job, tokenizer.encode)


def _document_tiktoken(job: Job) -> Outcome:
    return time_documents(job, load_tiktoken(job).encode_ordinary)


def _document_huggingface(job: Job) -> Outcome:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(job.tokenizer_json()))
    return time_documents(job, lambda text: tokenizer.encode(text, add_special_tokens=False).ids)


def _document_gigatoken(job: Job) -> Outcome:
    import gigatoken

    outcome = time_documents(job, gigatoken.Tokenizer(job.tokenizer_json()).encode)
    outcome.note = "returns an array, not a list"
    return outcome


def _document_fastokens(job: Job) -> Outcome:
    import fastokens

    tokenizer = fastokens.Tokenizer.from_file(str(job.tokenizer_json()))
    return time_documents(job, lambda text: tokenizer.encode(text).ids)


def time_decoding(job: Job, decode: Callable[[list[int]], Any]) -> Outcome:
    """Decode the ids of one megabyte of text, the best of twenty; every entry gets the same list of ints."""
    from tokenizer import Tokenizer

    tokenizer = Tokenizer.from_directory(job.tokenizer)
    text = job.file.read_bytes()[:1_000_000].decode("utf-8", "ignore").replace(END_OF_TEXT, "")
    ids = list(tokenizer.encode(text))
    passes = [seconds_of(lambda: decode(ids)) for _ in range(20)]
    result = passes[0][1]
    if (result.encode() if isinstance(result, str) else result) != text.encode():
        raise RuntimeError("decode(encode(text)) is not the text")
    return single(min(seconds for seconds, _ in passes), len(text.encode()), note=f"{len(ids):,} ids")


def _decode_ours(job: Job) -> Outcome:
    from tokenizer import Tokenizer

    tokenizer = Tokenizer.from_directory(job.tokenizer)
    tokenizer.compile()
    return time_decoding(job, tokenizer.decode)


def _decode_tiktoken(job: Job) -> Outcome:
    return time_decoding(job, load_tiktoken(job).decode)


def _decode_huggingface(job: Job) -> Outcome:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(job.tokenizer_json()))
    return time_decoding(job, lambda ids: tokenizer.decode(ids, skip_special_tokens=False))


def _decode_gigatoken(job: Job) -> Outcome:
    import gigatoken

    return time_decoding(job, gigatoken.Tokenizer(job.tokenizer_json()).decode)


def _decode_fastokens(job: Job) -> Outcome:
    import fastokens

    return time_decoding(job, fastokens.Tokenizer.from_file(str(job.tokenizer_json())).decode)


# ------------------------------------------------------------------------------------------------------ equal letters

RUN_LENGTHS = (10_000, 100_000, 1_000_000, 10_000_000)


def long_runs(job: Job, encode: Callable[[str], Any], longest: int) -> Outcome:
    """Seconds to encode n equal characters, for growing n until `longest`.

    The best of three, each one character longer than the one before, so that no cache has seen it.
    """
    seconds, num_bytes = {}, {}
    encode("warm up " * 1000)
    for name, letter in (("letter", "a"), ("blank", " ")):
        for length in RUN_LENGTHS:
            if length <= longest:
                stage = f"{length:,} x {name}"
                texts = [letter * (length + i) for i in range(3)]
                seconds[stage] = min(seconds_of(lambda text=text: encode(text))[0] for text in texts)  # type: ignore[misc]
                num_bytes[stage] = length
    return Outcome(seconds, num_bytes)


def _long_run_ours(job: Job) -> Outcome:
    from tokenizer import Tokenizer

    tokenizer = Tokenizer.from_directory(job.tokenizer)
    tokenizer.compile()
    return long_runs(job, tokenizer.encode, RUN_LENGTHS[-1])


def _long_run_tiktoken(job: Job) -> Outcome:
    outcome = long_runs(job, load_tiktoken(job).encode_ordinary, 100_000)
    outcome.note = "panics at a million blanks"
    return outcome


def _long_run_huggingface(job: Job) -> Outcome:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(job.tokenizer_json()))
    return long_runs(job, tokenizer.encode, 1_000_000)


def _long_run_gigatoken(job: Job) -> Outcome:
    import gigatoken

    return long_runs(job, gigatoken.Tokenizer(job.tokenizer_json()).encode, 1_000_000)


# ------------------------------------------------------------------------------------------------------- the registry


TASKS: dict[str, dict[str, Run]] = {
    "count": {
        "ours": _count_ours,
        "physical limit": _count_physical_limit,
        "gigatoken": _count_gigatoken,
        "regex": _count_regex,
    },
    "train": {
        "ours": _train_ours,
        "gigatoken": _train_gigatoken,
        "rustbpe": _train_rustbpe,
        "bpeasy": _train_bpeasy,
        "tokenizers": _train_huggingface,
        "sentencepiece": _train_sentencepiece,
        "quicktok": _train_quicktok,
    },
    "first-use": {"ours, kernels cached": _train_ours_fresh, "ours, kernels compiled": _train_ours_fresh},
    "profile": {"ours": _profile_ours},
    "encode": {
        "ours": _encode_ours,
        "gigatoken": _encode_gigatoken,
        "fastokens": _encode_fastokens,
        "tiktoken": _encode_tiktoken,
        "tokenizers": _encode_huggingface,
    },
    "document": {
        "ours": _document_ours,
        "gigatoken": _document_gigatoken,
        "fastokens": _document_fastokens,
        "tiktoken": _document_tiktoken,
        "tokenizers": _document_huggingface,
    },
    "decode": {
        "ours": _decode_ours,
        "gigatoken": _decode_gigatoken,
        "fastokens": _decode_fastokens,
        "tiktoken": _decode_tiktoken,
        "tokenizers": _decode_huggingface,
    },
    "long-run": {
        "ours": _long_run_ours,
        "gigatoken": _long_run_gigatoken,
        "tiktoken": _long_run_tiktoken,
        "tokenizers": _long_run_huggingface,
    },
    "owt-scale": {"ours": _train_ours},
    "tinystories-scale": {"ours": _train_ours},
}
"""Task → entry → what runs it. An entry is "ours...", a yardstick, or named like the package it needs."""


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def digest(ids: Path, tokenizer_json: Path) -> str:
    """Hash of the ids in a file, those of special tokens left out (some libraries drop them at separators)."""
    specials = [token["id"] for token in json.loads(tokenizer_json.read_text())["added_tokens"]]
    array = np.load(ids, mmap_mode="r")
    return hashlib.sha256(array[~np.isin(array, specials)].tobytes()).hexdigest()


def main() -> None:
    """Run the job that the file named in the first argument describes; write what it measured to the second."""
    description = json.loads(Path(sys.argv[1]).read_text())
    paths = {name: Path(description[name]) for name in ("file", "tokenizer", "scratch")}
    job = Job(**{**description, **paths})
    if job.rival.startswith("ours"):
        # gigatoken brings it, and Numba would import it with the first kernel: 0.1 s and 16 MB.
        sys.modules["awkward"] = None  # type: ignore[assignment]
    outcome = TASKS[job.task][job.rival](job)
    result = {
        "peak_bytes": peak_memory(),
        "seconds": outcome.seconds,
        "num_bytes": outcome.num_bytes,
        "note": outcome.note,
        "merges": [[left.hex(), right.hex()] for left, right in outcome.merges],
        "tokens": [token.hex() for token in outcome.tokens],
        "digest": digest(outcome.ids, job.tokenizer_json()) if outcome.ids else None,
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
