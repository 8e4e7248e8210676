"""Token files are refused when damaged; batches depend on seed and position alone; validation sees each target once."""

import json
import math
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lm.data import (
    CountFrom,
    DeviceTokens,
    TokenDataModule,
    TokenFile,
    TrainingBatches,
    ValidationBatches,
    WindowOrder,
    get_batch,
    open_split,
    read_meta,
)


def save(path: Path, ids: Any, dtype: str = "<u2") -> Path:
    np.save(path, np.asarray(ids).astype(dtype))
    return path


def make_dataset(folder: Path, train: Any, valid: Any, vocab_size: int = 300) -> Path:
    """A prepared dataset without its tokenizer."""
    splits = {}
    for name, ids in (("train", train), ("valid", valid)):
        ids = np.asarray(ids)
        save(folder / f"{name}.npy", ids)
        splits[name] = {
            "file": f"{name}.npy",
            "num_tokens": len(ids),
            "num_bytes": 3 * len(ids),
            "max_id": int(ids.max(initial=0)),
            "text_sha256": f"sha of {name}",
        }
    meta = {"format": 1, "vocab_size": vocab_size, "tokenizer_sha256": "abc", "unicode": {}, "splits": splits}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make_dataset(tmp_path, np.arange(1000) % 300, np.arange(101))


def chi_square_is_plausible(counts: np.ndarray) -> bool:
    """Whether counts look like equal chances: the statistic is within 5 standard deviations of its mean."""
    expected = counts.sum() / len(counts)
    degrees = len(counts) - 1
    return abs(((counts - expected) ** 2 / expected).sum() - degrees) < 5 * math.sqrt(2 * degrees)


# ------------------------------------------------------------------------------------------------------ get_batch


def test_targets_are_the_inputs_shifted_by_one_and_every_start_is_equally_likely() -> None:
    counts = np.zeros(93, int)  # 100 tokens, windows of 7: starts 0 to 92
    for _ in range(1000):
        inputs, targets = get_batch(np.arange(100), 32, 7, "cpu")
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs + 1, targets)
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(7))
        counts += np.bincount(inputs[:, 0], minlength=93)
    assert len(counts) == 93  # start 93 would have no target: never drawn
    assert chi_square_is_plausible(counts)


def test_get_batch_reads_a_memory_mapped_file_and_puts_the_batch_on_the_device(tmp_path: Path) -> None:
    ids = np.load(save(tmp_path / "x.npy", [9, 8, 7]), mmap_mode="r")
    inputs, targets = get_batch(ids, 2, 2, torch.device("meta"))
    assert inputs.device == targets.device == torch.device("meta")
    inputs, targets = get_batch(ids, 2, 2, "cpu")
    assert inputs.tolist() == [[9, 8]] * 2
    assert targets.tolist() == [[8, 7]] * 2


def test_get_batch_says_how_many_tokens_it_needs() -> None:
    with pytest.raises(ValueError, match="x has 5 tokens, context_length=5 needs at least 6"):
        get_batch(np.arange(5), 1, 5, "cpu")


