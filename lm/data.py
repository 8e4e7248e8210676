"""Token files to batches: windows that are a pure function of the seed, and the Lightning data module around them."""

import functools
import itertools
import json
import math
import os
import signal
import sys
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Windows = Literal["replacement", "epoch"]


class TokenFile:
    """The token ids of a `.npy` file, checked when opened and read a slice at a time.

    `tokens[i:j]` and `len(tokens)` work as on an array. The file is read, not memory-mapped: a file that shrinks under
    a map kills the process with SIGBUS, a short read is an error with a name; and pages of a map count as memory.

    Args:
        path: a one-dimensional array of little-endian uint16 or uint32.
        vocab_size: refuse ids that are not below it.
        max_id: the largest id, where it is known from meta.json; without it the file is scanned.

    Raises:
        FileNotFoundError: no file at `path`.
        ValueError: not such an array, cut off, or an id beyond the vocabulary (with its index).
        OSError: when reading: the file has shrunk since it was opened.
    """

    def __init__(self, path: str | os.PathLike[str], vocab_size: int | None = None, max_id: int | None = None):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no token file at {path}: `python -m lm prepare` makes one")
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - read for as long as this object lives
        weakref.finalize(self, self._file.close)
        self.dtype, self._num_tokens = self._read_header()
        self._offset = self._file.tell()
        if vocab_size is not None and (max_id is None or max_id >= vocab_size):
            self._check_ids(vocab_size)

    def _read_header(self) -> tuple[np.dtype, int]:
        size = os.fstat(self._file.fileno()).st_size
        if size == 0:
            raise ValueError(f"{self.path} is empty (0 bytes)")
        try:
            version = np.lib.format.read_magic(self._file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(self._file)
        except ValueError as error:
            raise ValueError(f"{self.path} ({size} bytes) is no whole .npy file: {error}") from None
        if dtype not in (np.dtype("<u2"), np.dtype("<u4")) or len(shape) != 1:
            raise ValueError(
                f"{self.path} holds {dtype.str} of shape {shape}; token ids are one row of uint16 or uint32, "
                "little-endian: save ids.astype(np.uint16) with np.save"
            )
        wanted = self._file.tell() + shape[0] * dtype.itemsize
        if size != wanted:
            raise ValueError(
                f"{self.path} has {size} bytes where its header promises {wanted} ({shape[0]} tokens): "
                "it was cut off or overwritten; make it again"
            )
        return dtype, shape[0]

    def _check_ids(self, vocab_size: int, block: int = 1 << 22) -> None:
        for start in range(0, len(self), block):
            ids = self[start : start + block]
            if ids.max() >= vocab_size:
                index = int(np.argmax(ids >= vocab_size))
                raise ValueError(
                    f"{self.path}: token {start + index} is {ids[index]}, beyond vocab_size={vocab_size}: "
                    "the file was made with another tokenizer"
                )

    def __len__(self) -> int:
        return self._num_tokens

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"a token file is read in order, not with step {step}")
        size = max(stop - start, 0) * self.dtype.itemsize
        data = os.pread(self._file.fileno(), size, self._offset + start * self.dtype.itemsize)
        if len(data) != size:
            raise OSError(f"{self.path} shrank while it was open: tokens {start} to {stop} of {len(self)} are gone")
        return np.frombuffer(data, self.dtype)

    def __reduce__(self) -> tuple[type["TokenFile"], tuple[Path]]:
        return TokenFile, (self.path,)  # a worker process opens its own


def get_batch(
    x: Integer[np.ndarray, " tokens"] | TokenFile,
    batch_size: int,
    context_length: int,
    device: str | torch.device,
    starts: Int[np.ndarray, " batch_size"] | None = None,
) -> tuple[Int[Tensor, "batch_size context_length"], Int[Tensor, "batch_size context_length"]]:
    """Windows of `x` and the tokens that follow each of theirs, int64, on `device`. CS336 A1 section 5.1.

    Args:
        x: the token ids.
        batch_size: number of windows.
        context_length: tokens per window.
        device: where the batch goes.
        starts: where the windows begin, as a run takes them from `WindowOrder`; without, torch's generator draws them,
            uniformly over all len(x) - context_length.

    Raises:
        ValueError: `x` is shorter than one window and its target.
    """
    check_length(len(x), context_length, "x")
    if starts is None:
        starts = torch.randint(len(x) - context_length, (batch_size,)).numpy()
    tokens = np.asarray(x) if isinstance(x, np.ndarray) else x  # slices of a plain array are quicker than of a memmap
    rows = [tokens[start : start + context_length + 1] for start in starts.tolist()]
    block = torch.from_numpy(np.stack(rows).astype(np.int64))
    return block[:, :-1].contiguous().to(device), block[:, 1:].contiguous().to(device)


