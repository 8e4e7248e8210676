"""A corpus name or a text becomes `data/<name>/`: texts, tokenizer, token files, meta.json.

Each stage notes in `stages.json` what it was made from. A stage whose inputs are as noted and whose files are there is
skipped: calling this again costs nothing, an interrupted preparation goes on, a change redoes what depends on it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lm import VOCAB_SIZES, grammar
from lm.download import decompress, download
from lm.texts import (
    advice,
    check_text,
    count_bytes,
    dataset_name,
    describe,
    fingerprint,
    gather,
    hold_out,
    is_plain,
    stem,
)
from tokenizer.bpe import Tokenizer
from tokenizer.encode import encode_files
from tokenizer.files import END_OF_TEXT, write_json
from tokenizer.pretokenize import check_special_tokens
from tokenizer.train import train_bpe

SPLITS = ("train", "valid")
TOKENIZER_FILES = [f"tokenizer/{name}" for name in ("vocab.json", "merges.txt", "tokenizer.json", "meta.json")]

BUILTIN_BYTES = {"train": 4_000_000, "valid": 200_000}
BUILTIN_SEEDS = {"train": 1, "valid": 2}


@dataclass(frozen=True)
class Source:
    """A file to download: its home, its size and hash, and those of the text in it where that is compressed."""

    url: str
    num_bytes: int
    sha256: str
    text_bytes: int | None = None
    text_sha256: str | None = None


HUB = "https://huggingface.co/datasets"
SOURCES = {
    "tinystories": {
        "train": Source(
            f"{HUB}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt",
            2_227_753_162,
            "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
        ),
        "valid": Source(
            f"{HUB}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-valid.txt",
            22_502_601,
            "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d",
        ),
    },
    "owt": {
        "train": Source(
            f"{HUB}/stanford-cs336/owt-sample/resolve/main/owt_train.txt.gz",
            4_591_240_837,
            "b19ae88cfbc4016b304c348522455fe38ebac48fffed955adcc7191a89e38ccf",
            11_920_511_059,
            "bbeb7f291a981ecfd5cf44b84d0f654b9e96c53dff99f2556b7d2cccaf8c1918",
        ),
        "valid": Source(
            f"{HUB}/stanford-cs336/owt-sample/resolve/main/owt_valid.txt.gz",
            111_785_382,
            "bc73db5da2f19c360836b9c8a88094e13346ec83798c2f40060be39135768c80",
            289_998_753,
            "2406f278e71829d273b315e9b403285baea7022b26a96d2728dd8b776ea40660",
        ),
    },
}
CORPORA = ("builtin", *SOURCES)
OWN_VOCAB_SIZES = ((1_000_000, 1024), (20_000_000, 4096), (500_000_000, 10_000))  # up to so many bytes of text


def prepare(
    corpus: str | None = None,
    train_text: str | os.PathLike[str] | None = None,
    valid_text: str | os.PathLike[str] | None = None,
    *,
    data_dir: str | os.PathLike[str] = "data",
    vocab_size: int | None = None,
    special_tokens: Sequence[str] = (),
    tokenizer: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Path:
    """Make what is missing of a dataset; its directory, `data_dir`/<corpus or name of the text>.

    With a tokenizer that there is, that of the token files is `data_dir`/<name>-for-<the tokenizer's hash>.

    What is done is said on stderr, a line a stage; nothing is said where nothing is left to do. Processes that prepare
    the same dataset wait for each other.

    Args:
        corpus: "builtin", "tinystories" or "owt", or None for a text of your own.
        train_text: UTF-8 text: a text file, in which `<|endoftext|>` ends a document; JSON Lines (.jsonl, .ndjson), a
            document each, an object with a string "text" or a string; a folder, of which every such file is read
            (.txt, .md and .text, a document each, and JSON Lines), in the order of their names. All may be
            compressed (.gz, .xz).
        valid_text: its validation text. Without one the last twentieth of `train_text` (at most 10 MB) is held out,
            whole documents, of a folder those whose names come last; where no `<|endoftext|>` stands near enough to
            its end (a document may make it four times as much, or 4 kB), whole paragraphs (blank lines between
            them), and where none of these does, whole lines.
        data_dir: where datasets lie.
        vocab_size: of the tokenizer; by default `default_vocab_size`.
        special_tokens: strings that become one token each, beside `<|endoftext|>`.
        tokenizer: encode with this one, a folder or a run's, instead of training one.
        progress: draw progress bars also where stderr is no terminal.

    Raises:
        ValueError: an unknown corpus, a text that is empty, cannot be read (with file and line or byte) or cut in two,
            a download that is not what it should be, a directory that holds the dataset of another text of that name,
            or the text itself, a tokenizer that is damaged or of another size.
        FileNotFoundError: no text of that name, no tokenizer there.
        OSError: no room on the disk, no network.
    """
    if (corpus is None) == (train_text is None):
        raise ValueError(f"corpus={corpus}, train_text={train_text}: give either a corpus or a text")
    if corpus is not None and corpus not in CORPORA:
        raise ValueError(f"corpus={corpus!r} must be one of {', '.join(CORPORA)}; a text goes into train_text")
    given = None if tokenizer is None else _given_tokenizer(tokenizer, vocab_size, special_tokens)
    specials = [END_OF_TEXT, *(token for token in special_tokens if token != END_OF_TEXT)]
    check_special_tokens(specials)
    if short := [token for token in specials if len(token.encode()) == 1]:
        raise ValueError(f"special_tokens={short}: a single byte is a token anyway; leave it out")
    if vocab_size is None:
        vocab_size = default_vocab_size(corpus, train_text)
    if vocab_size < 256 + len(specials) and given is None:
        raise ValueError(f"vocab_size={vocab_size} must be at least {256 + len(specials)}: bytes, special tokens")
    own = [check_text(name, path) for name, path in (("train_text", train_text), ("valid_text", valid_text)) if path]
    directory = Path(data_dir) / (corpus or dataset_name(own[0]))
    _refuse_overlap(directory, *own)
    with _alone(directory), advice():
        stages = Stages(directory)
        if corpus is None:
            texts = _own_texts(stages, progress, *own)
        elif corpus == "builtin":
            texts = _builtin_texts(stages)
        else:
            texts = _downloaded_texts(stages, corpus, progress)
        entropies = {split: _entropy(stages, split) for split in SPLITS}
        if given is not None:
            return _encode_for(given, texts, entropies, directory, progress)
        _train_tokenizer(stages, texts["train"], vocab_size, specials, progress)
        for split in SPLITS:
            _encode(stages, split, texts[split], entropies[split], progress)
    return directory


def run(
    corpus: str,
    valid_text: str | None = None,  # no Path, of which the parser would say itself that it is not UTF-8
    data_dir: Path = Path("data"),
    vocab_size: int | None = None,
    special_tokens: list[str] | None = None,
    tokenizer: str | None = None,
    progress: bool = False,
) -> None:
    """Get a corpus, train its tokenizer and encode it, as far as that is not done yet.

    Args:
        corpus: builtin, tinystories, owt, or the path of your own text, a .txt or .jsonl file or a folder of such.
        valid_text: the validation text beside your own text; default, a tail of whole documents is held out.
        data_dir: where datasets lie.
        vocab_size: of the tokenizer; default, 2,048 (builtin), 10,000 (tinystories), 32,000 (owt), or by size.
        special_tokens: strings that become one token each, beside `<|endoftext|>`: ["<|user|>", "<|model|>"].
        tokenizer: encode with this one, a folder or a run's, instead of training one.
        progress: draw progress bars also where stderr is no terminal.
    """
    name, text = (corpus, None) if corpus in CORPORA else (None, corpus)
    directory = prepare(
        name,
        text,
        valid_text,
        data_dir=data_dir,
        vocab_size=vocab_size,
        special_tokens=special_tokens or (),
        tokenizer=tokenizer,
        progress=progress,
    )
    meta = json.loads((directory / "meta.json").read_bytes())
    for split in SPLITS:
        record = meta["splits"][split]
        rate = record["num_bytes"] / max(record["num_tokens"], 1)
        counts = (
            f"{record['num_bytes']:,} bytes, {record['num_documents']:,} documents, {record['num_tokens']:,} tokens"
        )
        print(f"{directory / record['file']}: {counts} ({rate:.2f} bytes each)")
        if "entropy_bits_per_byte" in record:
            print(f"  entropy floor: {record['entropy_bits_per_byte']:.4f} bits per byte")


def prepare_validation(text: str | os.PathLike[str], tokenizer: Path, data_dir: str | os.PathLike[str]) -> Path:
    """Encode a text with a tokenizer that there is, to validate a run on it; the directory, which has no other split.

    Args:
        text: as `train_text` of `prepare`.
        tokenizer: the run's, a directory.
        data_dir: where datasets lie.

    Raises:
        FileNotFoundError: no such text or tokenizer.
        ValueError: the text is empty, or cannot be read.
    """
    path = check_text("valid_text", text)
    whole = Path(data_dir) / f"{stem(path)}-whole"  # prepared for training it may have lost its end
    with advice():
        return _encode_for(load_tokenizer(tokenizer), {"valid": path}, {}, whole, progress=False)


def _given_tokenizer(
    tokenizer: str | os.PathLike[str], vocab_size: int | None, special_tokens: Sequence[str]
) -> Tokenizer:
    loaded = load_tokenizer(tokenizer)
    if vocab_size not in (None, loaded.vocab_size):
        raise ValueError(
            f"vocab_size={vocab_size}, but the tokenizer {tokenizer} has {loaded.vocab_size}: leave it out"
        )
    if special_tokens:
        specials = list(special_tokens)
        raise ValueError(f"special_tokens={specials}, but the tokenizer {tokenizer} has its own: leave one of them out")
    return loaded


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a folder, or in a run's.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    folder = Path(path) / "tokenizer" if (Path(path) / "tokenizer").is_dir() else Path(path)
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise FileNotFoundError(
            f"tokenizer={path}: no tokenizer there; name its folder or a run's, logs/NAME/version_0"
        )
    return Tokenizer.from_directory(folder)


def default_vocab_size(corpus: str | None, train_text: str | os.PathLike[str] | None = None) -> int:
    """The vocabulary size of a corpus, or that which suits the size of a text."""
    if corpus is not None:
        return VOCAB_SIZES[corpus]
    assert train_text is not None
    num_bytes = count_bytes(check_text("train_text", train_text))
    return next((size for limit, size in OWN_VOCAB_SIZES if num_bytes <= limit), VOCAB_SIZES["owt"])


class Stages:
    """What has been made in a dataset's directory, and from what: `stages.json`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "stages.json"
        try:
            self.notes: dict[str, Any] = json.loads(self.path.read_bytes())
        except (FileNotFoundError, ValueError):
            self.notes = {}

    def run(self, name: str, line: str, inputs: dict[str, Any], outputs: list[str], work: Callable[[], Any]) -> Any:
        """The result of `work`, which makes the files `outputs` from `inputs`; that of last time if nothing changed.

        Args:
            name: of the stage.
            line: what is said on stderr before work is done.
            inputs: all that decides what comes out, as JSON.
            outputs: names of files in the dataset's directory.
            work: returns what is to be noted beside, as JSON.
        """
        note = self.notes.get(name)
        if note and note["inputs"] == inputs and note["outputs"] == self._sizes(outputs):
            return note["result"]
        self.forget(name)
        print(f"prepare: {line}", file=sys.stderr)
        result = work()
        self.note(name, {"inputs": inputs, "outputs": self._sizes(outputs), "result": result})
        return result

    def note(self, name: str, value: Any) -> None:
        """Write down a note."""
        if self.notes.get(name) != value:
            self.notes[name] = value
            write_json(self.path, self.notes)

    def forget(self, name: str) -> None:
        """Take a note back, before what it speaks of is made anew."""
        if self.notes.pop(name, None):
            write_json(self.path, self.notes)

    def sha256(self, path: Path) -> str:
        """The hash of a file, known from last time if its size and time of change are the same.

        Where it cannot be noted, as in a directory that is read-only, it is computed again next time.
        """
        stat, name = path.stat(), f"file {path.resolve()}"
        seen = {"num_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, **self.notes.get(name, {})}
        if "sha256" not in seen or (seen["num_bytes"], seen["mtime_ns"]) != (stat.st_size, stat.st_mtime_ns):
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            seen = {"num_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest}
            with contextlib.suppress(OSError):
                self.note(name, seen)
        return str(seen["sha256"])

    def _sizes(self, outputs: list[str]) -> dict[str, int | None]:
        paths = {name: self.directory / name for name in outputs}
        return {name: path.stat().st_size if path.is_file() else None for name, path in paths.items()}


def _builtin_texts(stages: Stages) -> dict[str, Path]:
    texts = {split: stages.directory / f"{split}.txt" for split in SPLITS}
    for split, path in texts.items():
        num_bytes, seed = BUILTIN_BYTES[split], BUILTIN_SEEDS[split]
        digest = hashlib.sha256(grammar.STORIES.encode()).hexdigest()
        inputs = {"grammar": digest, "num_bytes": num_bytes, "seed": seed}
        work = partial(grammar.write_corpus, path, num_bytes, seed)
        stages.run(f"{split} text", f"writing stories to {path}", inputs, [path.name], work)
    return texts


def _downloaded_texts(stages: Stages, corpus: str, progress: bool) -> dict[str, Path]:
    texts = {split: stages.directory / f"{split}.txt" for split in SPLITS}
    for split, path in texts.items():
        source = SOURCES[corpus][split]
        inputs = {"url": source.url, "sha256": source.sha256}
        work = partial(_fetch, source, path, progress)
        stages.run(f"{split} text", f"getting {source.url}", inputs, [path.name], work)
    return texts


def _fetch(source: Source, path: Path, progress: bool) -> None:
    if source.text_sha256 is None:
        download(source.url, path, num_bytes=source.num_bytes, sha256=source.sha256, progress=progress)
        return
    packed = path.with_name(source.url.rpartition("/")[2])
    download(source.url, packed, num_bytes=source.num_bytes, sha256=source.sha256, progress=progress)
    decompress(packed, path, num_bytes=source.text_bytes, sha256=source.text_sha256, progress=progress)
    packed.unlink()


def _own_texts(stages: Stages, progress: bool, train_text: Path, valid_text: Path | None = None) -> dict[str, Path]:
    source = {"path": str(train_text.resolve()), "sha256": _fingerprint(stages, "train", train_text)}
    before = stages.notes.get("source", source)
    if before["path"] != source["path"] and before["sha256"] != source["sha256"] and Path(before["path"]).exists():
        raise ValueError(
            f"{stages.directory} holds the dataset of {before['path']}: rename {train_text}, or give another data_dir"
        )
    stages.note("source", source)
    if valid_text is None:
        return _held_out_texts(stages, train_text, progress)
    own = {"train": train_text, "valid": valid_text}
    for split, text in own.items():
        if not is_plain(text):
            _refuse_overwriting([train_text, valid_text], stages.directory / f"{split}.txt")
    return {split: _readable(stages, split, text, progress) for split, text in own.items()}


def _held_out_texts(stages: Stages, text: Path, progress: bool) -> dict[str, Path]:
    texts = {split: stages.directory / f"{split}.txt" for split in SPLITS}
    for split, path in texts.items():
        _refuse_overwriting([text], path)
        stages.forget(f"{split} text")  # the file is written anew
    work = partial(hold_out, text, texts["train"], texts["valid"], progress)
    line = f"no valid_text, so the end of {text} is held out"
    if not is_plain(text):
        line = f"gathering {describe(text)}; no valid_text, so the end is held out"
    inputs = {"text_sha256": _fingerprint(stages, "train", text)}
    stages.run("held-out text", line, inputs, [path.name for path in texts.values()], work)
    return texts


def _readable(stages: Stages, split: str, text: Path, progress: bool) -> Path:
    """The file that the tokenizer reads: a plain text where it lies, or what is gathered of another."""
    if is_plain(text):
        return text
    path = stages.directory / f"{split}.txt"
    stages.forget("held-out text")  # the file is written anew
    inputs = {"text_sha256": _fingerprint(stages, split, text)}
    work = partial(gather, text, path, progress)
    stages.run(f"{split} text", f"gathering {describe(text)}", inputs, [path.name], work)
    return path


def _fingerprint(stages: Stages, split: str, text: Path) -> str:
    return fingerprint(text, stages.directory / f"{split}-files.json") if text.is_dir() else stages.sha256(text)


def _refuse_overlap(directory: Path, train_text: Path | None = None, valid_text: Path | None = None) -> None:
    """Before anything is written: no folder of texts may hold what it must not."""
    for text in (train_text, valid_text):
        if text is not None and text.is_dir() and text.resolve() == directory.resolve():
            raise ValueError(f"{text} would be its dataset's directory, too: move the texts, or give another data_dir")
    if train_text is None or valid_text is None:
        return
    for inner, outer in ((valid_text, train_text), (train_text, valid_text)):
        if outer.resolve() in inner.resolve().parents:
            raise ValueError(f"{inner} lies in {outer}, and would be both trained and validated on: move it out")


def _refuse_overwriting(texts: list[Path], path: Path) -> None:
    for text in texts:
        if text.resolve() == path.resolve():
            raise ValueError(f"{text} would be overwritten: move it out of {path.parent}")


def _train_tokenizer(stages: Stages, text: Path, vocab_size: int, specials: list[str], progress: bool) -> None:
    folder = stages.directory / "tokenizer"

    def work() -> str:
        vocab, merges = train_bpe(text, vocab_size, specials, progress=progress)
        tokenizer = Tokenizer(vocab, merges, specials)
        for stale in ("meta.json", *(f"{split}.npy" for split in SPLITS)):
            (stages.directory / stale).unlink(missing_ok=True)
        tokenizer.save(folder)
        return tokenizer.sha256

    inputs = {"text_sha256": stages.sha256(text), "vocab_size": vocab_size, "special_tokens": specials}
    before = inputs | stages.notes.get("tokenizer", {}).get("inputs", {})
    for name in ("vocab_size", "special_tokens"):
        if before[name] != inputs[name]:
            line = f"{stages.directory} has {name}={before[name]}, wanted {inputs[name]}: making it anew"
            print(f"prepare: {line}", file=sys.stderr)
    stages.run("tokenizer", f"training a tokenizer of {vocab_size:,} tokens on {text}", inputs, TOKENIZER_FILES, work)


def _encode_for(
    tokenizer: Tokenizer, texts: dict[str, Path], entropies: dict[str, float | None], beside: Path, progress: bool
) -> Path:
    """Encode texts with a tokenizer that there is, into a folder beside that of the texts; that folder."""

    def take() -> str:
        if END_OF_TEXT not in tokenizer.special_tokens:
            print(f"prepare: it has no {END_OF_TEXT}: documents will not be told apart", file=sys.stderr)
        tokenizer.save(directory / "tokenizer")
        return tokenizer.sha256

    directory = beside.with_name(f"{beside.name}-for-{tokenizer.sha256[:8]}")
    with _alone(directory):
        stages = Stages(directory)
        stages.run("tokenizer", f"taking a tokenizer of {tokenizer.vocab_size:,} tokens", {}, TOKENIZER_FILES, take)
        for split, text in texts.items():
            _encode(stages, split, _readable(stages, split, text, progress), entropies.get(split), progress)
    return directory


def _encode(stages: Stages, split: str, text: Path, entropy: float | None, progress: bool) -> None:
    def work() -> None:
        tokenizer = Tokenizer.from_directory(stages.directory / "tokenizer")
        target = stages.directory / f"{split}.npy"
        record = encode_files(tokenizer, text, target, progress=progress)
        if entropy:
            meta = json.loads(meta_path.read_bytes())
            meta["splits"][split] = {**record, "entropy_bits_per_byte": entropy}
            write_json(meta_path, meta)

    meta_path = stages.directory / "meta.json"
    inputs = {"text_sha256": stages.sha256(text), "tokenizer_sha256": stages.notes["tokenizer"]["result"]}
    if split not in _described_splits(meta_path):
        stages.forget(split)
    stages.run(split, f"encoding {text}", inputs, [f"{split}.npy"], work)


def _entropy(stages: Stages, split: str) -> float | None:
    """That of a text in bits per byte, where it is known: of the built-in one."""
    written = (stages.notes.get(f"{split} text") or {}).get("result") or {}
    return written.get("entropy_bits_per_byte")


def _described_splits(meta_path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(meta_path.read_bytes())["splits"])
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        meta_path.unlink()  # damaged: the token files are encoded anew, and described anew
        return {}


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the lock of a dataset's directory; one that cannot be written needs none, for nobody prepares it."""
    directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK):
        yield
        return
    with open(directory / ".lock", "wb") as lock:
        for _ in range(20):  # the ranks of a run come here together, and are done in no time
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.1)
        else:
            print(f"prepare: waiting for another process that prepares {directory}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for stray in directory.rglob(".*.[0-9]*.part"):  # of a process that was killed in `atomic_write`
            stray.unlink()
        yield