# ---------------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("windows", ["replacement", "epoch"])
@given(first=st.integers(0, 10**12), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_the_starts_are_one_sequence_however_it_is_cut(windows: Any, first: int, sizes: list[int], seed: int) -> None:
    order = WindowOrder(500, 16, seed, windows)
    parts = [order.starts(first + sum(sizes[:i]), size) for i, size in enumerate(sizes)]
    assert np.concatenate(parts).tolist() == order.starts(first, sum(sizes)).tolist()


@pytest.mark.parametrize("windows", ["replacement", "epoch"])
def test_another_seed_gives_another_sequence_and_the_same_one_the_same(windows: Any) -> None:
    sequences = {
        tuple(WindowOrder(10**6, 16, seed, windows).starts(0, 50).tolist())
        for seed in (0, 1, 2, 2**64 - 1)
        for _ in "ab"
    }
    assert len(sequences) == 4


def test_the_sequence_is_the_same_in_every_version_of_this_program() -> None:
    """Else a run that resumes after an update would see other data, and no result could be repeated."""
    assert WindowOrder(10**9, 256, 7).starts(10**6, 4).tolist() == GOLDEN["replacement"]
    assert WindowOrder(10**5, 256, 7, "epoch").starts(10**6, 4).tolist() == GOLDEN["epoch"]


GOLDEN = {"replacement": [187268114, 974621192, 908717099, 970857009], "epoch": [9243, 88603, 31515, 64283]}


def test_random_windows_are_uniform_over_all_starts_and_reach_the_last_one() -> None:
    starts = WindowOrder(num_tokens=110, context_length=10, seed=3).starts(0, 100_000)
    counts = np.bincount(starts)
    assert len(counts) == 100
    assert chi_square_is_plausible(counts)
    pairs = np.bincount(starts[:-1] // 10 * 10 + starts[1:] // 10)  # neighbours in the sequence are independent
    assert chi_square_is_plausible(pairs)


@pytest.mark.slow
@given(
    num_tokens=st.integers(2, 40), context_length=st.integers(1, 39), windows=st.sampled_from(["replacement", "epoch"])
)
@settings(max_examples=200, deadline=None)
def test_every_window_and_its_last_target_lie_inside_the_text(
    num_tokens: int, context_length: int, windows: Any
) -> None:
    if context_length >= num_tokens:
        return
    starts = WindowOrder(num_tokens, context_length, 1, windows).starts(0, 400)
    last = num_tokens - context_length - 1
    assert starts.min() == 0
    assert starts.max() == last if windows == "replacement" else starts.max() <= last


@given(
    num_tokens=st.integers(10, 300), context_length=st.integers(1, 9), epoch=st.integers(0, 5), seed=st.integers(0, 9)
)
@settings(max_examples=100, deadline=None)
def test_an_epoch_has_each_target_once_but_for_less_than_a_window(
    num_tokens: int, context_length: int, epoch: int, seed: int
) -> None:
    per_epoch = (num_tokens - 1) // context_length
    starts = WindowOrder(num_tokens, context_length, seed, "epoch").starts(epoch * per_epoch, per_epoch)
    targets = (starts[:, None] + 1 + np.arange(context_length)).ravel()
    assert len(set(targets.tolist())) == len(targets) == num_tokens - 1 - (num_tokens - 1) % context_length
    assert targets.min() >= 1
    assert targets.max() <= num_tokens - 1


def test_epochs_differ_in_order_and_in_where_the_windows_are_cut() -> None:
    order = WindowOrder(10 * 50 + 8, 10, 0, "epoch")
    epochs = [order.starts(50 * e, 50).tolist() for e in range(100)]
    assert len({tuple(e) for e in epochs}) == 100
    assert {min(e) for e in epochs} == set(range(8))
    first = np.bincount([e[0] // 10 for e in epochs * 1], minlength=50)
    assert first.max() < 12  # no window is always first


# -------------------------------------------------------------------------------------------- batches over ranks


@pytest.mark.parametrize("windows", ["replacement", "epoch"])
def test_an_update_sees_the_same_windows_with_any_number_of_ranks_and_accumulation(
    tmp_path: Path, windows: Any
) -> None:
    tokens = TokenFile(save(tmp_path / "t.npy", np.arange(5000)))
    order = WindowOrder(len(tokens), 16, 5, windows)

    def update(step: int, world_size: int, accumulate: int) -> list[list[int]]:
        batch_size = 8 // world_size // accumulate
        ranks = [
            TrainingBatches(tokens, order, batch_size, r, world_size, starts_only=False) for r in range(world_size)
        ]
        micro_batches = range(step * accumulate, (step + 1) * accumulate)
        return sorted(row for t in micro_batches for rank in ranks for row in rank[t][0].tolist())

    for step in (0, 1, 77):
        alone = update(step, 1, 1)
        for world_size, accumulate in ((2, 1), (4, 1), (1, 2), (2, 2), (1, 8)):
            assert update(step, world_size, accumulate) == alone


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_workers_that_read_ahead_change_nothing(tmp_path: Path) -> None:
    tokens = TokenFile(save(tmp_path / "t.npy", np.arange(5000)))
    batches = TrainingBatches(tokens, WindowOrder(5000, 16), 4, 0, 1, starts_only=False)
    sequences = []
    for num_workers in (0, 1, 4):
        loader = iter(DataLoader(batches, sampler=CountFrom(3), batch_size=None, num_workers=num_workers))
        sequences.append([next(loader)[0].tolist() for _ in range(10)])
        del loader
    assert sequences[0] == sequences[1] == sequences[2]
    assert sequences[0] == [batches[t][0].tolist() for t in range(3, 13)]


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_tokens_on_the_device_give_the_same_batches(tmp_path: Path, dtype: str) -> None:
    ids = np.random.default_rng(0).integers(0, 2 ** (16 if dtype == "<u2" else 31), 3000)
    tokens = TokenFile(save(tmp_path / "t.npy", ids, dtype))
    order = WindowOrder(len(tokens), 16)
    host, starts = (TrainingBatches(tokens, order, 4, 0, 1, starts_only=only) for only in (False, True))
    resident = DeviceTokens(tokens, torch.device("cpu"), block=1024)
    for t in range(20):
        for expected, actual in zip(host[t], resident.get_batch(16, starts[t]), strict=True):
            assert torch.equal(expected, actual)


# ---------------------------------------------------------------------------------------------------- validation


@given(
    num_tokens=st.integers(2, 200),
    context_length=st.integers(1, 20),
    batch_size=st.integers(1, 7),
    world_size=st.integers(1, 5),
)
@settings(max_examples=150, deadline=None)
def test_validation_has_each_target_once_with_any_batch_size_and_number_of_ranks(
    num_tokens: int, context_length: int, batch_size: int, world_size: int
) -> None:
    tokens = np.arange(num_tokens)
    seen: list[int] = []
    shapes, lengths = set(), set()
    for rank in range(world_size):
        batches = ValidationBatches(tokens, context_length, batch_size, rank, world_size)
        lengths.add(len(batches))
        for inputs, targets, num_targets in batches:
            shapes.add((inputs.shape, targets.shape))
            counted = targets.flatten()[:num_targets]
            assert torch.equal(inputs.flatten()[:num_targets] + 1, counted)  # each is predicted from its predecessor
            seen += counted.tolist()
    assert sorted(seen) == list(range(1, num_tokens))
    assert len(shapes) == 1  # one compiled graph
    assert len(lengths) == 1  # no rank waits for another in a collective operation


# ---------------------------------------------------------------------------------------------------- token files


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rewrite(lambda data: b""), r"is empty \(0 bytes\)"),
        (rewrite(lambda data: data[:1]), r"\(1 bytes\) is no whole .npy file"),
        (rewrite(lambda data: data[:100]), r"\(100 bytes\) is no whole .npy file"),
        (rewrite(lambda data: data[:128]), "has 128 bytes where its header promises 2128"),
        (rewrite(lambda data: data[:-1]), "has 2127 bytes where its header promises 2128"),
        (rewrite(lambda data: data[:-2]), r"has 2126 bytes where its header promises 2128 \(1000 tokens\)"),
        (rewrite(lambda data: data + b"\0\0"), "has 2130 bytes where its header promises 2128"),
        (rewrite(lambda data: b"Once upon a time there was a text file"), "is no whole .npy file"),
        (lambda path: save(path, range(1000), ">u2"), "holds >u2"),
        (lambda path: save(path, range(1000), "<i8"), "save ids.astype"),
        (lambda path: save(path, range(1000), "<f4"), "holds <f4"),
        (lambda path: save(path, np.zeros((10, 100)), "<u2"), r"of shape \(10, 100\)"),
        (lambda path: np.save(path, np.array([os.system] * 3, object), allow_pickle=True), r"holds \|O"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    path = save(tmp_path / "train.npy", range(1000))
    damage(path)
    with pytest.raises(ValueError, match=message) as raised:
        TokenFile(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="python -m lm prepare"):
        TokenFile(tmp_path / "train.npy")


@pytest.mark.parametrize("index", [0, 5_000_000, 9_999_999])
@pytest.mark.parametrize("max_id", [None, 70])
def test_the_first_id_beyond_the_vocabulary_is_named(tmp_path: Path, index: int, max_id: int | None) -> None:
    ids = np.full(10_000_000, 59, np.uint16)
    ids[index:] = 70
    with pytest.raises(ValueError, match=f"token {index} is 70, beyond vocab_size=60"):
        TokenFile(save(tmp_path / "train.npy", ids), vocab_size=60, max_id=max_id)


def test_the_largest_id_of_the_vocabulary_is_no_error(tmp_path: Path) -> None:
    assert len(TokenFile(save(tmp_path / "train.npy", [0, 59]), vocab_size=60)) == 2
    assert len(TokenFile(save(tmp_path / "empty.npy", []), vocab_size=60)) == 0


def test_slices_are_those_of_the_array(tmp_path: Path) -> None:
    ids = np.arange(50)
    tokens = TokenFile(save(tmp_path / "t.npy", ids, "<u4"))
    for part in (slice(None), slice(3, 9), slice(-4, None), slice(45, 99), slice(9, 3), slice(50, 60)):
        assert tokens[part].tolist() == ids[part].tolist()
    with pytest.raises(ValueError, match="step 2"):
        tokens[::2]
    assert pickle.loads(pickle.dumps(tokens))[7:9].tolist() == [7, 8]


def test_a_file_that_shrinks_while_open_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = save(tmp_path / "t.npy", range(100_000))
    tokens = TokenFile(path)
    os.truncate(path, 100_000)
    assert tokens[:10].tolist() == list(range(10))
    with pytest.raises(OSError, match="shrank while it was open: tokens 90000 to 90010"):
        tokens[90_000:90_010]


def test_reading_a_large_file_takes_no_memory(tmp_path: Path) -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc here")
    tokens = TokenFile(save(tmp_path / "t.npy", np.zeros(50_000_000, np.uint16)))
    before = resident_bytes()
    for start in range(0, len(tokens), 100_000):
        tokens[start : start + 100_000]
    assert resident_bytes() - before < 20e6  # the file has 100e6


# -------------------------------------------------------------------------------------------------- datasets


def edit_meta(folder: Path, **changes: Any) -> None:
    path = folder / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_dataset_without_its_record_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="python -m lm prepare"):
        read_meta(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', "\0" * 100])
def test_a_damaged_record_is_refused(dataset: Path, text: str) -> None:
    (dataset / "meta.json").write_text(text)
    with pytest.raises(ValueError, match=r"meta\.json is damaged \(.*python -m lm prepare"):
        read_meta(dataset)


def test_a_record_of_another_format_is_refused(dataset: Path) -> None:
    edit_meta(dataset, format=2)
    with pytest.raises(ValueError, match="has format 2"):
        read_meta(dataset)


def test_a_record_must_agree_with_its_files(dataset: Path) -> None:
    save(dataset / "train.npy", range(10))
    with pytest.raises(ValueError, match=r"has 10 tokens, meta\.json says 1000"):
        open_split(dataset, "train")
    edit_meta(dataset, vocab_size=50)
    with pytest.raises(ValueError, match="token 50 is 50, beyond vocab_size=50"):
        open_split(dataset, "valid")
    with pytest.raises(FileNotFoundError, match=r"no split 'test', only \['train', 'valid'\]"):
        open_split(dataset, "test")


def test_a_dataset_made_with_another_tokenizer_is_refused_and_other_unicode_tables_are_said(dataset: Path) -> None:
    (dataset / "tokenizer").mkdir()
    beside = dataset / "tokenizer" / "meta.json"
    beside.write_text(json.dumps({"sha256": "abc", "unicode": {}}))
    assert read_meta(dataset)["vocab_size"] == 300
    beside.write_text(json.dumps({"sha256": "abc", "unicode": {"classes": "f"}}))
    with pytest.warns(UserWarning, match="different Unicode tables"):
        read_meta(dataset)
    beside.write_text(json.dumps({"sha256": "def", "unicode": {}}))
    with pytest.raises(ValueError, match=r"made with the tokenizer abc, .* is def"):
        read_meta(dataset)


# ---------------------------------------------------------------------------------------------- the data module


def test_the_module_gives_training_and_whole_validation_batches(dataset: Path) -> None:
    data = TokenDataModule(directory=str(dataset), context_length=16, batch_size=4, val_context_length=25)
    data.prepare_data()
    data.setup("fit")
    assert data.vocab_size == 300
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.shape == targets.shape == (4, 16)
    validation = list(data.val_dataloader())
    assert [tuple(inputs.shape) for inputs, _, _ in validation] == [(4, 25)]
    assert sum(num_targets for _, _, num_targets in validation) == 100


def test_a_resumed_run_begins_after_the_last_batch_that_was_processed(dataset: Path) -> None:
    data = TokenDataModule(directory=str(dataset), context_length=16, batch_size=4)
    data.setup("fit")
    loader = iter(data.train_dataloader())
    fifth = [next(loader) for _ in range(6)][5]
    progress = SimpleNamespace(total=SimpleNamespace(processed=5))
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        accumulate_grad_batches=1,
        global_rank=0,
        world_size=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    assert torch.equal(next(iter(data.train_dataloader()))[0], fifth[0])


@pytest.mark.parametrize("length", [16, 17])
def test_the_shortest_text_has_one_window(tmp_path: Path, length: int) -> None:
    make_dataset(tmp_path, np.arange(length), [1, 2])
    data = TokenDataModule(directory=str(tmp_path), context_length=16, batch_size=2)
    if length == 16:
        with pytest.raises(ValueError, match=r"train.npy has 16 tokens, context_length=16 needs at least 17"):
            data.setup("fit")
        return
    data.setup("fit")
    inputs, _ = next(iter(data.train_dataloader()))
    assert inputs.tolist() == [list(range(16))] * 2


def test_validation_needs_no_training_file_and_two_tokens(tmp_path: Path) -> None:
    make_dataset(tmp_path, [1], [1])
    (tmp_path / "train.npy").unlink()
    data = TokenDataModule(directory=str(tmp_path))
    with pytest.raises(ValueError, match=r"valid.npy has 1 tokens, context_length=1 needs at least 2"):
        data.setup("validate")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"context_length": -1}, "context_length=-1 must be at least 1"),
        ({"val_context_length": -5}, "val_context_length=-5 must be at least 1"),
        ({"val_context_length": 0}, "val_context_length=0 must be at least 1"),
        ({"val_batch_size": 0}, "val_batch_size=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be in"),
        ({"num_workers": -1}, "num_workers=-1 must be"),
        ({"valid_text": "v.txt"}, "valid_text=v.txt needs a train_text"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_prepared(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenDataModule(**arguments)


def test_the_order_follows_the_seed_of_the_run_unless_it_has_its_own(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert TokenDataModule(directory=str(dataset)).seed == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")  # as lightning.seed_everything(7) does
    assert TokenDataModule(directory=str(dataset)).seed == 7
    assert TokenDataModule(directory=str(dataset), seed=0).seed == 0


def test_the_vocabulary_of_a_prepared_dataset_is_what_it_is(dataset: Path) -> None:
    assert TokenDataModule(directory=str(dataset), vocab_size=300).vocab_size == 300
    with pytest.raises(ValueError, match=r"vocab_size=500, but .* was made with 300"):
        TokenDataModule(directory=str(dataset), vocab_size=500)
    with pytest.raises(FileNotFoundError, match="python -m lm prepare"):
        TokenDataModule(directory=str(dataset / "nothing"))


def test_a_corpus_is_prepared_on_one_process_and_found_by_all(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def prepare(*args: Any, **kwargs: Any) -> Path:
        calls.append((args, kwargs))
        return dataset

    names = {"prepare": prepare, "default_vocab_size": lambda *args: 300, "load_tokenizer": None}
    monkeypatch.setitem(sys.modules, "lm.prepare", SimpleNamespace(**names))
    data = TokenDataModule(train_text="my.txt", data_dir="somewhere")
    assert data.vocab_size == 300
    assert not calls
    data.prepare_data()
    assert calls == [
        ((None, "my.txt", None), {"data_dir": "somewhere", "vocab_size": 300, "special_tokens": [], "tokenizer": None})
    ]
    data.setup("validate")
    assert data.directory == dataset
    small = TokenDataModule(vocab_size=299)
    with pytest.raises(ValueError, match="vocab_size=299 is smaller than the vocabulary of"):
        small.setup("fit")


def test_workers_leave_signals_to_the_run(dataset: Path) -> None:
    """SLURM, systemd and timeout signal every process of a job: a worker that dies of it is an error in the run."""
    data = TokenDataModule(directory=str(dataset), context_length=16, num_workers=1)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches)
    [worker] = multiprocessing.active_children()
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(worker.pid, signum)
    for _ in range(20):
        next(batches)
    assert worker.is_alive()


@pytest.mark.parametrize(
    "change",
    ["none", "batch_size", "seed", "context_length", "windows", "accumulate_grad_batches", "text", "tokenizer"],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_checkpoint_of_other_data_is_refused_with_the_difference(dataset: Path, change: str, training: bool) -> None:
    settings: dict[str, Any] = {"directory": str(dataset), "context_length": 16, "batch_size": 4, "seed": 0}
    before = TokenDataModule(**settings)
    before.setup("fit")
    saved = json.loads(json.dumps(before.state_dict()))  # plain values only
    changes: dict[str, Any] = {"batch_size": 8, "seed": 1, "context_length": 32, "windows": "epoch"}
    if change in changes:
        settings[change] = changes[change]
    elif change == "text":
        make_dataset(dataset, np.arange(999) % 300, np.arange(101))
    elif change == "tokenizer":
        edit_meta(dataset, tokenizer_sha256="def")
    after = TokenDataModule(**settings)
    after.setup("fit")
    batches = 2 if change == "accumulate_grad_batches" else 1
    after.trainer = SimpleNamespace(  # type: ignore[assignment]
        training=training, global_rank=0, world_size=1, accumulate_grad_batches=batches
    )
    if change == "none" or (not training and change != "tokenizer"):
        after.load_state_dict(saved)
        return
    with pytest.raises(ValueError, match=r"other data or batches: .*checkpoint .*, now ") as raised:
        after.load_state_dict(saved)
    assert {"text": "train_tokens", "tokenizer": "abc, now def"}.get(change, change) in str(raised.value)
    after.changed_data = "accept"
    after.load_state_dict(saved)


def test_another_validation_text_is_said_in_validating_and_refused_in_training(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = TokenDataModule(directory=str(dataset), context_length=16)
    data.setup("fit")
    saved = data.state_dict()
    data.meta["splits"]["valid"]["text_sha256"] = "sha of another"
    data.load_state_dict(saved)
    assert capsys.readouterr().err == f"note: the validation text of {dataset} is not the one that this run had\n"
    data.load_state_dict({"tokenizer_sha256": saved["tokenizer_sha256"]})
    del data.meta["splits"]["train"]  # made of a text to validate on, whatever that is
    data.load_state_dict(saved)
    assert capsys.readouterr().err == ""
    data.setup("fit")
    data.meta["splits"]["valid"]["text_sha256"] = "sha of another"
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        training=True, global_rank=0, world_size=1, accumulate_grad_batches=1
    )
    with pytest.raises(ValueError, match="valid_text_sha256: checkpoint sha of valid, now sha of another"):
        data.load_state_dict(saved)


def test_a_checkpoint_whose_batch_grew_is_refused_and_one_that_knows_its_tokenizer_alone_is_not(dataset: Path) -> None:
    data = TokenDataModule(directory=str(dataset), context_length=16)
    data.setup("fit")
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        training=True, global_rank=0, world_size=1, accumulate_grad_batches=1
    )
    data.load_state_dict(data.state_dict() | {"batch_schedule": {}})
    with pytest.raises(ValueError, match=r"batch_schedule: checkpoint \{9: 64\}, now there is none"):
        data.load_state_dict(data.state_dict() | {"batch_schedule": {9: 64}})
    data.load_state_dict({"tokenizer_sha256": data.meta["tokenizer_sha256"]})  # of an imported model
    with pytest.raises(
        ValueError, match=r"other data or batches: tokenizer_sha256: checkpoint another.* mean other tokens"
    ):
        data.load_state_dict({"tokenizer_sha256": "another"})


def test_ranks_share_the_validation_and_count_in_the_batch(dataset: Path) -> None:
    data = TokenDataModule(directory=str(dataset), context_length=16, batch_size=4)
    data.setup("fit")
    targets, sizes = [], []
    for rank in range(2):
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            global_rank=rank,
            world_size=2,
            accumulate_grad_batches=1,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
        )
        targets.append(sum(int(num) for *_, num in data.val_dataloader()))
        sizes.append(data.fingerprint()["global_batch_size"])
    assert sum(targets) == data.meta["splits"]["valid"]["num_tokens"] - 1
    assert sizes == [8, 8]