def check_length(num_tokens: int, context_length: int, name: str) -> None:
    """Refuse data shorter than one window and its last target."""
    if num_tokens <= context_length:
        raise ValueError(
            f"{name} has {num_tokens} tokens, context_length={context_length} needs at least {context_length + 1}: "
            "use a shorter context or more text"
        )


@dataclass(frozen=True)
class WindowOrder:
    """Where the training windows of a run start: an endless sequence whose n-th entry depends on (seed, n) alone.

    A run with any number of ranks, batch size and accumulation walks the same sequence, so that what one optimizer step
    sees depends on its number of windows only; and any position can be reached at once.

    - "replacement": each start is uniform over all num_tokens - context_length (the handout's choice).
    - "epoch": the text is cut into windows side by side, each used once per epoch in a new random order. The
      (num_tokens - 1) mod context_length targets left over lie at the ends, and differ between epochs.
    """

    num_tokens: int
    context_length: int
    seed: int = 0
    windows: Windows = "replacement"

    def starts(self, first: int, count: int) -> Int[np.ndarray, " count"]:
        """The starts number `first` to `first + count - 1`."""
        if self.windows == "replacement":
            # Philox is random access: four numbers at a time are a hash of key and counter.
            raw = philox(self.seed, 0, first // 4).random_raw(first % 4 + count)[first % 4 :]
            return (raw % np.uint64(self.num_tokens - self.context_length)).astype(np.int64)
        per_epoch = (self.num_tokens - 1) // self.context_length
        epoch, position = np.divmod(np.arange(first, first + count), per_epoch)
        parts = [self._epoch(e)[position[epoch == e]] for e in np.unique(epoch).tolist()]
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> np.ndarray:
        return shuffled_windows(self.num_tokens, self.context_length, self.seed, epoch)


def philox(seed: int, stream: int, counter: int = 0) -> np.random.Philox:
    """Random 64-bit numbers: a generator whose raw output NumPy keeps the same in all versions."""
    return np.random.Philox(key=np.array([seed, stream], np.uint64), counter=counter)


@functools.lru_cache(maxsize=2)  # a batch may lie across two epochs
def shuffled_windows(num_tokens: int, context_length: int, seed: int, epoch: int) -> np.ndarray:
    """The starts of all windows of one epoch, in its order: int64, (num_tokens - 1) // context_length of them."""
    num_windows, spare = divmod(num_tokens - 1, context_length)
    raw = philox(seed, 1 + epoch).random_raw(num_windows + 1)
    offset = int(raw[-1]) % (spare + 1)
    return np.argsort(raw[:-1], kind="stable") * context_length + offset


class TrainingBatches(Dataset):
    """Batch t of one rank, for any t: the windows of `order` after those of all ranks' batches before it.

    An entry is (inputs, targets), both (batch, seq) int64; or the starts, (batch,) int64, when `starts_only`.

    Args:
        tokens: the training text.
        order: of the windows.
        batch_size: windows per batch and rank.
        rank: this process's.
        world_size: number of ranks.
        starts_only: leave the windows to `DeviceTokens`.
    """

    def __init__(
        self,
        tokens: TokenFile,
        order: WindowOrder,
        batch_size: int,
        rank: int,
        world_size: int,
        starts_only: bool,
    ):
        self.tokens, self.order, self.batch_size, self.starts_only = tokens, order, batch_size, starts_only
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, t: int) -> Tensor | tuple[Tensor, Tensor]:
        starts = self.order.starts((t * self.world_size + self.rank) * self.batch_size, self.batch_size)
        if self.starts_only:
            return torch.from_numpy(starts)
        return get_batch(self.tokens, self.batch_size, self.order.context_length, "cpu", starts)


