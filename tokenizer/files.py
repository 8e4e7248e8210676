"""Files on disk: atomic writing, and the vocabulary formats that other tools read.

Three formats, each read and written: GPT-2's `vocab.json` + `merges.txt`, Hugging Face's `tokenizer.json`, and OpenAI's
`.tiktoken`. In the first two a token's bytes are written as printable characters (`byte_symbols`). A broken file is a
`ValueError` that names the file, the line or entry, and the cause; what a file asks for beyond byte-level BPE with
GPT-2's pattern (normalizers, other patterns, prefixes) is refused, for it would silently change the ids.
"""

import base64
import binascii
import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

Vocab = dict[int, bytes]
Merges = list[tuple[bytes, bytes]]

END_OF_TEXT = "<|endoftext|>"  # the special token after each document, where nobody asks for others
MAKES_TOKENIZERS = "`python -m tokenizer train` makes one"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` whole or not at all.

    The bytes go to `.<name>.<pid>.part` in the same folder; on leaving the block they are flushed to the device, the
    file is renamed over `path` and the folder is flushed. Any exception, Ctrl-C included, removes the part and leaves
    an older `path` as it was.

    Args:
        path: the final name; missing parent folders are made. A device or a pipe is written to instead, and a link
            goes on leading to the file.
        mode: "wb" for bytes, "w" for UTF-8 text with `\\n` line ends.
    """
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    there = Path(path)
    if there.exists() and not there.is_file() and not there.is_dir():
        with open(there, mode, **text) as file:  # type: ignore[call-overload]
            yield file
        return
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(part, mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, part, os.fspath(part)):
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise
    flush_folder(target.parent)


def flush_folder(path: Path) -> None:
    """Make the renames done in folder `path` survive a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@functools.cache
def byte_symbols() -> dict[int, str]:
    """GPT-2's map from each byte to one printable character.

    A byte whose Latin-1 character is visible stands for itself; the other 68 take the characters from U+0100 on.

    >>> byte_symbols()[ord("A")], byte_symbols()[ord(" ")], byte_symbols()[ord("\\n")]
    ('A', 'Ġ', 'Ċ')
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


@functools.cache
def _symbol_bytes() -> dict[int, int]:
    """The inverse of `byte_symbols`; what is below 256 and no symbol has a value that is no byte."""
    return {byte: 256 for byte in range(256)} | {ord(symbol): byte for byte, symbol in byte_symbols().items()}


def to_symbols(token: bytes) -> str:
    """The printable spelling of a token.

    >>> to_symbols(b" caf\\xc3\\xa9")
    'ĠcafÃ©'
    """
    return token.decode("latin-1").translate(byte_symbols())


def from_symbols(text: str) -> bytes:
    """The token spelt `text`; the inverse of `to_symbols`.

    Raises:
        ValueError: `text` is empty or has a character that stands for no byte.
    """
    if not text:
        raise ValueError("a token is empty")
    try:
        return text.translate(_symbol_bytes()).encode("latin-1")
    except UnicodeEncodeError as error:
        symbol = text[error.start]
        raise ValueError(f"{symbol!r} (U+{ord(symbol):04X}) in {text!r} stands for no byte") from None


def read_gpt2(
    vocab_path: str | os.PathLike[str], merges_path: str | os.PathLike[str], special_tokens: Sequence[str] = ()
) -> tuple[Vocab, Merges]:
    """Read GPT-2's `vocab.json` (spelling → id) and `merges.txt` (two spellings per line, best merge first).

    Args:
        vocab_path: the vocabulary.
        merges_path: the merges.
        special_tokens: those of them that are in the vocabulary are written there as they are, not as symbols.

    Raises:
        ValueError: a file is corrupt; the message names file, line or entry, and cause.
        FileNotFoundError: a file is missing.
    """
    vocab = _parse_vocab(vocab_path, _read_json(vocab_path), special_tokens)

    def place(number: int) -> str:
        return f"{os.fspath(merges_path)}: line {number}"

    pairs = []
    for number, line in enumerate(_read_text(merges_path).split("\n"), start=1):
        if not line.strip("\r") or (number == 1 and line.startswith("#version")):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2:
            found = f"expected two tokens with one space between, found {_shorten(line)}"
            raise ValueError(f"{place(number)}: {found}")
        pairs.append((number, parts[0], parts[1]))
    return vocab, _parse_merges(pairs, vocab, place)


def write_gpt2(folder: str | os.PathLike[str], vocab: Vocab, merges: Merges, special_tokens: Sequence[str]) -> None:
    """Write `vocab.json` and `merges.txt` into `folder`, each atomically.

    Raises:
        ValueError: two tokens would be written alike.
    """
    spellings = spell_vocab(vocab, special_tokens)
    with atomic_write(Path(folder) / "vocab.json", "w") as file:
        file.write(json.dumps(spellings, ensure_ascii=False, separators=(",\n", ": ")))
    spell = functools.cache(to_symbols)  # for as long as this call
    with atomic_write(Path(folder) / "merges.txt", "w") as file:
        file.write("#version: 0.2\n")
        file.writelines(f"{spell(left)} {spell(right)}\n" for left, right in merges)


def read_hf(path: str | os.PathLike[str]) -> tuple[Vocab, Merges, list[str]]:
    """Read a Hugging Face `tokenizer.json`: (vocab, merges, special tokens in the order of their ids).

    Added tokens become special tokens, whether the file calls them special or not: both are split off before the
    pattern is applied.

    Raises:
        ValueError: the file is corrupt, or is not byte-level BPE with GPT-2's pattern.
        FileNotFoundError: the file is missing.
    """
    data = _read_json(path)
    model = data.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise ValueError(f"{os.fspath(path)}: entry 'model': no BPE model with a vocabulary")
    _refuse_foreign(os.fspath(path), data, model)

    spellings = dict(model["vocab"])
    special_tokens = {}
    for index, token in enumerate(_expect(path, "added_tokens", data.get("added_tokens", []), list)):
        where = f"{os.fspath(path)}: added_tokens[{index}]"
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not _is_id(token.get("id")):
            raise ValueError(f"{where}: expected an object with 'content' and 'id', found {_shorten(token)}")
        for option in ("single_word", "lstrip", "rstrip"):
            if token.get(option):
                raise ValueError(f"{where}: {option}=true is not supported")
        if spellings.setdefault(token["content"], token["id"]) != token["id"]:
            raise ValueError(f"{where}: {token['content']!r} has id {token['id']} here and another in model.vocab")
        special_tokens[token["content"]] = token["id"]
    ordered = sorted(special_tokens, key=special_tokens.__getitem__)
    vocab = _parse_vocab(path, spellings, ordered)

    def place(index: int) -> str:
        return f"{os.fspath(path)}: model.merges[{index}]"

    pairs = []
    for index, merge in enumerate(_expect(path, "model.merges", model.get("merges"), list)):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{place(index)}: expected two tokens, found {_shorten(merge)}")
        pairs.append((index, parts[0], parts[1]))
    return vocab, _parse_merges(pairs, vocab, place), ordered


def write_hf(path: str | os.PathLike[str], vocab: Vocab, merges: Merges, special_tokens: Sequence[str]) -> None:
    """Write a `tokenizer.json` that Hugging Face `tokenizers` and `transformers` load to the same ids.

    Raises:
        ValueError: two tokens would be written alike, or a merge has a special token that is spelt otherwise in merges.
    """
    spellings = spell_vocab(vocab, special_tokens)
    spell = functools.cache(to_symbols)  # for as long as this call
    merged = {token for left, right in merges for token in (left, right, left + right)}
    for special in special_tokens:
        if special.encode() in merged and spell(special.encode()) != special:
            raise ValueError(
                f"a tokenizer.json cannot have {special!r} both as a special token and in a merge: "
                "choose a special token that is no ordinary one"
            )
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": spellings[token], "content": token, **flags}
            for token in sorted(special_tokens, key=spellings.__getitem__)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": spellings,
            "merges": [[spell(left), spell(right)] for left, right in merges],
        },
    }
    with atomic_write(path, "w") as file:
        file.write(json.dumps(data, ensure_ascii=False))  # indented, or written piece by piece: ten times as long


def read_tiktoken(path: str | os.PathLike[str], special_tokens: Sequence[str] = ()) -> tuple[Vocab, Merges]:
    """Read a `.tiktoken` file: one `base64(token) rank` per line; the rank is the id.

    The file has no merges: each token's last merge is found by encoding its bytes with the lower ranks. It has no
    special tokens either: `special_tokens` take the ids that the file leaves free, lowest first.

    Raises:
        ValueError: the file is corrupt, or ids are free that no special token takes.
        FileNotFoundError: the file is missing.
    """
    ranks: dict[bytes, int] = {}
    lines: dict[bytes, str] = {}
    taken = set()
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{os.fspath(path)}: line {number}"
        parts = line.split()
        if len(parts) != 2 or not parts[1].isdecimal() or not parts[1].isascii():
            raise ValueError(f"{where}: expected a base64 token and a rank, found {_shorten(line)}")
        try:
            token = base64.b64decode(parts[0], validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"{where}: {_shorten(parts[0])} is not base64 ({error})") from None
        if not token or token in ranks:
            raise ValueError(f"{where}: token {token!r} is {'repeated' if token else 'empty'}")
        if int(parts[1]) in taken:
            raise ValueError(f"{where}: rank {parts[1]} is repeated")
        taken.add(int(parts[1]))
        ranks[token] = int(parts[1])
        lines[token] = where
    _require_bytes(os.fspath(path), ranks)

    vocab = {rank: token for token, rank in ranks.items()}
    free = 0
    for special in special_tokens:
        if special.encode() in ranks:
            continue
        while free in vocab:
            free += 1
        vocab[free] = special.encode()
    _require_every_id(os.fspath(path), vocab)
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts_of_token = _merge_below(token, ranks, rank)
        if len(parts_of_token) != 2:
            raise ValueError(f"{lines[token]}: token {token!r} is no merge of two tokens of lower rank")
        merges.append((parts_of_token[0], parts_of_token[1]))
    return vocab, merges


def write_tiktoken(path: str | os.PathLike[str], vocab: Vocab, merges: Merges, special_tokens: Sequence[str]) -> None:
    """Write a `.tiktoken` file; special tokens are not in it, as the format has no place for them.

    Raises:
        ValueError: the order of the ids is not the order of the merges, which is all that the format can express.
    """
    special = {token.encode() for token in special_tokens}
    ids = {token: token_id for token_id, token in vocab.items() if token not in special or len(token) == 1}
    products = [ids[left + right] for left, right in merges]
    if products != sorted(set(products)):
        raise ValueError(
            "a .tiktoken file needs ids that grow in the order of the merges; write tokenizer.json instead"
        )
    with atomic_write(path, "wb") as file:
        for token, token_id in sorted(ids.items(), key=lambda item: item[1]):
            file.write(base64.b64encode(token) + f" {token_id}\n".encode())


def read_meta(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The `meta.json` of a tokenizer's folder, or {} where there is none (a bare GPT-2 pair).

    Raises:
        ValueError: the file is corrupt.
    """
    path = Path(folder) / "meta.json"
    if not path.exists():
        return {}
    meta = _read_json(path)
    for entry in ("unicode", "splits"):
        _expect(path, entry, meta.get(entry, {}), dict)
    special_tokens = meta.get("special_tokens", [])
    if not isinstance(special_tokens, list) or not all(isinstance(token, str) for token in special_tokens):
        raise ValueError(
            f"{path}: entry 'special_tokens': expected a list of strings, found {_shorten(special_tokens)}"
        )
    return meta


def write_json(path: str | os.PathLike[str], data: dict[str, Any]) -> None:
    """Write `data` as indented JSON, atomically; a byte of a file's name that is no UTF-8 as JSON's escape of it."""
    text = json.dumps(data, ensure_ascii=False, indent=2) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def spell_vocab(vocab: Vocab, special_tokens: Sequence[str]) -> dict[str, int]:
    """{spelling: id} in the order of the ids; special tokens are spelt literally.

    Raises:
        ValueError: two tokens would be spelt alike, which these formats cannot express.
    """
    special = {token.encode(): token for token in special_tokens}
    spellings: dict[str, int] = {}
    for token_id, token in sorted(vocab.items()):
        spelling = special.get(token) or to_symbols(token)
        if spelling in spellings:
            raise ValueError(
                f"ids {spellings[spelling]} and {token_id} would both be written {spelling!r}: "
                "choose a special token that is no other token's spelling"
            )
        spellings[spelling] = token_id
    return spellings


def _refuse_foreign(path: str, data: dict[str, Any], model: dict[str, Any]) -> None:
    """Raise `ValueError` for anything in a tokenizer.json that byte-level BPE with GPT-2's pattern does not do."""

    def refuse(entry: str, found: object) -> None:
        raise ValueError(
            f"{path}: entry '{entry}': only byte-level BPE with GPT-2's pattern is supported, found {found}"
        )

    if model.get("type", "BPE") != "BPE":
        refuse("model.type", _shorten(model["type"]))
    for entry in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(entry):
            refuse(f"model.{entry}", _shorten(model[entry]))
    for entry in ("fuse_unk", "byte_fallback", "ignore_merges"):
        if model.get(entry):
            refuse(f"model.{entry}", "true")
    for entry in ("normalizer", "truncation", "padding"):
        if data.get(entry) is not None:
            refuse(entry, _shorten(data[entry]))
    pre_tokenizer = data.get("pre_tokenizer")
    if (
        not isinstance(pre_tokenizer, dict)
        or pre_tokenizer.get("type") != "ByteLevel"
        or pre_tokenizer.get("add_prefix_space", True)
        or not pre_tokenizer.get("use_regex", True)
    ):
        refuse("pre_tokenizer", _shorten(pre_tokenizer))
    for entry in ("decoder", "post_processor"):
        part = data.get(entry)
        if part is not None and (not isinstance(part, dict) or part.get("type") != "ByteLevel"):
            refuse(entry, _shorten(part))


def _parse_vocab(path: str | os.PathLike[str], spellings: dict[str, Any], special_tokens: Sequence[str]) -> Vocab:
    vocab: Vocab = {}
    special = set(special_tokens)

    def refuse(spelling: str, cause: str) -> NoReturn:
        raise ValueError(f"{os.fspath(path)}: entry {_shorten(spelling)}: {cause}") from None

    for spelling, token_id in spellings.items():
        if not _is_id(token_id):
            refuse(spelling, f"expected an id >= 0, found {_shorten(token_id)}")
        if token_id in vocab:
            refuse(spelling, f"id {token_id} is already the id of {vocab[token_id]!r}")
        try:
            vocab[token_id] = spelling.encode() if spelling in special else from_symbols(spelling)
        except ValueError as error:
            hint = "" if special else "; if it is a special token, give it in special_tokens"
            refuse(spelling, f"{error}{hint}")
    _require_every_id(os.fspath(path), vocab)
    _require_bytes(os.fspath(path), vocab.values())
    return vocab


def _parse_merges(pairs: list[tuple[int, str, str]], vocab: Vocab, place: Callable[[int], str]) -> Merges:
    """The merges spelt in `pairs`, each with a number; `place` says where in the file that is."""
    known = {token: token for token in vocab.values()}
    spelled: dict[str, bytes] = {}
    merges: dict[tuple[bytes, bytes], None] = {}

    def refuse(number: int, cause: str) -> NoReturn:
        raise ValueError(f"{place(number)}: {cause}") from None

    def read(number: int, spelling: str) -> bytes:
        """The token, the same object as in `vocab`."""
        try:
            token = known[from_symbols(spelling)]
        except KeyError:
            refuse(number, f"token {_shorten(spelling)} is not in the vocabulary")
        except ValueError as error:
            refuse(number, str(error))
        spelled[spelling] = token
        return token

    for number, left_symbols, right_symbols in pairs:
        left = spelled.get(left_symbols) or read(number, left_symbols)
        right = spelled.get(right_symbols) or read(number, right_symbols)
        if left + right not in known:
            refuse(number, f"token {_shorten(left_symbols + right_symbols)} is not in the vocabulary")
        if (left, right) in merges:
            refuse(number, f"the merge {left_symbols!r} {right_symbols!r} is repeated")
        merges[left, right] = None
    return list(merges)


def _require_every_id(path: str, vocab: Vocab) -> None:
    for token_id in range(len(vocab)):
        if token_id not in vocab:
            raise ValueError(f"{path}: {len(vocab)} tokens have ids up to {max(vocab)}, but id {token_id} is missing")


def _require_bytes(path: str, tokens: Any) -> None:
    present = set(tokens)
    for byte in range(256):
        if bytes([byte]) not in present:
            raise ValueError(f"{path}: the token of byte 0x{byte:02X} ({byte_symbols()[byte]!r}) is missing")


def _merge_below(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """Encode `token` by the tokens of rank below `limit`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        rank, index = min((ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1))
        if rank >= limit:
            break
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts


def _read_text(path: str | os.PathLike[str]) -> str:
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {os.fspath(path)}; {MAKES_TOKENIZERS}") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{os.fspath(path)}: line {line}: byte {error.start} is not UTF-8 ({error.reason})") from None


def _read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) != len(pairs):
            seen: set[str] = set()
            repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"{os.fspath(path)}: entry {_shorten(repeated)} is repeated")
        return data

    text = _read_text(path)
    try:
        data = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        cause = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise ValueError(f"{os.fspath(path)}: {cause} (the file is no JSON, or is cut short)") from None
    except RecursionError:
        raise ValueError(f"{os.fspath(path)}: the JSON is nested too deeply") from None
    return _expect(path, "", data, dict)


def _expect(path: str | os.PathLike[str], entry: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        name = "an object" if kind is dict else "a list"
        at = f"entry '{entry}': " if entry else ""
        raise ValueError(f"{os.fspath(path)}: {at}expected {name}, found {_shorten(value)}")
    return value


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