def ignore_signals(worker: int) -> None:
    """In a worker: signals are for the run, which saves and then ends its workers itself."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)


class CountFrom:
    """A sampler: start, start + 1, ... without end, afresh each time it is iterated."""

    def __init__(self, start: int):
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


class ValidationBatches(Dataset):
    """Every target token of a file exactly once, in windows side by side; every world_size-th window is this rank's.

    An entry is (inputs, targets, num_targets): the first `num_targets` targets of the flattened batch count, the rest
    is padding (zeros). So every batch has one shape (one compiled graph), and every rank has the same number of
    batches, as collective operations inside a forward need it.
    """

    def __init__(
        self, tokens: np.ndarray | TokenFile, context_length: int, batch_size: int, rank: int = 0, world_size: int = 1
    ):
        self.tokens, self.context_length = tokens, context_length
        num_windows = math.ceil((len(tokens) - 1) / context_length)
        per_rank = math.ceil(num_windows / world_size)
        self.starts = [w * context_length for w in range(rank, num_windows, world_size)]
        self.batch_size = min(batch_size, per_rank)
        self.num_batches = math.ceil(per_rank / self.batch_size)

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        if not 0 <= index < self.num_batches:
            raise IndexError(index)
        inputs, targets = torch.zeros(2, self.batch_size, self.context_length, dtype=torch.int64)
        num_targets = 0
        for row, start in enumerate(self.starts[index * self.batch_size : (index + 1) * self.batch_size]):
            ids = torch.from_numpy(self.tokens[start : start + self.context_length + 1].astype(np.int64))
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = ids[1:]
            num_targets += len(ids) - 1  # only the file's last window is short, and it is the last of its rank
        return inputs, targets, num_targets


class DeviceTokens:
    """A whole token file in the memory of a device, two or four bytes per token."""

    def __init__(self, tokens: TokenFile, device: torch.device, block: int = 1 << 24):
        # torch indexes signed integers only: the bits are kept, the sign is masked off after widening.
        bits = 8 * tokens.dtype.itemsize
        self.mask = (1 << bits) - 1
        self.ids = torch.empty(len(tokens), dtype=torch.int16 if bits == 16 else torch.int32, device=device)
        for start in range(0, len(tokens), block):
            ids = tokens[start : start + block].view(f"<i{bits // 8}")
            self.ids[start : start + len(ids)] = torch.from_numpy(ids.copy()).to(device)

    def get_batch(
        self, context_length: int, starts: Int[Tensor, " batch_size"]
    ) -> tuple[Int[Tensor, "batch_size context_length"], Int[Tensor, "batch_size context_length"]]:
        """What the function of this name returns, gathered on the device."""
        index = starts[:, None] + torch.arange(context_length + 1, device=starts.device)
        block = self.ids[index].long() & self.mask
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()


def read_meta(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The meta.json of a prepared dataset, compared with the tokenizer beside it.

    Raises:
        FileNotFoundError: `directory` holds no prepared dataset.
        ValueError: unreadable, of another format, or made with another tokenizer than `directory`/tokenizer.
    """
    path = Path(directory) / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no meta.json: `python -m lm prepare` makes a dataset")
    try:
        meta = json.loads(path.read_bytes())
        version, _, _ = meta["format"], meta["vocab_size"], meta["splits"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): make the dataset again with `python -m lm prepare`") from None
    if version != 1:
        raise ValueError(f"{path} has format {version}, this version reads format 1: make the dataset again")
    beside = Path(directory) / "tokenizer" / "meta.json"
    if beside.is_file():
        tokenizer = json.loads(beside.read_bytes())
        if tokenizer.get("sha256") != meta.get("tokenizer_sha256"):
            raise ValueError(
                f"{path} was made with the tokenizer {str(meta.get('tokenizer_sha256'))[:12]}, "
                f"{beside.parent} is {str(tokenizer.get('sha256'))[:12]}: make the dataset again"
            )
        if tokenizer.get("unicode") != meta.get("unicode"):
            warnings.warn(
                f"{directory}: tokenizer and token files were made with different Unicode tables "
                f"({tokenizer.get('unicode')} and {meta.get('unicode')}); new text may get other ids",
                stacklevel=2,
            )
    return meta


def open_split(directory: str | os.PathLike[str], split: str) -> TokenFile:
    """The token file of "train" or "valid", checked against the dataset's meta.json.

    Raises:
        FileNotFoundError: no dataset, or no such split.
        ValueError: the file is damaged or not the one that meta.json describes.
    """
    meta = read_meta(directory)
    if split not in meta["splits"]:
        raise FileNotFoundError(f"{directory} has no split {split!r}, only {sorted(meta['splits'])}")
    record = meta["splits"][split]
    tokens = TokenFile(Path(directory) / record["file"], meta["vocab_size"], record.get("max_id"))
    if len(tokens) != record["num_tokens"]:
        raise ValueError(
            f"{tokens.path} has {len(tokens)} tokens, meta.json says {record['num_tokens']}: "
            "make the dataset again with `python -m lm prepare`"
        )
    return tokens


class TokenDataModule(pl.LightningDataModule):
    """Batches of a corpus; prepares it first where that is not yet done.

    Training batches are (inputs, targets); validation batches (inputs, targets, num_targets), see `ValidationBatches`.
    Set the Trainer's `use_distributed_sampler` to false: the ranks' shares are cut here.

    Args:
        corpus: what to prepare when neither texts nor a directory are given.
        train_text: your own text instead: a text file, JSON Lines (.jsonl) or a folder of them, also .gz or .xz.
        valid_text: its validation text; without one, a tail of whole documents is held out.
        directory: a prepared dataset, used as it is.
        data_dir: where prepared datasets lie.
        vocab_size: size of the tokenizer to train; by default what suits the corpus, or the size of the text.
        special_tokens: strings that become one token each, beside `<|endoftext|>`: ["<|user|>", "<|model|>"].
        tokenizer: encode with this one, its folder or a run's, instead of training one.
        context_length: tokens per training window.
        val_context_length: tokens per validation window; context_length by default.
        batch_size: windows per batch and device.
        val_batch_size: windows per validation batch; batch_size by default.
        windows: "replacement" draws each window at random, "epoch" uses every token once per epoch.
        seed: of the order of the windows; by default that of `seed_everything`.
        num_workers: processes that read ahead; 0 reads in the training process, which is quick enough here.
        tokens_on: "device" keeps the whole training file in the device's memory (2 bytes per token).
        changed_data: whether a run may resume on other data, batch size, context or seed than its checkpoint's.
    """

    def __init__(
        self,
        corpus: Literal["builtin", "tinystories", "owt"] = "builtin",
        train_text: str | None = None,
        valid_text: str | None = None,
        directory: str | None = None,
        data_dir: str = "data",
        vocab_size: int | None = None,
        special_tokens: list[str] | None = None,
        tokenizer: str | None = None,
        context_length: int = 256,
        val_context_length: int | None = None,
        batch_size: int = 32,
        val_batch_size: int | None = None,
        windows: Windows = "replacement",
        seed: int | None = None,
        num_workers: int = 0,
        tokens_on: Literal["host", "device"] = "host",
        changed_data: Literal["refuse", "accept"] = "refuse",
    ):
        super().__init__()
        self.corpus, self.train_text, self.valid_text, self.tokenizer = corpus, train_text, valid_text, tokenizer
        self.special_tokens = special_tokens or []
        self.directory = Path(directory) if directory is not None else None
        self.data_dir, self.context_length, self.batch_size = data_dir, context_length, batch_size
        self.val_context_length = context_length if val_context_length is None else val_context_length
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.windows, self.num_workers = windows, num_workers
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed  # where Lightning notes its own
        self.tokens_on, self.changed_data = tokens_on, changed_data
        for name in ("context_length", "val_context_length", "batch_size", "val_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} must be 0 or more")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} must be in [0, 2**64)")
        if valid_text is not None and train_text is None:
            raise ValueError(f"valid_text={valid_text} needs a train_text")
        if self.directory is not None:
            self.vocab_size = read_meta(self.directory)["vocab_size"]
            if vocab_size not in (None, self.vocab_size):
                raise ValueError(f"vocab_size={vocab_size}, but {directory} was made with {self.vocab_size}")
        else:
            from lm.prepare import default_vocab_size, load_tokenizer

            if vocab_size is not None:
                self.vocab_size = vocab_size
            elif tokenizer is not None:
                self.vocab_size = load_tokenizer(tokenizer).vocab_size
            else:
                self.vocab_size = default_vocab_size(None if train_text else corpus, train_text)
        self.meta: dict[str, Any] = {}
        self._splits: dict[str, TokenFile] = {}
        self._device_tokens: DeviceTokens | None = None

    def prepare_data(self) -> None:
        """Download, train the tokenizer and encode, on one process, where that is not yet done."""
        if self.directory is None:
            self._prepare()

    def check(self, stage: str) -> None:
        """Prepare what is missing and look at the files, as `setup` does, before Lightning makes the run's folder.

        Raises:
            FileNotFoundError, ValueError: as `setup`.
        """
        directory = self.directory or self._prepare()
        self._open(directory, stage)
        if stage == "fit" and not (directory / "tokenizer" / "vocab.json").is_file():
            raise FileNotFoundError(
                f"{directory} has no tokenizer, of which each run keeps a copy: put the one that encoded it there, "
                f"`cp -r TOKENIZER {directory}/tokenizer`"
            )

    def _prepare(self) -> Path:
        from lm.prepare import prepare

        return prepare(
            None if self.train_text else self.corpus,
            self.train_text,
            self.valid_text,
            data_dir=self.data_dir,
            vocab_size=self.vocab_size,
            special_tokens=self.special_tokens,
            tokenizer=self.tokenizer,
        )

    def setup(self, stage: str) -> None:
        """Open and check the token files. Every process comes here after `prepare_data`.

        Raises:
            FileNotFoundError: no dataset, or it lacks a split.
            ValueError: a damaged file, an id beyond the vocabulary, or fewer tokens than a window.
        """
        if self.directory is None:
            self.directory = self._prepare()  # made by now: this only finds out where it lies
        self.meta = read_meta(self.directory)
        self._splits |= self._open(self.directory, stage)

    def _open(self, directory: Path, stage: str) -> dict[str, TokenFile]:
        """The splits that a stage reads, none of them shorter than a window."""
        vocab_size = read_meta(directory)["vocab_size"]
        if vocab_size > self.vocab_size:
            raise ValueError(
                f"vocab_size={self.vocab_size} is smaller than the vocabulary of {directory} ({vocab_size})"
            )
        lengths = {"train": self.context_length, "valid": 1} if stage == "fit" else {"valid": 1}
        splits = {split: open_split(directory, split) for split in lengths}
        for split, tokens in splits.items():
            check_length(len(tokens), lengths[split], str(tokens.path))
        return splits

    @property
    def _shard(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> DataLoader:
        """Batches without end, from the one that follows the last that the Trainer has processed."""
        # `processed` is restored before this is called; a loader's own count would include what is prefetched.
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.total if self.trainer else None
        start = progress.processed if progress else 0  # type: ignore[attr-defined]
        tokens = self._splits["train"]
        order = WindowOrder(len(tokens), self.context_length, self.seed, self.windows)
        starts_only = self.tokens_on == "device"
        batches = TrainingBatches(tokens, order, self.batch_size, *self._shard, starts_only)
        return DataLoader(
            batches,
            sampler=CountFrom(start),
            batch_size=None,
            num_workers=self.num_workers,
            worker_init_fn=ignore_signals,
            pin_memory=self._on_cuda and self.tokens_on == "host",
        )

    def val_dataloader(self) -> DataLoader:
        """The whole validation set, this rank's share."""
        batches = ValidationBatches(self._splits["valid"], self.val_context_length, self.val_batch_size, *self._shard)
        return DataLoader(batches, batch_size=None, pin_memory=self._on_cuda)

    @property
    def _on_cuda(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn the starts of the windows into windows where the tokens lie on the device."""
        if not isinstance(batch, Tensor):
            return batch
        if self._device_tokens is None:
            self._device_tokens = DeviceTokens(self._splits["train"], batch.device)
        return self._device_tokens.get_batch(self.context_length, batch)

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree with for a run to go on as if it had not stopped. Plain values."""
        splits = self.meta["splits"]
        return {
            "tokenizer_sha256": self.meta["tokenizer_sha256"],
            "train_text_sha256": splits["train"]["text_sha256"] if "train" in splits else None,
            "train_tokens": splits["train"]["num_tokens"] if "train" in splits else None,
            "valid_text_sha256": splits["valid"]["text_sha256"] if "valid" in splits else None,
            "context_length": self.context_length,
            "global_batch_size": self.batch_size * self._shard[1],
            "accumulate_grad_batches": self.trainer.accumulate_grad_batches if self.trainer else 1,
            "windows": self.windows,
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """The fingerprint: Lightning stores it in each checkpoint."""
        return self.fingerprint()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare a checkpoint's data with ours: to validate, the tokenizer must agree; to go on training, all.

        A checkpoint that names less, as that of an imported model, has less that must agree. That a dataset's
        validation text is no longer the one that the run had is said, unless that is all there is in it.

        Raises:
            ValueError: something differs (and what), unless `changed_data` is "accept".
        """
        current = self.fingerprint()
        training = self.trainer is not None and self.trainer.training
        saved = state_dict
        compared = [k for k in current if k in saved] if training else ["tokenizer_sha256"]
        changed = [f"{k}: checkpoint {saved.get(k)}, now {current[k]}" for k in compared if saved.get(k) != current[k]]
        if training and saved.get("batch_schedule"):  # which an earlier version had
            changed.append(f"batch_schedule: checkpoint {saved['batch_schedule']}, now there is none")
        before = saved.get("valid_text_sha256", current["valid_text_sha256"])
        if not training and "train" in self.meta["splits"] and before != current["valid_text_sha256"]:
            print(f"note: the validation text of {self.directory} is not the one that this run had", file=sys.stderr)
        if not changed or self.changed_data == "accept":
            return
        advice = "--data.changed_data accept to go on"
        if saved.get("tokenizer_sha256") != current["tokenizer_sha256"]:
            advice = "its ids mean other tokens; validate --data.valid_text FILE encodes a text with the run's own"
        raise ValueError(f"the checkpoint was trained with other data or batches: {'; '.join(changed)} ({advice})")
